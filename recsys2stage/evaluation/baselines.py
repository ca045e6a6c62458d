"""Baselines: most popular items and a first-order Markov chain, both counted on training events.

Their scores are looked up, so ranks and best items take no pass over the catalogue.
"""

from abc import ABC, abstractmethod

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset


class Baseline(ABC):
    """Ranks items by what was counted in training events.

    `last` is each user's newest item, (B,), 0 without a history; `excluded` are the items that are not ranked,
    distinct in each row.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.size = dataset.num_items + 1
        self.popularity = dataset.train_counts.astype(np.float32)
        self.most_popular = 1 + np.argsort(-self.popularity[1:], kind="stable")

    @abstractmethod
    def scores(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Scores of (B, N) items, (B, N) float32."""

    @abstractmethod
    def _not_below(self, last: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Number of items 1..V whose score is not below each user's score, (B,) int64."""

    @abstractmethod
    def top(self, last: np.ndarray, excluded: Ragged, count: int) -> np.ndarray:
        """The best items, best first, (B, count) int64, padded with −1; ties go to the lower item number."""

    def ranks(self, last: np.ndarray, target: np.ndarray, excluded: Ragged) -> np.ndarray:
        """Rank of each target, (B,) int64 from 1; ties count against it, and an excluded target ranks last."""
        rows, values = excluded.rows, excluded.values
        own = self.scores(last, target[:, None])[:, 0]
        above = self.scores(last[rows], values[:, None])[:, 0] >= own[rows]
        ranks = self._not_below(last, own) - np.bincount(rows[above], minlength=len(target))
        ranks[rows[values == target[rows]]] = self.size - 1
        return ranks

    def _first(self, ordered: np.ndarray, mask: np.ndarray, excluded: np.ndarray, count: int) -> np.ndarray:
        """The first `count` items of an order that are not excluded.

        Args:
            ordered: items, best first.
            mask: (V + 1,) all False, to mark items in; left as it was.
            excluded: distinct items: of the order, at most that many are left out.
        """
        head = ordered[: count + len(excluded)]
        mask[excluded] = True
        head = head[~mask[head]][:count]
        mask[excluded] = False
        return head


class Popularity(Baseline):
    """Scores items by their number of training events."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.ascending = np.sort(self.popularity[1:])

    def scores(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        return self.popularity[items]

    def _not_below(self, last: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return self.size - 1 - np.searchsorted(self.ascending, scores)

    def top(self, last: np.ndarray, excluded: Ragged, count: int) -> np.ndarray:
        top, mask = np.full((len(last), count), -1, dtype=np.int64), np.zeros(self.size, dtype=bool)
        for row, (begin, end) in enumerate(zip(excluded.offsets[:-1], excluded.offsets[1:], strict=True)):
            best = self._first(self.most_popular, mask, excluded.values[begin:end], count)
            top[row, : len(best)] = best
        return top


class Markov(Baseline):
    """Scores items by their number of transitions from the user's newest item; popularity breaks ties."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        starts, ends = np.asarray(dataset.offsets[:-1]), np.asarray(dataset.train_ends)
        first = spans(starts, np.maximum(ends - 1, starts)).values  # every training event but a user's last
        keys = dataset.items[first].astype(np.int64) * self.size + dataset.items[first + 1]
        self.keys, counts = np.unique(keys, return_counts=True)
        self.next, self.counts = self.keys % self.size, counts.astype(np.float32)
        self.offsets = np.searchsorted(self.keys, np.arange(self.size + 1) * self.size)
        # below 1, so it never outweighs a transition
        self.tie_break = self.popularity / (self.popularity.sum() + 1)
        self.ascending = np.sort(self.tie_break[1:])

    def scores(self, last: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = last[:, None] * self.size + items
        index = np.searchsorted(self.keys, keys).clip(max=max(len(self.keys) - 1, 0))
        if not len(self.keys):
            return self.tie_break[items]
        return self.tie_break[items] + np.where(self.keys[index] == keys, self.counts[index], np.float32(0))

    def _not_below(self, last: np.ndarray, scores: np.ndarray) -> np.ndarray:
        number = self.size - 1 - np.searchsorted(self.ascending, scores)  # by popularity alone
        for row, (item, score) in enumerate(zip(last.tolist(), scores, strict=True)):
            followers = slice(self.offsets[item], self.offsets[item + 1])
            popularity = self.tie_break[self.next[followers]]
            number[row] += np.count_nonzero(popularity + self.counts[followers] >= score)
            number[row] -= np.count_nonzero(popularity >= score)
        return number

    def top(self, last: np.ndarray, excluded: Ragged, count: int) -> np.ndarray:
        top, mask = np.full((len(last), count), -1, dtype=np.int64), np.zeros(self.size, dtype=bool)
        for row, item in enumerate(last.tolist()):
            own = excluded.values[excluded.offsets[row] : excluded.offsets[row + 1]]
            followers = self.next[self.offsets[item] : self.offsets[item + 1]]
            mask[own] = True
            followers = followers[~mask[followers]]
            mask[own] = False
            best = self._best(item, followers, count)
            if len(best) < count:  # every follower has a higher score than any other item
                others = self._first(self.most_popular, mask, np.concatenate([own, best]), count - len(best))
                best = np.concatenate([best, others])
            top[row, : len(best)] = best
        return top

    def _best(self, last: int, items: np.ndarray, count: int) -> np.ndarray:
        """The `count` best of (n,) items."""
        scores = self.scores(np.full(1, last), items[None])[0]
        if len(items) > count:
            kept = scores >= np.partition(scores, len(scores) - count)[len(scores) - count]
            items, scores = items[kept], scores[kept]
        return items[np.lexsort((items, -scores))][:count]
