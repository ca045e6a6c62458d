"""Baselines that count: most popular items, first-order Markov chain, and the user's own most frequent items."""

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.baselines.base import Baseline, Scored
from recsys2stage.options import check_number
from recsys2stage.ranking.signals.graph import count_transitions

NOTHING = Scored(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))


class Popularity(Baseline):
    """Items by their number of training events."""

    def score(self, history: Ragged) -> Scored:
        return NOTHING


class Markov(Baseline):
    """Items by their number of transitions from the user's newest item (first-order Markov chain)."""

    def fit(self, dataset: Dataset) -> "Baseline":
        super().fit(dataset)
        self.offsets, self.next, self.counts = count_transitions(dataset)
        return self

    def score(self, history: Ragged) -> Scored:
        last = newest_items(history, 1)[:, 0]
        found = spans(self.offsets[last], self.offsets[last + 1])
        return Scored(found.rows, self.next[found.values], self.counts[found.values])


class PersonalTopFrequency(Baseline):
    """The user's own items by count, then by recency; others by popularity (GP-TopFreq of Li et al., TOIS 2023).

    For data prepared with `repeats: keep`, where a target may be an item of the history.

    Args:
        decay: weight of an event relative to the next newer one; 1 counts all events alike.
    """

    def __init__(self, decay: float = 1.0) -> None:
        check_number("decay", decay, above=0, high=1, example=1.0)
        self.decay = decay

    def fit(self, dataset: Dataset) -> "Baseline":
        if dataset.seen_rule != "keep":
            raise ValueError(
                f"PersonalTopFrequency ranks items of the history, but {dataset.path} has repeats: "
                f"{dataset.protocol['repeats']}, expected repeats: keep; leave it out, or prepare the data again"
            )
        return super().fit(dataset)

    def score(self, history: Ragged) -> Scored:
        rows = history.rows
        age = history.offsets[1:][rows] - 1 - np.arange(len(rows))  # 0 for the newest event
        keys, event, inverse = np.unique(
            (rows * self.size + history.values)[::-1], return_index=True, return_inverse=True
        )
        counts = np.bincount(inverse, self.decay ** age[::-1].astype(np.float64), len(keys))
        rows, items = np.divmod(keys, self.size)
        newest = age[::-1][event]  # of the item's newest event
        order = np.lexsort((-newest, counts, rows))
        scores = np.empty(len(keys))
        scores[order] = np.arange(len(keys))  # all distinct
        return Scored(rows, items, scores)


def newest_items(history: Ragged, count: int) -> np.ndarray:
    """The newest `count` items of each history, newest first, (B, count) int64, padded with 0."""
    place = history.offsets[1:, None] - 1 - np.arange(count)
    real = place >= history.offsets[:-1, None]
    values = np.append(history.values, 0).astype(np.int64)
    return np.where(real, values[np.where(real, place, -1)], 0)
