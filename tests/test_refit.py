"""Refits: the chosen retriever and the signals learn again from later events, and the ranker stays."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from closeness import close
from lightning import LightningDataModule, LightningModule, Trainer
from pipeline_fixtures import TOLD, Run, recsys

from recsys2stage.cli.refit import check_same_config, prepare_refit
from recsys2stage.cli.refit_bundle import rotation_between
from recsys2stage.columns import MANIFEST
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import STRETCH, TRAINED_TARGETS
from recsys2stage.ranking.bundle import read_bundle
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import MLP
from recsys2stage.ranking.signals.base import load_signals
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.histories import Histories
from recsys2stage.shapes import CandidateBatch

RENEWED = {"vectors", "popularity", "cold", "rotation"}  # of the ranker's weights


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def told(run: Run) -> list[str]:
    """The options of a fit of the retriever of this run, but for its output."""
    return ["fit", "--config", str(run.folder / "retriever.yaml"), "--data.init_args.path", str(run.data), *TOLD]


def refusal(*words: object) -> str:
    with pytest.raises(SystemExit) as end:
        recsys(*words)
    return str(end.value.code)


@pytest.fixture(scope="module")
def refitted(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On all events before the test targets."""
    return informed.refit(tmp_path_factory.mktemp("all"), "test", *TOLD)


