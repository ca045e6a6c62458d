"""Softmax losses of the retriever: an answer against many others at once."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recsys2stage.retrieval.losses.base import Catalogue, Targets
from recsys2stage.retrieval.losses.negatives import Drawn, InBatch, Negatives
from recsys2stage.retrieval.losses.sampled import Block, Hide, LossTerms, Sampled, alike
from recsys2stage.retrieval.losses.schedule import Schedule


class InfoNCE(Sampled):
    """InfoNCE (van den Oord et al. 2018) with the logQ correction (Bengio & Senécal 2008, Yi et al. 2019).

    With scores s_ij = q_i·v_j / τ of the row's negatives j, each drawn c_j times of an expected n·q_j,

        loss = mean_i ( log( exp a_i + Σ_j exp b_ij ) − a_i )       b_ij = s_ij + log c_j − [log(n·q_j)]
                                                                    a_i  = s_ii           − [log(n·q_i)]

    and `correct` says which brackets are there. With Uniform negatives it is the sampled softmax.

    - `negatives`, b only: the expected sum is that of all items but the answer, so that the gradient estimates the full
      softmax's, with a bias that falls as 1/n, and s becomes log p(i | u) + a constant of u.
    - `both`: a choice among an answer and n draws of noise q (ranking NCE, Ma & Collins 2018). Would repeated draws of
      the answer stay, its minimum were at s = log p(i | u) + a constant of u for every n, though the gradient on the
      way is not the full softmax's. They are hidden, so the more an answer is drawn, n·q_i, the less it counts in its
      own denominator: as in DCL it is still pulled where it is already likely. That matters where p(i | u) is
      large. Neither of the two discounts popular items when serving: only the sampling is corrected. An alpha below 1
      corrects for less than was drawn, and s becomes log p(i | u) − (1 − alpha)·log p(i) + a constant of u.
    - `none`: popular items are negatives more often and s becomes log p(i | u) − log p(i), what is likelier for u than
      for all: popular items are discounted. With Uniform negatives alone it is the same loss as `both`.

    Args:
        temperature: τ; None: 0.05 for cosines, 1 for dot products.
        negatives: the candidates; None: InBatch(), with which n falls out of `both`.
        correct: what is corrected for how likely it was drawn: none, the negatives, or the answer, too.
        same_sequence: whether items of the row's own window of events are no negatives; with `repeats: keep` they are.
        near: candidates whose cosine to the answer is above this are no negatives; None: all are.
        hard: only so many candidates remain, those of the highest score before the correction (after it, rare items
            would be picked); or points [[share of the run, number or null], ...]; None: all remain.
    """

    def __init__(
        self,
        temperature: float | None = None,
        negatives: Negatives | None = None,
        correct: Literal["none", "negatives", "both"] = "both",
        same_sequence: bool = False,
        near: float | None = None,
        hard: int | list[tuple[float, int | None]] | None = None,
    ) -> None:
        super().__init__(temperature, negatives or InBatch(), same_sequence)
        if correct not in ("none", "negatives", "both"):
            raise ValueError(f"correct is {correct!r}, expected none, negatives or both")
        self.correct, self.near = correct, near
        self.hard: Schedule[int | None] = Schedule("hard", hard)
        if any(k is not None and k < 1 for k in self.hard.values):
            raise ValueError(f"hard is {hard}, expected at least one candidate, or null for all")

    @property
    def scheduled(self) -> bool:
        return self.hard.moves or super().scheduled

    def facts(self, progress: float) -> dict[str, float]:
        k = self.hard.at(progress)
        return super().facts(progress) | ({"hard_k": float(k)} if self.hard.moves and k is not None else {})

    def filters(
        self,
        targets: Targets,
        sampled: Drawn,
        target: Int[Tensor, " M"],
        sets: Int[Tensor, "S N"],
        vectors: Float[Tensor, "U D"],
        num_items: int,
    ) -> list[Hide]:
        filters = super().filters(targets, sampled, target, sets, vectors, num_items)
        if self.near is not None:
            filters.append(alike(self.near, target, sets, vectors))
        return filters

    def loss_terms(self, block: Block) -> LossTerms:
        own, others = block.own, block.others
        k = self.hard.at(block.progress)
        if k is not None and k < others.size(1):
            scores, place = others.topk(k, dim=1)
            others = others.fill_(-torch.inf).scatter_(1, place, scores)
        weight = block.draws.log()
        others += weight if self.correct == "none" else weight - block.log_expected
        return self.softmax(own - block.target_log_q if self.correct == "both" else own, others)

    def softmax(self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"]) -> LossTerms:
        """−log of the answer's part."""
        return softmax(own, others)


class DCL(InfoNCE):
    """InfoNCE with the answer left out of its own denominator (decoupled, Yeh et al. 2022, equation 4).

        loss = mean_i ( log Σ_j exp b_ij − a_i )

    A row without negatives costs 0. Its options and what a and b are: see InfoNCE.
    """

    def softmax(self, own: Float[Tensor, " M"], others: Float[Tensor, "M N"]) -> LossTerms:
        top = others.amax(1)
        some = top > -torch.inf
        others.sub_(top.where(some, 0)[:, None]).exp_()
        mass = others.sum(1).clamp_(min=1)  # the largest alone is 1
        return (mass.log() + top - own).where(some, 0), -some.to(own.dtype), others.div_(mass[:, None])


class FullSoftmax(Sampled):
    """Softmax cross entropy against the whole catalogue: score_ij = q_i·v_j / τ over all items j.

    Args:
        temperature: τ; None: 0.05 for cosines, 1 for dot products.
    """

    def __init__(self, temperature: float | None = None) -> None:
        super().__init__(temperature, _Everything())

    def loss_terms(self, block: Block) -> LossTerms:
        return softmax(block.own, block.others)


class _Everything(Negatives):
    """Every item once."""

    def forward(self, targets: Targets, catalogue: Catalogue) -> Drawn:
        items = torch.arange(1, len(catalogue.counts), device=targets.items.device)[None]
        draws = torch.ones_like(items, dtype=torch.float64)
        places = len(targets.items)
        starts = torch.tensor([0, places], device="cpu")  # as `merged` has it
        return Drawn(items, draws, draws.log(), draws.new_zeros(places), starts)


def softmax(own: Float[Tensor, " M"], others: Float[Tensor, "M N"]) -> LossTerms:
    """−log( exp own / (exp own + Σ exp others) ) of each row."""
    top = torch.maximum(own, others.amax(1))
    others.sub_(top[:, None]).exp_()
    rest = others.sum(1)
    mass = (own - top).exp() + rest
    return mass.log() + top - own, -rest / mass, others.div_(mass[:, None])
