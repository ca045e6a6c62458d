"""Searches of many queries as arrays of rows: exclusions, chunks and results."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer

CELLS = 1 << 24  # maximum number of scores or fetched vector components in memory, whatever the number of queries

Exclude = tuple[Integer[np.ndarray, " _"], Integer[np.ndarray, " _"]]  # items (sum,) flat, offsets (B + 1,)
SearchResult = tuple[Float32[np.ndarray, "B k"], Int64[np.ndarray, "B k"]]


def empty_result(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A search result without items."""
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int64)


def chunks(rows: np.ndarray, cells: int) -> Iterator[np.ndarray]:
    """Splits rows into chunks of at most CELLS numbers, at `cells` numbers per row."""
    step = max(1, CELLS // cells)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def take_rows(exclude: Exclude, rows: np.ndarray) -> Exclude:
    """The exclusions of the given rows."""
    items, offsets = exclude
    lengths = np.diff(offsets)[rows]
    ends = np.cumsum(lengths)
    index = np.arange(lengths.sum()) + np.repeat(offsets[rows] - ends + lengths, lengths)
    return items[index].astype(np.int64), np.concatenate([[0], ends]).astype(np.int64)


def exclusion_keys(items: np.ndarray, offsets: np.ndarray, count: int) -> np.ndarray:
    """row · (count + 1) + item for each excluded (row, item): sorted, unique, without padding."""
    keys = np.unique(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * (count + 1) + items)
    return keys[keys % (count + 1) > 0]


def count_allowed(allowed: np.ndarray, rows: int) -> np.ndarray:
    """Number of allowed items of each row (B,), from one mask (V,) for all rows or masks (B, V)."""
    if allowed.ndim == 1:
        return np.full(rows, np.count_nonzero(allowed))
    return np.array([np.count_nonzero(mask) for mask in allowed], np.int64)


def masks_of(allowed: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """The mask (V,) of all rows, or those (b, V) of the given rows (b,) of (B, V)."""
    return allowed if allowed is None or allowed.ndim == 1 else allowed[rows]


def mask_groups(allowed: np.ndarray | None, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Groups of the given rows (b,) that share a mask, and their mask (V,): all together, or one after another."""
    if allowed is None or allowed.ndim == 1:
        yield rows, allowed
    else:
        yield from ((rows[number : number + 1], allowed[row]) for number, row in enumerate(rows))


def finite_rows(vectors: Float32[np.ndarray, "V D"]) -> Bool[np.ndarray, " V"]:
    """Whether each row is finite, block by block: a mask of all numbers would take a quarter of their memory."""
    finite = np.empty(len(vectors), bool)
    for rows in chunks(np.arange(len(vectors)), vectors.shape[1]):
        finite[rows] = np.isfinite(vectors[rows[0] : rows[-1] + 1]).all(axis=1)
    return finite


def best_first(scores: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row by score, then by item; items that score -inf become -1."""
    order = np.arange(len(scores))[:, None], np.lexsort((items, -scores), axis=-1)
    scores, items = scores[order], items[order]
    return scores, np.where(np.isneginf(scores), -1, items)