@pytest.fixture(scope="module")
def production(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On all events."""
    return informed.refit(tmp_path_factory.mktemp("production"), "end", *TOLD)


@pytest.mark.parametrize("until", list(STRETCH))
def test_training_events_end_where_until_says_and_targets_stay(informed: Run, until: Any) -> None:
    chosen, dataset = Dataset(informed.data), Dataset(informed.data, until)
    ends = {"val": chosen.train_ends, "test": chosen.val_ends, "end": chosen.offsets[1:]}[until]
    spans = zip(chosen.offsets[:-1], ends, strict=True)
    trained = np.concatenate([np.arange(start, end) for start, end in spans])
    assert np.array_equal(dataset.train_counts, np.bincount(chosen.items[trained], minlength=chosen.num_items + 1))
    assert dataset.last_times.max() == chosen.times[trained].max()
    for part in ("val", "test"):
        assert np.array_equal(dataset.users(part), chosen.users(part))
        assert np.array_equal(dataset.target_indices(part), chosen.target_indices(part))
        targets = dataset.target_indices(part)[dataset.users(part)]
        assert np.isin(targets, trained).all() == (part in TRAINED_TARGETS[until])
        assert np.isin(targets, trained).any() == (part in TRAINED_TARGETS[until])
    assert all(np.array_equal(*pair) for pair in zip(dataset.val_targets(), chosen.val_targets(), strict=True))


@pytest.mark.parametrize("until", [None, "test", "end"])
def test_windows_of_a_refit_hold_every_event_until_there(informed: Run, until: Any) -> None:
    data = Histories(informed.data, max_length=20, refit=informed.folder / "retriever", until=until)
    wanted = Dataset(informed.data, until or "test").train_ends
    users, first = np.unique(data.window_users, return_index=True)
    assert np.array_equal(np.maximum.reduceat(data.window_ends, first), wanted[users])
    assert len(users) == data.dataset.num_users
    assert data.epochs == checkpoint(informed.retriever)["epoch"] + 1
    assert Histories(informed.data).epochs is None


def test_a_refit_takes_the_epochs_of_the_best_and_is_not_validated(informed: Run, refitted: Run) -> None:
    best, chosen = checkpoint(refitted.retriever), checkpoint(informed.retriever)
    assert best["epoch"] == chosen["epoch"]
    assert best["trained_until"] == "test"
    assert chosen["trained_until"] == "val"
    made = manifest(refitted.retriever.parent)
    assert made["trained_until"] == "test"
    assert made["monitor"] is None
    assert made["best"] is None
    assert made["epochs"] == chosen["epoch"] + 1
    logs = "".join(path.read_text() for path in refitted.retriever.parent.rglob("metrics.csv"))
    assert "val/" not in logs
    assert not torch.equal(
        best["state_dict"]["towers.items.table.weight"], chosen["state_dict"]["towers.items.table.weight"]
    )


@pytest.mark.parametrize(("planned", "schedule"), [(10, 10), (3, None), (2, None), (-1, -1), (None, None)])
def test_the_learning_rate_follows_the_schedule_of_the_chosen_run(
    informed: Run, planned: int | None, schedule: int | None
) -> None:
    stopping, loop = SimpleNamespace(patience=1, strict=True), SimpleNamespace(max_epochs=planned)
    state = {
        "fit_loop": loop,
        "max_epochs": planned,
        "early_stopping_callbacks": [stopping],
        "checkpoint_callbacks": [],
    }
    trainer = mock.MagicMock(spec=Trainer, **state)
    model = mock.MagicMock(spec=LightningModule, hparams={}, planned_epochs=None)
    data = mock.MagicMock(spec=LightningDataModule, epochs=3, refit=informed.folder / "retriever")
    prepare_refit(trainer, model, data, {})
    assert loop.max_epochs == 3
    assert model.planned_epochs == schedule
    assert trainer.limit_val_batches == 0
    assert stopping.patience > 3


def test_the_bundle_counts_again_and_keeps_the_weights_of_the_ranker(informed: Run, refitted: Run) -> None:
    dataset = Dataset(informed.data, "test")
    served, chosen = read_bundle(refitted.bundle), read_bundle(informed.bundle)
    assert np.array_equal(served["popularity"], dataset.train_counts)
    assert served["newest_time"] == dataset.last_times.max()
    vectors = np.concatenate([np.zeros((1, 16), np.float32), np.load(refitted.index / "index.npy")])
    for signal in load_signals(informed.candidates / "signals"):
        signal.fit(dataset, vectors)
        (own,) = (other for other in served["signals"] if type(other) is type(signal))
        assert own.tables.keys() == signal.tables.keys()
        for name, table in signal.tables.items():
            assert np.array_equal(own.tables[name], table), f"{type(signal).__name__}.{name}"
    weights, before = served["reranker"].state_dict(), chosen["reranker"].state_dict()
    assert weights.keys() - before.keys() == {"rotation"}, "the DIN of this run reads vectors"
    for name, value in before.items():
        assert torch.equal(value, weights[name]) == (name not in RENEWED - {"cold"}), name
    assert np.array_equal(weights["cold"][1:], dataset.train_counts[1:] == 0)
    made = manifest(refitted.bundle)
    assert made["trained_until"] == "test"
    assert "learned from all events before the test targets" in (refitted.bundle / "README.md").read_text()


def test_vectors_of_another_space_are_rotated_to_those_of_training() -> None:
    """Retrievers that differ by a rotation are the same to the ranker."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((31, 6)).astype(np.float32)
    vectors[0] = 0
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0].astype(np.float32)
    rotation = rotation_between((vectors @ turn)[1:], vectors[1:])
    close(rotation, turn.T)
    torch.manual_seed(0)
    first = Reranker(30, 6, [], lambda dim, width: MLP(dim, width, hidden=[8])).eval()
    for weight in first.scorer.parameters():
        torch.nn.init.normal_(weight)
    first.vectors.copy_(torch.from_numpy(vectors))
    second = Reranker(30, 6, [], lambda dim, width: MLP(dim, width, hidden=[8]), rotated=True).eval()
    second.load_state_dict({**first.state_dict(), "rotation": torch.from_numpy(rotation)})
    second.vectors.copy_(torch.from_numpy(vectors @ turn @ rotation))
    state = rng.standard_normal((2, 6)).astype(np.float32)
    items = torch.randint(1, 31, (2, 5))
    none = torch.zeros(2, 0, dtype=torch.int64)

    def batch(states: np.ndarray) -> CandidateBatch:
        return CandidateBatch(
            state=torch.from_numpy(states),
            items=items,
            score=torch.zeros(2, 5),
            rank=torch.ones(2, 5, dtype=torch.int64),
            signals=torch.zeros(2, 5, 0),
            recent=none,
            ages=none.float(),
        )

    close(first(batch(state)), second(batch(state @ turn)))
    assert not torch.allclose(first(batch(state)), first(batch(state @ turn)), atol=0.1)


