"""Answers against candidates in blocks of rows: all their scores are never in memory at once."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from recsys2stage.retrieval.encoders.layers import without_autocast

BLOCK = 1 << 20  # numbers in flight, 4 MB: a CPU keeps them in cache
GPU_BLOCK = 1 << 26
DENSE = 32  # vectors for each candidate of a row, up to which a product with all is cheaper than gathering some

# (own (m,), others (m, N), rows, sets) -> what each row costs (m,), and its gradient for own (m,) and others (m, N).
# `sets` is the one set of these rows, or as many as rows. It may write over `others`.
LossForm = Callable[[Tensor, Tensor, slice, slice], tuple[Tensor, Tensor, Tensor]]


def mean_loss(
    queries: Float[Tensor, "M D"],
    vectors: Float[Tensor, "U D"],
    target: Int[Tensor, " M"],
    sets: Int[Tensor, "S N"],
    starts: Int[Tensor, " S+1"] | None,
    loss_terms: LossForm,
) -> Float[Tensor, ""]:
    """The mean over rows of what `price` makes of a row's scores: own = q·v_answer, others = q·v_j, j of its set.

    The gradient is computed while a block's scores are at hand, and scaled in backward.

    Args:
        queries: rows, at least one.
        vectors: of the items.
        answer: index of each row's answer among the vectors.
        sets: indices of candidates, N in each set.
        starts: set s belongs to rows starts[s] .. starts[s + 1] - 1; None: to row s alone.
        price: the form of the loss.
    """
    if starts is None and len(vectors) <= DENSE * sets.size(1):
        mine, form = sets, loss_terms

        def loss_terms(own: Tensor, every: Tensor, rows: slice, _: slice) -> tuple[Tensor, Tensor, Tensor]:
            cost, d_own, d_others = form(own, every.gather(1, mine[rows]), rows, rows)
            return cost, d_own, torch.zeros_like(every).scatter_add_(1, mine[rows], d_others)

        sets = torch.arange(len(vectors), device=sets.device)[None]
        starts = torch.tensor([0, len(queries)], device="cpu")  # read there: on a GPU that would wait for it
    with without_autocast(queries):  # bf16 would round scores of ±20 to steps of 1/8
        return _MeanPrice.apply(  # type: ignore[no-untyped-call]  # torch does not type it
            queries, vectors, target, sets, starts, loss_terms
        )


class _MeanPrice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        vectors: Tensor,
        target: Tensor,
        sets: Tensor,
        starts: Tensor | None,
        loss_terms: LossForm,
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        d_queries, d_vectors = torch.empty_like(queries), torch.zeros_like(vectors)
        # a sum over many blocks: float32 rows of up to 1e5 would lose digits, and double costs nothing here
        precise = torch.float64 if queries.device.type != "mps" else torch.float32
        total = torch.zeros((), dtype=precise, device=queries.device)
        for part, blocks in _groups(sets, starts, queries):
            index = sets[part]  # (1, N), shared by all rows of the group, or (m, N)
            shared = len(index) == 1
            candidates = vectors[index[0] if shared else index]
            d_candidates = torch.zeros_like(candidates) if wants_gradient else None
            scores = queries.new_empty(blocks[0].stop - blocks[0].start, sets.size(1))  # by all blocks in turn
            for rows in blocks:
                query, right = queries[rows], vectors[target[rows]]
                others = scores[: len(query)]
                if shared:
                    torch.mm(query, candidates.T, out=others)
                else:
                    torch.bmm(candidates, query[:, :, None], out=others[:, :, None])
                cost, d_own, d_others = loss_terms((query * right).sum(1), others, rows, part)
                total += cost.sum()
                if d_candidates is not None:
                    d_query = d_others @ candidates if shared else (d_others[:, None] @ candidates)[:, 0]
                    d_queries[rows] = d_query.addcmul_(d_own[:, None], right)
                    d_vectors.index_add_(0, target[rows], d_own[:, None] * query)
                    if shared:
                        d_candidates.addmm_(d_others.T, query)
                    else:
                        torch.mul(d_others[:, :, None], query[:, None], out=d_candidates)
            if d_candidates is not None:
                d_vectors.index_add_(0, index.flatten(), d_candidates.flatten(0, -2))
        if wants_gradient:
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
    """q_i·v_j for j of the one set, or of each row's own."""
    if len(index) == 1:
        return queries @ vectors[index[0]].T
    if len(vectors) <= DENSE * index.size(1):
        return (queries @ vectors.T).gather(1, index)
    return (vectors[index] @ queries[:, :, None])[..., 0]


def _groups(sets: Tensor, starts: Tensor | None, queries: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Sets and the blocks of rows they belong to: one set at a time or, where each row has its own, a block of them."""
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
