"""Losses of the ranker: they see a list of candidates around one positive."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


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


class LambdaRank(ListLoss):
    """Pairs of the positive with each negative, weighted by what their exchange would change in NDCG@k (Burges 2010).

        Σ_j |gain(rank of the positive) − gain(rank of j)| · softplus(σ · (score of j − score of the positive))

    gain(r) = 1 / log2(1 + r) up to rank k, 0 below. Ranks are those of the moment and carry no gradient; ties count
    against the positive and otherwise leave the list's order. A pair below rank k weighs nothing: a positive down there
    is drawn up by the k candidates at the top alone. With one positive the ideal DCG is 1, so the weights need no norm.
    There is no other: a sum over each list, as in LambdaLoss (Wang et al. 2018), averaged over lists, without the
    `lambdarank_norm` of LightGBM, which damps lists of bad order.

    Args:
        k: how many ranks NDCG counts; None: all.
        sigma: steepness of a pair's loss.
    """

    def __init__(self, k: int | None = 10, sigma: float = 1.0) -> None:
        super().__init__()
        if k is not None and k < 1:
            raise ValueError(f"k is {k}, expected at least 1, or None for all ranks")
        if sigma <= 0:
            raise ValueError(f"sigma is {sigma}, expected more than 0")
        self.k, self.sigma = k, sigma

    def forward(
        self, logits: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]
    ) -> Float[Tensor, ""]:
        own, negative = _sides(logits, positive, real)
        apart = logits - own[:, None]
        with torch.no_grad():
            ahead = negative & (apart >= 0)
            order = logits.masked_fill(~negative, -torch.inf).argsort(dim=1, descending=True, stable=True)
            among_negatives = order.argsort(dim=1)  # from 0
            rank = among_negatives + torch.where(ahead, 1, 2)  # the positive stands ahead of the others
            weights = (self.gain(1 + ahead.sum(1, keepdim=True)) - self.gain(rank)).abs()
        pairs = weights * F.softplus(self.sigma * apart)
        return pairs.masked_fill(~negative, 0).sum(1).mean()

    def gain(self, rank: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """Of a positive at a rank, counted from 1."""
        gain = 1 / (1 + rank).log2()
        return gain if self.k is None else gain.masked_fill(rank > self.k, 0)


def _sides(logits: Tensor, positive: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    negative = real.clone()
    negative.scatter_(1, positive[:, None], False)
    return logits.gather(1, positive[:, None]).squeeze(1), negative
