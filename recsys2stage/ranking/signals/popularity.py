"""PopularityAsOf: item popularity at request time, from the training events before the request only."""

from collections.abc import Sequence

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_integers
from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import item_marks
from recsys2stage.retrieval.encoders.times import DAY, WEEK

HOUR = 3_600
LOOKS = 32  # events per item in a window from which counting by item is faster than counting by event
KEPT = 1 << 21  # items in the lists of windows that are kept, 4 bytes each


class PopularityAsOf(Proposer):
    """Exact counts of an item's training events strictly before the request.

    The values are log(1 + n_w) for each window w and for all time, and

    - trend: log((n_w + 1) / (n · min(1, N_w / N) + 1)), where w is the window `trending`, n the item's events of all
      time, N_w the events of all items in the window and N those of all items since the item's first. It compares the
      item's events with those expected from its usual share of all events, so it is independent of overall activity. It
      is 0 for items that are not older than the window or have no events yet;
    - age: log(1 + seconds since its first event), 0 without events;
    - gap: log(1 + seconds since its newest event), or since the start of the log without events.

    Proposals are the items with most events in the window `trending` before the start of the request's hour (UTC), so
    that the requests of an hour share them. If the window has too few items, the next longer windows, and finally all
    time, fill the list. Ties go to the lower item number.

    Args:
        candidates: number of items proposed for each request; 0: none.
        windows: lengths of the time windows before the request in seconds, ascending.
        trending: the window used for `trend` and for ranking the proposals.
    """

    reads_allowed = True
    reads_times = True

    def __init__(
        self, candidates: int = 0, windows: Sequence[int] = (DAY, WEEK, 30 * DAY, 365 * DAY), trending: int = WEEK
    ) -> None:
        super().__init__(candidates)
        self._lists: dict[tuple[int, int], np.ndarray] = {}  # ranks of events -> items
        self._at_end: np.ndarray | None = None
        check_integers("windows", windows, example=(DAY, WEEK))
        self.windows, self.trending = list(windows), trending
        if self.windows != sorted(set(self.windows)):
            raise ValueError(
                f"windows is {self.windows}, expected distinct seconds in ascending order; sort them and leave out "
                "repeats"
            )
        if trending not in self.windows:
            raise ValueError(f"trending is {trending}, expected one of the windows {self.windows}; add it to them")

    @property
    def names(self) -> tuple[str, ...]:
        lengths = [f"{window // DAY}d" if window % DAY == 0 else f"{window}s" for window in self.windows]
        return (*(f"popularity_{length}" for length in (*lengths, "all")), "trend", "age", "gap")

    @property
    def counted(self) -> tuple[str, ...]:
        return self.names

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if not dataset.has_time:
            raise ValueError(f"{dataset.path} has an order and no times, so no popularity as of a time; leave it out")
        train = spans(dataset.offsets[:-1], dataset.train_ends).values
        if not len(train):
            raise ValueError(f"{dataset.path} has no training events to count; leave PopularityAsOf out")
        train = train[np.argsort(dataset.times[train], kind="stable")]
        times, items = np.asarray(dataset.times[train]), np.asarray(dataset.items[train])
        # an event's rank is the number of older events. Unlike seconds, ranks cannot overflow the keys
        base = len(times) + 1
        keys = np.sort(items.astype(np.int64) * base + np.searchsorted(times, times))
        starts = np.searchsorted(keys, np.arange(dataset.num_items + 2) * base)
        self.restore({"times": times, "items": items, "keys": keys, "starts": starts})

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        super().restore(tables)
        self._lists.clear()
        self._at_end = None

    def __call__(self, requests: Requests) -> np.ndarray:
        times, keys, starts = (np.asarray(self.tables[name]) for name in ("times", "keys", "starts"))
        items, now, base = np.maximum(requests.items, 0), self._counted_until(requests.request_time), len(times) + 1
        older = np.searchsorted(times, now[:, None] - np.array([*self.windows[::-1], 0]))  # (B, windows + 1) ranks
        # the index of each item's first event with at least each of these ranks
        index = np.empty((*items.shape, older.shape[1]), np.int64)
        if (now > times[-1]).all():  # most requests to a service
            index[..., :-1], index[..., -1] = self._first_at_end()[items], starts[items + 1]
        else:
            index[:] = np.searchsorted(keys, items[..., None] * base + older[:, None])
        begins, ends = starts[items], index[..., -1]
        total, number = ends - begins, len(self.windows)

        values = np.empty((*items.shape, number + 4), dtype=np.float32)
        values[..., :number] = np.log1p(ends[..., None] - index[..., -2::-1])
        values[..., number] = np.log1p(total)
        # ranks of the first and of the newest event; arbitrary for items without events
        first = keys[np.minimum(begins, len(keys) - 1)] % base
        newest = keys[np.maximum(ends - 1, 0)] % base
        window, now = self.windows.index(self.trending), now[:, None]
        since = np.maximum(older[:, -1:] - first, 1)
        usual = total * np.minimum((older[:, -1:] - older[:, -2 - window, None]) / since, 1)
        values[..., -3] = np.log1p(ends - index[..., -2 - window]) - np.log1p(usual)
        some = total > 0
        values[..., -2] = np.log1p(np.where(some, now - times[first], 0))
        values[..., -1] = np.log1p(np.maximum(now - np.where(some, times[newest], times[0]), 0))
        values[items == 0] = 0
        return values

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        hour = self._counted_until(requests.request_time - requests.request_time % HOUR)
        times, size = np.asarray(self.tables["times"]), len(self.tables["starts"]) - 1
        windows, ends = self.windows[self.windows.index(self.trending) :], np.searchsorted(times, hour)
        begins = np.zeros((len(hour), len(windows) + 1), dtype=np.int64)  # the last window is all time
        begins[:, :-1] = np.searchsorted(times, hour[:, None] - np.array(windows))
        proposals = np.full((len(hour), self.candidates), NONE, dtype=np.int64)
        with item_marks(size) as marks:
            for row, (own, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
                left_out = excluded.values[excluded.offsets[row] : excluded.offsets[row + 1]]
                marks[left_out] = 1
                allowed = None if requests.allowed is None else requests.allowed[row]
                filled = 0
                for begin in own:
                    if filled == self.candidates:
                        break
                    ranked, depth = self._by_count(begin, end), self.candidates + len(left_out) + filled
                    while True:  # only the first ones are looked at; where few are allowed, more of them
                        first = ranked[:depth]
                        eligible = marks[first] == 0
                        if allowed is not None:
                            eligible &= allowed[first - 1]
                        new = first[eligible][: self.candidates - filled]
                        if len(new) == self.candidates - filled or depth >= len(ranked):
                            break
                        depth *= 4
                    marks[new] = 1
                    proposals[row, filled : filled + len(new)] = new
                    filled += len(new)
                marks[left_out] = marks[proposals[row, :filled]] = 0
        return proposals

    def _counted_until(self, seconds: np.ndarray) -> np.ndarray:
        """The times (B,), at most the second after the newest training event."""
        return np.minimum(seconds, self.tables["times"][-1] + 1)

    def _first_at_end(self) -> np.ndarray:
        """The index of each item's first event in each window before the end of the log, (V + 1, windows)."""
        if self._at_end is None:
            times, keys, starts = (np.asarray(self.tables[name]) for name in ("times", "keys", "starts"))
            older = np.searchsorted(times, times[-1] + 1 - np.array(self.windows[::-1]))
            self._at_end = np.searchsorted(keys, np.arange(len(starts) - 1)[:, None] * (len(times) + 1) + older)
        return self._at_end

    def _by_count(self, begin: int, end: int) -> np.ndarray:
        """Items of the events with ranks begin .. end - 1, most frequent first, (n,) int32.

        The lists of the last windows are kept: the requests of an hour share them.
        """
        lists = self._lists
        ranked = lists.get((begin, end))
        if ranked is None:
            ranked = self._count(begin, end)
            if len(ranked) + sum(map(len, list(lists.values()))) > KEPT:
                lists.clear()
            lists[begin, end] = ranked
        return ranked

    def _count(self, begin: int, end: int) -> np.ndarray:
        events, size = end - begin, len(self.tables["starts"]) - 1
        if LOOKS * events < size:  # a short window: nothing as long as the catalogue
            items, counts = np.unique(self.tables["items"][begin:end], return_counts=True)
        else:
            if events < LOOKS * size:
                counts = np.bincount(self.tables["items"][begin:end], minlength=size)
            else:
                queries = np.arange(size)[:, None] * (len(self.tables["times"]) + 1) + np.array([begin, end])
                index = np.searchsorted(np.asarray(self.tables["keys"]), queries)
                counts = index[:, 1] - index[:, 0]
            items = np.flatnonzero(counts)
            counts = counts[items]
        order = np.sort(counts * size + (size - 1 - items))[::-1]  # more events, then the lower number
        return (size - 1 - order % size).astype(np.int32)
