"""The items that each target of a batch is ranked among: the catalogue without excluded items, or sampled negatives."""

from typing import NamedTuple

import numpy as np
import torch

from recsys2stage.data.batches import Ragged
from recsys2stage.evaluation.baselines import Baseline
from recsys2stage.retrieval.catalogue_ranks import catalogue_ranks


class RankedItems(NamedTuple):
    """The items that each of B targets is ranked among. V: number of items."""

    target: np.ndarray  # (B,)
    size: int  # V + 1
    excluded: Ragged  # items that are filtered, ascending and distinct in each row
    negatives: np.ndarray | None  # (B, N) sampled items, padded with −1; None: all items that are not excluded

    @classmethod
    def of(
        cls, filtered: Ragged, target: np.ndarray, num_items: int, users: np.ndarray, negatives: int | None, seed: int
    ) -> "RankedItems":
        """
        Args:
            filtered: seen items that are filtered for each user.
            target: (B,) items.
            num_items: V.
            users: (B,) user numbers, which seed the samples.
            negatives: number of items sampled for each user; None: full ranking.
            seed: of the samples.
        """
        excluded = distinct(filtered, num_items + 1)
        sampled = None if negatives is None else sample_negatives(excluded, target, num_items, users, negatives, seed)
        return cls(target, num_items + 1, excluded, sampled)

    def holds(self, items: np.ndarray) -> np.ndarray:
        """Which of (B, K) items are ranked; False for padding (0 and below)."""
        row = np.arange(len(items))[:, None] * self.size
        if self.negatives is None:
            excluded = np.isin(row + items, self.excluded.rows * self.size + self.excluded.values)
            return (items > 0) & ~excluded
        ranked = np.concatenate([self.negatives, self.target[:, None]], axis=1)
        return (items > 0) & np.isin(row + items, (row + ranked)[ranked > 0])

    def baseline_ranks(self, baseline: Baseline, history: Ragged) -> np.ndarray:
        """Ranks of the targets by a baseline, (B,) int64; ties count against them.

        Args:
            history: items of each user, oldest first.
        """
        if self.negatives is None:
            return baseline.ranks(history, self.target, self.excluded)
        above = baseline.not_below(history, self.target, np.maximum(self.negatives, 0))
        return 1 + (above & (self.negatives > 0)).sum(1)

    def retriever_ranks(
        self, queries: np.ndarray, vectors: torch.Tensor, items: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks of the targets by the retriever; ties count against them.

        Args:
            queries: (B, D).
            vectors: (V, D) of items 1..V.
            items: (B, K) further items to score, padded with −1.
            top: number of best items, in full ranking.

        Returns:
            (B,) int64 ranks, (B, 1 + K) scores of the target and the further items, −inf for padding and, in full
            ranking, excluded items, and the best items, (B, top), padded with −1; (B, 0) with sampled negatives.
        """
        own = np.concatenate([self.target[:, None], items], axis=1)
        batch, width = torch.from_numpy(queries), own.shape[1]
        if self.negatives is not None:
            nothing = torch.zeros(0, dtype=torch.int64)
            scored = torch.from_numpy(np.concatenate([own, self.negatives], axis=1))
            scores = catalogue_ranks(batch, vectors, nothing, nothing, scored, ranked=0).scores.numpy()
            ranks = 1 + (scores[:, width:] >= scores[:, :1]).sum(1)
            return ranks, scores[:, :width], np.zeros((len(own), 0), dtype=np.int64)
        rows, excluded = (torch.from_numpy(values) for values in (self.excluded.rows, self.excluded.values))
        found = catalogue_ranks(batch, vectors, rows, excluded, torch.from_numpy(own), ranked=1, top=top)
        return found.ranks[:, 0].numpy(), found.scores.numpy(), found.top.numpy()


def distinct(ragged: Ragged, size: int) -> Ragged:
    """Each row's distinct values, ascending.

    Args:
        ragged: values from 0 to size - 1.
    """
    rows, values = np.divmod(np.unique(ragged.rows * size + ragged.values), size)
    return Ragged(values, np.searchsorted(rows, np.arange(len(ragged.offsets))))


def sample_negatives(
    excluded: Ragged, target: np.ndarray, num_items: int, users: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Items sampled uniformly without replacement, neither excluded nor the target, (B, count), padded with −1.

    A sample depends on the seed and the user only. All items are sampled if fewer than `count` are left.

    Args:
        excluded: ascending and distinct in each row.
        target: (B,) items.
        num_items: V.
        users: (B,) user numbers.
        count: number of items for each user.
        seed: of the samples.
    """
    negatives = np.full((len(users), count), -1, dtype=np.int64)
    for row, user in enumerate(users.tolist()):
        # the target may be among the excluded
        own = np.union1d(excluded.values[excluded.offsets[row] : excluded.offsets[row + 1]], target[row])
        left = num_items - len(own)
        number = np.random.default_rng([seed, user]).choice(left, min(count, left), replace=False)
        # of the items that are left, in order, number n is n + 1 and one more for each other item before it
        sampled = number + 1 + np.searchsorted(own - np.arange(len(own)), number + 1, side="right")
        negatives[row, : len(sampled)] = sampled
    return negatives
