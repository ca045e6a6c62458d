"""What a fit leaves: one run's files, signed only where best.ckpt is this fit's and its losses were finite."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import recsys

from recsys2stage.cli.callbacks import KeepLast, RequireFinite
from recsys2stage.retrieval.retriever import Retriever

STEPS = 4  # 120 windows in batches of 32
CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: Retriever
  init_args: {dim: 8, encoder: {class_path: Transformer, init_args: {layers: 1, heads: 1, dropout: 0.2}}}
data: {class_path: Histories, init_args: {max_length: 20, batch_size: 32}}
"""
Fit = Callable[..., Path]


def fit_into(folder: Path, data: Path, *words: object) -> Path:
    """`recsys fit` of a small retriever into `folder / "run"`, which it gives."""
    config = folder / "retriever.yaml"
    config.write_text(CONFIG)
    recsys("fit", "--config", config, "--output", folder / "run", "--data.init_args.path", data, *words)
    return folder / "run"


@pytest.fixture
def fit(cycle: Path, tmp_path: Path) -> Fit:
    return partial(fit_into, tmp_path, cycle)


@pytest.fixture(scope="module")
def once(cycle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_into(tmp_path_factory.mktemp("finished"), cycle)


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    """A finished run, where `fit` writes."""
    shutil.copytree(once, tmp_path / "run")
    return tmp_path / "run"


def files(folder: Path) -> dict[str, str]:
    """Checksums of all files."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def after(step: int, do: Callable[[Retriever], None]) -> Callable[..., None]:
    """A hook that does something once a step was taken."""

    def hook(model: Retriever, outputs: Any, batch: Any, batch_idx: int) -> None:
        if model.global_step == step:
            do(model)

    return hook


def nan_at(step: int) -> Callable[..., dict[str, Any]]:
    """Retriever.losses whose loss is NaN in one step."""
    losses = Retriever.losses

    def spoilt(model: Retriever, window: Any) -> dict[str, Any]:
        found = losses(model, window)
        return {**found, "loss": found["loss"] * (float("nan") if model.global_step + 1 == step else 1.0)}

    return spoilt


# --- what is not signed


def test_a_smoke_run_writes_nothing(fit: Fit, finished: Path, tmp_path: Path) -> None:
    before = files(finished)
    assert files(fit("--trainer.fast_dev_run", 2)) == before, "the finished run is untouched"
    fit("--trainer.fast_dev_run", 1, "--output", tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trainer.max_epochs", 0), r"max_epochs is 0, so the fit would take no step; set it above 0"),
        (("--trainer.limit_val_batches", 0), r"limit_val_batches is 0, so val/ndcg@10, .* --checkpoint.monitor null"),
        (
            ("--trainer.check_val_every_n_epoch", 3),
            r"check_val_every_n_epoch is 3 in a fit of 2 epochs, so val/ndcg@10",
        ),
    ],
)
def test_a_fit_that_would_have_no_best_is_refused(
    fit: Fit, tmp_path: Path, words: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        fit(*words)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_fit_that_ends_without_a_best_is_not_signed(fit: Fit, once: Path, tmp_path: Path) -> None:
    """The best of a finished fit stays in its folder, and a fit that is resumed from there elsewhere adds nothing."""
    last = once / "last.ckpt"
    with pytest.raises(
        SystemExit, match=r"ended after 8 steps without a best.ckpt in .*other, because val/ndcg@10 was not"
    ):
        fit("--ckpt_path", last, "--output", tmp_path / "other")
    assert not (tmp_path / "other/manifest.json").exists()


@pytest.mark.filterwarnings("ignore:Early stopping conditioned on metric:RuntimeWarning")
def test_the_last_weights_may_be_asked_for(fit: Fit) -> None:
    run = fit("--trainer.limit_val_batches", 0, "--checkpoint.monitor", "null")
    assert json.loads((run / "manifest.json").read_text())["steps"] == 2 * STEPS
    best, last = weights(run / "best.ckpt"), weights(run / "last.ckpt")
    assert all(torch.equal(best[name], last[name]) for name in last)


# --- losses, weights and metrics that are not finite


def test_a_loss_that_is_not_finite_ends_the_fit(fit: Fit, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "losses", nan_at(STEPS + 2))
        with pytest.raises(
            SystemExit, match=r"loss of step 6 is NaN or infinite \(learning rate .*, precision 32-true\)"
        ):
            fit()
    assert not (finished / "manifest.json").exists(), "nor that of the fit before"
    assert torch.load(finished / "last.ckpt", weights_only=True)["global_step"] == STEPS
    fit("--ckpt_path", finished / "last.ckpt")
    assert json.loads((finished / "manifest.json").read_text())["steps"] == 2 * STEPS


def test_losses_are_read_now_and_then_where_that_costs_time(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the first such step is named, whenever it is found, at the latest before weights are measured."""
    steps: list[int] = []
    monkeypatch.setattr(Retriever, "losses", nan_at(2))
    monkeypatch.setattr(Retriever, "on_train_batch_start", lambda model, batch, batch_idx: steps.append(batch_idx))
    for every, taken in ((3, 3), (50, STEPS)):
        monkeypatch.setattr(RequireFinite, "every", every)
        with pytest.raises(SystemExit, match=r"loss of step 2 is NaN"):
            fit()
        assert len(steps) == taken
        steps.clear()


def test_weights_that_are_not_finite_are_not_saved(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a gradient that is not, of a loss that is."""
    spoil = after(2 * STEPS, lambda model: model.towers.items.table.weight.data.fill_(torch.nan))
    monkeypatch.setattr(Retriever, "on_train_batch_end", spoil)
    with pytest.raises(SystemExit, match=r"some weights are NaN or infinite after step 8; the fit ends here"):
        fit()
    run = tmp_path / "run"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == STEPS
    assert not (run / "manifest.json").exists()


def test_a_metric_that_is_not_finite_ends_the_fit(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Retriever, "on_validation_epoch_end", lambda model: model.log("val/ndcg@10", torch.tensor(torch.nan))
    )
    with pytest.raises(SystemExit, match=r"val/ndcg@10 is nan after step 4, expected a number; the fit ends here"):
        fit()
    assert not list((tmp_path / "run").glob("*.*"))


# --- files of one fit


def test_the_files_in_a_folder_are_of_one_fit(fit: Fit, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    before = weights(finished / "best.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(KeepLast, "on_train_epoch_end", kill)  # after best.ckpt, before last.ckpt
        with pytest.raises(Killed):
            fit("--seed_everything", 1)
    assert [file.name for file in sorted(finished.glob("*.*"))] == ["best.ckpt"], "no file of the fit before"
    assert not torch.equal(
        weights(finished / "best.ckpt")["towers.items.table.weight"], before["towers.items.table.weight"]
    )


def test_a_resumed_fit_keeps_its_best_wherever_its_folder_was_moved(fit: Fit, tmp_path: Path) -> None:
    still = ("--model.init_args.optimizer.lr", 0)
    moved = fit(*still).rename(tmp_path / "moved")
    assert torch.load(moved / "best.ckpt", weights_only=True)["global_step"] == STEPS, "no later epoch improves on it"
    fit(*still, "--ckpt_path", moved / "last.ckpt", "--trainer.max_epochs", 3, "--output", moved)
    assert torch.load(moved / "best.ckpt", weights_only=True)["global_step"] == STEPS
    assert json.loads((moved / "manifest.json").read_text())["steps"] == 3 * STEPS
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def cut_short(checkpoint: dict[str, Any], path: Path) -> None:
        save(checkpoint, path)
        if checkpoint["global_step"] > STEPS:
            os.truncate(path, 1_000)
            raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(SystemExit, match="No space left"):
        fit()
    run = tmp_path / "run"
    assert sorted(file.name for file in run.iterdir()) == ["best.ckpt", "last.ckpt", "log"]
    for name in ("best.ckpt", "last.ckpt"):
        assert torch.load(run / name, weights_only=True)["global_step"] == STEPS


def test_without_a_logger_the_config_is_kept_beside_the_checkpoints(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    fit("--trainer.logger", "false")
    run = fit("--trainer.logger", "false")
    assert json.loads((run / "manifest.json").read_text())["options"]["config"] == str(run / "config.yaml")
    assert (run / "config.yaml").is_file()


# --- ends from outside


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_fit_that_is_ended_fails(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    """So that make does not go on to the next stage."""
    monkeypatch.setattr(Retriever, "on_train_batch_end", after(STEPS + 1, lambda model: os.kill(os.getpid(), end)))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore SIGINT
    try:
        with pytest.raises(SystemExit) as error:
            fit()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert error.value.code == 130 if end == signal.SIGINT else "ended by SIGTERM" in str(error.value.code)
    run = tmp_path / "run"
    assert sorted(file.name for file in run.iterdir()) == ["best.ckpt", "last.ckpt", "log"]


# --- random numbers


def test_batches_of_one_step_differ_in_their_random_numbers(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    step = Retriever.training_step

    def spy(model: Retriever, window: Any, batch_idx: int) -> torch.Tensor:
        seeds.append(torch.initial_seed())
        return step(model, window, batch_idx)

    monkeypatch.setattr(Retriever, "training_step", spy)
    run = fit("--trainer.accumulate_grad_batches", 3, "--trainer.limit_train_batches", 3)
    assert len(set(seeds)) == len(seeds) == 6
    assert json.loads((run / "manifest.json").read_text())["steps"] == 2


MODULE = """
import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader


class Line(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.line = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.line(batch).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/ndcg@10", -self.line(batch).pow(2).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Ones(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.ones(8, 3), batch_size=4)

    val_dataloader = train_dataloader
"""


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_fit_of_any_other_module_can_be_measured_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints have the format number that loading asks for, also those of weights alone."""
    (tmp_path / "my_lines.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    own = ("--model", "my_lines.Line", "--data", "my_lines.Ones", "--output", tmp_path / "run")
    own += ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    recsys("fit", *own, "--trainer.max_epochs", 1, "--checkpoint.save_weights_only", "true")
    recsys("validate", *own)
    recsys("fit", *own, "--trainer.max_epochs", 2, "--ckpt_path", tmp_path / "run/last.ckpt")
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] == 4
