"""Losses of the ranker over candidate lists with one positive: softmax, BCE, BPR and LambdaRank."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import check_integer, check_number


class ListLoss(nn.Module, ABC):
    """Loss of candidate lists with one positive each."""

    @abstractmethod
    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        """
        Args:
            logits: scores of the candidates.
            positive: index of the positive in each list.
            real: mask of the candidates, False at padding.
        """


class Listwise(ListLoss):
    """Softmax cross entropy over the list (ListNet with one relevant item, Cao et al. 2007)."""

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        return F.cross_entropy(logits.masked_fill(~real, -torch.inf), positive)


class BCE(ListLoss):
    """Binary cross entropy of the positive plus the mean over the list's negatives."""

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        positive_score, negative = _split(logits, positive, real)
        negative_loss = F.softplus(logits).masked_fill(~negative, 0).sum(1) / negative.sum(1).clamp(min=1)
        return (F.softplus(-positive_score) + negative_loss).mean()


class BPR(ListLoss):
    """−log σ(positive − negative), averaged over the list's negatives (Rendle et al. 2009)."""

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        positive_score, negative = _split(logits, positive, real)
        pair_losses = F.softplus(logits - positive_score[:, None]).masked_fill(~negative, 0)
        return (pair_losses.sum(1) / negative.sum(1).clamp(min=1)).mean()


class LambdaRank(ListLoss):
    """Pairwise losses of the positive and each negative, weighted by the change of NDCG@k if they swap (Burges 2010).

        Σ_j |gain(rank of the positive) − gain(rank of j)| · softplus(σ · (score of j − score of the positive))

    gain(r) = 1 / log2(1 + r) up to rank k, 0 below. Ranks are those of the current scores and carry no gradient. A tie
    counts against the positive; ties of negatives keep the order of the list. Pairs with both ranks below k have weight
    0, so only the top k candidates pull up a positive that is below rank k. With one positive the ideal DCG is 1, so
    the weights need no normalization. Each list is summed, as in LambdaLoss (Wang et al. 2018), and lists are averaged,
    without `lambdarank_norm` of LightGBM, which reduces the loss of badly ordered lists.

    Args:
        k: cutoff of NDCG; None: all ranks.
        sigma: slope of the pairwise loss.
    """

    def __init__(self, k: int | None = 10, sigma: float = 1.0) -> None:
        super().__init__()
        check_integer("k", k, other="null for all ranks", example=10)
        check_number("sigma", sigma, above=0, example=1.0)
        self.k, self.sigma = k, sigma

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        positive_score, negative = _split(logits, positive, real)
        margin = logits - positive_score[:, None]
        with torch.no_grad():
            above = negative & (margin >= 0)
            order = logits.masked_fill(~negative, -torch.inf).argsort(dim=1, descending=True, stable=True)
            negative_rank = order.argsort(dim=1)  # from 0
            rank = negative_rank + torch.where(above, 1, 2)  # from 1; +1 more for negatives below the positive
            weights = (self.gain(1 + above.sum(1, keepdim=True)) - self.gain(rank)).abs()
        pair_losses = weights * F.softplus(self.sigma * margin)
        return pair_losses.masked_fill(~negative, 0).sum(1).mean()

    def gain(self, rank: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Gain of a positive at a rank from 1."""
        gain = 1 / (1 + rank).log2()
        return gain if self.k is None else gain.masked_fill(rank > self.k, 0)


def _split(logits: Tensor, positive: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Score of the positive (B,) and mask of the negatives (B, C)."""
    negative = real.clone()
    negative.scatter_(1, positive[:, None], False)
    return logits.gather(1, positive[:, None]).squeeze(1), negative
