"""Ranking metrics of one relevant item a user, all computed from its rank; ties count against us.

With one relevant item HR@k and Recall@k are the same number; both names are kept, since both are asked for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

KS = (10, 50, 100, 200)


def rank_of(scores: Float[Tensor, "B W"], target: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Rank of each row's target column, from 1.

    Every column whose score is not below the target's counts against it: ties, and NaN. Excluded columns hold −inf.
    A target that is itself −inf or NaN ranks last.
    """
    own = scores.gather(1, target[:, None])
    return (~(scores < own)).sum(1)


def metrics_of(ranks: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Each user's metrics, (B,) float64: hr@k = [rank ≤ k], ndcg@k = [rank ≤ k] / log2(1 + rank), mrr = 1 / rank."""
    ranks = ranks.astype(np.float64)
    gain = 1 / np.log2(1 + ranks)
    values: dict[str, np.ndarray] = {}
    for k in ks:
        hit = (ranks <= k).astype(np.float64)
        values |= {f"hr@{k}": hit, f"ndcg@{k}": hit * gain, f"recall@{k}": hit}
    return values | {"mrr": 1 / ranks}


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
        """The means under prefixed names; starts anew."""
        values = self.compute()
        self.reset()
        return {f"{prefix}{name}": value for name, value in values.items()}

    def compute(self) -> dict[str, Tensor]:
        users = self.users.clamp(min=1)
        values = {f"hr@{k}": hits / users for k, hits in zip(self.ks, self.hits, strict=True)}
        values |= {f"ndcg@{k}": gains / users for k, gains in zip(self.ks, self.gains, strict=True)}
        return {name: value.float() for name, value in (values | {"mrr": self.reciprocal / users}).items()}


def bootstrap(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of `resamples` samples of users drawn with replacement (Efron 1979), (R, K).

    All K columns of one resample see the same users, so the difference of two columns is a paired bootstrap.

    Args:
        values: (B, K) per-user values.
    """
    rng = np.random.default_rng(seed)
    users = len(values)
    means = np.empty((resamples, values.shape[1]))
    for r in range(resamples):
        means[r] = np.bincount(rng.integers(users, size=users), minlength=users) @ values / users
    return means


def interval(means: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The central `level` of bootstrap means, (K,) low and (K,) high."""
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high
