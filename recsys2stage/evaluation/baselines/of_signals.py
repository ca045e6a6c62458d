"""Baselines that rank by one signal alone: transition graph, ItemKNN, EASE."""

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.baselines.base import Baseline, Scored
from recsys2stage.evaluation.baselines.counted import NOTHING, newest_items
from recsys2stage.options import check_integer
from recsys2stage.ranking.lists import without_repeats
from recsys2stage.ranking.signals import ease, graph, item_knn
from recsys2stage.ranking.signals.stored import StoredNeighbours

NO_VECTORS = np.zeros((0, 0), dtype=np.float32)  # these signals do not read the retriever's vectors
MAX_ITEMS = 1 << 16  # of EASE: their weights take 34 GB in double precision


def sum_scores(signal: StoredNeighbours, events: np.ndarray, weights: np.ndarray, size: int) -> Scored:
    """The sum of weight · score of each item over the stored neighbors of the events of its row.

    Args:
        signal: fitted.
        events: (B, L) items, 0 for none.
        weights: (B, L).
        size: V + 1.
    """
    event, items, scores = signal.pairs(events.reshape(-1), weights.reshape(-1))
    keys, inverse = np.unique(event // events.shape[1] * size + items, return_inverse=True)
    # float32 at the end: sums of the same scores in another order are the same
    return Scored(*np.divmod(keys, size), np.bincount(inverse, scores, len(keys)).astype(np.float32))


class TransitionGraph(Baseline):
    """Transition-graph heuristic (Han et al. 2026): rings of hops around the newest items, by feature similarity.

    Training-free; see the signal `TransitionGraph` for the score. Items in no ring follow by popularity.

    Args:
        hops: number of rings.
        items: number of newest events whose rings are used.
        weight: of the number of transitions, relative to the similarity of features.
        decay: weight of an event relative to the next newer one.
        edges: most frequent transitions used of each item.
        top: items with the largest scores kept per item.
    """

    def __init__(
        self,
        hops: int = 3,
        items: int = 2,
        weight: float = 1.0,
        decay: float = 0.1,
        edges: int = 256,
        top: int = 1000,
    ) -> None:
        self.signal = graph.TransitionGraph(0, hops, items, weight, decay, edges, top)
        self.hops, self.items, self.weight, self.decay, self.edges, self.top = hops, items, weight, decay, edges, top

    def fit(self, dataset: Dataset) -> "Baseline":
        super().fit(dataset)
        self.signal.fit(dataset, NO_VECTORS)
        return self

    def score(self, history: Ragged) -> Scored:
        events = newest_items(history, self.items)
        weights = np.broadcast_to(self.decay ** np.arange(self.items), events.shape)
        return sum_scores(self.signal, events, weights, self.size)


class ItemKNN(Baseline):
    """Item-based nearest neighbors (Sarwar et al. 2001): cosines of the users in common, summed over the history.

    Items that are no neighbor of the history follow by popularity.

    Args:
        neighbours: number of neighbors kept per item.
        shrink: added to the divisor of the cosine; takes weight from items of few users.
        decay: weight of an event relative to the next newer one; 1: all alike, as in the paper.
    """

    rows_in_flight = 32  # whole histories, each event with its neighbors

    def __init__(self, neighbours: int = 100, shrink: float = 10.0, decay: float = 1.0) -> None:
        self.signal = item_knn.ItemKNN(0, neighbours, shrink, decay=decay)
        self.neighbours, self.shrink, self.decay = neighbours, shrink, decay

    def fit(self, dataset: Dataset) -> "Baseline":
        super().fit(dataset)
        self.signal.fit(dataset, NO_VECTORS)
        return self

    def score(self, history: Ragged) -> Scored:
        events = distinct_items(history)
        weights = (events > 0) * self.decay ** np.arange(events.shape[1])
        return sum_scores(self.signal, events, weights, self.size)


class EASE(Baseline):
    """Embarrassingly shallow autoencoder (Steck 2019): the items of a user from the user's other items, in closed form.

    Items beyond the `items` most frequent ones have no weights and follow by popularity.

    Args:
        ridge: L2 penalty of the weights, relative to the mean number of users of an item.
        items: number of most frequent items that have weights; memory is quadratic in it, time of `fit` cubic.
    """

    rows_in_flight = 64  # each has scores of `items` items

    def __init__(self, ridge: float = 3.0, items: int = 8192) -> None:
        check_integer("items", items, 1, MAX_ITEMS, example=8192)
        self.signal = ease.EASE(0, ridge, items=items)
        self.ridge, self.items = ridge, items

    def fit(self, dataset: Dataset) -> "Baseline":
        super().fit(dataset)
        self.signal.fit(dataset, NO_VECTORS)
        self.scored = np.flatnonzero(self.signal.tables["row"])  # items of rows 1, 2, ...
        return self

    def score(self, history: Ragged) -> Scored:
        if not len(self.scored):
            return NOTHING
        row, weights = self.signal.tables["row"], self.signal.tables["weights"]
        events = row[distinct_items(history)]
        known, inverse = np.unique(events, return_inverse=True)
        sets = np.zeros((len(events), len(known)), dtype=np.float32)
        np.put_along_axis(sets, inverse.reshape(events.shape), 1, axis=1)
        scores = sets @ weights[known, 1:, 0].astype(np.float32)  # row 0, of items without weights, is 0
        rows, column = np.divmod(np.arange(scores.size), len(self.scored))
        some = (events > 0).any(axis=1)[rows]  # else there is nothing to predict from
        return Scored(rows[some], self.scored[column[some]], scores.reshape(-1)[some])


def distinct_items(history: Ragged) -> np.ndarray:
    """The distinct items of each history by their newest event, newest first, (B, L) int64; 0 for repeats and none."""
    longest = max(1, int(np.diff(history.offsets).max(initial=0)))
    return without_repeats(newest_items(history, longest)).clip(min=0)
