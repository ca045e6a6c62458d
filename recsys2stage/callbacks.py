"""What every fit does beside training: it is a function of seed and step, leaves where to go on, and signs its work."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from recsys2stage.artifacts import write_manifest
from recsys2stage.data import seed


class ReseedEveryStep(Callback):
    """Makes dropout a function of (seed, step), so that a resumed run ends with the weights of an unbroken one."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(((seed() * 1_000_003 + trainer.global_step) * 65_537 + trainer.global_rank) % 2**63)


class KeepLast(Checkpoint):
    """Writes last.ckpt after every epoch, for a killed fit to go on from.

    ModelCheckpoint's own `save_last` writes it only where it writes a new best, so a kill would cost all epochs since,
    and its `every_n_train_steps` would write the best in mid-epoch, where nothing has been measured.

    Args:
        dirpath: folder of last.ckpt.
        every_n_train_steps: write it in mid-epoch too, whenever this many steps are done; None: at ends of epochs only.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int | None = None) -> None:
        self.path, self.every_n_train_steps = Path(dirpath) / "last.ckpt", every_n_train_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            trainer.save_checkpoint(self.path, weights_only=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)  # with the optimiser, that is


class MeasureTheEnd(Callback):
    """Has the weights measured, so that there is a best.ckpt, where `max_steps` ends a fit in mid-epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning measures before it stops, but not where it only runs out of steps


class StayStopped(Callback):
    """Trains no further where a fit is resumed that early stopping had ended, and only its signature was missing."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(stopping.wait_count >= stopping.patience for stopping in trainer.early_stopping_callbacks):
            trainer.should_stop = True


class SignFit(Callback):
    """Writes manifest.json beside the checkpoints when, and only when, a fit has come to its end."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of all attempts before this one

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds + time.monotonic() - self.started}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = trainer.checkpoint_callback
        if not trainer.is_global_zero or not isinstance(checkpoint, ModelCheckpoint) or trainer.interrupted:
            return
        best = checkpoint.best_model_score
        write_manifest(
            Path(str(checkpoint.dirpath)),
            type(pl_module).__name__.lower(),
            options={"config": str(Path(str(trainer.log_dir)) / "config.yaml"), "seed": seed()},
            parents=getattr(trainer.datamodule, "parents", {}),  # type: ignore[attr-defined]
            monitor=checkpoint.monitor,
            best=None if best is None else float(best),
            epochs=trainer.current_epoch,
            steps=trainer.global_step,
            seconds=round(self.seconds + time.monotonic() - self.started, 1),
            parameters=sum(p.numel() for p in pl_module.parameters()),
        )
