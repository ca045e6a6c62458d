"""Repeats: how often, how recently and at what interval the user has met a candidate before."""

from typing import NamedTuple

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_number
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import top_by_sum
from recsys2stage.retrieval.encoders.times import DAY


class Own(NamedTuple):
    """The different items of each history, (n,) each."""

    keys: np.ndarray  # row · (V + 1) + item, ascending
    events: np.ndarray  # int64, number of events
    weights: np.ndarray  # float64, sum of the weights of the events
    first: np.ndarray  # int64, seconds of the first event
    last: np.ndarray  # int64, seconds of the newest event


class Repeats(Proposer):
    """The candidate's own events in the history, for data prepared with `repeats: keep`.

    The values, all 0 for items that are not in the history:

    - own_events: log(1 + its events in the history);
    - own_recent: log(1 + Σ 2^(−age / half_life)) over these events;
    - own_gap: log(1 + seconds since the newest of them);
    - own_due: log of (days since the newest + 1) / (mean days between them + 1): above 0 if the item is overdue; 0 with
      fewer than two of them, or none at different times.

    Proposals are the items of the history by the same sum of weights (personal frequency).

    Args:
        candidates: number of items proposed for each request; 0: none.
        half_life: seconds in which the weight of an event falls to a half.
    """

    reads_allowed = True
    reads_times = True
    by_id = True
    names = ("own_events", "own_recent", "own_gap", "own_due")

    def __init__(self, candidates: int = 0, half_life: float | int = 60 * DAY) -> None:
        super().__init__(candidates)
        check_number("half_life", half_life, above=0, example=60 * DAY, what="seconds")
        self.half_life = half_life

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if not dataset.has_time:
            raise ValueError(f"{dataset.path} has an order and no times; leave Repeats out")
        self.tables = {}  # uses the request only

    def __call__(self, requests: Requests) -> np.ndarray:
        values = np.zeros((*requests.items.shape, len(self.names)), dtype=np.float32)
        own, size = self._own(requests), len(requests.vectors)
        if not len(own.keys):
            return values
        wanted = np.arange(len(requests.items))[:, None] * size + requests.items
        place = np.searchsorted(own.keys, wanted).clip(max=len(own.keys) - 1)
        found = (own.keys[place] == wanted) & (requests.items > 0)
        row, place = np.nonzero(found)[0], place[found]
        since = (requests.request_time[row] - own.last[place]).clip(min=0)
        between = (own.last[place] - own.first[place]) / np.maximum(own.events[place] - 1, 1)
        due = np.log((since + DAY) / (between + DAY))
        values[found] = np.stack(
            [
                np.log1p(own.events[place]),
                np.log1p(own.weights[place]),
                np.log1p(since),
                np.where(between > 0, due, 0),
            ],
            axis=1,
        )
        return values

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        own, size = self._own(requests), len(requests.vectors)
        rows, items = np.divmod(own.keys, size)
        scores = np.maximum(own.weights, np.finfo(np.float64).tiny)  # very old ones are still candidates
        return top_by_sum(rows, items, scores, excluded, size, self.candidates, requests.allowed)

    def _own(self, requests: Requests) -> Own:
        items, times = requests.history.items, requests.history.times
        real = np.arange(items.shape[1]) < np.asarray(requests.history.lengths)[:, None]
        real &= items > 0
        rows, seconds = np.nonzero(real)[0], times[real]
        keys = rows * len(requests.vectors) + items[real]
        order = np.argsort(keys, kind="stable")  # times stay ascending within an item
        keys, seconds, rows = keys[order], seconds[order], rows[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        if not len(starts):
            empty = np.zeros(0, np.int64)
            return Own(empty, empty, np.zeros(0), empty, empty)
        age = (requests.request_time[rows] - seconds).clip(min=0)
        ends = np.append(starts[1:], len(keys))
        weights = np.add.reduceat(np.exp2(-age / self.half_life), starts)
        return Own(keys[starts], ends - starts, weights, seconds[starts], seconds[ends - 1])
