"""Baselines: most popular items and a first-order Markov chain, both counted on training events."""

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset


class Popularity:
    """Scores items by their number of training events."""

    def __init__(self, dataset: Dataset) -> None:
        self.counts = dataset.train_counts.astype(np.float32)

    def scores(self, last: np.ndarray) -> np.ndarray:
        """(B, V + 1) scores, the same for all users; `last` is each user's newest item, (B,)."""
        return np.broadcast_to(self.counts, (len(last), len(self.counts))).copy()


class Markov:
    """Scores items by their number of transitions from the user's newest item; popularity breaks ties."""

    def __init__(self, dataset: Dataset) -> None:
        starts, ends = np.asarray(dataset.offsets[:-1]), np.asarray(dataset.train_ends)
        first = spans(starts, np.maximum(ends - 1, starts)).values  # every training event but a user's last
        self.size = dataset.num_items + 1
        keys = dataset.items[first].astype(np.int64) * self.size + dataset.items[first + 1]
        keys, counts = np.unique(keys, return_counts=True)
        self.next, self.counts = keys % self.size, counts.astype(np.float32)
        self.offsets = np.searchsorted(keys, np.arange(self.size + 1) * self.size)
        popularity = dataset.train_counts.astype(np.float32)
        self.tie_break = popularity / (popularity.sum() + 1)  # below 1, so it never outweighs a transition

    def scores(self, last: np.ndarray) -> np.ndarray:
        """(B, V + 1) scores; `last` is each user's newest item, (B,), 0 without a history."""
        scores = np.broadcast_to(self.tie_break, (len(last), self.size)).copy()
        followers = spans(self.offsets[last], self.offsets[last + 1])
        np.add.at(scores, (followers.rows, self.next[followers.values]), self.counts[followers.values])
        return scores
