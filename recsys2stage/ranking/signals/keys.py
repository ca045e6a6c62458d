"""Look-ups in sorted keys, and the best of what they find. Bare arrays."""

import numpy as np

from recsys2stage.data.batches import Ragged
from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals.base import is_excluded

ROWS_IN_FLIGHT = 1 << 10  # requests whose lists are merged at once
END = np.iinfo(np.int64).max  # past the last key, so that every look-up lands on one


def find(keys: np.ndarray, target_action: np.ndarray) -> np.ndarray:
    """`np.searchsorted` of many values in a long table, in their order: what one look-up reads the next has in cache.

    Args:
        keys: ascending.
        asked: values of any shape.
    """
    order = np.argsort(target_action, axis=None)
    place = np.empty(target_action.size, dtype=np.int64)
    place[order] = np.searchsorted(keys, target_action.ravel()[order])
    return place.reshape(target_action.shape)


def best(rows: np.ndarray, items: np.ndarray, scores: np.ndarray, known: Ragged, size: int, count: int) -> np.ndarray:
    """The `count` items of each row with the largest sum of scores that are not known, −1 past the last.

    Args:
        rows: (n,) row of each entry.
        items: (n,) its item.
        scores: (n,) what it adds to the item's score, above 0.
        known: the items each row's user has met.
        size: above every item number.
        count: columns of what is returned.

    Returns:
        (B, count) int64, best first; ties go to the lower item number, whatever else is in the batch.
    """
    keys, place = np.unique(rows * size + items, return_inverse=True)
    row, item = np.divmod(keys, size)
    column = np.arange(len(keys)) - np.searchsorted(row, row)
    shape = (len(known.offsets) - 1, max(int(column.max(initial=0)) + 1, count))
    found, score = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    found[row, column] = item
    score[row, column] = np.bincount(place, scores, len(keys))
    score[is_excluded(found, known, size)] = 0
    order = np.argsort(-score, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(score, order, axis=1) > 0, np.take_along_axis(found, order, axis=1), NONE)


def highest(scores: np.ndarray, items: np.ndarray, known: Ragged, size: int, count: int) -> np.ndarray:
    """The `count` items of each row with the highest scores that are not known, −1 past the last.

    Args:
        scores: (B, n), −inf where there is none; changed.
        items: (n,) which they are of, ascending.
        known: the items each row's user has met.
        size: above every item number.
        count: columns of what is returned.

    Returns:
        (B, count) int64, best first; ties go to the lower item number.
    """
    scores[is_excluded(np.broadcast_to(items, scores.shape), known, size)] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    named = np.where(np.isfinite(np.take_along_axis(scores, order, axis=1)), items[order], NONE)
    return np.pad(named, ((0, 0), (0, count - named.shape[1])), constant_values=NONE)


def cut(known: Ragged, begin: int, end: int) -> Ragged:
    """Rows begin .. end - 1."""
    offsets = known.offsets[begin : end + 1]
    return Ragged(known.values[offsets[0] : offsets[-1]], offsets - offsets[0])
