"""Merging the candidates of several sources (retriever and candidate generators) into one list."""

from collections.abc import Sequence

import numpy as np

from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals.keys import item_marks


def merge(sources: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Round-robin merge by rank: rank 1 of each source, then rank 2, and so on; later duplicates are dropped.

    Args:
        sources: (B, K) items of each source, best first, padded with −1.
        k: number of items to return.

    Returns:
        (B, k) items, padded with −1.
    """
    depth, batch = max(items.shape[1] for items in sources), len(sources[0])
    interleaved = np.full((batch, depth, len(sources)), NONE, dtype=np.int64)
    for source, items in enumerate(sources):
        interleaved[:, : items.shape[1], source] = items
    merged, place = np.full((batch, k), NONE, dtype=np.int64), np.arange(depth * len(sources))
    with item_marks(1 + int(interleaved.max(initial=0))) as marks:
        for row, all_items in enumerate(interleaved.reshape(batch, -1)):
            items = all_items[all_items > 0]
            own = place[: len(items)]
            marks[items[::-1]] = own[::-1]  # of equal items the first one is written last
            items_once = items[marks[items] == own][:k]
            marks[items] = 0
            merged[row, : len(items_once)] = items_once
    return merged


def reciprocal_ranks(items: np.ndarray, sources: Sequence[np.ndarray], size: int) -> np.ndarray:
    """1 / rank of each item in the list of each source, 0 where the source lacks it, (B, C, sources) float32.

    Args:
        items: (B, C).
        sources: (B, K) items of each source, best first, padded with −1.
        size: V + 1.
    """
    items, ranks = np.maximum(items, 0), np.zeros((*items.shape, len(sources)), dtype=np.float32)
    with item_marks(size) as marks:
        for source, proposed in enumerate(sources):
            rank = np.arange(1, proposed.shape[1] + 1)
            for row, (own, candidates) in enumerate(zip(items, np.maximum(proposed, 0), strict=True)):
                marks[candidates] = rank
                marks[0] = 0
                ranks[row, :, source] = marks[own]
                marks[candidates] = 0
    return np.divide(1, ranks, out=ranks, where=ranks > 0)
