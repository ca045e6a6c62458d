"""Scores and ranks of items in the whole catalogue, and its best items, computed in blocks.

The scores of a batch and a catalogue, (B, V), are never in memory at once: a block holds some of the queries and some
of the items. An item's own score is taken from its block, so that it is rounded as those it is compared to.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CELLS = 1 << 20  # scores of a block on the CPU: 4 MiB, so that they stay in its cache
DEVICE_CELLS = 1 << 26  # on other devices, which want large matrix products
ROWS = 128  # queries of a block where the catalogue is larger than one: enough for a fast matrix product


class CatalogueRanks(NamedTuple):
    """What B queries say of given items, and their best items."""

    scores: Float[Tensor, "B N"]  # −inf for excluded items and padding
    ranks: Int[Tensor, "B M"]  # from 1
    top: Int[Tensor, "B K"]  # best first, padded with −1


def catalogue_ranks(
    queries: Float[Tensor, "B D"],
    vectors: Float[Tensor, "V D"],
    excluded_rows: Int[Tensor, " X"],
    excluded_items: Int[Tensor, " X"],
    items: Int[Tensor, "B N"],
    ranked: int | None = None,
    top: int = 0,
) -> CatalogueRanks:
    """Scores of given items, their ranks among all items that are not excluded, and the best items.

    The rank of an item is the number of items whose score is not below its own: ties, and NaN, count against it. An
    item that is itself excluded ranks last.

    Args:
        queries: query vectors.
        vectors: vectors of items 1..V.
        excluded_rows: query of each excluded item.
        excluded_items: items 1..V that are not ranked.
        items: items to score, padded with 0 or −1.
        ranked: number M of their first columns to rank; None: all.
        top: number of best items.
    """
    ranked = items.size(1) if ranked is None else ranked
    cells = CELLS if queries.device.type == "cpu" else DEVICE_CELLS
    step = max(min(ROWS, cells), cells // max(len(vectors), 1))
    if step >= len(queries):
        return _ranks(queries, vectors, excluded_rows, excluded_items, items, ranked, top, cells)
    parts = []
    for start in range(0, len(queries), step):
        own = (excluded_rows >= start) & (excluded_rows < start + step)
        rows = slice(start, start + step)
        excluded = excluded_rows[own] - start, excluded_items[own]
        parts.append(_ranks(queries[rows], vectors, *excluded, items[rows], ranked, top, cells))
    return CatalogueRanks(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _ranks(
    queries: Tensor,
    vectors: Tensor,
    excluded_rows: Tensor,
    excluded_items: Tensor,
    items: Tensor,
    ranked: int,
    top: int,
    cells: int,
) -> CatalogueRanks:
    """The same for a few queries."""
    blocks = _Blocks(queries, vectors, excluded_rows, excluded_items, cells)
    scores = queries.new_full(items.shape, -torch.inf)
    for begin, block in blocks:
        column = items - 1 - begin
        inside = (column >= 0) & (column < block.size(1))
        scores = torch.where(inside, block.gather(1, column.clamp(0, block.size(1) - 1)), scores)
    above = torch.zeros_like(items[:, :ranked])
    best, best_items = queries.new_full((len(queries), top), -torch.inf), items.new_full((len(queries), top), -1)
    if ranked or top:
        for begin, block in blocks:
            above += _not_below(block, scores[:, :ranked])
            if top:
                _keep_best(best, best_items, block, begin)
    return CatalogueRanks(scores, above, torch.where(best > -torch.inf, best_items, -1))


class _Blocks:
    """Iterates over blocks of items: the number of items before a block, and its scores, −inf for excluded items.

    The widths of blocks differ by one at most: a matrix product with a few columns may round differently. The scores
    of a single block are computed once, however often it is iterated over.
    """

    def __init__(self, queries: Tensor, vectors: Tensor, rows: Tensor, items: Tensor, cells: int) -> None:
        self.queries, self.vectors = queries, vectors
        count = -(-len(vectors) * max(len(queries), 1) // cells)
        self.bounds = [len(vectors) * number // count for number in range(count + 1)] if count else []
        if count > 1:  # sorted by item, the exclusions of a block are a slice
            order = items.argsort()
            rows, items = rows[order], items[order]
        self.rows, self.items = rows, items
        edges = torch.tensor(self.bounds, device=items.device) + 1
        self.edges = torch.searchsorted(items, edges).tolist() if count > 1 else [0, len(items)]
        self.single: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for number, begin in enumerate(self.bounds[:-1]):
            if self.single is not None:
                yield begin, self.single
                continue
            scores = self.queries @ self.vectors[begin : self.bounds[number + 1]].T
            own = slice(self.edges[number], self.edges[number + 1])
            scores[self.rows[own], self.items[own] - 1 - begin] = -torch.inf
            if len(self.bounds) == 2:
                self.single = scores
            yield begin, scores


def _not_below(block: Tensor, scores: Tensor) -> Tensor:
    """How many scores of each row of a block, (B, W), are not below each of (B, M) scores."""
    width = block.size(1)
    if block.device.type != "cpu":
        return width - torch.stack([(block < own[:, None]).sum(1) for own in scores.T], dim=1)
    # NumPy counts a row many times faster than torch sums its comparisons
    rows, own = block.numpy(), scores.numpy()
    below = [[np.count_nonzero(row < score) for score in row_scores] for row, row_scores in zip(rows, own, strict=True)]
    return width - torch.tensor(below, dtype=torch.int64).view(scores.shape)


def _keep_best(best: Tensor, items: Tensor, block: Tensor, begin: int) -> None:
    """Replaces, in place, the best scores so far and their items by those of a block that are better."""
    rows = (block.amax(1) > best[:, -1]).nonzero().squeeze(1)  # few, after the first blocks
    if not len(rows):
        return
    scores, columns = block[rows].topk(min(best.size(1), block.size(1)))
    merged = torch.cat([best[rows], scores], dim=1), torch.cat([items[rows], columns + 1 + begin], dim=1)
    order = merged[0].argsort(dim=1, descending=True, stable=True)[:, : best.size(1)]
    best[rows], items[rows] = merged[0].gather(1, order), merged[1].gather(1, order)
