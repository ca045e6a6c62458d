"""Softmax losses of the retriever.

The logits of many queries against many columns are never all in memory: `cross_entropy` works through blocks of rows
and keeps only the gradient.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recsys2stage.losses.base import Answers, Catalogue, Loss

BLOCK_LOGITS = 1 << 20  # logits in flight, 4 MB: a CPU keeps them in cache
GPU_BLOCK_LOGITS = 1 << 26


class InfoNCE(Loss):
    """InfoNCE with in-batch negatives (van den Oord et al. 2018), corrected for popularity (Yi et al. 2019, logQ).

    With s_ij = q_i·v_j / τ − log p(j) over the answers j of all M places of the batch, and every j ≠ i that is the same
    item as i masked,

        loss = mean_i ( logsumexp_j s_ij − s_ii ).

    The correction applies to every column, the positive included. Equal columns are merged exactly: an item that
    answers n places is one column whose logit is raised by log n (by log 1 in the rows it answers).

    Args:
        temperature: τ.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, queries: Float[Tensor, "M D"], answers: Answers, catalogue: Catalogue) -> Float[Tensor, ""]:
        distinct, column, count = torch.unique(answers.items, return_inverse=True, return_counts=True)
        correction = -log_share(catalogue.counts)[distinct].to(queries.dtype)
        return cross_entropy(
            queries / self.temperature,
            catalogue.vectors(distinct),
            column,
            column_bias=correction + count.to(correction.dtype).log(),
            answer_bias=correction[column],
        )


class FullSoftmax(Loss):
    """Softmax cross entropy against the whole catalogue: logit_ij = q_i·v_j / τ over all items j.

    Args:
        temperature: τ.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, queries: Float[Tensor, "M D"], answers: Answers, catalogue: Catalogue) -> Float[Tensor, ""]:
        columns = catalogue.vectors(torch.arange(1, len(catalogue.counts), device=queries.device))
        no_bias, answer = columns.new_zeros(len(columns)), answers.items - 1
        return cross_entropy(queries / self.temperature, columns, answer, no_bias, no_bias[answer])


def log_share(counts: Int[Tensor, " W"]) -> Float[Tensor, " W"]:
    """log p of each item as a training target, p = (count + 1) / (targets + V); row 0 is padding."""
    return ((counts + 1).double() / (counts[1:].sum() + len(counts) - 1)).log()


def _positive(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0; 0.05 suits cosine similarity")
    return temperature


def cross_entropy(
    queries: Float[Tensor, "M D"],
    columns: Float[Tensor, "U D"],
    answer: Int[Tensor, " M"],
    column_bias: Float[Tensor, " U"],
    answer_bias: Float[Tensor, " M"],
    block: int | None = None,
) -> Float[Tensor, ""]:
    """Mean softmax cross entropy of queries against columns, in blocks of rows.

    The logit of row i and column j is q_i·c_j + column_bias[j], but q_i·c_j + answer_bias[i] where j = answer[i].

    Args:
        queries: rows.
        columns: vectors the rows are compared with.
        answer: the right column of each row.
        column_bias: added to a column's logits (a constant: it gets no gradient).
        answer_bias: stands in for column_bias at each row's answer (a constant).
        block: rows at a time; None: as many as keep the logits in cache.
    """
    if block is None:
        budget = BLOCK_LOGITS if queries.device.type == "cpu" else GPU_BLOCK_LOGITS
        block = max(1, budget // max(1, len(columns)))
    with torch.autocast(queries.device.type, enabled=False):  # bf16 would round logits of ±20 to steps of 1/8
        return _CrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch does not type it
            queries, columns, answer, column_bias, answer_bias, block
        )


class _CrossEntropy(torch.autograd.Function):
    """The gradient, softmax minus one-hot, is computed while a block's logits are at hand and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, columns: Tensor, answer: Tensor, column_bias: Tensor, answer_bias: Tensor, block: int
    ) -> Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        rows = len(queries)
        if rows == 0:
            raise ValueError("cross_entropy got no rows; a batch needs at least one answered place")
        d_queries = torch.empty_like(queries) if wants_gradient else None
        d_columns = torch.zeros_like(columns) if wants_gradient else None
        # a sum over many blocks: float32 rows of up to 1e5 would lose digits, and double costs nothing here
        total = torch.zeros(
            (), dtype=torch.float64 if queries.device.type != "mps" else torch.float32, device=queries.device
        )
        for start in range(0, rows, block):
            part = slice(start, start + block)
            query, right = queries[part], answer[part, None]
            logits = query @ columns.T
            own = logits.gather(1, right) + answer_bias[part, None]
            logits += column_bias
            logits.scatter_(1, right, own)
            top = logits.amax(1, keepdim=True)
            logits.sub_(top).exp_()
            mass = logits.sum(1, keepdim=True)
            total += (mass.log() + top - own).sum()
            if d_queries is not None and d_columns is not None:
                logits /= mass
                logits.scatter_add_(1, right, torch.full_like(own, -1.0))
                d_queries[part] = logits @ columns
                d_columns += logits.T @ query
        if wants_gradient:
            ctx.save_for_backward(d_queries, d_columns)
        ctx.rows = rows
        return (total / rows).to(queries.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_queries, d_columns = ctx.saved_tensors
        scale = gradients[0] / ctx.rows
        return d_queries * scale, d_columns * scale, None, None, None, None
