"""Validation metrics during training; a separate module, since only training should wait for torchmetrics to load."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric

from recsys2stage.metrics import KS


class RankMetrics(Metric):
    """Means of hr@k, ndcg@k and mrr over users, reduced across processes.

    Args:
        ks: cut-offs.
    """

    full_state_update = False
    hits: Tensor
    gains: Tensor
    reciprocal: Tensor
    users: Tensor

    def __init__(self, ks: Sequence[int] = KS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.add_state("hits", torch.zeros(len(self.ks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("gains", torch.zeros(len(self.ks), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("reciprocal", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, ranks: Int[Tensor, " B"]) -> None:
        rank = ranks.double()[:, None]
        hit = (rank <= torch.tensor(self.ks, device=rank.device)).double()
        # not in place: after `trainer.validate` the states are inference tensors, which a fit may not change
        self.hits = self.hits + hit.sum(0)
        self.gains = self.gains + (hit / torch.log2(1 + rank)).sum(0)
        self.reciprocal = self.reciprocal + (1 / rank).sum()
        self.users = self.users + len(ranks)

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Returns the means under prefixed names and resets the metric."""
        values = self.compute()
        self.reset()
        return {f"{prefix}{name}": value for name, value in values.items()}

    def compute(self) -> dict[str, Tensor]:
        users = self.users.clamp(min=1)
        values = {f"hr@{k}": hits / users for k, hits in zip(self.ks, self.hits, strict=True)}
        values |= {f"ndcg@{k}": gains / users for k, gains in zip(self.ks, self.gains, strict=True)}
        return {name: value.float() for name, value in (values | {"mrr": self.reciprocal / users}).items()}
