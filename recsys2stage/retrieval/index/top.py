"""The k best of rows of scores, and of a large catalogue that is scored block by block.

Among equal scores the lower column, that is the lower item, comes first.
"""

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

LARGE = 1 << 16  # items from which blocks are faster than a matrix of all scores
BLOCK = 1 << 17  # scores computed at once: they stay in the processor's cache
GROUP = 32  # neighbouring items of which only the largest score is kept
SPARE = 16  # groups scored again beyond the k that suffice, for scores that are equal up to rounding
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
    barred: Bool[Tensor, "*rows V"] | None = None,
) -> tuple[Float32[Tensor, "B k"], Int64[Tensor, "B k"]]:
    """As `top_columns` of queries @ table.T, without that matrix; for sizes that have `block_cells`.

    One pass scores the items block by block and keeps the largest score of each group of neighbouring items. The k
    best items are in the k groups with the largest of these, so only those groups are scored again.

    Args:
        table: vectors of items 1..V.
        queries: one vector per row.
        k: number of items per query.
        excluded: row and column (item - 1) of each excluded item.
        barred: True for items that are not allowed, (V,) for all rows or (B, V); None: all are allowed.
    """
    count, owners = len(table), excluded[0]
    columns, order = excluded[1].sort()
    owners = owners[order]

    def score(start: int, stop: int) -> Tensor:
        scores = queries @ table[start:stop].T
        if barred is not None:
            scores.masked_fill_(barred[..., start:stop], -torch.inf)
        first, last = torch.searchsorted(columns, torch.tensor([start, stop])).tolist()
        scores[owners[first:last], columns[first:last] - start] = -torch.inf
        return scores

    step = max(1, BLOCK // (len(queries) * GROUP)) * GROUP
    largest = torch.empty(len(queries), -(-count // GROUP))
    for start in range(0, count, step):
        scores = score(start, min(start + step, count))
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
    if barred is not None:
        out |= barred[again] if barred.ndim == 1 else barred.gather(1, again)
    top, places = top_columns(scores.masked_fill_(out, -torch.inf), k)
    found = again.gather(1, places)
    # another group may hold an equal item, where its largest score is that of the k-th group up to rounding
    scale = queries.norm(dim=1) * vectors.norm(dim=2).amax(1)
    unsure = (best[:, -1] > -torch.inf) & (best[:, -1] >= best[:, k - 1] - ROUNDING * scale)
    if unsure.any():
        top[unsure], found[unsure] = top_columns(score(0, count)[unsure], k)
    return top, found
