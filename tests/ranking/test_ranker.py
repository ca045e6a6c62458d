"""The ranker reads mined lists, starts at the retriever's level, and learns a world in which genre and user decide."""

import copy
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from lightning import Trainer
from worlds import seal

from recsys2stage import columns as c
from recsys2stage.artifacts import write_manifest
from recsys2stage.checkpoints import OPTIONS, add_metadata, read_checkpoint
from recsys2stage.cli.main import main
from recsys2stage.data.dataset import Dataset
from recsys2stage.optim import RecsysAdamW
from recsys2stage.ranking.candidates import Candidates, Lists
from recsys2stage.ranking.choice import choose_part
from recsys2stage.ranking.lists import CANDIDATES, REQUESTS, STATES
from recsys2stage.ranking.losses import BCE, BPR, ListLoss, Listwise
from recsys2stage.ranking.ranker import NOT_RETRIEVED, Ranker
from recsys2stage.ranking.scorers import MLP
from recsys2stage.retrieval.index import VECTORS
from recsys2stage.shapes import CandidateBatch

D, USERS = 8, 120
QUIET: dict[str, Any] = {
    "logger": False,
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(scope="module")
def checkerboard(cycle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mined lists in which the answer is known: even users take the one even item, odd users the one odd item.

    The retriever's scores are noise, so its target stands anywhere among 13 to 21 candidates. Items have the genre Even
    or Odd; the first number of a user's state says which sort the user is. Every seventh list lacks its target. There
    are two numbers of signals, which nobody is told of here: whether an item is of the user's sort, and noise.
    """
    rng, folder = np.random.default_rng(11), tmp_path_factory.mktemp("checkerboard")
    dataset = Dataset(cycle)
    genre = next(feature["values"] for feature in dataset.item_features if feature["name"] == "genres")[:, 0]
    sorts = {sort: np.flatnonzero(genre == sort) for sort in (1, 2)}
    states = rng.normal(size=(USERS, D))
    rows: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    for user in range(USERS):
        sort = 1 + user % 2
        states[user, 0] = 3 * (2 * sort - 3)
        others = rng.permutation(sorts[3 - sort])[: rng.integers(12, 21)]
        target = [] if user % 7 == 6 else [rng.choice(sorts[sort])]
        items = rng.permutation(np.concatenate([others, target]).astype(int))
        scores = -np.sort(-rng.uniform(-1, 1, size=len(items)))
        for rank, (item, score) in enumerate(zip(items, scores, strict=True), start=1):
            rows.append(
                {
                    c.REQUEST: user,
                    c.USER: user,
                    c.ITEM: item,
                    c.LABEL: int(item in target),
                    c.RETRIEVER_SCORE: score,
                    c.RETRIEVER_RANK: rank,
                    c.ORIGIN: "candidate",
                    c.FOLD: "select" if user % 5 == 4 else "train",
                    "Match.right": float(genre[item] == sort),
                    "Match.noise": rng.normal(),
                }
            )
        place = int(dataset.train_ends[user]) - user % 3  # so that some histories are shorter than others
        time = int(dataset.times[place]) + 60 * user
        requests.append({c.USER: user, c.PLACE: place, c.TIME: time, c.FOLD: rows[-1][c.FOLD], c.ROWS: len(items)})
    types = {
        c.REQUEST: pl.Int32,
        c.USER: pl.Int32,
        c.ITEM: pl.Int32,
        c.LABEL: pl.Int8,
        c.RETRIEVER_SCORE: pl.Float32,
        c.RETRIEVER_RANK: pl.Int32,
        "Match.right": pl.Float32,
        "Match.noise": pl.Float32,
    }
    (folder / "index").mkdir()
    (folder / "candidates").mkdir()
    pl.DataFrame(rows).cast(types).write_parquet(folder / "candidates" / CANDIDATES)
    pl.DataFrame(requests).write_parquet(folder / "candidates" / REQUESTS)
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    np.save(folder / "candidates" / STATES, states.astype(np.float32))
    vectors = rng.normal(size=(dataset.num_items, D))
    np.save(folder / "index" / VECTORS, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
    parents = {"index": folder / "index", "data": cycle}
    write_manifest(
        folder / "candidates",
        "candidates",
        options={"k": 20, "signals": []},
        parents=parents,
        vector_dim=D,
        signals=[],
        scores_cold=False,
        max_length=20,
        request_time="target",
        split_hash=dataset.manifest["split_hash"],
    )
    return folder / "candidates"


def told_of_signals(checkerboard: Path, folder: Path, by_id: bool = False, counted: bool = False) -> Path:
    """The same lists, with the numbers of the signals."""
    folder = shutil.copytree(checkerboard, folder / "candidates")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["signals"] = [
        {"name": name, "by_id": by_id, "counted": counted} for name in ("Match.noise", "Match.right")
    ]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def ranker_for(data: Candidates, **options: Any) -> Ranker:
    settings = {"scorer": partial(MLP, hidden=(32,)), "optimizer": partial(RecsysAdamW, lr=5e-3), "warmup_steps": 0}
    settings["linear_start"] = False  # what gradient descent learns
    shown = {"signals": data.signals, "recent": data.recent}
    return Ranker(data.num_items, data.vector_dim, data.features, **(settings | shown | options))


def fitted(model: Ranker, data: Candidates, epochs: int = 15) -> dict[str, float]:
    trainer = Trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, **QUIET)
    trainer.fit(model, data)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


# --- the lists


def test_batches_equal_a_loop(checkerboard: Path, tmp_path: Path) -> None:
    data = Candidates(told_of_signals(checkerboard, tmp_path), batch_size=7, recent=9)
    data.setup("fit")
    table = pl.read_parquet(checkerboard / CANDIDATES)
    states = np.load(checkerboard / STATES)
    requests, dataset = pl.read_parquet(checkerboard / REQUESTS), data.dataset
    naive = {user[0]: own for user, own in table.group_by(c.USER, maintain_order=True)}
    found: dict[str, list[int]] = {"train": [], "select": []}
    for fold, loader in (("train", data.train_dataloader()), ("select", data.val_dataloader())):
        for batch in loader:
            listed = batch.candidates
            for row in range(len(listed.items)):
                user = int((np.abs(states - listed.state[row].numpy()).sum(1)).argmin())
                own = naive[user]
                n = len(own)
                assert listed.items[row, :n].tolist() == own[c.ITEM].to_list()
                assert not listed.items[row, n:].any()
                assert listed.score[row, :n].tolist() == own[c.RETRIEVER_SCORE].to_list()
                assert listed.rank[row, :n].tolist() == own[c.RETRIEVER_RANK].to_list()
                assert listed.signals[row, :n].tolist() == own["Match.noise", "Match.right"].to_numpy().tolist()
                place, now = requests[user, c.PLACE], requests[user, c.TIME]
                before = range(place - 1, max(place - 10, int(dataset.offsets[user]) - 1), -1)
                newest = [int(dataset.items[event]) for event in before]
                assert listed.recent[row].tolist() == newest + [0] * (9 - len(newest))
                ages = [np.log1p(now - int(dataset.times[event])) for event in before]
                assert listed.ages[row].tolist() == pytest.approx(ages + [0.0] * (9 - len(ages)), rel=1e-5)
                assert 7 <= len(newest) <= 9
                labels = own[c.LABEL].to_list()
                assert batch.positive[row] == (labels.index(1) if 1 in labels else -1)
                found[fold].append(user)
            assert (listed.items != 0).any(0).all(), "cut to the longest"
    assert sorted(found["train"]) == [u for u in range(USERS) if u % 5 != 4 and u % 7 != 6], (
        "lists without target train not"
    )
    assert found["select"] == [u for u in range(USERS) if u % 5 == 4], "but they count in selection"


def test_no_older_events_are_shown_than_when_it_serves(checkerboard: Path, tmp_path: Path) -> None:
    """The retriever's histories have so many events; a bundle knows of no more."""
    folder = shutil.copytree(checkerboard, tmp_path / "candidates")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"max_length": 3}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    batches = []
    for path in (checkerboard, folder):
        data = Candidates(path, recent=5)
        data.setup("fit")
        batches.append(data.read(np.arange(USERS)).candidates)
    whole, short = batches
    for name in ("recent", "ages"):
        one, other = getattr(whole, name), getattr(short, name)
        assert one.shape == other.shape == (USERS, 5)
        assert one[:, 3:].all()
        assert not other[:, 3:].any()
        assert torch.equal(one[:, :3], other[:, :3])


def test_no_event_may_be_looked_at(checkerboard: Path) -> None:
    data = Candidates(checkerboard, recent=0)
    data.setup("fit")
    batch = data.read(np.arange(5))
    assert batch.candidates.recent.shape == batch.candidates.ages.shape == (5, 0)
    with pytest.raises(ValueError, match="recent is -1, expected at least 0"):
        Candidates(checkerboard, recent=-1)


def test_item_vectors_have_a_row_for_padding(checkerboard: Path) -> None:
    vectors = Candidates(checkerboard).item_vectors()
    assert vectors.shape == (41, D)
    assert not vectors[0].any()
    torch.testing.assert_close(vectors[1:].norm(dim=1), torch.ones(40))


# --- training


def test_it_starts_at_the_retrievers_level(checkerboard: Path) -> None:
    """After an epoch at rate 0, calibrated: the same ranks for every user."""
    metrics = fitted(
        ranker_for(data := Candidates(checkerboard), optimizer=partial(RecsysAdamW, lr=0.0)), data, epochs=1
    )
    for name in ("hr@10", "ndcg@10", "mrr"):
        assert metrics[f"val/{name}"] == metrics[f"val/retriever_{name}"]
    assert 0.1 < metrics["val/ndcg@10"] < 0.6


@pytest.mark.parametrize("loss", [Listwise(), BCE(), BPR()], ids=lambda loss: type(loss).__name__)
def test_the_checkerboard_is_learned(checkerboard: Path, loss: ListLoss) -> None:
    """Every found target comes first, with ids and without: what decides is genre and user. Chance is far below."""
    data = Candidates(checkerboard, batch_size=16)
    metrics = fitted(ranker_for(data, loss=loss, id_dropout=0.3), data)
    found = sum(user % 7 != 6 for user in range(4, USERS, 5)) / len(range(4, USERS, 5))  # the rest cannot be found
    assert metrics["val/mrr"] == pytest.approx(found, abs=0.05)
    assert metrics["val/masked_mrr"] == pytest.approx(found, abs=0.05)
    assert metrics["val/retriever_mrr"] < 0.5 * found


def test_without_the_genre_there_is_nothing_to_learn_with_ids_masked(checkerboard: Path) -> None:
    """The counterpart: the win above does come from the features."""
    data = Candidates(checkerboard, batch_size=16)

    class Blind(Candidates):
        features = property(lambda self: [])

    blind = Blind(checkerboard, batch_size=16)
    blind.dataset.features = lambda: []
    assert data.features
    metrics = fitted(ranker_for(blind, id_dropout=0.3), blind)
    assert metrics["val/masked_mrr"] < 0.5


@pytest.mark.parametrize(
    ("by_id", "without", "known", "masked"),
    [
        (False, ["features"], True, True),
        (True, ["features"], True, False),  # a number of the item's id vanishes with it
        (False, ["features", "vectors", "Match.right"], False, False),
        (False, ["features", "vectors", "Match"], False, False),
    ],
)
def test_a_signal_that_says_the_answer_is_believed(
    checkerboard: Path, tmp_path: Path, by_id: bool, without: list[str], known: bool, masked: bool
) -> None:
    """Without the genre there is only the signal to tell which items are of the user's sort."""
    data = Candidates(told_of_signals(checkerboard, tmp_path, by_id), batch_size=16)
    metrics = fitted(ranker_for(data, id_dropout=0.3, without=without), data)
    found = sum(user % 7 != 6 for user in range(4, USERS, 5)) / len(range(4, USERS, 5))
    for name, learned in (("val/mrr", known), ("val/masked_mrr", masked)):
        assert metrics[name] == pytest.approx(found, abs=0.05) if learned else metrics[name] < 0.6, name


def test_a_cold_target_is_found_by_its_genre_beside_others_that_are_known(checkerboard: Path) -> None:
    data = Candidates(checkerboard, batch_size=16)
    model = ranker_for(data, id_dropout=0.0, cold_dropout=0.3)
    fitted(model, data, epochs=30)
    lists = data.read(np.array([user for user in range(4, USERS, 5) if user % 7 != 6]))
    cold = torch.zeros_like(lists.candidates.items, dtype=torch.bool)
    cold[torch.arange(len(cold)), lists.positive] = True
    with torch.no_grad():
        logits = model.eval().reranker(lists.candidates, torch.zeros_like(cold), cold)
    ranks = (logits >= logits.gather(1, lists.positive[:, None])).sum(1)
    assert (1 / ranks).mean() > 0.9


@pytest.mark.parametrize(("dropout", "learned"), [(0.0, True), (1.0, False)])
def test_what_is_counted_is_not_learned_from_items_that_are_taken_for_cold(
    checkerboard: Path, tmp_path: Path, dropout: float, learned: bool
) -> None:
    folder = told_of_signals(checkerboard, tmp_path, counted=True)
    data = Candidates(folder, batch_size=16)
    metrics = fitted(ranker_for(data, cold_dropout=dropout, without=["features"]), data)
    assert (metrics["val/mrr"] > 0.7) == learned


def test_a_candidate_is_taken_for_cold_on_its_own(checkerboard: Path) -> None:
    data = Candidates(checkerboard)
    items = torch.ones(200, 50, dtype=torch.int64)
    assert not ranker_for(data, cold_dropout=0.0).drop_counts(items).any()
    cold = ranker_for(data, cold_dropout=0.2).drop_counts(items)
    assert cold.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert cold.any(1).all()
    with pytest.raises(ValueError, match=r"cold_dropout is -0\.1, expected a probability"):
        ranker_for(data, cold_dropout=-0.1)


def test_signals_are_standardised_before_the_first_step(checkerboard: Path, tmp_path: Path) -> None:
    """Over the candidates of training lists; those that select are not looked at."""
    data = Candidates(told_of_signals(checkerboard, tmp_path))
    model = ranker_for(data, without=["Match.noise"], optimizer=partial(RecsysAdamW, lr=0.0))
    fitted(model, data, epochs=1)
    table = pl.read_parquet(checkerboard / CANDIDATES).filter(pl.col(c.FOLD) == "train")
    rows = table.filter(pl.col(c.LABEL).max().over(c.USER) == 1)["Match.noise", "Match.right"].to_numpy()
    reranker = model.reranker
    assert reranker.signal_mean.numpy() == pytest.approx(rows.mean(0), abs=1e-5)
    assert reranker.signal_scale.tolist() == pytest.approx([0, 1 / rows[:, 1].std()], rel=1e-4)
    assert reranker.signal_by_id.tolist() == [False, False]


def test_metrics_are_those_of_a_naive_ranking(checkerboard: Path) -> None:
    data = Candidates(checkerboard, batch_size=16)
    model = ranker_for(data)
    metrics = fitted(model, data, epochs=2)
    model.eval()
    for prefix, masks in (("", False), ("masked_", True)):
        reciprocal = []
        for user in range(4, USERS, 5):
            lists = data.read(np.array([user]))
            mask = torch.full_like(lists.candidates.items, masks, dtype=torch.bool)
            with torch.no_grad():
                logits = model.reranker(lists.candidates, mask)[0]
            place = int(lists.positive[0])
            reciprocal.append(0.0 if place < 0 else 1 / int((logits >= logits[place]).sum()))
        assert metrics[f"val/{prefix}mrr"] == pytest.approx(np.mean(reciprocal), abs=1e-6)


def test_a_target_outside_the_candidates_is_nowhere(checkerboard: Path) -> None:
    data = Candidates(checkerboard)
    data.setup("fit")
    lost = data.read(np.array([34]))  # 34 % 5 == 4 and 34 % 7 == 6
    assert lost.positive.tolist() == [-1]
    model = ranker_for(data).eval()
    model.validation_step(lost, 0)
    for metric in (model.metrics, model.retriever_metrics, model.masked_metrics):
        assert metric.compute()["hr@200"] == 0
        assert metric.compute()["mrr"].item() == pytest.approx(1 / NOT_RETRIEVED)


# --- ID dropout


def batch_of(data: Candidates) -> Lists:
    data.setup("fit")
    return data.read(np.arange(0, 40))


def test_id_dropout_masks_whole_lists_at_its_rate(checkerboard: Path) -> None:
    data = Candidates(checkerboard)
    model, lists = ranker_for(data, id_dropout=0.25), batch_of(data)
    masks = torch.stack([model.drop_ids(lists.candidates.items) for _ in range(400)])
    assert masks.shape[1:] == lists.candidates.items.shape
    assert (masks.all(-1) == masks.any(-1)).all()
    assert masks[..., 0].float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_id_dropout_drops_the_very_set_that_evaluation_masks(checkerboard: Path, rate: float) -> None:
    """At rate 1 the training loss is that of ids masked, at rate 0 that of ids known; the two differ."""
    data = Candidates(checkerboard)
    alone = {"cold_dropout": 0.0, "scorer": partial(MLP, hidden=(32,), dropout=0.0)}
    model, lists = ranker_for(data, id_dropout=rate, **alone), batch_of(data)
    found = lists.positive >= 0
    lists = Lists(CandidateBatch(*(part[found] for part in lists.candidates)), lists.positive[found])
    model.log = lambda *args, **kwargs: None
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn_like(weight)
        trained = model.training_step(lists, 0)
        real = lists.candidates.items != c.PAD
        masked, known = (
            model.loss(model.reranker(lists.candidates, torch.full_like(real, mask)), lists.positive, real)
            for mask in (True, False)
        )
    assert trained == (masked if rate else known)
    assert abs(masked - known) > 1e-3


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_id_dropout_is_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"id_dropout is {rate}, expected a probability"):
        Ranker(3, 4, [], id_dropout=rate)


