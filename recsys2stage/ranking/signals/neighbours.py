"""How near a candidate is to what the user took lately, by the retriever's item vectors."""

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.base import Proposer, Requests, unit
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, best, cut

NUMBERS_IN_FLIGHT = 1 << 22  # of vectors or marks that are looked at together


class Neighbours(Proposer):
    """Cosines of a candidate and the newest items, and how much of its neighbourhood the history holds.

    The numbers are the cosine to the newest item; of the cosines to the `history` newest items the largest, the mean of
    the largest three and the mean; and the share of the candidate's `count` nearest items that is among all events of
    the history. Missing events are left out, and without a history all are 0. An item whose vector is zero
    has cosine 0 to all, is near to none and has none near.

    Proposals are the nearest items of the newest items, by the sum of decay^place · cosine.

    Args:
        candidates: how many it names at each request; 0: none.
        history: newest events that are looked at.
        count: nearest items kept of each item.
        decay: weight of an event's neighbours in comparison to those of the one after it.
    """

    by_id = True
    names = ("cosine_newest", "cosine_max", "cosine_best_3", "cosine_mean", "neighbours_seen")

    def __init__(self, candidates: int = 0, history: int = 10, count: int = 20, decay: float = 0.8) -> None:
        super().__init__(candidates)
        if min(history, count) < 1:
            raise ValueError(f"history is {history} and count {count}, expected at least 1 each")
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}, expected 0 < decay <= 1")
        self.history, self.count, self.decay = history, count, decay

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        vectors = unit(np.asarray(vectors))
        there = np.flatnonzero(vectors.any(axis=1))  # the others are near to nothing
        there = there[there > 0]
        own, width = vectors[there], min(self.count, max(len(there) - 1, 0))
        nearest = np.zeros((len(vectors), width), dtype=np.int32)
        cosines = np.zeros((len(vectors), width), dtype=np.float32)
        block = max(1, 4 * NUMBERS_IN_FLIGHT // max(len(there), 1))
        for begin in range(0, len(there) if width else 0, block):  # never all pairs at once
            cosine = own[begin : begin + block] @ own.T
            row = np.arange(len(cosine))
            cosine[row, begin + row] = -np.inf
            near = np.argpartition(cosine, -width, axis=1)[:, -width:]
            near_cosine = np.take_along_axis(cosine, near, axis=1)
            order = np.argsort(-near_cosine, axis=1)
            nearest[there[begin + row]] = there[np.take_along_axis(near, order, axis=1)]
            cosines[there[begin + row]] = np.take_along_axis(near_cosine, order, axis=1)
        self.tables = {"nearest": nearest, "cosines": cosines}

    def __call__(self, requests: Requests) -> np.ndarray:
        items, (newest, _) = requests.items.clip(min=0), requests.newest(self.history)
        numbers = np.zeros((*items.shape, len(self.names)), dtype=np.float32)
        block = max(1, NUMBERS_IN_FLIGHT // max(requests.vectors.shape[1] * items.shape[1], len(requests.vectors)))
        for begin in range(0, len(items), block):
            rows = slice(begin, begin + block)
            numbers[rows, :, :4] = self._cosines(requests.vectors, items[rows], newest[rows])
            numbers[rows, :, 4] = self._seen(items[rows], requests.history.items[rows], len(requests.vectors))
        numbers[items == 0] = 0
        return numbers

    def _cosines(self, vectors: np.ndarray, items: np.ndarray, newest: np.ndarray) -> np.ndarray:
        """To the newest item, the largest, the mean of the best three and of all, (B, C, 4)."""
        cosine = unit(vectors[items]) @ unit(vectors[newest]).swapaxes(1, 2)  # (B, C, history)
        real = newest > 0
        some = np.any(real, axis=1)[:, None]
        number = np.maximum(real.sum(axis=1), 1)[:, None]
        mean = cosine.sum(axis=2) / number  # missing events have zero vectors
        ordered = -np.sort(-np.where(real[:, None], cosine, -np.inf), axis=2)[..., :3]
        three = np.where(np.isfinite(ordered), ordered, 0).sum(axis=2) / np.minimum(number, 3)
        return np.stack([cosine[..., 0], np.where(some, ordered[..., 0], 0), three, mean], axis=-1)

    def _seen(self, items: np.ndarray, history: np.ndarray, size: int) -> np.ndarray:
        """Share of the nearest items of each that the history holds, (B, C)."""
        nearest = np.asarray(self.tables["nearest"])
        row = np.arange(len(items))[:, None]
        seen = np.zeros((len(items), size), dtype=bool)  # of a few requests: a mark is found faster than searched
        seen[row, history] = True
        seen[:, 0] = False
        return seen[row[..., None], nearest[items]].sum(axis=2) / max(nearest.shape[1], 1)

    def propose(self, requests: Requests, known: Ragged) -> np.ndarray:
        newest, _ = requests.newest(self.history)
        nearest, cosines = self.tables["nearest"], self.tables["cosines"]
        weights = self.decay ** np.arange(self.history)
        parts = []
        for begin in range(0, len(newest), ROWS_IN_FLIGHT):
            items = newest[begin : begin + ROWS_IN_FLIGHT]
            near, scores = nearest[items], weights[:, None] * cosines[items]  # (B, history, nearest)
            rows = np.broadcast_to(np.arange(len(items))[:, None, None], near.shape)
            real = scores > 0  # who is on the other side is no neighbour
            few = cut(known, begin, begin + len(items))
            parts.append(best(rows[real], near[real], scores[real], few, len(nearest), self.candidates))
        return np.concatenate([*parts, np.zeros((0, self.candidates), np.int64)])