def test_a_refit_reports_the_test_and_its_protocol(informed: Run, refitted: Run, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    of = ("--data", informed.data, "--plots", "false", "--resamples", 10)
    recsys("evaluate", "--bundle", informed.bundle, "--output", chosen, *of)
    recsys("evaluate", "--bundle", refitted.bundle, "--output", tmp_path, "--against", chosen, *of)
    report, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    assert report["protocol"]["refit"] == STRETCH["test"]
    assert "learned again from all events before the test targets" in text.splitlines()[2]
    (differs,) = report["against"]["differs"]
    assert "learned from all events before the test targets here" in differs
    assert "learned from the events before the validation targets there" in differs
    assert "the retriever never does" in (chosen / "report.md").read_text().splitlines()[2]


def test_production_serves_and_has_no_figures(informed: Run, production: Run) -> None:
    for part in ("test", "val"):
        text = refusal("evaluate", "--bundle", production.bundle, "--data", informed.data, "--split", part)
        assert f"was refitted on all events, expected one that was not trained on {part} targets; evaluate" in text
    card = (production.bundle / "README.md").read_text()
    assert "no metrics of this folder: it learned from all events, those of the test too" in card
    model = Recommender.load(production.bundle)
    assert model.newest_time == Dataset(informed.data).times.max()
    item = model.catalogue.items["item_id"][0]
    assert len(model.recommend([item], k=5, times=[model.newest_time])) == 5


def test_what_needs_targets_out_of_sample_refuses_a_refit(informed: Run, refitted: Run, tmp_path: Path) -> None:
    said = "was refitted on all events before the test targets, expected one that was not trained on val targets; "
    mining = ("mine-negatives", "--data", informed.data, "--output", tmp_path / "lists", "--index")
    assert f"{said}mine with the index of the retriever" in refusal(*mining, refitted.index)
    second = ("--signals+=OtherRetriever", f"--signals.index={refitted.index}")
    assert "expected the events before the validation targets, as" in refusal(*mining, informed.index, *second)
    assert f"{said}measure test targets" in refusal(
        "evaluate", "--bundle", refitted.bundle, "--data", informed.data, "--split", "val"
    )
    output = ("--output", tmp_path / "fit")
    assert f"{said}validate the run" in refusal(
        "validate", "--ckpt_path", refitted.retriever, *output, *told(informed)[1:]
    )
    with pytest.raises(ValueError, match=f"{said}refit the run that was chosen by validation"):
        _ = Histories(informed.data, refit=refitted.retriever.parent).epochs
    assert f"{said}start from" in refusal(*told(informed), *output, "--model.init_args.start", refitted.retriever)
    assert not (tmp_path / "lists").exists()


def test_a_refit_with_other_options_or_of_other_data_is_refused(informed: Run, trained: Run, tmp_path: Path) -> None:
    chosen = informed.retriever.parent
    trainer, model = mock.MagicMock(spec=Trainer), mock.MagicMock(spec=LightningModule, hparams={"max_length": 10})
    data = mock.MagicMock(spec=LightningDataModule, epochs=3, refit=chosen)
    with pytest.raises(
        ValueError, match=r"warmup_steps is 7, but the fit of .* refit with the options that were chosen"
    ):
        prepare_refit(trainer, model, data, {"warmup_steps": 7})
    with pytest.raises(ValueError, match=r"max_length of the data is 10, but the fit of .* began with 20; refit with"):
        prepare_refit(trainer, model, data, {})
    with pytest.raises(ValueError, match=r"was not chosen on .* as it is now, expected a retriever of these data"):
        _ = Histories(informed.data, refit=trained.retriever.parent).epochs
    with pytest.raises(FileNotFoundError, match="there is no retriever in"):
        _ = Histories(informed.data, refit=tmp_path / "nowhere").epochs
    fit = (*told(informed), "--output", chosen, "--data.init_args.refit", chosen)
    assert "is the selected of this fit and would be overwritten" in refusal(*fit)


def test_a_bundle_of_a_refit_takes_the_ranker_of_the_chosen_retriever_only(
    informed: Run, refitted: Run, tmp_path: Path
) -> None:
    of = ("export-bundle", "--ranker", informed.ranker, "--output", tmp_path / "bundle", "--data", informed.data)
    other = shutil.copytree(refitted.index, tmp_path / "index")
    (other / MANIFEST).write_text(json.dumps(manifest(other) | {"selected": "0" * 64}))
    assert f"{other} is not of a refit of the retriever of {informed.index}" in refusal(*of, "--index", other)
    assert "but no signal of" in refusal(*of, "--index", refitted.index, "--other", refitted.index)
    assert f"--other is {informed.index}, but the retriever of {informed.index} is no refit" in refusal(
        *of, "--index", informed.index, "--other", informed.index
    )
    (other / MANIFEST).write_text(json.dumps(manifest(other) | {"trained_until": "tomorrow"}))
    assert "has the trained_until 'tomorrow', expected one of val, test, end" in refusal(*of, "--index", other)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("model.init_args.loss", {"class_path": "BCE"}, "model.init_args.loss is 'BCE', expected None"),
        ("model.init_args.optimizer.init_args.lr", 0.5, "optimizer.init_args.lr is 0.5, expected 0.01"),
        ("data.init_args.batch_size", 7, "data.init_args.batch_size is 7, expected 32"),
        ("trainer.max_epochs", 9, "trainer.max_epochs is 9, expected 3"),
        ("data.init_args.eval_batch_size", 7, None),
        ("trainer.devices", 1, None),
    ],
)
def test_a_refit_has_the_config_of_the_chosen_run(informed: Run, where: str, value: Any, said: str | None) -> None:
    folder = informed.retriever.parent
    config = yaml.safe_load((folder / "log" / "version_0" / "config.yaml").read_text())
    check_same_config(config, folder)
    *path, last = where.split(".")
    part = config
    for name in path:
        part = part[name]
    part[last] = value
    if said is None:
        check_same_config(config, folder)
    else:
        with pytest.raises(ValueError, match=f"{said}, as in .*config.yaml; refit with the options that were chosen"):
            check_same_config(config, folder)


