"""A blend of scorers: the weighted mean of their calibrated logits."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.options import check_option
from recsys2stage.ranking.scorers.base import CalibratedScorer, RankerInputs, Scorer, ScorerFactory, fit_scale

MAX_MEMBERS = 16
STEPS = 100  # of the optimizer of the weights; they are few

Weights = Literal["equal", "validation"]


class Blend(CalibratedScorer):
    """Several scorers of the same lists, such as trees and a network; each is trained as if it were alone.

        logit = scale · Σ_k w_k s_k (base + member_k)

    s_k calibrates a member: the softmax of its logits, times s_k, fits the positives of the validation lists. So
    members count by what they know, however large their logits are, and one that is sure of a list keeps its weight.
    (Logits divided by their standard deviation would give trees too little weight: they push hopeless candidates far
    down.) The weights and the scale are fitted to the validation lists before each validation.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        members: the scorers, such as [GBDT, MLP]; two or more.
        weights: `equal`: all w_k are 1/K, only the scale is fitted; `validation`: the w_k, at least 0, minimize the
            softmax cross-entropy of the validation lists.
    """

    def __init__(
        self, dim: int, num_features: int, members: Sequence[ScorerFactory], weights: Weights = "equal"
    ) -> None:
        if not 2 <= len(members) <= MAX_MEMBERS:
            raise ValueError(
                f"members has {len(members)} scorers, expected 2 to {MAX_MEMBERS}; name them, for example "
                "members: [GBDT, MLP]"
            )
        check_option("weights", weights, Weights)
        super().__init__(len(members))
        self.members: Sequence[Scorer] = nn.ModuleList(  # type: ignore[assignment]  # torch: of modules
            member(dim, num_features) for member in members
        )
        self.choice = weights
        self.reads_ages = any(member.reads_ages for member in self.members)
        self.listwise = any(member.listwise for member in self.members)

    def parts(self, inputs: RankerInputs) -> list[Float[Tensor, "B C"]]:
        return [member(inputs) for member in self.members]

    def corrections(self, inputs: RankerInputs) -> list[Float[Tensor, "B C"]]:
        return [correction for member in self.members for correction in member.corrections(inputs)]

    def calibrate(self, logits: Float[Tensor, "N C K"], positive: Int[Tensor, " N"], real: Bool[Tensor, "N C"]) -> None:
        scales = [fit_scale(part, positive, real) for part in logits.unbind(-1)]
        share = torch.tensor(scales, device=logits.device) / len(scales)
        share = share * fit_scale(logits @ share, positive, real)
        if self.choice == "validation" and len(logits):
            share = minimise(logits, positive, real, share)
        self.weights.copy_(share)


def minimise(
    logits: Float[Tensor, "N C K"], positive: Int[Tensor, " N"], real: Bool[Tensor, "N C"], start: Float[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """The weights, at least 0, that minimize the softmax cross-entropy of the weighted logits.

    Args:
        logits: of the parts.
        positive: index of the positive in each list.
        real: False at padding.
        start: weights to start from.
    """
    with torch.inference_mode(False), torch.enable_grad():
        values, chosen = logits.double().clone(), positive.clone()
        padding = ~real.clone()
        logs = start.double().clamp(min=1e-6).log().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logs], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            summed = (values @ logs.exp()).masked_fill(padding, -torch.inf)
            value = nn.functional.cross_entropy(summed, chosen)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return logs.detach().exp().to(start.dtype)
