"""What usually follows the newest items: directed counts of pairs of training events some places apart."""

import itertools
from collections.abc import Sequence

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import END, ROWS_IN_FLIGHT, best, cut, find

PAIRS_IN_FLIGHT = 1 << 24  # pairs of events that are counted at once


class Transitions(Proposer):
    """How much oftener a candidate came k places after the event k places back than its popularity explains.

    For each lag k, with a the item of the event k places before the request (1: the newest) and b the candidate,

        log((n_k(a, b) + alpha) / (n_k(a) · p(b) + alpha))

    where n_k(a, b) counts how often b came k places after a, n_k(a) how often anything did, and p(b) is b's share of
    all training events: observed over expected counts, shrunk to 1 where both are small (gamma-Poisson, DuMouchel
    1999). Popularity is left out, since it has numbers of its own; a smoothed P(b | a) / p(b) would do so too, but one
    chance pair of a rare b would have a lift of thousands. The number is 0, which says nothing, where there is no such
    event and where a or b was never seen.

    Only the `top` most frequent b of each a are kept (ties: the lower number). A pair that is not has the count
    min(rest(a) · p(b) / p_rest(a), least(a)): its share of the pairs that were left out, and no more than the least
    that was kept; where nothing was left out, 0.

    `covisit` is the logarithm of the mean of (n(a, b) + alpha) / (n(a) · p(b) + alpha) over the newest events, with
    weights decay^place and n counting b up to `window` places after a; `covisit_max` is that of the largest of them.

    Proposals have the largest sum of n_k(a, b) / n_k(a) over the lags and the pairs that were kept.

    Args:
        candidates: how many it names at each request; 0: none.
        lags: places between the two events of a pair.
        top: most items kept after each item, for each lag and for the window.
        alpha: events by which counts are smoothed.
        history: newest events that co-visits look at.
        window: places after an event that co-visits count.
        decay: weight of an event in comparison to the one after it.
    """

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
        self.lags, self.top, self.alpha = list(lags), top, alpha
        self.history, self.window, self.decay = history, window, decay
        if not self.lags or min(self.lags) < 1 or len(set(self.lags)) < len(self.lags):
            raise ValueError(f"lags are {self.lags}, expected places from 1 on, none twice")
        if min(top, history, window) < 1:
            raise ValueError(f"top is {top}, history {history} and window {window}, expected at least 1 each")
        if alpha <= 0 or not 0 < decay <= 1:
            raise ValueError(f"alpha is {alpha} and decay {decay}, expected alpha above 0 and 0 < decay <= 1")

    @property
    def names(self) -> tuple[str, ...]:
        return (*(f"after_{lag}" for lag in self.lags), "covisit", "covisit_max")

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        train = spans(dataset.offsets[:-1], dataset.train_ends)
        items = np.asarray(dataset.items[train.values])
        left = np.repeat(train.offsets[1:], np.diff(train.offsets)) - np.arange(len(items)) - 1  # events of its user
        share = dataset.train_counts / max(len(items), 1)
        self.tables = {"share": share}
        for name, steps in {**{str(lag): [lag] for lag in self.lags}, "window": range(1, self.window + 1)}.items():
            counted = _count(items, left, steps, share, self.top)
            self.tables |= {f"{part}_{name}": table for part, table in counted.items()}

    def __call__(self, requests: Requests) -> np.ndarray:
        items = requests.items.clip(min=0)
        newest, _ = requests.newest(max(self.history, *self.lags))
        numbers = np.zeros((*items.shape, len(self.names)), dtype=np.float32)
        for number, lag in enumerate(self.lags):
            numbers[..., number] = np.log(self._lift(str(lag), newest[:, lag - 1], items))
        real = newest[:, : self.history] > 0
        weights = real * self.decay ** np.arange(self.history)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)  # the newest event's is 1
        excess, largest = np.zeros(items.shape), np.zeros(items.shape)  # a lift of 1 says nothing
        for place in range(self.history):
            lift = self._lift("window", newest[:, place], items)
            excess += weights[:, place, None] * (lift - 1)
            np.maximum(largest, lift, out=largest, where=real[:, place, None])
        numbers[..., -2] = np.log1p(excess)
        numbers[..., -1] = np.log(np.where(real[:, :1], largest, 1))
        return np.where(items[..., None] > 0, numbers, np.float32(0))

    def _lift(self, name: str, before: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Smoothed ratio of counts to expected counts of (B, C) items after the items (B,) before, 1 for item 0."""
        keys, counts, totals, rest, least = (
            np.asarray(self.tables[f"{part}_{name}"]) for part in ("keys", "counts", "totals", "rest", "least")
        )
        share = np.asarray(self.tables["share"])
        target_action = before[:, None] * len(share) + items
        place = find(keys, target_action)
        expected = share[items]
        unlisted = np.minimum(rest[before, None] * expected, least[before, None])
        seen = np.where(keys[place] == target_action, counts[place], unlisted)
        return (seen + self.alpha) / (totals[before, None] * expected + self.alpha)

    def propose(self, requests: Requests, known: Ragged) -> np.ndarray:
        newest, _ = requests.newest(max(self.lags))
        size = len(self.tables["share"])
        parts = []
        for start in range(0, len(newest), ROWS_IN_FLIGHT):
            rows, items, scores = [], [], []
            for lag in self.lags:
                keys, counts, totals = (self.tables[f"{part}_{lag}"] for part in ("keys", "counts", "totals"))
                before = newest[start : start + ROWS_IN_FLIGHT, lag - 1]
                followers = spans(np.searchsorted(keys, before * size), np.searchsorted(keys, (before + 1) * size))
                rows.append(followers.rows)
                items.append(keys[followers.values] % size)
                scores.append(counts[followers.values] / totals[before][followers.rows])
            few = cut(known, start, start + len(before))
            entries = np.concatenate(rows), np.concatenate(items), np.concatenate(scores)
            parts.append(best(*entries, few, size, self.candidates))
        return np.concatenate([*parts, np.zeros((0, self.candidates), np.int64)])


def _count(
    items: np.ndarray, left: np.ndarray, steps: Sequence[int], share: np.ndarray, top: int
) -> dict[str, np.ndarray]:
    """Counts of pairs of events that are any of `steps` places apart.

    Args:
        items: (E,) of the training events, user by user.
        left: (E,) how many of its user's come after each.
        steps: places.
        share: (V + 1,) of each item in all events.
        top: most items kept after each item.

    Returns:
        Sorted keys a · (V + 1) + b with their counts, and after the last the key END; and of each item a, (V + 1,): all
        its pairs (totals), pairs not kept for each unit of their items' share (rest), and the least count kept (least).
    """
    size = len(share)
    totals = sum((np.bincount(items[left >= step], minlength=size) for step in steps), np.zeros(size, np.int64))
    edges = np.flatnonzero(np.diff(np.cumsum(totals) // PAIRS_IN_FLIGHT, prepend=-1, append=-1))
    kept_keys, kept_counts = [], []
    for begin, end in itertools.pairwise(edges):  # some of the items a at a time, so that memory is bounded
        own = (items >= begin) & (items < end)
        first = [np.flatnonzero(own & (left >= step)) for step in steps]
        pairs = [
            items[index].astype(np.int64) * size + items[index + step] for index, step in zip(first, steps, strict=True)
        ]
        keys, counts = np.unique(np.concatenate(pairs), return_counts=True)
        before = keys // size
        order = np.argsort(before * (counts.max(initial=0) + 1) - counts, kind="stable")  # most first within an item
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
