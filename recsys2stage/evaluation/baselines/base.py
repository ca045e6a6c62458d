"""The baseline interface: scores of some items for a history, from which ranks and best items follow."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from recsys2stage.data.batches import Ragged, in_chunks
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.keys import slice_rows
from recsys2stage.trust import class_name


class Scored(NamedTuple):
    """Items that a baseline scores for B histories, in any order, each once in a row."""

    rows: np.ndarray  # (n,) int64, of the histories
    items: np.ndarray  # (n,) 1 to V
    scores: np.ndarray  # (n,) finite


class Baseline(ABC):
    """Ranks items for a history by what was counted in training events.

    A subclass stores each option as an attribute of the same name and gives scores of some items. These items rank
    above all others. Equal scores, and items without a score, are ranked by their number of training events.
    Histories hold items only, oldest first: a baseline does not know the request time.
    """

    rows_in_flight: ClassVar[int] = 256  # histories scored at once

    size: int  # V + 1
    popularity: np.ndarray  # (V + 1,) training events of each item, float32

    @property
    def name(self) -> str:
        """Name in reports: transition_graph for a class TransitionGraph."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__).lower()

    def fit(self, dataset: Dataset) -> "Baseline":
        """Counts training events, those before `dataset.train_ends`, and nothing else; a subclass extends it.

        Raises:
            ValueError: if the dataset lacks what the baseline needs.
        """
        self.size = dataset.num_items + 1
        self.popularity = np.asarray(dataset.train_counts).astype(np.float32)
        self.ascending = np.sort(self.popularity[1:])
        self.most_popular = 1 + np.argsort(-self.popularity[1:], kind="stable")
        return self

    @abstractmethod
    def score(self, history: Ragged) -> Scored:
        """Scores of some items.

        Args:
            history: items of B users, oldest first; B is at most `rows_in_flight`.
        """

    def ranks(self, history: Ragged, target: np.ndarray, excluded: Ragged) -> np.ndarray:
        """Rank of each target among the items that are not excluded, (B,) int64 from 1.

        Ties count against the target, and an excluded target ranks last.

        Args:
            history: items of B users, oldest first.
            target: (B,) items.
            excluded: items that are not ranked, distinct in each row.
        """
        ranks = np.empty(len(target), dtype=np.int64)
        for part, scores in self._parts(history):
            own, left_out = target[part], slice_rows(excluded, part.start, part.stop)
            limits = scores.look_up(np.arange(len(own)), own)
            others = scores.rows, scores.items
            above = np.bincount(scores.rows[scores.not_below(*others, limits)], minlength=len(own))
            popular = self.popularity[scores.items] >= limits.popularity[scores.rows]  # have been counted above
            rest = self.size - 1 - np.searchsorted(self.ascending, limits.popularity)
            rest -= np.bincount(scores.rows[popular], minlength=len(own))
            number = above + np.where(limits.scored, 0, rest)
            rows, items = left_out.rows, left_out.values
            hidden = scores.not_below(rows, items, limits)
            number -= np.bincount(rows[hidden], minlength=len(own))
            number[rows[items == own[rows]]] = self.size - 1
            ranks[part] = number
        return ranks

    def not_below(self, history: Ragged, target: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Which of (B, N) items rank above the target of their row or tie with it, (B, N) bool."""
        found = np.empty(items.shape, dtype=bool)
        for part, scores in self._parts(history):
            limits = scores.look_up(np.arange(part.stop - part.start), target[part])
            rows = np.repeat(np.arange(part.stop - part.start), items.shape[1])
            found[part] = scores.not_below(rows, items[part].reshape(-1), limits).reshape(-1, items.shape[1])
        return found

    def best(self, history: Ragged, excluded: Ragged, count: int) -> np.ndarray:
        """The best items, best first, (B, count) int64, padded with −1; ties go to the lower item number."""
        top, mask = np.full((len(history.offsets) - 1, count), -1, dtype=np.int64), np.zeros(self.size, dtype=bool)
        for part, scores in self._parts(history):
            left_out = slice_rows(excluded, part.start, part.stop)
            bounds = np.searchsorted(scores.rows, np.arange(part.stop - part.start + 1)).tolist()
            for row in range(part.stop - part.start):
                hidden = left_out.values[left_out.offsets[row] : left_out.offsets[row + 1]]
                own = slice(bounds[row], bounds[row + 1])
                mask[hidden] = True
                best = self._best(scores.items[own], scores.scores[own], mask, count)
                if len(best) < count:  # every scored item is among them: the most popular others follow
                    mask[best] = True
                    first = self.most_popular[: count + len(hidden)]
                    others = first[~mask[first]][: count - len(best)]
                    mask[best] = False
                    best = np.concatenate([best, others])
                mask[hidden] = False
                top[part.start + row, : len(best)] = best
        return top

    def _best(self, items: np.ndarray, scores: np.ndarray, hidden: np.ndarray, count: int) -> np.ndarray:
        """The `count` best of (n,) items that are not hidden, (V + 1,) bool."""
        shown = ~hidden[items]
        items, scores = items[shown], scores[shown]
        if len(items) > count:
            kept = scores >= np.partition(scores, len(scores) - count)[len(scores) - count]
            items, scores = items[kept], scores[kept]
        return items[np.lexsort((items, -self.popularity[items], -scores))][:count]

    def _parts(self, history: Ragged) -> Iterator[tuple[slice, "_Lookup"]]:
        """The scores of consecutive rows."""
        for part in in_chunks(len(history.offsets) - 1, self.rows_in_flight):
            yield part, _Lookup(self.score(slice_rows(history, part.start, part.stop)), self.popularity)


class _Limits(NamedTuple):
    """What ranks a target: whether it has a score, its score, and its popularity, (B,) each."""

    scored: np.ndarray
    scores: np.ndarray
    popularity: np.ndarray


class _Lookup:
    """Scores sorted by row and item.

    Args:
        scored: of one block of rows.
        popularity: (V + 1,) training events of each item.
    """

    def __init__(self, scored: Scored, popularity: np.ndarray) -> None:
        self.size = len(popularity)
        keys = scored.rows * np.int64(self.size) + scored.items
        if (keys[1:] <= keys[:-1]).any():
            order = np.argsort(keys)
            keys, scored = keys[order], Scored(*(part[order] for part in scored))
        self.keys, self.popularity = keys, popularity
        self.rows, self.items, self.scores = scored

    def look_up(self, rows: np.ndarray, items: np.ndarray) -> _Limits:
        """What ranks (n,) items in (n,) rows."""
        keys = rows * np.int64(self.size) + items
        if not len(self.keys):
            return _Limits(np.zeros(len(keys), bool), np.zeros(len(keys)), self.popularity[items])
        index = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        scored = self.keys[index] == keys
        return _Limits(scored, np.where(scored, self.scores[index], 0), self.popularity[items])

    def not_below(self, rows: np.ndarray, items: np.ndarray, limits: _Limits) -> np.ndarray:
        """Which of (n,) items in (n,) rows rank above the row's target or tie with it.

        Args:
            limits: of the targets.
        """
        own = self.look_up(rows, items)
        scored, scores, popularity = (part[rows] for part in limits)
        tie = (own.scored == scored) & (own.scores == scores) & (own.popularity >= popularity)
        return (own.scored & ~scored) | (own.scored & scored & (own.scores > scores)) | tie


def specify_baseline(baseline: Baseline) -> dict[str, Any]:
    """Class path and options of a baseline, for JSON."""
    options = {name: getattr(baseline, name) for name in inspect.signature(type(baseline)).parameters}
    return {"class_path": class_name(type(baseline)), "init_args": options}
