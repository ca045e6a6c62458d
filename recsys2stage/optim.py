"""The optimiser both stages start from, and how its learning rate goes."""

import math
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recsys2stage import __version__
from recsys2stage.artifacts import check_format
from recsys2stage.checkpoints import OPTIONS, SPLIT, VERSIONS, load_checkpoint, sign
from recsys2stage.trust import arguments, trusting


class RecsysAdamW(torch.optim.AdamW):
    """AdamW as in nanoRecSys: a quick second moment and no weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate after warm-up.
        betas: decay of the first and second moment.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        # a fused step can unscale float16 gradients itself, and Lightning then refuses to clip them; without this mark
        # they are unscaled before the step, as for any other optimiser, and bf16 has no scale at all
        self._step_supports_amp_scaling = False


class Planned(LightningModule):
    """A module that knows how much of its run is done, for what changes on the way."""

    planned_steps = float("inf")  # of the whole run

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sign(checkpoint, self._split_hash, __version__)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format, and one that was trained on other events than these data train on."""
        make = f"recsys fit, with the model {type(self).__name__}"
        check_format(Path("the checkpoint"), checkpoint.get("format"), checkpoint.get(VERSIONS), make)
        own, other = self._split_hash, checkpoint.get(SPLIT)
        if own is not None and own != other:
            raise ValueError(
                f"the checkpoint was trained on data with split hash {str(other)[:12]}…, but these have {own[:12]}…: "
                f"their test events may have been trained on; fit again: {make}"
            )

    @property
    def _split_hash(self) -> str | None:
        """Of the data this module is trained or measured on; None where its data module has none."""
        return getattr(getattr(self._trainer, "datamodule", None), "split_hash", None)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, trust: Sequence[str] = (), **options: Any
    ) -> Any:
        """As Lightning's, but never a class that the file names and this package or a module in `trust` has not."""
        make, taken = f"recsys fit, with the model {cls.__name__}", signature(cls).parameters
        stored = load_checkpoint(checkpoint_path, make)[OPTIONS]
        with trusting(trust):
            arguments(cls, {name: value for name, value in stored.items() if name in taken}, checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **options})

    def on_train_start(self) -> None:
        self.planned_steps = float(self.trainer.estimated_stepping_batches)

    @property
    def progress(self) -> float:
        """The share of the planned steps that is done."""
        return min(1.0, self.global_step / self.planned_steps) if self._trainer else 0.0

    def needs_an_end(self, what: str) -> None:
        """Refuses a run without an end, by the share of which something changes."""
        if self.planned_steps == float("inf"):
            raise ValueError(
                f"{what} changes with the share of the run that is done, and this run has no end; "
                "set trainer.max_epochs or trainer.max_steps"
            )


def with_schedule(
    optimizer: Optimizer, warmup: int, final: float = 1.0, progress: Callable[[], float] = lambda: 0.0
) -> OptimizerLRSchedulerConfig:
    """What Lightning's configure_optimizers returns: the learning rate rises linearly, then falls along a half cosine.

    Args:
        optimizer: with the learning rate at its highest.
        warmup: steps of the rise.
        final: share of the learning rate that is left at the end (Loshchilov & Hutter 2017, without restarts); 1: all.
        progress: how much of the run is done, from 0 to 1.
    """
    if not 0 <= final <= 1:
        raise ValueError(f"final_lr is {final}, expected a share of the learning rate, from 0 to 1")

    def share(step: int) -> float:
        return min(1.0, (step + 1) / max(warmup, 1)) * (final + (1 - final) * (1 + math.cos(math.pi * progress())) / 2)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"}}
