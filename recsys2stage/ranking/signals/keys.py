"""Array helpers of signals: searches in sorted keys, and top-k items with exclusions."""

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals.base import is_excluded

ROWS_IN_FLIGHT = 1 << 10  # requests per block of top-k selection
END = np.iinfo(np.int64).max  # sentinel after the last key, so that every search index is valid


def batched_searchsorted(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`np.searchsorted` of many values in a long table, in sorted order: consecutive searches hit the cache.

    Args:
        keys: ascending.
        queries: values of any shape.
    """
    order = np.argsort(queries, axis=None)
    index = np.empty(queries.size, dtype=np.int64)
    index[order] = np.searchsorted(keys, queries.ravel()[order])
    return index.reshape(queries.shape)


def top_by_sum(
    rows: np.ndarray, items: np.ndarray, scores: np.ndarray, excluded: Ragged, size: int, count: int
) -> np.ndarray:
    """Top `count` items of each row by the sum of their entries' scores, without excluded items; padded with −1.

    Args:
        rows: (n,) row of each entry.
        items: (n,) item of each entry.
        scores: (n,) above 0, summed over the entries of an item.
        excluded: excluded items of each row.
        size: V + 1.
        count: number of columns of the result.

    Returns:
        (B, count) int64, best first; ties go to the lower item number, independent of the rest of the batch.
    """
    keys, inverse = np.unique(rows * size + items, return_inverse=True)
    row, item = np.divmod(keys, size)
    column = np.arange(len(keys)) - np.searchsorted(row, row)
    shape = (len(excluded.offsets) - 1, max(int(column.max(initial=0)) + 1, count))
    candidates, score = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    candidates[row, column] = item
    score[row, column] = np.bincount(inverse, scores, len(keys))
    score[is_excluded(candidates, excluded, size)] = 0
    order = np.argsort(-score, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(score, order, axis=1) > 0, np.take_along_axis(candidates, order, axis=1), NONE)


def top_by_score(scores: np.ndarray, items: np.ndarray, excluded: Ragged, size: int, count: int) -> np.ndarray:
    """Top `count` items of each row by score, without excluded items; padded with −1.

    Args:
        scores: (B, n), −inf for items that are not eligible; changed in place.
        items: (n,) item of each column, ascending.
        excluded: excluded items of each row.
        size: V + 1.
        count: number of columns of the result.

    Returns:
        (B, count) int64, best first; ties go to the lower item number.
    """
    scores[is_excluded(np.broadcast_to(items, scores.shape), excluded, size)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    top = np.where(np.isfinite(np.take_along_axis(scores, order, axis=1)), items[order], NONE)
    return np.pad(top, ((0, 0), (0, count - top.shape[1])), constant_values=NONE)


def slice_rows(ragged: Ragged, begin: int, end: int) -> Ragged:
    """Rows begin .. end - 1."""
    offsets = ragged.offsets[begin : end + 1]
    return Ragged(ragged.values[offsets[0] : offsets[-1]], offsets - offsets[0])
