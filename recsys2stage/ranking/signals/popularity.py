"""PopularityAsOf: item popularity at request time, from the training events before the request only."""

from collections.abc import Sequence

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_integers
from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import END, batched_searchsorted
from recsys2stage.retrieval.encoders.times import DAY, WEEK

HOUR = 3_600
LOOKS = 32  # events per item in a window from which counting by item is faster than counting by event


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

    reads_times = True

    def __init__(
        self, candidates: int = 0, windows: Sequence[int] = (DAY, WEEK, 30 * DAY, 365 * DAY), trending: int = WEEK
    ) -> None:
        super().__init__(candidates)
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
        self.tables = {"times": times, "items": items, "keys": keys, "starts": starts}

    def __call__(self, requests: Requests) -> np.ndarray:
        times, keys, starts = (np.asarray(self.tables[name]) for name in ("times", "keys", "starts"))
        items, now, base = requests.items.clip(min=0), requests.request_time, len(times) + 1
        older = np.searchsorted(times, now[:, None] - np.array([0, *self.windows]))  # (B, 1 + windows) ranks
        index = self._key_index(items, older)
        begins = starts[items]
        total = index[..., 0] - begins
        counts = np.concatenate([index[..., :1] - index[..., 1:], total[..., None]], axis=-1)

        # ranks of the first and of the newest event; arbitrary for items without events
        first = keys[begins.clip(max=len(keys) - 1)] % base
        newest = keys[(index[..., 0] - 1).clip(min=0)] % base
        window = self.windows.index(self.trending)
        since = np.maximum(older[:, :1] - first, 1)
        usual = total * np.minimum((older[:, :1] - older[:, 1 + window, None]) / since, 1)
        trend = np.log1p(counts[..., window]) - np.log1p(usual)
        age = np.where(total > 0, now[:, None] - times[first], 0)
        gap = now[:, None] - np.where(total > 0, times[newest], times[0])
        values = [np.log1p(counts), np.stack([trend, np.log1p(age), np.log1p(gap.clip(min=0))], axis=-1)]
        return np.where(items[..., None] > 0, np.concatenate(values, axis=-1), 0).astype(np.float32)

    def _key_index(self, items: np.ndarray, older: np.ndarray) -> np.ndarray:
        """Index in `keys` of each item's first event with at least each rank of `older`, (B, C, ranks)."""
        queries = items[..., None] * (len(self.tables["times"]) + 1) + older[:, None, :]
        return batched_searchsorted(np.asarray(self.tables["keys"]), queries)

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        hour = requests.request_time - requests.request_time % HOUR
        times, size = np.asarray(self.tables["times"]), len(self.tables["starts"]) - 1
        ends = np.searchsorted(times, hour)
        proposals = np.full((len(hour), self.candidates), NONE, dtype=np.int64)
        filled = np.zeros(len(hour), dtype=np.int64)  # proposals of each request so far
        taken = np.append(excluded.rows * size + excluded.values, END)  # keys of excluded and proposed items
        for window in [*self.windows[self.windows.index(self.trending) :], None]:
            rows = np.flatnonzero(filled < self.candidates)
            begins = np.zeros_like(ends) if window is None else np.searchsorted(times, hour - window)
            depth = self.candidates + np.diff(excluded.offsets) + filled  # deep enough for `candidates` new items
            ranked = self._ranked(begins[rows], ends[rows], depth[rows])
            row = rows[ranked.rows]
            keys = row * size + ranked.values
            taken.sort()
            new = taken[np.searchsorted(taken, keys)] != keys
            row, keys = row[new], keys[new]
            column = filled[row] + np.arange(len(row)) - np.searchsorted(row, row)
            fits = column < self.candidates
            row, column, keys = row[fits], column[fits], keys[fits]
            proposals[row, column] = keys % size
            filled += np.bincount(row, minlength=len(filled))
            taken = np.concatenate([taken, keys])
        return proposals

    def _ranked(self, begins: np.ndarray, ends: np.ndarray, depth: np.ndarray) -> Ragged:
        """Items of the events begins[b] .. ends[b] - 1, most frequent first, at most depth[b] per row."""
        base = len(self.tables["times"]) + 1
        distinct, inverse = np.unique(begins * base + ends, return_inverse=True)  # one per hour
        deepest = np.zeros(len(distinct), dtype=np.int64)
        np.maximum.at(deepest, inverse, depth)
        bounds = zip(*np.divmod(distinct, base), deepest, strict=True)
        lists = [self._by_count(int(begin), int(end))[:count] for begin, end, count in bounds]
        offsets = np.cumsum([0, *map(len, lists)])
        index = spans(offsets[inverse], np.minimum(offsets[inverse] + depth, offsets[inverse + 1]))
        return Ragged(np.concatenate([*lists, np.zeros(0, np.int64)])[index.values], index.offsets)

    def _by_count(self, begin: int, end: int) -> np.ndarray:
        """Items of the events with ranks begin .. end - 1, most frequent first, (n,) int64."""
        size = len(self.tables["starts"]) - 1
        if end - begin < LOOKS * size:
            counts = np.bincount(self.tables["items"][begin:end], minlength=size)
        else:
            index = self._key_index(np.arange(size)[None], np.array([[begin, end]]))[0]
            counts = index[:, 1] - index[:, 0]
        items = np.flatnonzero(counts)
        order = np.sort(counts[items] * size + (size - 1 - items))[::-1]  # more events, then the lower number
        return size - 1 - order % size
