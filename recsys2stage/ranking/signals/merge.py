"""Candidates of several sources as one list."""

from collections.abc import Sequence

import numpy as np

from recsys2stage.ranking.lists import NONE, without_repeats


def merge(named: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Merges by rank: the best of each source, the second best of each, and so on, the first mention counting.

    Args:
        named: (B, K) items of each source, best first, −1 past the last.
        k: how many in all.

    Returns:
        (B, k) items, −1 where the sources have no more.
    """
    depth = max(items.shape[1] for items in named)
    filled = [np.pad(items, ((0, 0), (0, depth - items.shape[1])), constant_values=NONE) for items in named]
    turns = without_repeats(np.stack(filled, axis=2).reshape(len(filled[0]), -1))
    first = np.argsort(turns == NONE, axis=1, kind="stable")[:, :k]
    merged = np.take_along_axis(turns, first, axis=1)
    return np.pad(merged, ((0, 0), (0, k - merged.shape[1])), constant_values=NONE)


def nearness(items: np.ndarray, named: Sequence[np.ndarray], size: int) -> np.ndarray:
    """1 / rank of each item in the list of each source, 0 where it is not there, (B, C, sources) float32.

    Args:
        items: (B, C).
        named: (B, K) items of each source, best first, −1 past the last.
        size: above every item number.
    """
    row = np.arange(len(items))[:, None] * size
    found = np.zeros((*items.shape, len(named)), dtype=np.float32)
    for source, listed in enumerate(named):
        real = listed > 0
        keys, rank = (row + listed)[real], np.nonzero(real)[1] + 1
        order = np.argsort(keys)
        keys, rank = keys[order], rank[order]
        if len(keys):
            place = np.searchsorted(keys, row + items).clip(max=len(keys) - 1)
            found[:, :, source] = np.where((keys[place] == row + items) & (items > 0), 1 / rank[place], 0)
    return found
