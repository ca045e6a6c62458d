"""How popular an item is as of the request: counts of the training events before it, never of one after it."""

from collections.abc import Sequence

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import END, find
from recsys2stage.retrieval.encoders.times import DAY, WEEK

HOUR = 3_600
LOOKS = 32  # events of a window for each item, from which on looks at items cost less than looks at events


class PopularityAsOf(Proposer):
    """Counts of an item's training events strictly before the request, all exact.

    The numbers are log(1 + n_w) for each window w and for all time, and

    - trend: log((n_w + 1) / (n · min(1, N_w / N) + 1)), where w is the window `trending`, n the item's events of all
      time, N_w the events of all items in the window and N those of all items since the item's first. It compares what
      the item got with what its usual share of all events would have given, so it does not follow how busy the log is,
      and is 0 for what is no older than the window or has no events yet;
    - age: log(1 + seconds since its first event), 0 where it has none;
    - gap: log(1 + seconds since its newest event), or since the log began where it has none.

    Proposals are the items with most events in the window `trending` before the start of the request's hour (UTC): all
    requests of an hour share them. What this window lacks the next longer ones fill, and at last all time. Ties go to
    the lower item number.

    Args:
        candidates: how many it names at each request; 0: none.
        windows: seconds that are looked back, ascending.
        trending: the one of them whose counts rank the proposals, and make the trend.
    """

    reads_times = True

    def __init__(
        self, candidates: int = 0, windows: Sequence[int] = (DAY, WEEK, 30 * DAY, 365 * DAY), trending: int = WEEK
    ) -> None:
        super().__init__(candidates)
        self.windows, self.trending = list(windows), trending
        if not self.windows or self.windows != sorted({window for window in self.windows if window > 0}):
            raise ValueError(f"windows are {self.windows}, expected seconds above 0, ascending, none twice")
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
        # an event's rank is how many are older. Unlike seconds, ranks cannot make keys overflow, wherever times lie
        base = len(times) + 1
        keys = np.sort(items.astype(np.int64) * base + np.searchsorted(times, times))
        starts = np.searchsorted(keys, np.arange(dataset.num_items + 2) * base)
        self.tables = {"times": times, "items": items, "keys": keys, "starts": starts}

    def __call__(self, requests: Requests) -> np.ndarray:
        times, keys, starts = (np.asarray(self.tables[name]) for name in ("times", "keys", "starts"))
        items, now, base = requests.items.clip(min=0), requests.now, len(times) + 1
        older = np.searchsorted(times, now[:, None] - np.array([0, *self.windows]))  # (B, 1 + windows) ranks
        place = self._places(items, older)
        begins = starts[items]
        total = place[..., 0] - begins
        counts = np.concatenate([place[..., :1] - place[..., 1:], total[..., None]], axis=-1)

        # ranks of the first and of the newest event; where there is none, of any event
        first = keys[begins.clip(max=len(keys) - 1)] % base
        newest = keys[(place[..., 0] - 1).clip(min=0)] % base
        window = self.windows.index(self.trending)
        since = np.maximum(older[:, :1] - first, 1)
        usual = total * np.minimum((older[:, :1] - older[:, 1 + window, None]) / since, 1)
        trend = np.log1p(counts[..., window]) - np.log1p(usual)
        age = np.where(total > 0, now[:, None] - times[first], 0)
        gap = now[:, None] - np.where(total > 0, times[newest], times[0])
        numbers = [np.log1p(counts), np.stack([trend, np.log1p(age), np.log1p(gap.clip(min=0))], axis=-1)]
        return np.where(items[..., None] > 0, np.concatenate(numbers, axis=-1), 0).astype(np.float32)

    def _places(self, items: np.ndarray, older: np.ndarray) -> np.ndarray:
        """Where among the keys each item's events from each rank on begin, (B, C, ranks)."""
        target_action = items[..., None] * (len(self.tables["times"]) + 1) + older[:, None, :]
        return find(np.asarray(self.tables["keys"]), target_action)

    def propose(self, requests: Requests, known: Ragged) -> np.ndarray:
        hour = requests.now - requests.now % HOUR
        times, size = np.asarray(self.tables["times"]), len(self.tables["starts"]) - 1
        ends = np.searchsorted(times, hour)
        chosen = np.full((len(hour), self.candidates), NONE, dtype=np.int64)
        found = np.zeros(len(hour), dtype=np.int64)
        met, knows = np.append(known.rows * size + known.values, END), np.diff(known.offsets)
        for window in [*self.windows[self.windows.index(self.trending) :], None]:
            rows = np.flatnonzero(found < self.candidates)
            begins = np.zeros_like(ends) if window is None else np.searchsorted(times, hour - window)
            depth = self.candidates + knows + found  # so deep lie enough items that are new, if they lie anywhere
            ranked = self._ranked(begins[rows], ends[rows], depth[rows])
            row = rows[ranked.rows]
            keys = row * size + ranked.values
            met.sort()
            new = met[np.searchsorted(met, keys)] != keys
            row, keys = row[new], keys[new]
            place = found[row] + np.arange(len(row)) - np.searchsorted(row, row)
            fits = place < self.candidates
            row, place, keys = row[fits], place[fits], keys[fits]
            chosen[row, place] = keys % size
            found += np.bincount(row, minlength=len(found))
            met = np.concatenate([met, keys])
        return chosen

    def _ranked(self, begins: np.ndarray, ends: np.ndarray, depth: np.ndarray) -> Ragged:
        """Items of the events begins[b] .. ends[b] - 1, most frequent first, at most depth[b]."""
        base = len(self.tables["times"]) + 1
        spanned, place = np.unique(begins * base + ends, return_inverse=True)  # requests of an hour share them
        deepest = np.zeros(len(spanned), dtype=np.int64)
        np.maximum.at(deepest, place, depth)
        lists = [self._most(int(a), int(b))[:n] for a, b, n in zip(*np.divmod(spanned, base), deepest, strict=True)]
        offsets = np.cumsum([0, *map(len, lists)])
        index = spans(offsets[place], np.minimum(offsets[place] + depth, offsets[place + 1]))
        return Ragged(np.concatenate([*lists, np.zeros(0, np.int64)])[index.values], index.offsets)

    def _most(self, begin: int, end: int) -> np.ndarray:
        """Items of the events begin .. end - 1 in order of time, most frequent first, (n,) int64."""
        size = len(self.tables["starts"]) - 1
        if end - begin < LOOKS * size:
            counts = np.bincount(self.tables["items"][begin:end], minlength=size)
        else:
            place = self._places(np.arange(size)[None], np.array([[begin, end]]))[0]
            counts = place[:, 1] - place[:, 0]
        items = np.flatnonzero(counts)
        order = np.sort(counts[items] * size + (size - 1 - items))[::-1]  # more events, then the lower number
        return size - 1 - order % size
