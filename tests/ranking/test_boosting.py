"""Trees are LightGBM's, grow by epochs, learn what decides the lists, and their bundle needs no LightGBM."""

import copy
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jaxtyping
import numpy as np
import pytest
import torch
from closeness import close
from pipeline_fixtures import Run, recsys
from test_scorers import shown
from torch import Tensor, nn

from recsys2stage.artifacts import read_manifest
from recsys2stage.cli.export import export_bundle
from recsys2stage.evaluation.card_model import class_of
from recsys2stage.ranking.average import Average, average_weights, build_average, score_lists
from recsys2stage.ranking.bundle import RERANKER
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import GBDT, MLP, Blend, ListTable
from recsys2stage.ranking.scorers.base import fit_scale
from recsys2stage.ranking.scorers.gbdt import round_down
from recsys2stage.recommender import Recommender
from recsys2stage.serving.engine import Engine
from recsys2stage.serving.onnx_files import write_graphs

LISTS, CANDIDATES, F = 60, 20, 4
SMALL: dict[str, Any] = {"trees": 12, "trees_per_epoch": 4, "leaves": 5, "min_leaf": 5, "learning_rate": 0.3}


def lists(seed: int = 0) -> tuple[ListTable, Tensor]:
    """Lists of 8 features, of which the product of the first two decides: no linear model orders them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(LISTS, CANDIDATES, F)).astype(np.float32)
    best = (features[..., 0] * features[..., 1]).argmax(axis=1)
    label = (np.arange(CANDIDATES) == best[:, None]).astype(np.int8)
    base = rng.normal(size=(LISTS, CANDIDATES)).astype(np.float32)
    sizes = np.full(LISTS, CANDIDATES)
    return ListTable(features.reshape(-1, F), base.ravel(), label.ravel(), sizes), torch.from_numpy(best)


def grown(epochs: int = 3, seed: int = 0, **options: Any) -> GBDT:
    scorer = GBDT(8, F, **(SMALL | options))
    scorer.prepare(lists()[0], seed)
    scorer.grow(epochs)
    return scorer


def inputs(table: ListTable) -> Any:
    shape = (LISTS, CANDIDATES)
    seen = shown(LISTS, CANDIDATES, 0, 8, F)
    return seen._replace(
        features=torch.from_numpy(table.features).view(*shape, F), base=torch.from_numpy(table.base).view(shape)
    )


def test_the_sum_of_the_trees_is_lightgbms() -> None:
    table, _ = lists()
    scorer = grown(leaves=7)
    expected = scorer._booster.predict(table.features, raw_score=True).reshape(LISTS, CANDIDATES)
    assert scorer.count == 12
    close(scorer.sum_trees(inputs(table).features), torch.from_numpy(expected).float())
    edges = scorer.threshold[: scorer.count].unique()  # values on a threshold go left, as in double precision
    rows = np.repeat(edges.numpy()[:, None], F, axis=1)
    wanted = scorer._booster.predict(rows, raw_score=True)
    close(scorer.sum_trees(torch.from_numpy(rows)[None])[0], torch.from_numpy(wanted).float())


def test_what_no_linear_model_orders_is_learned() -> None:
    table, best = lists()
    seen, scorer = inputs(table), grown()
    base = seen.base
    logits = base + scorer(seen)
    assert not GBDT(8, F)(seen).any(), "before it has grown, the retriever's order stands"
    assert (logits.argmax(1) == best).float().mean() > (base.argmax(1) == best).float().mean() + 0.4


def test_a_seed_grows_the_same_trees_whether_at_once_or_by_epochs() -> None:
    whole, steps = grown(3, feature_share=0.5), GBDT(8, F, **(SMALL | {"feature_share": 0.5}))
    steps.prepare(lists()[0], 0)
    assert [steps.grow(epoch) for epoch in (1, 2, 2, 3, 4)] == [True, True, False, True, False]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, steps.state_dict()[name]), name
    other = grown(3, seed=1, feature_share=0.5)
    assert not torch.equal(other.threshold, whole.threshold)


def test_a_copy_and_loaded_weights_score_alike() -> None:
    seen, scorer = inputs(lists()[0]), grown()
    loaded = GBDT(8, F, **SMALL)
    loaded.load_state_dict(scorer.state_dict())
    assert torch.equal(loaded(seen), scorer(seen))
    assert torch.equal(copy.deepcopy(scorer)(seen), scorer(seen))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grown", torch.tensor(13), "the trees are 13, expected 0 to 12"),
        ("grown", torch.tensor(-1), "the trees are -1, expected 0 to 12"),
        ("feature", torch.full((12, 4), F), "read the features 4 to 4, expected 0 to 3; fit again"),
        ("feature", torch.full((12, 4), -1), "read the features -1 to -1"),
    ],
    ids=["too many", "negative", "unknown feature", "negative feature"],
)
def test_trees_of_a_stranger_are_checked(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GBDT(8, F, **SMALL).load_state_dict(grown().state_dict() | {name: value})


def test_a_threshold_is_rounded_so_that_no_decision_changes() -> None:
    rng = np.random.default_rng(3)
    for value in rng.normal(size=200):
        near = np.float32(value)
        for x in (near, np.nextafter(near, np.float32(9)), np.nextafter(near, np.float32(-9))):
            assert (float(x) <= value) == bool(x <= round_down(value))


def test_the_scale_is_fitted_and_leaves_the_order() -> None:
    table, best = lists()
    seen, scorer = inputs(table), grown()
    real, before = torch.ones(LISTS, CANDIDATES, dtype=torch.bool), seen.base + scorer(seen)
    scorer.calibrate((3 * before)[..., None], best, real)  # as if the logits were three times too large
    first = scorer.weights.item()
    scorer.calibrate(before[..., None], best, real)
    assert first == pytest.approx(scorer.weights.item() / 3, rel=0.01)
    after = seen.base + scorer(seen)
    close(after, before * scorer.weights)
    assert nn.functional.cross_entropy(after, best) <= nn.functional.cross_entropy(before, best)


@pytest.mark.parametrize("choice", ["equal", "validation"])
def test_a_blend_is_the_mean_of_calibrated_logits(choice: Any) -> None:
    table, best = lists()
    seen, real = inputs(table), torch.ones(LISTS, CANDIDATES, dtype=torch.bool)
    blend = Blend(8, F, [partial(GBDT, **SMALL), partial(MLP, hidden=(8,))], choice)
    assert not blend(seen).any()
    blend.members[0].load_state_dict(grown().state_dict())
    nn.init.normal_(blend.members[1].get_submodule("wide").weight)  # type: ignore[arg-type]
    parts = torch.stack([seen.base + part for part in blend.parts(seen)], dim=-1).detach()
    blend.calibrate(parts, best, real)
    logits = seen.base + blend(seen)
    close(logits, parts @ blend.weights)
    calibrated = torch.tensor([fit_scale(part, best, real) for part in parts.unbind(-1)])
    if choice == "equal":
        close(blend.weights / blend.weights.sum(), calibrated / calibrated.sum())
    else:  # the second member is noise
        assert blend.weights[1] * parts[..., 1].std() < 0.3 * blend.weights[0] * parts[..., 0].std()
        alone = [nn.functional.cross_entropy(scale * parts[..., 0], best) for scale in (0.5, 1.0, 2.0)]
        assert nn.functional.cross_entropy(logits, best) <= min(alone)


def test_gradients_train_only_what_they_reach() -> None:
    seen = inputs(lists()[0])
    blend = Blend(8, F, [partial(GBDT, **SMALL), partial(MLP, hidden=(8,)), MLP])
    assert len(blend.corrections(seen)) == 2
    assert GBDT(8, F).corrections(seen) == []


def test_a_missing_lightgbm_says_how_to_install_it() -> None:
    with (
        mock.patch("recsys2stage.ranking.scorers.gbdt.find_spec", return_value=None),
        pytest.raises(
            ValueError, match=r"lightgbm, which is not installed; install it: pip install 'recsys2stage\[gbdt\]'"
        ),
    ):
        GBDT(8, F).prepare(lists()[0], 0)


def test_a_list_longer_than_lightgbm_takes_is_refused() -> None:
    empty = ListTable(np.zeros((0, F), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int8), np.array([10_001]))
    with pytest.raises(
        ValueError, match=r"10,001 candidates, expected at most 10,000 for trees; mine with a smaller --k"
    ):
        GBDT(8, F).prepare(empty, 0)


# --- through the commands


TREES = {"class_path": "GBDT", "init_args": {"trees_per_epoch": 5, "min_leaf": 10, "leaves": 6}}
BLEND = {"class_path": "Blend", "init_args": {"members": [TREES, {"class_path": "MLP", "init_args": {"hidden": [8]}}]}}


def own(trained: Run, folder: Path, scorer: str, *words: object) -> Run:
    """The run with another ranker, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    config = folder / "ranker.yaml"
    config.write_text((trained.folder / "ranker.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    given = ("--data.init_args.path", trained.candidates, "--model.init_args.scorer", scorer)
    recsys("fit", "--config", config, "--output", folder / "ranker", *given, *words)
    return Run(folder)


@pytest.fixture(scope="module")
def averaged(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A bundle of the blend of trees and a network, averaged with the network of the session's run."""
    run = own(trained, tmp_path_factory.mktemp("averaged"), json.dumps(BLEND))
    of = ("--index", trained.index, "--ranker", run.ranker, "--average", json.dumps([str(trained.ranker)]))
    recsys("export-bundle", *of, "--output", run.bundle)
    return run


def test_a_bundle_of_an_average_needs_no_lightgbm(averaged: Run, trained: Run) -> None:
    with mock.patch.dict(sys.modules, {"lightgbm": None}):
        both = Recommender.load(averaged.bundle)
        history = both.catalogue.items["item_id"].to_list()[:5]
        assert len(both.recommend(history, k=5)) == 5
    assert isinstance(both.reranker, Average)
    first, second = both.reranker.members
    trees, network = first.scorer.members  # type: ignore[misc]
    assert trees.count > 0
    assert network.get_submodule("wide").weight.abs().max() > 0, "both members of the blend are trained"
    assert second.vectors is first.vectors, "the item vectors are in memory once"
    alone = Recommender.load(trained.bundle).reranker
    assert isinstance(alone, Reranker)
    close(second.log_scale, alone.log_scale)
    # the file holds the table once too
    assert (averaged.bundle / RERANKER).stat().st_size < 2 * (trained.bundle / RERANKER).stat().st_size + 400_000


def test_the_rankers_of_an_average_are_calibrated(averaged: Run, trained: Run) -> None:
    both = Recommender.load(averaged.bundle).reranker
    assert isinstance(both, Average)
    data = Candidates(trained.candidates)
    data.setup("validate")
    scored = [score_lists(member, data.val_dataloader()) for member in both.members]
    close(both.weights, average_weights(scored))
    larger = [[(3 * logits, positive, real) for logits, positive, real in part] for part in scored]
    close(average_weights(larger), both.weights / 3)  # the scale of a loss does not matter
    batch = next(iter(data.val_dataloader())).candidates
    with torch.no_grad():
        close(both(batch), torch.stack([member(batch) for member in both.members], dim=-1) @ both.weights)


def test_an_average_is_explained_and_described(averaged: Run) -> None:
    engine = Engine.load(averaged.bundle)
    engine.warm()  # a request with reasons, among others
    assert "Averaged with: scorer `MLP`" in (averaged.bundle / "README.md").read_text(encoding="utf-8")
    described = read_manifest(averaged.bundle, "bundle", "")
    assert [class_of(one["scorer"])[0] for one in described["average"]] == ["MLP"]


@pytest.mark.slow
def test_an_average_with_trees_is_exported_to_onnx(
    averaged: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # sizes are symbols during the export
    made = write_graphs(Recommender.load(averaged.bundle), tmp_path)  # compares each file with torch
    assert made["ranker"]["file"] == "ranker.onnx"


def test_a_changed_average_is_refused(averaged: Run) -> None:
    manifest = read_manifest(averaged.bundle, "bundle", "")
    weights = torch.load(averaged.bundle / RERANKER, weights_only=True)
    options = [manifest["reranker"], *manifest["average"]]
    for other, changed, message in (
        (options, weights | {"weights": torch.tensor([1.0, -1.0])}, "numbers above 0"),
        (options, weights | {"members.2.center": torch.tensor(0.0)}, "which no ranker of the average has"),
        ([options[0], options[1] | {"feature_dim": 3}], weights, "differ in feature_dim"),
        (options * 9, weights, "an average of 18 rankers, expected 2 to 16"),
        ([options[0], options[1] | {"scorer": {"class_path": "os.system"}}], weights, "not part of recsys2stage"),
    ):
        with pytest.raises(ValueError, match=message):
            build_average(other, changed, "manifest.json")


def test_rankers_of_other_lists_are_not_averaged(averaged: Run, trained: Run, tmp_path: Path) -> None:
    other = shutil.copytree(averaged.ranker.parent, tmp_path / "ranker")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["parents"]["candidates"]["hash"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    output = tmp_path / "bundle"
    with pytest.raises(ValueError, match=r"was trained on other candidates than .*; fit both on the same candidates"):
        export_bundle(trained.index, trained.ranker, output, average=[other / "best.ckpt"])
    assert not output.exists()


def test_refits_are_neither_averaged_nor_validated(averaged: Run, trained: Run, tmp_path: Path) -> None:
    """Their validation lists were trained on."""
    refit = shutil.copytree(averaged.ranker.parent, tmp_path / "refit") / "best.ckpt"
    manifest = json.loads((refit.parent / "manifest.json").read_text())
    manifest["parents"]["selected"] = {"path": str(averaged.ranker.parent), "hash": "0" * 64}
    (refit.parent / "manifest.json").write_text(json.dumps(manifest))
    message = r"refit/best\.ckpt is a refit of .*, expected a ranker that was not trained on the validation lists; "
    for first, other in ((trained.ranker, refit), (refit, trained.ranker)):
        with pytest.raises(ValueError, match=message + "average the rankers that they were refitted from"):
            export_bundle(trained.index, first, tmp_path / "bundle", average=[other])
    assert not (tmp_path / "bundle").exists()
    of = ("--output", refit.parent, "--data.init_args.path", trained.candidates)
    with pytest.raises(SystemExit) as end:
        recsys(
            "validate", "--config", averaged.folder / "ranker.yaml", *of, "--model.init_args.scorer", json.dumps(BLEND)
        )
    assert "is a refit of" in str(end.value.code)
    assert "validate the run that it was refitted from" in str(end.value.code)


def test_trees_resume_and_refit(trained: Run, tmp_path: Path) -> None:
    """Broken off after an epoch and resumed, a fit equals one in a piece; a refit grows the best epoch's number."""
    flat = ("--early_stopping.patience", 9, "--trainer.max_epochs")
    whole = own(trained, tmp_path / "whole", json.dumps(TREES), *flat, 2)
    parts = own(trained, tmp_path / "parts", json.dumps(TREES), *flat, 1)
    parts = own(
        trained, tmp_path / "parts", json.dumps(TREES), *flat, 2, "--ckpt_path", parts.folder / "ranker/last.ckpt"
    )
    saved = [torch.load(run.folder / "ranker/last.ckpt", weights_only=True)["state_dict"] for run in (whole, parts)]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        assert torch.equal(value, saved[1][name]), name
    assert saved[0]["reranker.scorer.grown"] == 10
    assert saved[0]["reranker.scorer.weights"] != 1, "calibrated"
    best = torch.load(whole.ranker, weights_only=True)
    if best["global_step"]:
        again = own(trained, tmp_path / "again", json.dumps(TREES), "--data.init_args.refit", whole.ranker.parent)
        refitted = torch.load(again.ranker, weights_only=True)["state_dict"]
        assert refitted["reranker.scorer.grown"] == best["state_dict"]["reranker.scorer.grown"]
        assert refitted["reranker.scorer.weights"] == best["state_dict"]["reranker.scorer.weights"]
        assert not torch.equal(refitted["reranker.scorer.value"], best["state_dict"]["reranker.scorer.value"])