# --- through the command line


def fit(checkerboard: Path, output: Path, *options: str) -> None:
    config = output.with_suffix(".yaml")
    config.write_text(f"""
output: {output}
trainer:
  {{max_epochs: 3, accelerator: cpu, log_every_n_steps: 1, enable_progress_bar: false, enable_model_summary: false}}
model:
  class_path: Ranker
  init_args:
    id_dropout: 0.3
    loss: {{class_path: BCE}}
    scorer: {{class_path: MLP, init_args: {{hidden: [16]}}}}
    optimizer: {{class_path: RecsysAdamW, init_args: {{lr: 0.01}}}}
data: {{class_path: Candidates, init_args: {{path: {checkerboard}, batch_size: 16}}}}
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recsys", "fit", "--config", str(config), *options])
        main()


def test_recsys_fit_leaves_a_checkpoint_that_stands_alone(checkerboard: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranker"
    fit(checkerboard, output)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["kind"] == "ranker"
    assert manifest["parents"]["candidates"]["path"] == str(checkerboard)

    model = Ranker.load_from_checkpoint(output / "best.ckpt", weights_only=True, map_location="cpu").eval()
    data = Candidates(checkerboard)
    data.setup("fit")
    torch.testing.assert_close(model.reranker.vectors, data.item_vectors())
    for row in data.val_dataloader():
        model.validation_step(row, 0)
    assert model.metrics.compute()["ndcg@10"].item() == pytest.approx(manifest["best"], abs=1e-5)


def test_the_best_is_never_worse_than_step_0(checkerboard: Path, tmp_path: Path) -> None:
    """Where no step improves on it, the best is the retriever's own order, from before the first step."""
    output = tmp_path / "ranker"
    fit(checkerboard, output, "--model.optimizer.lr", "0", "--model.linear_start", "false")
    manifest = json.loads((output / "manifest.json").read_text())
    data = Candidates(checkerboard)
    data.setup("fit")
    model = Ranker.load_from_checkpoint(output / "best.ckpt", weights_only=True, map_location="cpu").eval()
    for row in data.val_dataloader():
        model.validation_step(row, 0)
    assert torch.load(output / "best.ckpt", weights_only=True)["global_step"] == 0
    assert manifest["best"] == pytest.approx(model.retriever_metrics.compute()["ndcg@10"].item(), abs=1e-6)
    assert manifest["chosen"] == "retriever"


def test_with_few_lists_it_starts_from_a_linear_model(checkerboard: Path, tmp_path: Path) -> None:
    """The scores are noise and one signal is the answer, so the linear model is right before the first step."""
    lists, output = told_of_signals(checkerboard, tmp_path), tmp_path / "ranker"
    fit(lists, output, "--model.optimizer.lr", "0", "--trainer.max_epochs", "1")
    manifest = json.loads((output / "manifest.json").read_text())
    assert torch.load(output / "best.ckpt", weights_only=True)["global_step"] == 0
    assert manifest["chosen"] == "linear"
    data = Candidates(lists)
    data.setup("fit")
    assert manifest["linear_start"]["lists"] == len(data.training_lists())
    model = Ranker.load_from_checkpoint(output / "best.ckpt", weights_only=True, map_location="cpu").eval()
    for row in data.val_dataloader():
        model.validation_step(row, 0)
    best, retriever = (one.compute()["ndcg@10"].item() for one in (model.metrics, model.retriever_metrics))
    assert best == pytest.approx(manifest["best"], abs=1e-6)
    assert best > 1.5 * retriever


def test_a_fit_that_ended_before_its_choice_makes_it_when_resumed(checkerboard: Path, tmp_path: Path) -> None:
    lists, output = told_of_signals(checkerboard, tmp_path), tmp_path / "ranker"
    fit(lists, output, "--trainer.max_epochs", "1")
    whole = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").unlink()  # the process was killed after the last epoch
    fit(lists, output, "--trainer.max_epochs", "1", "--ckpt_path", str(output / "last.ckpt"))
    resumed = json.loads((output / "manifest.json").read_text())
    for name in ("chosen", "validation", "linear_start", "best", "epochs", "steps"):
        assert resumed[name] == whole[name], name


def test_without_validation_lists_nothing_is_chosen(checkerboard: Path, tmp_path: Path) -> None:
    lists, output = shutil.copytree(checkerboard, tmp_path / "candidates"), tmp_path / "ranker"
    for name in (CANDIDATES, REQUESTS):
        table = pl.read_parquet(lists / name)
        table.with_columns(pl.lit("train").alias(c.FOLD)).write_parquet(lists / name)
    seal(lists)
    last = ("--trainer.limit_val_batches", "0", "--checkpoint.monitor", "train/loss", "--checkpoint.mode", "min")
    fit(lists, output, "--trainer.max_epochs", "1", *last)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["monitor"] == "train/loss"
    assert "chosen" not in manifest


def test_with_many_lists_it_starts_from_the_retrievers_order(
    checkerboard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recsys2stage.ranking.ranker.LINEAR_LISTS", 10)
    data = Candidates(told_of_signals(checkerboard, tmp_path))
    weights = []
    for start in (None, True):
        model = ranker_for(data, optimizer=partial(RecsysAdamW, lr=0.0), linear_start=start)
        fitted(model, data, epochs=1)
        assert model.reranker.wide is not None
        weights.append(model.reranker.wide.weight.abs().sum().item())
    assert weights[0] == 0 < weights[1]


def misled(data: Candidates) -> Ranker:
    """A ranker that an ID-based signal misleads: noise outweighs the answer."""
    model = ranker_for(data)
    model.reranker.load_item_tables(data.item_vectors(), data.dataset.train_counts, data.dataset.item_features)
    model.reranker.signal_by_id[0] = True
    with torch.no_grad():
        assert model.reranker.wide is not None
        model.reranker.wide.weight[0, -2:] = torch.tensor([3.0, 1.0])
    return model


def test_ids_are_masked_if_that_is_better(checkerboard: Path, tmp_path: Path) -> None:
    data = Candidates(told_of_signals(checkerboard, tmp_path))
    data.setup("fit")
    model = misled(data)
    best = tmp_path / "best.ckpt"
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), OPTIONS: dict(model.hparams), "global_step": 9}
    checkpoint[OPTIONS] |= {"scorer": {"class_path": "MLP", "init_args": {"hidden": [32]}}}
    checkpoint[OPTIONS].pop("optimizer")
    add_metadata(checkpoint, data.split_hash, "1")
    torch.save(checkpoint, best)
    before = {name: value.clone() for name, value in model.reranker.state_dict().items()}
    found = choose_part(model.reranker, data, best, torch.device("cpu"))
    assert found["chosen"] == "ranker with IDs masked"
    assert found["validation"]["masked_ndcg@10"] > 1.5 * found["validation"]["ndcg@10"]
    for name, value in model.reranker.state_dict().items():
        assert torch.equal(value, before[name]), name

    options, weights = read_checkpoint(best, "reranker", "")
    assert options["mask_ids"] is True
    chosen = copy.deepcopy(model.reranker)
    chosen.load_state_dict(weights)
    chosen.mask_ids = True
    batch = next(iter(data.val_dataloader())).candidates
    masked = torch.ones_like(batch.items, dtype=torch.bool)
    assert torch.equal(chosen(batch), model.reranker(batch, masked))
    assert not torch.equal(chosen(batch), model.reranker(batch))

    model.reranker.wide.weight.data[0, -2] = 0  # type: ignore[union-attr]  # now nothing misleads it
    checkpoint["state_dict"] = model.state_dict()
    torch.save(checkpoint | {OPTIONS: checkpoint[OPTIONS] | {"mask_ids": False}}, best)
    assert choose_part(model.reranker, data, best, torch.device("cpu"))["chosen"] == "ranker"
    assert read_checkpoint(best, "reranker", "")[0]["mask_ids"] is False


