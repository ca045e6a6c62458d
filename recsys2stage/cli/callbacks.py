"""Callbacks and checkpoint IO of every fit: reproducible steps, finite losses, resuming, and the final manifest."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from torch import Tensor

from recsys2stage import __version__
from recsys2stage.artifacts import atomic_write, write_manifest
from recsys2stage.checkpoints import UNTIL, add_metadata
from recsys2stage.cli.progress import print_fit
from recsys2stage.columns import MANIFEST
from recsys2stage.retrieval.histories import BEST, seed

LAST = "last.ckpt"
NEVER = torch.iinfo(torch.int64).max


class ReseedEveryStep(Callback):
    """Seeds dropout and negative sampling by (seed, batch, process), so that a resumed fit equals an uninterrupted one.

    Batches are counted over all epochs, since batches accumulated for one optimizer step must differ too.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        number = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(((seed() * 1_000_003 + number) * 65_537 + trainer.global_rank) % 2**63)


class RequireFinite(Callback):
    """Ends a fit at the first step whose loss is NaN or infinite; no checkpoint of such weights is written.

    Reading a loss synchronizes the GPU, so it is read every 50 batches there and before each validation and checkpoint;
    on a CPU after each batch.
    """

    every: int | None = None  # batches between reads; None: by device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.failed = torch.full((), NEVER, device=pl_module.device)  # first step with a non-finite loss
        self.rates: dict[int, float] = {}  # step -> learning rate, of steps not read yet

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step + 1
        self.rates[self.step] = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            finite = torch.isfinite(loss.detach()).all()
            self.failed = torch.where(finite, self.failed, self.failed.clamp(max=self.step))
        if (batch_idx + 1) % (self.every or (1 if self.failed.device.type == "cpu" else 50)) == 0:
            self._read(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._read(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set outside Trainer.__init__
            name = callback.monitor if isinstance(callback, ModelCheckpoint | EarlyStopping) else None
            value = float(trainer.callback_metrics.get(name, 0.0)) if name else 0.0
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} after step {trainer.global_step}, expected a number{self._end()}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read(trainer)
        finite = torch.stack([weight.isfinite().all() for weight in pl_module.parameters()]).all()
        if not trainer.strategy.reduce_boolean_decision(bool(finite)):
            raise ValueError(f"some weights are NaN or infinite after step {trainer.global_step}{self._end()}")

    def _read(self, trainer: Trainer) -> None:
        """Raises on all processes if the loss of any is not finite."""
        step = int(trainer.strategy.reduce(self.failed.clone(), reduce_op="min"))
        if step < NEVER:
            at = f"learning rate {float(self.rates.get(step, math.nan)):g}, precision {trainer.precision}"
            raise ValueError(f"the loss of step {step} is NaN or infinite ({at}){self._end()}")
        self.rates.clear()

    def _end(self) -> str:
        return (
            "; the fit ends here without a manifest, and last.ckpt, if it exists, is from before: start a new fit with "
            "a lower learning rate, a longer warm-up, trainer.gradient_clip_val or trainer.precision 32-true"
        )


class KeepLast(Checkpoint):
    """Writes last.ckpt after every epoch, so that an interrupted fit can be resumed from it.

    ModelCheckpoint's `save_last` writes it only with a new best checkpoint, which would lose all epochs since then, and
    its `every_n_train_steps` would save the best checkpoint in mid-epoch, before validation.

    Args:
        dirpath: folder of last.ckpt.
        every_n_train_steps: also write it in mid-epoch, every this many steps; None: only after each epoch.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int | None = None) -> None:
        self.path, self.every_n_train_steps = Path(dirpath) / LAST, every_n_train_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # only after an optimizer step: accumulated gradients are not saved
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        due = self.every_n_train_steps and self.step % self.every_n_train_steps == 0
        if stepped and due and not trainer.is_last_batch:  # the last batch: saved after validation
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside Trainer.__init__
            trainer.save_checkpoint(self.path, weights_only=False)  # includes the optimizer state


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically, and adds a format number to those of any LightningModule.

    Lightning writes to the system's temporary folder first; a move from there to another disk can be interrupted.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "format" not in checkpoint:  # of a module outside this package
            add_metadata(checkpoint, None, __version__)
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)


class MeasureTheEnd(Callback):
    """Runs a last validation if `max_steps` ends a fit in mid-epoch, so that there is a best.ckpt."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning validates before this stop, but not at `max_steps`


class StayStopped(Callback):
    """Stops at once if the resumed fit had been ended by early stopping and lacks only its manifest."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(stopping.wait_count >= stopping.patience for stopping in trainer.early_stopping_callbacks):
            trainer.should_stop = True


class NextEpoch(Callback):
    """Starts the next epoch if a fit with `max_steps` is resumed at the end of an epoch, as without `max_steps`.

    Lightning would end the finished epoch a second time, without validation.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        progress: Any = loop.epoch_progress
        if loop.restarting and progress.current.ready == progress.current.started == progress.current.processed:
            for counts in (progress.current, progress.total):
                counts.completed = counts.processed
            loop._restarting = loop.epoch_loop.restarting = False  # the setter keeps True with `max_steps`
            loop.reset_restart_stage()


class OwnFiles(Callback):
    """Ensures that best.ckpt, last.ckpt and the manifest in a folder belong to one fit.

    The first checkpoint deletes the files of an earlier fit. A resumed fit finds its best.ckpt in a moved folder.
    """

    def __init__(self) -> None:
        self.cleaned = False  # whether the files of an earlier fit are deleted

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saver = trainer.checkpoint_callback
        if not isinstance(saver, ModelCheckpoint) or not self._resumes(trainer, saver):
            return
        state = checkpoint.get("callbacks", {}).get(saver.state_key)
        if state is not None and state["dirpath"] != saver.dirpath:  # else Lightning resets the best score

            def moved(path: str) -> str:
                return path and str(Path(str(saver.dirpath)) / Path(path).name)

            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = moved(state[name])
            state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
            state["dirpath"] = saver.dirpath

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saver = trainer.checkpoint_callback
        if self.cleaned or not isinstance(saver, ModelCheckpoint):
            return
        self.cleaned = True
        if trainer.is_global_zero:
            folder = Path(str(saver.dirpath))
            for name in (MANIFEST,) if self._resumes(trainer, saver) else (MANIFEST, BEST, LAST):
                if str(folder / name) != saver._last_checkpoint_saved:  # weights only: no callback runs
                    (folder / name).unlink(missing_ok=True)

    def _resumes(self, trainer: Trainer, saver: ModelCheckpoint) -> bool:
        """Whether the fit resumes from a checkpoint in its own folder."""
        path = trainer.ckpt_path
        return path is not None and Path(path).resolve().parent == Path(str(saver.dirpath)).resolve()


class WriteManifest(Callback):
    """Writes manifest.json next to the checkpoints of a fit, only if it is complete and has a best.ckpt."""

    def __init__(self) -> None:
        self.seconds = 0.0  # of earlier runs of this fit

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds + time.monotonic() - self.started}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds = state["seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = trainer.checkpoint_callback
        log = trainer.log_dir  # on every process: Lightning broadcasts it
        smoke = trainer.fast_dev_run  # type: ignore[attr-defined]  # set outside Trainer.__init__
        if smoke or not isinstance(checkpoint, ModelCheckpoint) or trainer.interrupted:
            return
        if not trainer.is_global_zero:
            return
        folder, best, score = Path(str(checkpoint.dirpath)), checkpoint.best_model_path, checkpoint.best_model_score
        if not best or Path(best).resolve().parent != folder.resolve() or not Path(best).is_file():
            raise ValueError(
                f"the fit ended after {trainer.global_step} steps without a best.ckpt in {folder}, because "
                f"{checkpoint.monitor} was not logged, so no manifest is written; enable validation "
                "(trainer.limit_val_batches, trainer.check_val_every_n_epoch), or keep the last weights with "
                "--checkpoint.monitor null"
            )
        if (finish := getattr(pl_module, "finish_fit", None)) is not None:
            finish()  # if training was over before this fit was resumed
        facts: dict[str, Any] = {
            "monitor": checkpoint.monitor,
            "best": None if score is None else float(score),
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds": round(self.seconds + time.monotonic() - self.started, 1),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            UNTIL: getattr(trainer.datamodule, "until", "val"),  # type: ignore[attr-defined]  # set outside Trainer.__init__
            **getattr(pl_module, "manifest_facts", {}),
        }
        write_manifest(
            folder,
            type(pl_module).__name__.lower(),
            options={"config": str(Path(str(log)) / "config.yaml"), "seed": seed()},
            parents=getattr(trainer.datamodule, "parents", {}),  # type: ignore[attr-defined]  # set outside Trainer.__init__
            **facts,
        )
        print_fit(trainer, pl_module, folder / BEST, facts)