def test_a_damaged_config_of_the_chosen_run_is_named(informed: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(informed.retriever.parent, tmp_path / "moved")
    path = folder / "log" / "version_0" / "config.yaml"
    for text in ("model: [", "[]", "model: {}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"moved/.*config.yaml is damaged .*, expected the config of the fit of"):
            check_same_config({}, folder)


def test_a_refit_by_the_command_line_refuses_another_loss(informed: Run, tmp_path: Path) -> None:
    fit = (*told(informed), "--output", tmp_path, "--data.init_args.refit", informed.retriever.parent)
    assert "model.init_args.loss is 'GBCE', expected None, as in" in refusal(*fit, "--model.init_args.loss", "GBCE")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_refit_of_a_ranker_trains_as_the_chosen_one_did(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked IDs are for serving only, the linear start stays, and an interrupted refit continues as it began."""
    own = Candidates(trained.candidates)
    own.setup("fit")
    count = len(own.training_lists())  # a refit has more lists
    monkeypatch.setattr("recsys2stage.ranking.ranker.LINEAR_LISTS", count)

    def choose(name: str, epoch: int, masked: bool) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained.ranker.parent, folder, dirs_exist_ok=True)
        content = checkpoint(folder / "best.ckpt") | {"epoch": epoch, "global_step": 1}
        content["hyper_parameters"]["mask_ids"] = masked
        torch.save(content, folder / "best.ckpt")
        return folder

    def refit(chosen: Path, name: str, *words: object) -> Path:
        of = ("--data.init_args.path", trained.candidates, "--data.init_args.refit", chosen)
        recsys("fit", "--config", trained.folder / "ranker.yaml", "--output", tmp_path / name, *of, *words)
        return tmp_path / name

    rare = ("--trainer.check_val_every_n_epoch", 3, "--checkpoint.every_n_epochs", 3)
    whole = refit(choose("plain", 1, False), "whole", *rare)
    parts = refit(choose("masked", 0, True), "parts")
    assert checkpoint(parts / "best.ckpt")["epoch"] == 0
    parts = refit(choose("masked", 1, True), "parts", "--ckpt_path", parts / "last.ckpt")
    one, other = checkpoint(whole / "best.ckpt"), checkpoint(parts / "best.ckpt")
    assert one["epoch"] == other["epoch"] == 1, "best.ckpt is of the last epoch"
    assert (one["hyper_parameters"]["mask_ids"], other["hyper_parameters"]["mask_ids"]) == (False, True)
    assert manifest(whole)["linear_start"]["lists"] == count
    for name, value in one["state_dict"].items():
        close(value, other["state_dict"][name])  # rounding of the same steps