@pytest.mark.parametrize("seed", ["1234567890", "4294967295"])
def test_any_seed_will_do(checkerboard: Path, tmp_path: Path, seed: str) -> None:
    fit(checkerboard, tmp_path / "ranker", "--seed_everything", seed, "--trainer.max_epochs", "1")


def test_a_fit_that_had_stopped_early_stays_stopped(checkerboard: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranker"
    options = ("--model.optimizer.lr", "0", "--trainer.max_epochs", "9", "--early_stopping.patience", "2")
    fit(checkerboard, output, *options)
    signed = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").unlink()  # killed before it was signed
    fit(checkerboard, output, *options, "--ckpt_path", str(output / "last.ckpt"))
    again = json.loads((output / "manifest.json").read_text())
    assert (again["steps"], again["best"]) == (signed["steps"], signed["best"])


def test_broken_off_and_resumed_equals_unbroken(checkerboard: Path, tmp_path: Path) -> None:
    """Scale, center, ID dropout and all: tests/test_resume.py has the real kill."""

    class Broken(Exception):
        pass

    def break_off(model: Ranker, outputs: Any, batch: Any, batch_idx: int) -> None:
        if model.global_step == 9:
            raise Broken

    fit(checkerboard, tmp_path / "unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranker, "on_train_batch_end", break_off)
        with pytest.raises(Broken):
            fit(checkerboard, tmp_path / "broken", "--last.every_n_train_steps=4")
    broken, unbroken = tmp_path / "broken/last.ckpt", tmp_path / "unbroken/last.ckpt"
    assert torch.load(broken, weights_only=True)["global_step"] == 8  # 6 steps an epoch
    fit(checkerboard, tmp_path / "broken", f"--ckpt_path={broken}")
    ours, theirs = (torch.load(path, weights_only=True) for path in (broken, unbroken))
    assert ours["global_step"] == theirs["global_step"] == 18
    for name, weight in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], weight), name


def test_lists_that_cannot_train_or_select_say_so(checkerboard: Path) -> None:
    data = Candidates(checkerboard)
    data.setup("fit")
    lists = data.lists
    data.lists = lists._replace(fold=np.full_like(lists.fold, "train"))
    with pytest.raises(ValueError, match=r"has no validation users for the ranker; mine with select above 0"):
        data.val_dataloader()
    data.lists = lists._replace(positive=np.full_like(lists.positive, -1))
    with pytest.raises(ValueError, match=r"no candidate list in .* contains its target"):
        data.train_dataloader()
    with pytest.raises(ValueError, match=r"run recsys evaluate"):
        data.test_dataloader()
