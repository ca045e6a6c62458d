"""Pointwise and pairwise retriever losses: BCE, gBCE, BPR and MSE."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from recsys2stage.options import check_number
from recsys2stage.retrieval.losses.base import Catalogue, Targets
from recsys2stage.retrieval.losses.negatives import Negatives, Uniform
from recsys2stage.retrieval.losses.sampled import Block, LossTerms, Sampled


class Pointwise(Sampled):
    """Loss from elementwise functions of the scores; autograd computes the gradient block by block.

    Args:
        temperature: τ of s = q·v / τ; None: 0.05 for cosines, 1 for dot products.
        negatives: negative sampler; None: Uniform(1).
        same_sequence: exclude items of the row's own window from its negatives; no effect with `repeats: keep`.
    """

    def __init__(
        self, temperature: float | None = None, negatives: Negatives | None = None, same_sequence: bool = False
    ) -> None:
        super().__init__(temperature, negatives or Uniform(1), same_sequence)

    def loss_terms(self, block: Block) -> LossTerms:
        masked = block.negative == -torch.inf
        counts = block.sample_counts.masked_fill(masked, 0)
        with torch.enable_grad():
            positive, negative = (
                block.positive.requires_grad_(),
                block.negative.masked_fill_(masked, 0).requires_grad_(),
            )
            row_losses = self.row_losses(positive, negative, counts, block)
            d_positive, d_negative = torch.autograd.grad(row_losses.sum(), (positive, negative), materialize_grads=True)
        return row_losses.detach(), d_positive, d_negative

    @abstractmethod
    def row_losses(
        self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"], counts: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        """
        Args:
            positive: scores of the targets.
            negative: scores of the candidates.
            counts: how often each candidate was sampled, 0 if masked.
            block: ratings, catalogue size and logQ terms of the rows.
        """


class BCE(Pointwise):
    """Binary cross entropy of the target plus the mean over its N negatives (Kang & McAuley 2018, SASRec).

        loss = mean_i ( softplus(−s_ii) + 1/N Σ_j softplus(s_ij) )

    max_rating gives the soft labels of scikit-rec, y = rating / max_rating. The loss of the target is then
    y·softplus(−s_ii) + (1 − y)·softplus(s_ii).

    Args:
        temperature: τ of s = q·v / τ; None: 0.05 for cosines, 1 for dot products.
        negatives: negative sampler; None: Uniform(1).
        same_sequence: exclude items of the row's own window from its negatives; no effect with `repeats: keep`.
        max_rating: rating with label 1; None: the label of every target is 1.
    """

    def __init__(
        self,
        temperature: float | None = None,
        negatives: Negatives | None = None,
        same_sequence: bool = False,
        max_rating: float | None = None,
    ) -> None:
        super().__init__(temperature, negatives or Uniform(1), same_sequence)
        what, other = "the highest rating of the log,", "null for labels of 1"
        check_number("max_rating", max_rating, above=0, other=other, example=5.0, what=what)
        self.max_rating = max_rating

    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        if self.max_rating is not None:
            ratings = require_ratings(targets, "max_rating: null")
            invalid = ratings[(ratings < 0) | (ratings > self.max_rating)]
            if len(invalid):
                raise ValueError(
                    f"a target is rated {invalid[0].item():g}, expected 0 to max_rating {self.max_rating:g}; give the "
                    "highest rating of the log"
                )
        return super().forward(queries, targets, catalogue)

    def row_losses(
        self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"], counts: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        row_losses = F.softplus(-positive) + mean(F.softplus(negative), counts)
        if self.max_rating is not None and block.ratings is not None:
            row_losses = row_losses + (1 - block.ratings / self.max_rating) * positive  # softplus(s) = softplus(−s) + s
        return row_losses


class MSE(Pointwise):
    """Regression loss of scikit-rec: (s_ii − rating)² + 1/N Σ_j s_ij² over the N negatives."""

    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        require_ratings(targets, "another loss, such as BCE")
        return super().forward(queries, targets, catalogue)

    def row_losses(
        self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"], counts: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        assert block.ratings is not None
        return (positive - block.ratings) ** 2 + mean(negative**2, counts)


class GBCE(Pointwise):
    """Generalized binary cross entropy (gSASRec, Petrov & Macdonald 2023); corrects overconfidence of sampling.

        loss = mean_i 1/(N + 1) · ( −log σ(s_ii)^β + Σ_j softplus(s_ij) )
        β = a·(t·(1 − 1/a) + 1/a) = 1 − t·(1 − a),     a = N / (V − 1)

    over the row's N negatives, with a at most 1. t = 0 is binary cross entropy. At t = 1, β = a and σ(s) is calibrated
    as if all items were negatives. −log σ(s)^β is computed as β·softplus(−s), whose gradient, −β·σ(−s), neither
    overflows nor vanishes early; no probability is raised to a power.

    Args:
        temperature: τ of s = q·v / τ; None: 0.05 for cosines, 1 for dot products.
        negatives: negative sampler; None: Uniform(256).
        same_sequence: exclude items of the row's own window from its negatives; no effect with `repeats: keep`.
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
        what = "a number, from binary cross entropy to calibrated,"
        check_number("calibration", calibration, low=0, high=1, example=0.75, what=what)
        self.calibration = calibration

    def row_losses(
        self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"], counts: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        count = counts.sum(1)
        beta = 1 - self.calibration * (1 - (count / max(block.num_items - 1, 1)).clamp(max=1))
        return (beta * F.softplus(-positive) + (F.softplus(negative) * counts).sum(1)) / (count + 1)


class BPR(Pointwise):
    """−log σ(s_ii − s_ij), averaged over the row's negatives j (Rendle et al. 2009)."""

    def row_losses(
        self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"], counts: Float[Tensor, "M N"], block: Block
    ) -> Float[Tensor, " M"]:
        return mean(F.softplus(negative - positive[:, None]), counts)


def mean(losses: Float[Tensor, "M N"], counts: Float[Tensor, "M N"]) -> Float[Tensor, " M"]:
    """Mean over the negatives of each row, 0 if it has none."""
    return (losses * counts).sum(1) / counts.sum(1).clamp(min=1)


def require_ratings(targets: Targets, instead: str) -> Float[Tensor, " M"]:
    if targets.ratings is None:
        raise ValueError(f"the loss needs ratings and the log has none; name the rating column, or use {instead}")
    return targets.ratings
