"""Blockwise loss computation: the (M, N) matrix of target and candidate scores is never materialized at once."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys2stage.retrieval.encoders.layers import without_autocast

BLOCK = 1 << 20  # scores per block, 4 MB: fits in CPU cache
GPU_BLOCK = 1 << 26
DENSE = 32  # up to this U / N, scoring all U vectors is cheaper than gathering N of them per row

# (positive (m,), negative (m, N), rows, sets) -> loss per row (m,), and gradients for positive (m,) and
# negative (m, N). `sets` selects the one set that these rows share, or one set per row. May overwrite `negative`.
ComputeLoss = Callable[[Tensor, Tensor, slice, slice], tuple[Tensor, Tensor, Tensor]]


def mean_loss(
    queries: Float[Tensor, "M D"],
    vectors: Float[Tensor, "U D"],
    target: Int[Tensor, " M"],
    sets: Int[Tensor, "S N"],
    starts: Int[Tensor, " S+1"] | None,
    loss_terms: ComputeLoss,
) -> Float[Tensor, ""]:
    """Mean over rows of `loss_terms`, from the scores positive = q·v_target and negative = q·v_j, j in the row's set.

    The forward pass computes the gradient of each block while its scores are in memory; backward only scales it.

    Args:
        queries: one per row, at least one.
        vectors: of U distinct items.
        target: index of each row's target in `vectors`.
        sets: indices of candidates in `vectors`, N per set.
        starts: rows starts[s] .. starts[s + 1] - 1 use set s; None: row s uses set s.
        loss_terms: loss and gradients of a block of rows.
    """
    if starts is None and len(vectors) <= DENSE * sets.size(1):
        candidates, sparse_terms = sets, loss_terms

        def loss_terms(positive: Tensor, all_scores: Tensor, rows: slice, _: slice) -> tuple[Tensor, Tensor, Tensor]:
            row_losses, d_positive, d_negative = sparse_terms(
                positive, all_scores.gather(1, candidates[rows]), rows, rows
            )
            return row_losses, d_positive, torch.zeros_like(all_scores).scatter_add_(1, candidates[rows], d_negative)

        sets = torch.arange(len(vectors), device=sets.device)[None]
        starts = torch.tensor([0, len(queries)], device="cpu")  # read on the CPU; a GPU tensor would force a sync
    with without_autocast(queries):  # bf16 would round scores of ±20 to steps of 1/8
        return _MeanLoss.apply(  # type: ignore[no-untyped-call]  # torch does not type it
            queries, vectors, target, sets, starts, loss_terms
        )


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        vectors: Tensor,
        target: Tensor,
        sets: Tensor,
        starts: Tensor | None,
        loss_terms: ComputeLoss,
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:2])
        d_queries, d_vectors = torch.empty_like(queries), torch.zeros_like(vectors)
        # float32 would lose digits in a sum over up to 1e5 rows; float64 is free here
        precision = torch.float64 if queries.device.type != "mps" else torch.float32
        total = torch.zeros((), dtype=precision, device=queries.device)
        for part, blocks in _groups(sets, starts, queries):
            index = sets[part]  # (1, N), shared by all rows of the group, or (m, N)
            shared = len(index) == 1
            candidates = vectors[index[0] if shared else index]
            d_candidates = torch.zeros_like(candidates) if needs_gradient else None
            scores = queries.new_empty(blocks[0].stop - blocks[0].start, sets.size(1))  # reused by all blocks
            for rows in blocks:
                query, target_vectors = queries[rows], vectors[target[rows]]
                negative = scores[: len(query)]
                if shared:
                    torch.mm(query, candidates.T, out=negative)
                else:
                    torch.bmm(candidates, query[:, :, None], out=negative[:, :, None])
                row_losses, d_positive, d_negative = loss_terms((query * target_vectors).sum(1), negative, rows, part)
                total += row_losses.sum()
                if d_candidates is not None:
                    d_query = d_negative @ candidates if shared else (d_negative[:, None] @ candidates)[:, 0]
                    d_queries[rows] = d_query.addcmul_(d_positive[:, None], target_vectors)
                    d_vectors.index_add_(0, target[rows], d_positive[:, None] * query)
                    if shared:
                        d_candidates.addmm_(d_negative.T, query)
                    else:
                        torch.mul(d_negative[:, :, None], query[:, None], out=d_candidates)
            if d_candidates is not None:
                d_vectors.index_add_(0, index.flatten(), d_candidates.flatten(0, -2))
        if needs_gradient:
            ctx.save_for_backward(d_queries, d_vectors)
        ctx.rows = len(queries)
        return (total / len(queries)).to(queries.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_queries, d_vectors = ctx.saved_tensors
        scale = gradients[0] / ctx.rows
        return d_queries * scale, d_vectors * scale, None, None, None, None


def products(
    queries: Float[Tensor, "M D"], vectors: Float[Tensor, "U D"], index: Int[Tensor, "S N"]
) -> Float[Tensor, "M N"]:
    """q_i·v_j for j in the one shared set, or in row i's own set."""
    if len(index) == 1:
        return queries @ vectors[index[0]].T
    if len(vectors) <= DENSE * index.size(1):
        return (queries @ vectors.T).gather(1, index)
    return (vectors[index] @ queries[:, :, None])[..., 0]


def _groups(sets: Tensor, starts: Tensor | None, queries: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Sets with the row blocks that use them: one shared set at a time, or a block of rows with one set each."""
    (rows, dim), width = queries.shape, sets.size(1)
    budget = BLOCK if queries.device.type == "cpu" else GPU_BLOCK
    if starts is None:
        for block in _slices(0, rows, budget // (width * dim)):
            yield block, [block]
    else:
        for number, (start, end) in enumerate(pairwise(starts.tolist())):
            if start < end:
                yield slice(number, number + 1), _slices(start, end, budget // width)


def _slices(start: int, end: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(at, min(at + size, end)) for at in range(start, end, size)]
