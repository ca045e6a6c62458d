"""The optimiser both stages start from."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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


def with_warmup(optimizer: Optimizer, steps: int) -> OptimizerLRSchedulerConfig:
    """What Lightning's configure_optimizers returns: the learning rate rises linearly over `steps`, then stays."""
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(steps, 1)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
