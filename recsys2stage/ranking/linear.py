"""A penalized conditional logit: the linear model of the ranker's features from which its training starts."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

FOLDS = 4  # of the cross-validation over users
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
STEPS = 25  # of L-BFGS; few, as the penalty bounds the condition number


class LinearFit(NamedTuple):
    """Weights of the features, and how they were chosen."""

    weights: Float[Tensor, " F"]
    penalty: float
    base: float  # weight of the retriever's score that the penalty pulls toward: 1 or 0
    loss: float  # cross-validated softmax cross-entropy of a list


class LinearLists(NamedTuple):
    """N lists with C candidates each and F features of each."""

    base: Float[Tensor, "N C"]  # the retriever's calibrated scores
    features: Float[Tensor, "N C F"]  # the first one is the base; 0 where they are not to be used
    positive: Int[Tensor, " N"]  # index of the positive in each list
    real: Bool[Tensor, "N C"]  # False at padding

    def take(self, which: Bool[Tensor, " N"]) -> "LinearLists":
        """Selects lists."""
        return LinearLists(self.base[which], self.features[which], self.positive[which], self.real[which])

    def loss(self, weights: Float[Tensor, " F"]) -> Float[Tensor, ""]:
        """Mean softmax cross-entropy of the logits base + features · weights."""
        logits = self.base + self.features @ weights
        return F.cross_entropy(logits.masked_fill(~self.real, -torch.inf), self.positive)


def fit_linear(lists: LinearLists, users: np.ndarray) -> LinearFit:
    """Fits the weights w of the logit base + features · w by softmax cross-entropy and an L2 penalty.

    The first feature is the base itself, so its weight says how much the retriever's score counts. The penalty, and the
    total weight that it pulls the score toward, 1 (the retriever's order) or 0 (a feature as the others), are those
    with the lowest loss in cross-validation over users. The problem is convex, so few lists suffice, where a few steps
    of gradient descent would stop near the retriever's order.

    Args:
        lists: of any users.
        users: (N,) user of each list.
    """
    fold = torch.from_numpy(np.unique(users, return_inverse=True)[1].reshape(-1) % FOLDS).to(lists.base.device)
    parts = [(lists.take(fold != number), lists.take(fold == number)) for number in range(FOLDS)]
    parts = [(inside, outside) for inside, outside in parts if len(inside.base) and len(outside.base)]
    losses = {}
    for total in (1.0, 0.0):
        starts = [lists.base.new_zeros(lists.features.size(-1)) for _ in parts]
        for penalty in sorted(PENALTIES, reverse=True):  # each fit starts from that of the next larger penalty
            starts = [minimise(inside, penalty, total, start) for (inside, _), start in zip(parts, starts, strict=True)]
            pairs = zip(parts, starts, strict=True)
            held = [float(outside.loss(start)) * len(outside.base) for (_, outside), start in pairs]
            losses[penalty, total] = sum(held) / len(lists.base)
    penalty, total = min(losses, key=lambda options: losses[options]) if parts else (max(PENALTIES), 1.0)
    weights = minimise(lists, penalty, total, lists.base.new_zeros(lists.features.size(-1)))
    return LinearFit(weights, penalty, total, losses[penalty, total])


def minimise(lists: LinearLists, penalty: float, total: float, start: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
    """The weights with the lowest penalized loss, by L-BFGS.

    Args:
        lists: to fit.
        penalty: factor of the squared distance of the weights from those without data.
        total: sum of the weight of the base, which is 1, and that of the first feature, without data; all other weights
            are then 0.
        start: where to begin.
    """
    prior = torch.zeros_like(start)
    prior[0] = total - 1
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = lists.loss(weights) + penalty * (weights - prior).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
