"""The targets of a report and their requests: with baskets, all targets of a basket are one request."""

from typing import NamedTuple

import numpy as np

from recsys2stage.data.dataset import At, Dataset
from recsys2stage.metrics import compute_basket_metrics, compute_metrics

BASKET, GAP = "basket", "gap"  # columns of ranks.parquet, with baskets and with times


class Targets(NamedTuple):
    """B targets of G requests. Without baskets each target is a request, so G = B."""

    users: np.ndarray  # (B,) user of each target
    events: np.ndarray  # (B,) index of each target among all events
    baskets: np.ndarray | None  # (B,) number of each target's basket, ascending; None: no baskets

    @classmethod
    def of(cls, dataset: Dataset, users: np.ndarray, at: At) -> "Targets":
        """
        Args:
            dataset: prepared dataset.
            users: (B,) user of each target.
            at: (B,) indices of the targets, or `val` or `test` for each user's (first) target.
        """
        events = dataset.indices_at(users, at)
        return cls(users, events, dataset.ends(users, events) if dataset.baskets else None)

    def metrics(self, ranks: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of each request, (G,) float64, from the (B,) ranks of the targets."""
        return compute_metrics(ranks) if self.baskets is None else compute_basket_metrics(ranks, self.baskets)

    def weights(self) -> np.ndarray | None:
        """Weight of each target in a mean over requests, (B,) float64: 1 / size of its basket; None: equal ones."""
        if self.baskets is None:
            return None
        _, basket, sizes = np.unique(self.baskets, return_inverse=True, return_counts=True)
        return 1 / sizes[basket]

    def requests(self) -> "Targets":
        """One target of each request, in the order of `metrics`."""
        if self.baskets is None:
            return self
        _, first = np.unique(self.baskets, return_index=True)
        return Targets(self.users[first], self.events[first], self.baskets[first])


def gaps(dataset: Dataset, targets: Targets) -> np.ndarray:
    """Seconds from the newest event of each target's history to the target, (B,) int64; −1 without a history."""
    ends = dataset.ends(targets.users, targets.events)
    gap = np.asarray(dataset.times[targets.events]) - dataset.times[np.maximum(ends - 1, 0)]
    return np.where(ends > dataset.offsets[targets.users], gap, -1)
