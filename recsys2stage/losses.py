"""Losses. Those of the retriever own their negatives; those of the ranker see a list of candidates.

The logits of many queries against many columns are never all in memory: `cross_entropy` works through blocks of rows
and keeps only the gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_LOGITS = 1 << 20  # logits in flight, 4 MB: a CPU keeps them in cache
GPU_BLOCK_LOGITS = 1 << 26


class Loss(nn.Module, ABC):
    """How well queries find their answers among negatives of the loss's own choosing."""

    @abstractmethod
    def forward(
        self,
        queries: Float[Tensor, "M D"],
        answers: Int[Tensor, " M"],
        item_vectors: Callable[[Tensor], Tensor],
        log_popularity: Float[Tensor, " W"],
    ) -> Float[Tensor, ""]:
        """
        Args:
            queries: one for each answered place; padding is not among them.
            answers: item numbers.
            item_vectors: item numbers (U,) -> vectors (U, D) whose products with queries are scores.
            log_popularity: (V + 1,) log of each item's share of the training targets.
        """


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

    def forward(
        self,
        queries: Float[Tensor, "M D"],
        answers: Int[Tensor, " M"],
        item_vectors: Callable[[Tensor], Tensor],
        log_popularity: Float[Tensor, " W"],
    ) -> Float[Tensor, ""]:
        distinct, column, count = torch.unique(answers, return_inverse=True, return_counts=True)
        correction = -log_popularity[distinct]
        return cross_entropy(
            queries / self.temperature,
            item_vectors(distinct),
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

    def forward(
        self,
        queries: Float[Tensor, "M D"],
        answers: Int[Tensor, " M"],
        item_vectors: Callable[[Tensor], Tensor],
        log_popularity: Float[Tensor, " W"],
    ) -> Float[Tensor, ""]:
        columns = item_vectors(torch.arange(1, len(log_popularity), device=answers.device))  # of padding and all items
        no_bias, answer = columns.new_zeros(len(columns)), answers - 1
        return cross_entropy(queries / self.temperature, columns, answer, no_bias, no_bias[answer])


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


class ListLoss(nn.Module, ABC):
    """How well a list of candidates is ordered around its one positive."""

    @abstractmethod
    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        """
        Args:
            logits: scores of the candidates.
            positive: place of the positive in each list.
            real: which places hold a candidate.
        """


class Listwise(ListLoss):
    """Softmax cross entropy over the list (ListNet with one relevant item, Cao et al. 2007)."""

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        return F.cross_entropy(logits.masked_fill(~real, -torch.inf), positive)


class BCE(ListLoss):
    """Binary cross entropy of each candidate, averaged over the list's negatives and added to the positive's."""

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        own, negative = _sides(logits, positive, real)
        against = F.softplus(logits).masked_fill(~negative, 0).sum(1) / negative.sum(1).clamp(min=1)
        return (F.softplus(-own) + against).mean()


class BPR(ListLoss):
    """−log σ(positive − negative), averaged over the list's negatives (Rendle et al. 2009)."""

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        own, negative = _sides(logits, positive, real)
        pairs = F.softplus(logits - own[:, None]).masked_fill(~negative, 0)
        return (pairs.sum(1) / negative.sum(1).clamp(min=1)).mean()


def _sides(logits: Tensor, positive: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    negative = real.clone()
    negative.scatter_(1, positive[:, None], False)
    return logits.gather(1, positive[:, None]).squeeze(1), negative
