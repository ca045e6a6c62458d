"""What a fit prints: no notices of Lightning, a line at the start, epochs where no bar is drawn, and the result."""

import logging
import math
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from recsys2stage.data.summary import HINTS, print_hint, print_summary

EVERY = 120.0  # seconds between two lines of a log


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences what Lightning prints of devices, products and limits; warnings stay. RECSYS_DEBUG=1 shows all of it.

    The table of the model is printed only where enable_model_summary is true.
    """
    levels = {name: logging.WARNING for name in ("lightning.pytorch", "lightning.fabric")}
    levels["lightning.pytorch.callbacks.model_summary"] = logging.INFO
    before = {name: logging.getLogger(name).level for name in levels}
    try:
        for name, level in ({} if os.environ.get("RECSYS_DEBUG") else levels).items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


class FitLines(Callback):
    """Prints what is trained and where and, where no progress bar is drawn, a line per epoch.

    Epochs that end less than EVERY seconds after the last line have none, so that the log of a short fit stays short.

    Args:
        verb: fit, validate or test.
        bar: whether a progress bar is drawn.
        enabled: False: print nothing.
    """

    def __init__(self, verb: str, bar: bool, enabled: bool = True) -> None:
        self.verb, self.bar, self.enabled = verb, bar, enabled

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = self.printed = time.monotonic()
        self.clock = time.time()  # as of files' modification times
        self.first = trainer.current_epoch
        if not self.enabled:
            return
        weights = sum(weight.numel() for weight in pl_module.parameters())
        resumed = f", resumes after epoch {self.first}" if trainer.ckpt_path else ""
        print(
            f"{type(pl_module).__name__}: {weights:,} parameters, {trainer.strategy.root_device}, {trainer.precision}, "
            f"{_at_most(trainer)}, {trainer.num_training_batches:,} batches each{resumed}",
            flush=True,
        )

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == self.first and self._due():  # how long an epoch will take
            self._print(f"epoch {self.first + 1}: {batch_idx + 1:,} of {trainer.num_training_batches:,} batches")
            self.printed = math.inf  # until the epoch's end

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.printed == math.inf:
            self.printed = self.started
        if self._due():
            values = [f"{name} {float(value):.4f}" for name, value in trainer.progress_bar_metrics.items()]
            of = "" if (trainer.max_epochs or 0) < 1 else f" of {trainer.max_epochs}"
            self._print(f"epoch {trainer.current_epoch + 1}{of}: {', '.join(values) or 'no metrics'}")

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt):
            return
        saver: Any = trainer.checkpoint_callback
        advice = ""
        if os.environ.get(HINTS, "0") != "0" and saver is not None and self.verb == "fit":
            last = Path(str(saver.dirpath)) / "last.ckpt"
            own = trainer.ckpt_path or (last.is_file() and last.stat().st_mtime >= getattr(self, "clock", math.inf))
            advice = f"; to resume, add to the command --ckpt_path {last}" if own else " before its first checkpoint"
        print(f"\nrecsys {self.verb}: interrupted{advice}", file=sys.stderr, flush=True)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate" and (then := next_command(trainer, pl_module, str(trainer.ckpt_path))):
            print_hint(then)

    def _due(self) -> bool:
        return self.enabled and not self.bar and time.monotonic() - self.printed >= EVERY

    def _print(self, line: str) -> None:
        self.printed = time.monotonic()
        print(f"{line}, {self.printed - self.started:,.0f} s", flush=True)


def _at_most(trainer: Trainer) -> str:
    epochs, steps = trainer.max_epochs, trainer.max_steps
    limits = [f"{epochs:,} epochs"] if epochs is not None and epochs > 0 else []
    return " or ".join([*limits, *([f"{steps:,} steps"] if steps > 0 else [])]) or "epochs without end"


def print_fit(trainer: Trainer, pl_module: LightningModule, best: Path, manifest: dict[str, Any]) -> None:
    """Prints the result of a complete fit.

    Args:
        trainer: trainer of the fit.
        pl_module: the model.
        best: its best.ckpt.
        manifest: facts of its manifest: monitor, best, epochs, steps, seconds.
    """
    epoch, score = best_epoch(best), manifest["best"]
    which = "the last weights" if score is None else f"{manifest['monitor']} {score:.4f}"
    of = f"{manifest['epochs']} epochs" if epoch is None else f"epoch {epoch + 1} of {manifest['epochs']}"
    if best.is_relative_to(Path.cwd()):  # Lightning made it absolute
        best = best.relative_to(Path.cwd())
    print_summary(
        best,
        f"{which}, {of}, {manifest['steps']:,} steps, {manifest['seconds']:,.0f} s",
        *([f"chosen: {manifest['chosen']}"] if manifest.get("chosen", "ranker") != "ranker" else []),
        then=next_command(trainer, pl_module, str(best)),
    )


def best_epoch(path: Path) -> int | None:
    """Epoch of a checkpoint, from 0; None if it cannot be read without running code of its own."""
    try:
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["epoch"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, ValueError, TypeError):
        return None


def next_command(trainer: Trainer, pl_module: LightningModule, checkpoint: str) -> str | None:
    """The command that uses a checkpoint of a retriever or a ranker; None for other models.

    Args:
        trainer: trainer that wrote or read it.
        pl_module: the model.
        checkpoint: path of the checkpoint.
    """
    parents = getattr(trainer.datamodule, "parents", {})  # type: ignore[attr-defined]  # set outside Trainer.__init__
    kind = type(pl_module).__name__
    if kind == "Retriever" and "data" in parents:
        index = " --output INDEX" if "selected" in parents else ""  # of a refit: not in the place of the chosen one
        return f"recsys export-index --retriever {checkpoint} --data {parents['data']}{index}"
    if kind == "Ranker" and "candidates" in parents:
        index = trainer.datamodule.manifest["parents"]["index"]["path"]  # type: ignore[attr-defined]  # as above
        return f"recsys export-bundle --index {index} --ranker {checkpoint}"
    return None
