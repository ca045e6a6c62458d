"""Stored neighbours: signals that look up, for the events of a history, a stored list of scored items each."""

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, item_marks, slice_rows, top_by_sum

LOOKUPS_IN_FLIGHT = 1 << 21  # stored pairs per block


class StoredNeighbours(Proposer):
    """Base of signals whose `fit` stores a list of neighbors with scores above 0 for each item.

    The score of an item for a history is the sum of weight · score over the events that have it as a neighbor.
    Proposals have the largest scores. Tables: `offsets` (V + 2,) int64; `neighbours` (n,) int32 and `scores` (n,)
    float32, those of item a from offsets[a] to offsets[a + 1] - 1.
    """

    reads_allowed: ClassVar[bool] = True
    by_id: ClassVar[bool] = True

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        """Loads tables, of which all are checked: `propose` reads as many pairs as the offsets say.

        Raises:
            ValueError: a table is missing or does not fit the others.
        """
        if what := _fault(tables):
            raise ValueError(f"the tables of {type(self).__name__} {what}; mine again: recsys mine-negatives")
        super().restore(tables)

    @abstractmethod
    def weigh(self, requests: Requests) -> tuple[np.ndarray, np.ndarray]:
        """The events that are read, newest first, (B, L) int64, 0 for none, and their weights, (B, L)."""

    def stored(self, events: np.ndarray) -> Ragged:
        """The indices of the stored pairs of (n,) items."""
        offsets = self.tables["offsets"]
        return spans(offsets[events], offsets[events + 1])

    def pairs(self, events: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Neighbors of n events: the event's number, the item and weight · score of each stored pair.

        Args:
            events: (n,) items.
            weights: (n,).
        """
        found = self.stored(events)
        event = found.rows
        return event, self.tables["neighbours"][found.values], weights[event] * self.tables["scores"][found.values]

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        events, weights = self.weigh(requests)
        parts, size = [], len(self.tables["offsets"]) - 1
        for begin in range(0, len(events), ROWS_IN_FLIGHT):
            rows = slice(begin, begin + ROWS_IN_FLIGHT)
            own, width = events[rows], events.shape[1]
            event, items, scores = self.pairs(own.reshape(-1), weights[rows].reshape(-1))
            left_out = slice_rows(excluded, begin, begin + len(own))
            allowed = None if requests.allowed is None else requests.allowed[rows]
            parts.append(top_by_sum(event // width, items, scores, left_out, size, self.candidates, allowed))
        return np.concatenate([*parts, np.zeros((0, self.candidates), np.int64)])


def _fault(tables: dict[str, np.ndarray]) -> str | None:
    """What is wrong with tables of stored neighbors, and what is expected; None: nothing."""
    if missing := [name for name in ("offsets", "neighbours", "scores") if name not in tables]:
        return f"lack {', '.join(missing)}, expected offsets, neighbours and scores"
    if wrong := [name for name, table in tables.items() if table.ndim != 1 or table.dtype.kind not in "if"]:
        return f"have {wrong[0]} of shape {tables[wrong[0]].shape}, expected one dimension of numbers"
    offsets, neighbours = tables["offsets"], tables["neighbours"]
    if offsets.dtype.kind != "i" or neighbours.dtype.kind != "i":
        return f"have offsets of {offsets.dtype} and neighbours of {neighbours.dtype}, expected integers"
    count, size = len(neighbours), len(offsets) - 1
    if size < 1 or offsets[0] != 0 or offsets[-1] != count or (offsets[1:] < offsets[:-1]).any():
        ends = f" from {offsets[0]} to {offsets[-1]}" if len(offsets) else ""
        return f"have {len(offsets):,} offsets{ends}, expected ascending ones from 0 to {count:,}, their number"
    low, high = neighbours.min(initial=0), neighbours.max(initial=0)
    if low < 0 or high >= size:
        return f"have neighbours from {low:,} to {high:,}, expected items from 0 to {size - 1:,}"
    if other := [name for name, table in tables.items() if name != "offsets" and len(table) != count]:
        return f"have {len(tables[other[0]]):,} {other[0]}, expected {count:,}, one of each stored neighbor"
    return None


def locate(pairs: Ragged, neighbours: np.ndarray, width: int, items: np.ndarray, size: int) -> np.ndarray:
    """Which stored pair links each event to each candidate, (B, L, C) int64; −1 for none.

    Args:
        pairs: the indices of the stored pairs of B · L events, in row order.
        neighbours: of all stored pairs.
        width: L, events of a row.
        items: (B, C) candidates, 0 for padding.
        size: V + 1.
    """
    found = np.full((len(items), width, items.shape[1]), -1, dtype=np.int64)
    linked, event = neighbours[pairs.values], pairs.rows
    bounds = pairs.offsets[::width].tolist()
    place = np.arange(items.shape[1])
    with item_marks(size) as marks:
        for row, own in enumerate(items):
            begin, end = bounds[row], bounds[row + 1]
            marks[own] = place + 1
            marks[0] = 0
            column = marks[linked[begin:end]]  # 0: no candidate
            at = np.flatnonzero(column)
            found[row, event[begin:end][at] - row * width, column[at] - 1] = pairs.values[begin:end][at]
            same = np.where(own > 0, marks[own] - 1, place)  # the place of an item that comes twice is its last one
            if (same != place).any():
                found[row] = found[row][:, same]
            marks[own] = 0
    return found


def rows_per_block(pairs_of_row: np.ndarray) -> list[slice]:
    """Blocks of rows with at most LOOKUPS_IN_FLIGHT pairs, or of one row.

    Args:
        pairs_of_row: (B,) number of pairs.
    """
    blocks, begin, total = [], 0, 0
    for row, number in enumerate(pairs_of_row.tolist()):
        if total and total + number > LOOKUPS_IN_FLIGHT:
            blocks.append(slice(begin, row))
            begin, total = row, 0
        total += number
    return [*blocks, slice(begin, len(pairs_of_row))] if len(pairs_of_row) else []


def pack(owners: np.ndarray, neighbours: np.ndarray, scores: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Tables of stored neighbors.

    Args:
        owners: (n,) the item that each neighbor is stored for, ascending.
        neighbours: (n,).
        scores: (n,).
        size: V + 1.
    """
    return {
        "offsets": np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=size))]).astype(np.int64),
        "neighbours": neighbours.astype(np.int32, copy=False),
        "scores": scores.astype(np.float32, copy=False),
    }
