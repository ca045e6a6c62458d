"""Transitions: item-to-item transition counts at several lags, and co-visitation with the newest items."""

import itertools
from collections.abc import Sequence

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import MAX_LENGTH, check_integer, check_integers, check_number
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import END, ROWS_IN_FLIGHT, item_marks, slice_rows, top_by_sum

PAIRS_IN_FLIGHT = 1 << 24  # event pairs per block of counting
NUMBERS_IN_FLIGHT = 1 << 20  # lifts per block


class Transitions(Proposer):
    """Lift of item-to-item transitions over the candidate's popularity, for each lag.

    For each lag k, with a the item of the k-th newest event of the history and b the candidate,

        log((n_k(a, b) + alpha) / (n_k(a) · p(b) + alpha))

    where n_k(a, b) counts the events of b that are k positions after an event of a in a user's history, n_k(a) the
    events of any item there, and p(b) is b's share of all training events: observed over expected counts, shrunk to 1
    where both are small (gamma-Poisson, DuMouchel 1999). The ratio removes popularity, which has its own signal. So
    would a smoothed P(b | a) / p(b), but one chance pair of a rare b would have a lift of thousands. The value is 0 if
    the history has no such event or a or b has no training events.

    Only the `top` most frequent b of each a are stored (ties: the lower number). Any other pair has the count
    min(rest(a) · p(b) / p_rest(a), least(a)): its share of the pairs not stored, and at most the least count stored; 0
    if all pairs are stored.

    `covisit` is the logarithm of the mean of (n(a, b) + alpha) / (n(a) · p(b) + alpha) over the newest events, with
    weights decay^k, k = 0 for the newest, and n counting b up to `window` positions after a; `covisit_max` is the
    logarithm of their maximum.

    Proposals have the largest sum of n_k(a, b) / n_k(a) over the lags and the stored pairs.

    Args:
        candidates: number of items proposed for each request; 0: none.
        lags: distances in positions between the two events of a pair.
        top: number of most frequent following items stored per item, for each lag and for the window.
        alpha: pseudo-events added to observed and expected counts.
        history: number of newest events used by co-visits.
        window: number of positions after an event counted by co-visits.
        decay: weight of an event relative to the next newer one.
    """

    reads_allowed = True
    by_id = True

    def __init__(
        self,
        candidates: int = 0,
        lags: Sequence[int] = (1, 2, 3, 5, 10),
        top: int = 256,
        alpha: float = 1.0,
        history: int = 10,
        window: int = 5,
        decay: float = 0.8,
    ) -> None:
        super().__init__(candidates)
        check_integers("lags", lags, 1, MAX_LENGTH, example=(1, 2, 3))
        if len(set(lags)) < len(lags):
            raise ValueError(f"lags is {list(lags)}, expected distinct positions; leave out the repeated ones")
        for name, value, usual in (("top", top, 256), ("history", history, 10), ("window", window, 5)):
            check_integer(name, value, 1, MAX_LENGTH, example=usual)
        check_number("alpha", alpha, above=0, example=1.0)
        check_number("decay", decay, above=0, high=1, example=0.8)
        self.lags, self.top, self.alpha = list(lags), top, alpha
        self.history, self.window, self.decay = history, window, decay

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"after_{lag}" for lag in self.lags), "covisit", "covisit_max")

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        train = spans(dataset.offsets[:-1], dataset.train_ends)
        items = np.asarray(dataset.items[train.values])
        later = np.repeat(train.offsets[1:], np.diff(train.offsets)) - np.arange(len(items)) - 1  # of its user
        share = dataset.train_counts / max(len(items), 1)
        tables, facts = {"share": share}, []
        for name, steps in {**{str(lag): [lag] for lag in self.lags}, "window": range(1, self.window + 1)}.items():
            tables[f"pairs_{name}"], own = _packed(_count(items, later, steps, share, self.top), len(share))
            facts.append(own)
        self.restore(tables | {"items": np.stack(facts, axis=1)})

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        names = [*map(str, self.lags), "window"]
        if "items" not in tables and "keys_window" in tables:  # as they were stored before
            share, facts, packed = tables["share"], [], {}
            for name in names:
                parts = {part: tables[f"{part}_{name}"] for part in ("keys", "counts", "totals", "rest", "least")}
                packed[f"pairs_{name}"], own = _packed(parts, len(share))
                facts.append(own)
            tables = {"share": share, "items": np.stack(facts, axis=1), **packed}
        super().restore(tables)
        number = len(self.lags)
        # of the items that are looked up: the lag or, with the last table, the co-visits
        self._columns = np.array([*range(number), *[number] * self.history])
        self._places = np.array([*(lag - 1 for lag in self.lags), *range(self.history)])  # among the newest events
        self._pairs = [tables[f"pairs_{name}"] for name in names if f"pairs_{name}" in tables]

    def __call__(self, requests: Requests) -> np.ndarray:
        items, newest = np.maximum(requests.items, 0), requests.newest_items(max(self.history, *self.lags))
        values, lags = np.zeros((*items.shape, len(self.names)), dtype=np.float32), len(self.lags)
        before, real = newest[:, self._places], newest[:, : self.history] > 0
        weights = real * self.decay ** np.arange(self.history)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)  # the newest event has weight 1
        block = max(1, NUMBERS_IN_FLIGHT // max(before.shape[1] * items.shape[1], 1))
        for begin in range(0, len(items), block):
            rows = slice(begin, begin + block)
            lift = self._lifts(before[rows], items[rows])
            values[rows, :, :lags] = np.log(lift[:, :lags]).swapaxes(1, 2)
            lift = lift[:, lags:]  # (B, history, C); of missing events 1, the neutral value
            values[rows, :, -2] = np.log1p(np.matmul(weights[rows, None], lift - 1)[:, 0])
            largest = np.where(real[rows, :, None], lift, 0).max(axis=1)
            values[rows, :, -1] = np.log(np.where(real[rows, :1], largest, 1))
        values[items == 0] = 0
        return values

    def _lifts(self, before: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Smoothed ratios of observed to expected counts of (B, C) items after the (B, lags + history) items `before`.

        Returns:
            (B, lags + history, C) float64; 1 for item 0.
        """
        expected, own = self.tables["share"][items][:, None], self.tables["items"][before, self._columns]
        totals, rest, least = own[..., 0, None], own[..., 1, None], own[..., 2, None]
        observed = np.minimum(rest * expected, least)  # of pairs that are not stored
        bounds = own[..., 3:].astype(np.int64).tolist()
        place, start = np.arange(1, items.shape[1] + 1), items.shape[1] * np.arange(before.shape[1]) - 1
        with item_marks(len(self.tables["share"])) as marks:
            for row, candidates in enumerate(items):
                marks[candidates] = place
                after, counts, lengths = self._stored(self._columns.tolist(), bounds[row])
                column = marks[after]  # 0: no candidate
                found = np.flatnonzero(column)
                at = start.repeat(lengths)[found] + column[found]
                observed[row].reshape(-1)[at] = counts[found]
                same = marks[candidates]  # the place of an item that comes twice is its last one
                if (same != place).any():
                    observed[row] = observed[row][:, same - 1]
                marks[candidates] = 0
        observed += self.alpha
        observed /= totals * expected + self.alpha
        return observed

    def _stored(
        self, columns: Sequence[int], bounds: Sequence[Sequence[int]]
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Stored pairs: the items after each of n items, their counts, and the number of pairs of each of the n.

        Args:
            columns: the table of each item.
            bounds: first pair and number of pairs of each item in its table.
        """
        lengths = [number for _, number in bounds]
        parts = [
            self._pairs[column][begin : begin + number] for column, (begin, number) in zip(columns, bounds, strict=True)
        ]
        pairs = np.concatenate(parts)
        return pairs[:, 0], pairs[:, 1], lengths

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        newest = requests.newest_items(max(self.lags))[:, self._places[: len(self.lags)]]
        size, parts, columns = len(self.tables["share"]), [], self._columns[: len(self.lags)]
        for start in range(0, len(newest), ROWS_IN_FLIGHT):
            own = self.tables["items"][newest[start : start + ROWS_IN_FLIGHT], columns]  # (B, lags, 5)
            bounds = own[..., 3:].astype(np.int64).reshape(-1, 2)
            items, counts, lengths = self._stored(columns.tolist() * len(own), bounds.tolist())
            scores = counts / own[..., 0].repeat(lengths)
            rows = np.arange(len(own)).repeat(bounds[:, 1].reshape(len(own), -1).sum(axis=1))
            left_out = slice_rows(excluded, start, start + len(own))
            allowed = None if requests.allowed is None else requests.allowed[start : start + len(own)]
            parts.append(top_by_sum(rows, items, scores, left_out, size, self.candidates, allowed))
        return np.concatenate([*parts, np.zeros((0, self.candidates), np.int64)])


def _packed(counted: dict[str, np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
    """What `_count` returns, as it is looked up.

    Returns:
        pairs: (N, 2) int32, the following item and the count of each stored pair, by the item before.
        facts: (V + 1, 5) float64 of each item: totals, rest, least, its first pair and its number of pairs. They are
            read together, so they lie side by side.
    """
    keys = counted["keys"][:-1]  # without the sentinel
    pairs = np.empty((len(keys), 2), dtype=np.int32)
    np.remainder(keys, size, out=pairs[:, 0], casting="unsafe")
    pairs[:, 1] = counted["counts"][: len(keys)]
    starts = keys.searchsorted(np.arange(size + 1) * size)
    return pairs, np.stack([*(counted[name] for name in ("totals", "rest", "least")), starts[:-1], np.diff(starts)], 1)


def _count(
    items: np.ndarray, later: np.ndarray, steps: Sequence[int], share: np.ndarray, top: int
) -> dict[str, np.ndarray]:
    """Counts of event pairs at any distance in `steps`.

    Args:
        items: (E,) items of the training events, grouped by user.
        later: (E,) number of later events of the same user.
        steps: distances in positions.
        share: (V + 1,) share of each item in all events.
        top: number of most frequent following items stored per item.

    Returns:
        Sorted keys a · (V + 1) + b with their counts, ending with the sentinel END; and for each item a, (V + 1,): all
        its pairs (totals), pairs not stored per unit of their items' share (rest), the least count stored (least).
    """
    size = len(share)
    totals = sum((np.bincount(items[later >= step], minlength=size) for step in steps), np.zeros(size, np.int64))
    edges = np.flatnonzero(np.diff(np.cumsum(totals) // PAIRS_IN_FLIGHT, prepend=-1, append=-1))
    kept_keys, kept_counts = [], []
    for begin, end in itertools.pairwise(edges):  # blocks of items a bound the memory
        own = (items >= begin) & (items < end)
        first = [np.flatnonzero(own & (later >= step)) for step in steps]
        pairs = [
            items[index].astype(np.int64) * size + items[index + step] for index, step in zip(first, steps, strict=True)
        ]
        keys, counts = np.unique(np.concatenate(pairs), return_counts=True)
        before = keys // size
        order = np.argsort(before * (counts.max(initial=0) + 1) - counts, kind="stable")  # most frequent first
        kept = np.sort(order[np.arange(len(keys)) - np.searchsorted(before, before) < top])
        kept_keys.append(keys[kept])
        kept_counts.append(counts[kept].astype(np.int32))
    keys, counts = np.concatenate(kept_keys), np.concatenate(kept_counts)
    before, after = np.divmod(keys, size)
    missing = totals - np.bincount(before, counts, size).astype(np.int64)
    missing_share = share.sum() - np.bincount(before, share[after], size)
    least = np.full(size, np.iinfo(np.int32).max)
    np.minimum.at(least, before, counts)
    return {
        "keys": np.append(keys, END),
        "counts": np.append(counts, np.int32(0)),
        "totals": totals,
        "rest": np.where(missing > 0, missing / np.where(missing > 0, missing_share, 1), 0),
        "least": least,
    }
