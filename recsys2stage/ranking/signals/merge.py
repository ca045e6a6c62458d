"""Merging the candidates of several sources (retriever and candidate generators) into one list."""

from collections.abc import Sequence

import numpy as np

from recsys2stage.ranking.lists import NONE, without_repeats


def merge(sources: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Round-robin merge by rank: rank 1 of each source, then rank 2, and so on; later duplicates are dropped.

    Args:
        sources: (B, K) items of each source, best first, padded with −1.
        k: number of items to return.

    Returns:
        (B, k) items, padded with −1.
    """
    depth = max(items.shape[1] for items in sources)
    padded = [np.pad(items, ((0, 0), (0, depth - items.shape[1])), constant_values=NONE) for items in sources]
    interleaved = without_repeats(np.stack(padded, axis=2).reshape(len(padded[0]), -1))
    first = np.argsort(interleaved == NONE, axis=1, kind="stable")[:, :k]
    merged = np.take_along_axis(interleaved, first, axis=1)
    return np.pad(merged, ((0, 0), (0, k - merged.shape[1])), constant_values=NONE)


def reciprocal_ranks(items: np.ndarray, sources: Sequence[np.ndarray], size: int) -> np.ndarray:
    """1 / rank of each item in the list of each source, 0 where the source lacks it, (B, C, sources) float32.

    Args:
        items: (B, C).
        sources: (B, K) items of each source, best first, padded with −1.
        size: V + 1.
    """
    row = np.arange(len(items))[:, None] * size
    out = np.zeros((*items.shape, len(sources)), dtype=np.float32)
    for source, candidates in enumerate(sources):
        real = candidates > 0
        keys, rank = (row + candidates)[real], np.nonzero(real)[1] + 1
        order = np.argsort(keys)
        keys, rank = keys[order], rank[order]
        if len(keys):
            index = np.searchsorted(keys, row + items).clip(max=len(keys) - 1)
            out[:, :, source] = np.where((keys[index] == row + items) & (items > 0), 1 / rank[index], 0)
    return out
