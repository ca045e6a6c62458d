"""Optimiser, learning-rate schedule and base LightningModule of both stages."""

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
from recsys2stage.checkpoints import OPTIONS, SPLIT, VERSIONS, add_metadata, load_checkpoint
from recsys2stage.options import check_integer, check_number, is_number
from recsys2stage.trust import arguments, trusting


class RecsysAdamW(torch.optim.AdamW):
    """AdamW as in nanoRecSys: β₂ = 0.98 and no weight decay.

    Args:
        params: parameters or parameter groups.
        lr: learning rate after warm-up.
        betas: decay rates of the first and second moment.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        check_number("lr", lr, low=0, high=1e3, example=1e-3)
        check_number("weight_decay", weight_decay, low=0, high=1e3, example=0.01)
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not (pair and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"betas is {betas!r}, expected two numbers from 0 to below 1; set betas to [0.9, 0.98], for example"
            )
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        # a fused step can unscale float16 gradients itself, and Lightning then refuses to clip them; with this flag off
        # they are unscaled before the step, as for any other optimiser; bf16 needs no scaling
        self._step_supports_amp_scaling = False


class RecsysModule(LightningModule):
    """Base module of both stages: training progress, checkpoint metadata, loading without untrusted code."""

    planned_steps = float("inf")  # optimiser steps of the whole run

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        add_metadata(checkpoint, self._split_hash, __version__)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another format, or one trained on another split."""
        make = f"recsys fit, with the model {type(self).__name__}"
        check_format(Path("the checkpoint"), checkpoint.get("format"), checkpoint.get(VERSIONS), make)
        own, other = self._split_hash, checkpoint.get(SPLIT)
        if own is not None and own != other:
            raise ValueError(
                f"the checkpoint was trained on data with split hash {str(other)[:12]}…, but this data has "
                f"{own[:12]}…: its test events may have been trained on; fit again: {make}"
            )

    @property
    def _split_hash(self) -> str | None:
        """Split hash of the data module; None if it has none."""
        return getattr(getattr(self._trainer, "datamodule", None), "split_hash", None)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # one more argument, trust
        cls, checkpoint_path: str | Path, *args: Any, trust: Sequence[str] = (), **options: Any
    ) -> Any:
        """As in Lightning, but only with classes of this package and of modules in `trust`."""
        make, taken = f"recsys fit, with the model {cls.__name__}", signature(cls).parameters
        stored = load_checkpoint(checkpoint_path, make)[OPTIONS]
        with trusting(trust):
            arguments(cls, {name: value for name, value in stored.items() if name in taken}, checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **options})

    def on_train_start(self) -> None:
        self.planned_steps = float(self.trainer.estimated_stepping_batches)

    @property
    def progress(self) -> float:
        """Share of the planned steps done, from 0 to 1."""
        return min(1.0, self.global_step / self.planned_steps) if self._trainer else 0.0

    def require_planned_steps(self, what: str) -> None:
        """Raises a ValueError for a run of unknown length: `what` is a schedule over the progress of the run."""
        if self.planned_steps == float("inf"):
            raise ValueError(
                f"{what} is scheduled over the whole run, but this run has no planned end; set trainer.max_epochs or "
                "trainer.max_steps"
            )


def check_schedule(warmup: int, final: float) -> None:
    """Raises a ValueError for an invalid schedule of the learning rate; arguments as in `with_schedule`."""
    check_integer("warmup_steps", warmup, 0, example=100)
    check_number("final_lr", final, low=0, high=1, example=0.1, what="a share of the learning rate,")


def with_schedule(
    optimizer: Optimizer, warmup: int, final: float = 1.0, progress: Callable[[], float] = lambda: 0.0
) -> OptimizerLRSchedulerConfig:
    """Return value of Lightning's configure_optimizers, with linear warm-up and cosine decay.

    Args:
        optimizer: with the peak learning rate.
        warmup: warm-up steps.
        final: final share of the learning rate (Loshchilov & Hutter 2017, without restarts); 1: no decay.
        progress: returns the share of the run that is done, from 0 to 1.
    """
    check_schedule(warmup, final)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(warmup, 1)) * (final + (1 - final) * (1 + math.cos(math.pi * progress())) / 2)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
