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


def _sides(logits: Tensor, positive: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    negative = real.clone()
    negative.scatter_(1, positive[:, None], False)
    return logits.gather(1, positive[:, None]).squeeze(1), negative
