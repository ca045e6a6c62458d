"""The k best of rows of scores, and of a large catalogue that is scored block by block.

Among equal scores the lower column, that is the lower item, comes first.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

LARGE = 1 << 16  # items from which blocks are faster than a matrix of all scores
BLOCK = 1 << 17  # scores computed at once: they stay in the processor's cache
GROUP = 32  # neighboring items of which only the largest score is kept
SPARE = 16  # groups scored again beyond the k that suffice, for scores that are equal up to rounding
CEILING = np.array([-np.inf, np.inf], np.float32)  # of the scores of an item that is not allowed, and that is
ROUNDING = 1e-6  # difference between two ways to add up one inner product, relative to the lengths of its vectors


def top_columns(scores: Float32[Tensor, "B N"], k: int) -> tuple[Float32[Tensor, "B k"], Int64[Tensor, "B k"]]:
    """The k best scores of each row, k at most N, in any order, and their columns.

    Of the columns that tie at the k-th score, the lowest are returned.
    """
    best, columns = scores.topk(k)
    # topk returns any of the columns that tie at the k-th score, so rows with such a tie are fully sorted
    tied = ((best[:, -1] > -torch.inf) & ((scores >= best[:, -1:]).sum(1) > k)).nonzero().squeeze(1)
    if len(tied):
        ordered = scores[tied].sort(dim=1, descending=True, stable=True)
        best[tied], columns[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return best, columns


def block_cells(items: int, width: int, k: int) -> int | None:
    """Numbers that `search_blocks` holds per query; None where a matrix of all scores is as fast."""
    again = (k + SPARE) * GROUP
    return max(items // GROUP, again * width) if items >= max(LARGE, 4 * again) else None


def search_blocks(
    table: Float32[Tensor, "V D"],
    queries: Float32[Tensor, "B D"],
    k: int,
    excluded: tuple[Int64[Tensor, " E"], Int64[Tensor, " E"]],
    allowed: Bool[np.ndarray, "*rows V"] | None = None,
) -> tuple[Float32[Tensor, "B k"], Int64[Tensor, "B k"]]:
    """As `top_columns` of queries @ table.T, without that matrix; for sizes that have `block_cells`.

    One pass scores the items block by block and keeps the largest score of each group of neighboring items. The k
    best items are in the k groups with the largest of these, so only those groups are scored again.

    Args:
        table: vectors of items 1..V.
        queries: one vector per row.
        k: number of items per query.
        excluded: row and column (item - 1) of each excluded item.
        allowed: True for each item that may be returned, (V,) for all rows or (B, V); None: all.
    """
    count, owners = len(table), excluded[0]
    columns, order = excluded[1].sort()
    owners = owners[order]

    def score(rows: slice, start: int, stop: int, held: slice | Tensor) -> Tensor:
        """Scores of a block of items, -inf where they may not be returned; `held`: exclusions in it."""
        scores = queries[rows] @ table[start:stop].T
        if allowed is not None:  # the minimum with a ceiling takes a quarter of the time of masked_fill
            own = allowed if allowed.ndim == 1 else allowed[rows]
            ceiling = CEILING.take(own[..., start:stop].view(np.uint8))
            torch.minimum(scores, torch.from_numpy(ceiling), out=scores)
        scores[owners[held] - rows.start, columns[held] - start] = -torch.inf
        return scores

    step = max(1, BLOCK // (len(queries) * GROUP)) * GROUP
    largest = torch.empty(len(queries), -(-count // GROUP))
    for start in range(0, count, step):
        stop = min(start + step, count)
        held = slice(*torch.searchsorted(columns, torch.tensor([start, stop])).tolist())
        scores = score(slice(0, len(queries)), start, stop, held)
        scores = torch.nn.functional.pad(scores, (0, -scores.shape[1] % GROUP), value=-torch.inf)
        groups = scores.view(len(queries), -1, GROUP).amax(2)
        largest[:, start // GROUP :][:, : groups.shape[1]] = groups
    best, chosen = largest.topk(k + SPARE)
    chosen = chosen.sort(1).values  # so that columns rise, and ties go to the lowest
    again = (chosen[:, :, None] * GROUP + torch.arange(GROUP)).flatten(1)  # (B, columns)
    padding, again = again >= count, again.clamp(max=count - 1)
    vectors = table[again]  # (B, columns, D)
    scores = torch.bmm(vectors, queries[:, :, None]).squeeze(2)
    out = padding | torch.isin(again + torch.arange(len(queries))[:, None] * count, owners * count + columns)
    if allowed is not None:
        columns_of = again.numpy()
        own = allowed[columns_of] if allowed.ndim == 1 else np.take_along_axis(allowed, columns_of, axis=1)
        out |= torch.from_numpy(~own)
    top, places = top_columns(scores.masked_fill_(out, -torch.inf), k)
    found = again.gather(1, places)
    # another group may hold an equal item, where its largest score is that of the k-th group up to rounding
    scale = queries.norm(dim=1) * vectors.norm(dim=2).amax(1)
    unsure = (best[:, -1] > -torch.inf) & (best[:, -1] >= best[:, k - 1] - ROUNDING * scale)
    for row in unsure.nonzero().flatten().tolist():
        rows = slice(row, row + 1)
        top[rows], found[rows] = top_columns(score(rows, 0, count, owners == row), k)
    return top, found
