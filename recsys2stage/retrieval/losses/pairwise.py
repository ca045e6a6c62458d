"""Losses of the retriever that take each score, or each pair of scores, by itself."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from recsys2stage.retrieval.losses.base import Catalogue, Targets
from recsys2stage.retrieval.losses.negatives import Negatives, Uniform
from recsys2stage.retrieval.losses.sampled import Block, LossTerms, Sampled


class Pointwise(Sampled):
    """A sum over scores of the answer and of each negative; autograd takes the gradient, block by block.

    Args:
        temperature: τ of s = q·v / τ; None: 0.05 for cosines, 1 for dot products.
        negatives: the candidates; None: Uniform(1).
        same_sequence: whether items of the row's own window of events are no negatives; with `repeats: keep` they are.
    """

    def __init__(
        self, temperature: float | None = None, negatives: Negatives | None = None, same_sequence: bool = False
    ) -> None:
        super().__init__(temperature, negatives or Uniform(1), same_sequence)

    def loss_terms(self, block: Block) -> LossTerms:
        hidden = block.others == -torch.inf
        times = block.draws.masked_fill(hidden, 0)
        with torch.enable_grad():
            own, others = block.own.requires_grad_(), block.others.masked_fill_(hidden, 0).requires_grad_()
            cost = self.cost(own, others, times, block)
            d_own, d_others = torch.autograd.grad(cost.sum(), (own, others), materialize_grads=True)
        return cost.detach(), d_own, d_others

    @abstractmethod
    def cost(
        self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"], times: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        """
        Args:
            own: scores of the answers.
            others: scores of the candidates.
            times: how often each candidate was drawn, 0 for what is no negative.
            block: what else is known.
        """


class BCE(Pointwise):
    """Binary cross entropy of an answer and the mean over its N negatives (Kang & McAuley 2018, SASRec).

        loss = mean_i ( softplus(−s_ii) + 1/N Σ_j softplus(s_ij) )

    With max_rating, scikit-rec's soft labels: y = rating / max_rating, and an answer costs
    y·softplus(−s_ii) + (1 − y)·softplus(s_ii).

    Args:
        temperature: τ of s = q·v / τ; None: 0.05 for cosines, 1 for dot products.
        negatives: the candidates; None: Uniform(1).
        same_sequence: whether items of the row's own window of events are no negatives; with `repeats: keep` they are.
        max_rating: the rating that makes a label of 1; None: every answer's label is 1.
    """

    def __init__(
        self,
        temperature: float | None = None,
        negatives: Negatives | None = None,
        same_sequence: bool = False,
        max_rating: float | None = None,
    ) -> None:
        super().__init__(temperature, negatives or Uniform(1), same_sequence)
        if max_rating is not None and max_rating <= 0:
            raise ValueError(f"max_rating is {max_rating}, expected the highest rating of the log, above 0")
        self.max_rating = max_rating

    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        if self.max_rating is not None:
            ratings = rated(targets, "max_rating: null")
            wrong = ratings[(ratings < 0) | (ratings > self.max_rating)]
            if len(wrong):
                raise ValueError(
                    f"an answer is rated {wrong[0].item():g}, expected 0 to max_rating {self.max_rating:g}; give the "
                    "highest rating of the log"
                )
        return super().forward(queries, targets, catalogue)

    def cost(
        self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"], times: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        cost = F.softplus(-own) + mean(F.softplus(others), times)
        if self.max_rating is not None and block.ratings is not None:
            cost = cost + (1 - block.ratings / self.max_rating) * own  # softplus(s) = softplus(−s) + s
        return cost


class MSE(Pointwise):
    """scikit-rec's regression: (s_ii − rating)² + 1/N Σ_j s_ij² over the N negatives."""

    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        rated(targets, "another loss, such as BCE")
        return super().forward(queries, targets, catalogue)

    def cost(
        self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"], times: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        assert block.ratings is not None
        return (own - block.ratings) ** 2 + mean(others**2, times)


class GBCE(Pointwise):
    """Generalised binary cross entropy (Petrov & Macdonald 2023, gSASRec), which undoes the overconfidence of sampling.

        loss = mean_i 1/(N + 1) · ( −log σ(s_ii)^β + Σ_j softplus(s_ij) )
        β = a·(t·(1 − 1/a) + 1/a) = 1 − t·(1 − a),     a = N / (V − 1)

    over the row's N negatives, a at most 1. t = 0 is binary cross entropy; at t = 1, β = a and σ(s) is calibrated as if
    all items had been negatives. −log σ(s)^β is computed as β·softplus(−s), whose gradient, −β·σ(−s), neither
    overflows nor vanishes early; no probability is raised to a power.

    Args:
        temperature: τ of s = q·v / τ; None: 0.05 for cosines, 1 for dot products.
        negatives: the candidates; None: Uniform(256).
        same_sequence: whether items of the row's own window of events are no negatives; with `repeats: keep` they are.
        calibration: t, from 0 to 1.
    """

    def __init__(
        self,
        temperature: float | None = None,
        negatives: Negatives | None = None,
        same_sequence: bool = False,
        calibration: float = 0.75,
    ) -> None:
        super().__init__(temperature, negatives or Uniform(256), same_sequence)
        if not 0 <= calibration <= 1:
            raise ValueError(f"calibration is {calibration}, expected 0 (binary cross entropy) to 1 (calibrated)")
        self.calibration = calibration

    def cost(
        self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"], times: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        count = times.sum(1)
        beta = 1 - self.calibration * (1 - (count / max(block.num_items - 1, 1)).clamp(max=1))
        return (beta * F.softplus(-own) + (F.softplus(others) * times).sum(1)) / (count + 1)


class BPR(Pointwise):
    """−log σ(s_ii − s_ij), the mean over a row's negatives j (Rendle et al. 2009)."""

    def cost(
        self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"], times: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        return mean(F.softplus(others - own[:, None]), times)


def mean(costs: Float[Tensor, "M N"], times: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Over the negatives of each row, 0 where there is none."""
    return (costs * times).sum(1) / times.sum(1).clamp(min=1)


def rated(targets: Targets, instead: str) -> Float[Tensor, " M"]:
    if targets.ratings is None:
        raise ValueError(f"the loss wants ratings and the log has none; name the column of ratings, or use {instead}")
    return targets.ratings
