"""Neighbours: similarity of a candidate to the newest items, by the retriever's item vectors."""

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import MAX_LENGTH, check_integer, check_number
from recsys2stage.ranking.signals.base import Proposer, Requests, unit
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, item_marks, slice_rows, top_by_sum
from recsys2stage.ranking.signals.nearest import nearest_vectors

NUMBERS_IN_FLIGHT = 1 << 22  # array elements per block


class Neighbours(Proposer):
    """Cosines of a candidate and the newest items, and the share of its nearest items that are in the history.

    The values are the cosine to the newest item; the maximum, the mean of the top 3 and the mean of the cosines to the
    `history` newest items; and the share of the candidate's `count` nearest items that occur in the whole history.
    All are 0 without a history. An item with a zero vector has cosine 0 to all items, and no neighbors.

    Proposals are the nearest items of the newest items, by the sum of decay^k · cosine, k = 0 for the newest.

    Args:
        candidates: number of items proposed for each request; 0: none.
        history: number of newest events to use.
        count: number of nearest items stored per item.
        decay: weight of an event relative to the next newer one.
        exact: largest catalogue whose nearest items are found by comparing all pairs. In a larger one they are looked
            for in the 32 nearest of √V clusters, which takes minutes instead of hours for a million items and misses
            some.
    """

    reads_allowed = True
    by_id = True
    names = ("cosine_newest", "cosine_max", "cosine_best_3", "cosine_mean", "neighbours_seen")

    def __init__(
        self, candidates: int = 0, history: int = 10, count: int = 20, decay: float = 0.8, exact: int = 100_000
    ) -> None:
        super().__init__(candidates)
        check_integer("history", history, 1, MAX_LENGTH, example=10)
        check_integer("count", count, example=20)
        check_number("decay", decay, above=0, high=1, example=0.8)
        check_integer("exact", exact, 0, example=100_000)
        self.history, self.count, self.decay, self.exact = history, count, decay, exact

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        nonzero = np.flatnonzero(vectors.any(axis=1))  # items with a zero vector have no neighbors
        nonzero = nonzero[nonzero > 0]
        own = vectors[nonzero]
        length = np.sqrt(np.einsum("vd,vd->v", own, own))[:, None]
        own /= np.where(length > 0, length, 1)  # in place: a catalogue may be large
        width = min(self.count, max(len(nonzero) - 1, 0))
        rows, cosine = nearest_vectors(own, width, self.exact)
        nearest = np.zeros((len(vectors), width), dtype=np.int32)
        cosines = np.zeros((len(vectors), width), dtype=np.float32)
        nearest[nonzero], cosines[nonzero] = nonzero[rows], cosine
        self.restore({"nearest": nearest, "cosines": cosines})

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        super().restore(tables)
        self._lengths: tuple[np.ndarray, np.ndarray] | None = None  # item vectors, and their lengths

    def _lengths_of(self, vectors: np.ndarray) -> np.ndarray:
        """The lengths of the item vectors, (V + 1,) float32, 1 for zero vectors; the last ones are kept."""
        held = self._lengths
        if held is None or held[0] is not vectors:
            length = np.sqrt(np.einsum("vd,vd->v", vectors, vectors))
            self._lengths = held = vectors, np.where(length > 0, length, np.float32(1))
        return held[1]

    def __call__(self, requests: Requests) -> np.ndarray:
        items, newest = np.maximum(requests.items, 0), requests.newest_items(self.history)
        values = np.zeros((*items.shape, len(self.names)), dtype=np.float32)
        block = max(1, NUMBERS_IN_FLIGHT // max(requests.vectors.shape[1] * items.shape[1], 1))
        for begin in range(0, len(items), block):
            rows = slice(begin, begin + block)
            values[rows, :, :4] = self._cosines(requests.vectors, items[rows], newest[rows])
            values[rows, :, 4] = self._seen(items[rows], requests.history.items[rows], len(requests.vectors))
        values[items == 0] = 0
        return values

    def _cosines(self, vectors: np.ndarray, items: np.ndarray, newest: np.ndarray) -> np.ndarray:
        """Cosine to the newest item, maximum, mean of the top 3 and mean, (B, C, 4)."""
        cosine = vectors.take(items, axis=0) @ unit(vectors[newest]).swapaxes(1, 2)  # (B, C, history)
        cosine /= self._lengths_of(vectors)[items][..., None]
        real = newest > 0
        number = np.maximum(real.sum(axis=1), 1)[:, None]
        values = np.empty((*items.shape, 4), dtype=np.float32)
        values[..., 0] = cosine[..., 0]
        values[..., 3] = cosine.sum(axis=2) / number  # missing events have zero vectors
        if not real.all():
            cosine[np.broadcast_to(~real[:, None], cosine.shape)] = -np.inf
        cosine.sort(axis=2)
        best = cosine[..., :-4:-1]
        best = np.where(np.isfinite(best), best, 0)
        values[..., 1] = best[..., 0]
        values[..., 2] = best.sum(axis=2) / np.minimum(number, 3)
        return values

    def _seen(self, items: np.ndarray, history: np.ndarray, size: int) -> np.ndarray:
        """Share of each item's nearest items that occur in the history, (B, C)."""
        nearest, share = self.tables["nearest"], np.empty(items.shape)
        with item_marks(size) as marks:
            for row, (own, events) in enumerate(zip(items, history, strict=True)):
                marks[events] = 1
                marks[0] = 0
                share[row] = marks[nearest.take(own, axis=0)].sum(axis=1)
                marks[events] = 0
        return share / max(nearest.shape[1], 1)

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        newest = requests.newest_items(self.history)
        nearest, cosines = self.tables["nearest"], self.tables["cosines"]
        weights = self.decay ** np.arange(self.history)
        parts = []
        for begin in range(0, len(newest), ROWS_IN_FLIGHT):
            items = newest[begin : begin + ROWS_IN_FLIGHT]
            near, scores = nearest[items], weights[:, None] * cosines[items]  # (B, history, nearest)
            rows = np.broadcast_to(np.arange(len(items))[:, None, None], near.shape)
            real = scores > 0  # items with a negative cosine are no neighbors
            own = slice_rows(excluded, begin, begin + len(items))
            allowed = None if requests.allowed is None else requests.allowed[begin : begin + len(items)]
            parts.append(top_by_sum(rows[real], near[real], scores[real], own, len(nearest), self.candidates, allowed))
        return np.concatenate([*parts, np.zeros((0, self.candidates), np.int64)])
