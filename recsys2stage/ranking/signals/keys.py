"""Array helpers of signals: searches in sorted keys, look-ups by item, and top-k items with exclusions."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.ranking.lists import NONE

ROWS_IN_FLIGHT = 1 << 10  # requests per block of top-k selection
END = np.iinfo(np.int64).max  # sentinel after the last key, so that every search index is valid

_of_thread = threading.local()


@contextmanager
def item_marks(size: int) -> Iterator[np.ndarray]:
    """Zeros for at least `size` items, int32. The body sets back to 0 what it changes.

    A look-up by item takes one step, and no request allocates or clears an array as long as the catalogue: each thread
    keeps its own.
    """
    marks = getattr(_of_thread, "marks", None)
    _of_thread.marks = None  # nested uses, and those after an error, get an array of their own
    if marks is None or len(marks) < size:
        marks = np.zeros(size, dtype=np.int32)
    yield marks
    _of_thread.marks = marks


def batched_searchsorted(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`np.searchsorted` of many values in a long table, in sorted order: consecutive searches hit the cache.

    Args:
        keys: ascending.
        queries: values of any shape.
    """
    if len(queries) == 1:  # the candidates of one request ascend
        return np.searchsorted(keys, queries)
    order = np.argsort(queries, axis=None)
    index = np.empty(queries.size, dtype=np.int64)
    index[order] = np.searchsorted(keys, queries.ravel()[order])
    return index.reshape(queries.shape)


def top_by_sum(
    rows: np.ndarray,
    items: np.ndarray,
    scores: np.ndarray,
    excluded: Ragged,
    size: int,
    count: int,
    allowed: np.ndarray | None = None,
) -> np.ndarray:
    """Top `count` items of each row by the sum of their entries' scores, without excluded items; padded with −1.

    Args:
        rows: (n,) row of each entry.
        items: (n,) item of each entry.
        scores: (n,) above 0, summed over the entries of an item.
        excluded: excluded items of each row.
        size: V + 1.
        count: number of columns of the result.
        allowed: (B, V) bool, items that may be returned; None: all.

    Returns:
        (B, count) int64, best first; ties go to the lower item number, independent of the rest of the batch.
    """
    batch = len(excluded.offsets) - 1
    if (rows[1:] < rows[:-1]).any():
        order = np.argsort(rows, kind="stable")
        rows, items, scores = rows[order], items[order], scores[order]
    bounds, out = np.searchsorted(rows, np.arange(batch + 1)).tolist(), np.full((batch, count), NONE, dtype=np.int64)
    with item_marks(size) as marks:
        for row in range(batch):
            own, score = items[bounds[row] : bounds[row + 1]], scores[bounds[row] : bounds[row + 1]]
            marks[own] = np.arange(len(own))  # of equal entries the last one stands for all
            total = np.bincount(marks[own], score, len(own))
            marks[own] = 0
            left_out = excluded.values[excluded.offsets[row] : excluded.offsets[row + 1]]
            marks[left_out] = 1
            eligible = (total > 0) & (marks[own] == 0)
            marks[left_out] = 0
            if allowed is not None:
                eligible &= allowed[row][own - 1]
            own, total = own[eligible], total[eligible]
            if 0 < count < len(own):
                best = total >= np.partition(total, len(own) - count)[len(own) - count]
                own, total = own[best], total[best]
            order = np.lexsort((own, -total))[:count]
            out[row, : len(order)] = own[order]
    return out


def top_by_score(
    scores: np.ndarray, items: np.ndarray, excluded: Ragged, count: int, allowed: np.ndarray | None = None
) -> np.ndarray:
    """Top `count` items of each row by score, without excluded items; padded with −1.

    Args:
        scores: (B, n), −inf for items that are not eligible; changed in place.
        items: (n,) item of each column, ascending.
        excluded: excluded items of each row.
        count: number of columns of the result.
        allowed: (B, V) bool, items that may be returned; None: all.

    Returns:
        (B, count) int64, best first; ties go to the lower item number.
    """
    out = np.full((len(scores), count), NONE, dtype=np.int64)
    if not scores.size or not count:
        return out
    scores[:, : np.searchsorted(items, 1)] = -np.inf  # padding
    column = np.searchsorted(items, excluded.values).clip(max=len(items) - 1)
    found = items[column] == excluded.values
    scores[excluded.rows[found], column[found]] = -np.inf
    if allowed is not None:
        scores[~allowed[:, items - 1]] = -np.inf  # of padding, item 0, any
    for row, score in enumerate(scores):
        least = np.partition(score, len(items) - count)[len(items) - count] if count < len(items) else -np.inf
        best = np.flatnonzero((score >= least) & np.isfinite(score))
        best = best[np.argsort(-score[best], kind="stable")[:count]]
        out[row, : len(best)] = items[best]
    return out


def slice_rows(ragged: Ragged, begin: int, end: int) -> Ragged:
    """Rows begin .. end - 1."""
    offsets = ragged.offsets[begin : end + 1]
    return Ragged(ragged.values[offsets[0] : offsets[-1]], offsets - offsets[0])
