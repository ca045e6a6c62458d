"""Softmax losses of the retriever: InfoNCE, DCL and full softmax."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recsys2stage.options import check_integer, check_number, check_option
from recsys2stage.retrieval.losses.base import Catalogue, Targets
from recsys2stage.retrieval.losses.negatives import InBatch, Negatives, SampledNegatives
from recsys2stage.retrieval.losses.sampled import Block, LossTerms, MaskCandidates, Sampled, mask_similar
from recsys2stage.retrieval.losses.schedule import Schedule


class InfoNCE(Sampled):
    """InfoNCE (van den Oord et al. 2018) with the logQ correction (Bengio & Senécal 2008, Yi et al. 2019).

    With scores s_ij = q_i·v_j / τ and a negative j sampled c_j times, n·q_j times in expectation,

        loss = mean_i ( log( exp a_i + Σ_j exp b_ij ) − a_i )       b_ij = s_ij + log c_j − [log(n·q_j)]
                                                                    a_i  = s_ii           − [log(n·q_i)]

    `correct` selects the logQ terms in brackets. With Uniform negatives this is the sampled softmax. The limits
    of s below hold up to a constant per user u.

    - `negatives` (only b corrected): s tends to log p(i | u). In expectation the sum is over all items but the target,
      so the gradient estimates that of the full softmax, with a bias that falls as 1/n.
    - `both`: classification of the target against n noise samples (ranking NCE, Ma & Collins 2018). If samples equal
      to the target stayed in the sum, the minimum would be at s = log p(i | u) for every n, with other gradients than
      the full softmax's. They are masked, so a target with a large n·q_i has a small weight in its own denominator: as
      in DCL, its gradient fades less once it is likely. This matters for large p(i | u).
    - `none`: s tends to log p(i | u) − log p(i), because popular items are negatives more often. This discounts popular
      items. With Uniform negatives alone it equals `both`.

    `negatives` and `both` correct only the sampling; they do not discount popular items when serving. With alpha below
    1 the correction is partial, and s tends to log p(i | u) − (1 − alpha)·log p(i).

    Args:
        temperature: τ; None: 0.05 for cosines, 1 for dot products.
        negatives: negative sampler; None: InBatch(), with which n cancels in `both`.
        correct: scores with the logQ correction: none, those of the negatives, or both the negatives' and the target's.
        same_sequence: exclude items of the row's own window from its negatives; no effect with `repeats: keep`.
        near: exclude candidates with a cosine to the target above this; None: no limit.
        hard: keep the k candidates with the highest scores before the correction (after it, these would be rare items);
            or points [[share of the run, k or null], ...]; None: all.
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
        check_option("correct", correct, Literal["none", "negatives", "both"])
        check_number("near", near, low=-1, high=1, other="null for no limit", example=0.9, what="a cosine")
        self.correct, self.near = correct, near
        self.hard: Schedule[int | None] = Schedule("hard", hard)
        for k in self.hard.values:
            check_integer("hard", k, other="null for all candidates", example=100)

    @property
    def scheduled(self) -> bool:
        return self.hard.varies or super().scheduled

    def facts(self, progress: float) -> dict[str, float]:
        k = self.hard.at(progress)
        return super().facts(progress) | ({"hard_k": float(k)} if self.hard.varies and k is not None else {})

    def masks(
        self,
        targets: Targets,
        sampled: SampledNegatives,
        target: Int[Tensor, " M"],
        sets: Int[Tensor, "S N"],
        vectors: Float[Tensor, "U D"],
        num_items: int,
    ) -> list[MaskCandidates]:
        masks = super().masks(targets, sampled, target, sets, vectors, num_items)
        if self.near is not None:
            masks.append(mask_similar(self.near, target, sets, vectors))
        return masks

    def loss_terms(self, block: Block) -> LossTerms:
        positive, negative = block.positive, block.negative
        k = self.hard.at(block.progress)
        if k is not None and k < negative.size(1):
            scores, columns = negative.topk(k, dim=1)
            negative = negative.fill_(-torch.inf).scatter_(1, columns, scores)
        weight = block.sample_counts.log()
        negative += weight if self.correct == "none" else weight - block.log_expected
        return self.softmax(positive - block.target_log_q if self.correct == "both" else positive, negative)

    def softmax(self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"]) -> LossTerms:
        """Softmax cross entropy of the target, given the corrected scores."""
        return softmax(positive, negative)


class DCL(InfoNCE):
    """Decoupled InfoNCE: the target is not in its own denominator (Yeh et al. 2022, equation 4).

        loss = mean_i ( log Σ_j exp b_ij − a_i )

    The loss of a row without negatives is 0. Options, a and b: see InfoNCE.
    """

    def softmax(self, positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"]) -> LossTerms:
        top = negative.amax(1)
        has_negatives = top > -torch.inf
        negative.sub_(top.where(has_negatives, 0)[:, None]).exp_()
        mass = negative.sum(1).clamp_(min=1)  # the largest term is 1
        return (
            (mass.log() + top - positive).where(has_negatives, 0),
            -has_negatives.to(positive.dtype),
            negative.div_(mass[:, None]),
        )


class FullSoftmax(Sampled):
    """Softmax cross entropy against the whole catalogue: score_ij = q_i·v_j / τ over all items j.

    Args:
        temperature: τ; None: 0.05 for cosines, 1 for dot products.
    """

    every_item = True

    def __init__(self, temperature: float | None = None) -> None:
        super().__init__(temperature, _AllItems())

    def loss_terms(self, block: Block) -> LossTerms:
        return softmax(block.positive, block.negative)


class _AllItems(Negatives):
    """All items of the catalogue, once each."""

    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        items = torch.arange(1, len(catalogue.counts), device=targets.items.device)[None]
        sample_counts = torch.ones_like(items, dtype=torch.float64)
        num_targets = len(targets.items)
        starts = torch.tensor([0, num_targets], device="cpu")  # on the CPU, as in `merge_duplicates`
        return SampledNegatives(items, sample_counts, sample_counts.log(), sample_counts.new_zeros(num_targets), starts)


def softmax(positive: Float[Tensor, " M"], negative: Float[Tensor, "M N"]) -> LossTerms:
    """−log( exp positive / (exp positive + Σ exp negative) ) of each row."""
    top = torch.maximum(positive, negative.amax(1))
    negative.sub_(top[:, None]).exp_()
    negative_mass = negative.sum(1)
    mass = (positive - top).exp() + negative_mass
    return mass.log() + top - positive, -negative_mass / mass, negative.div_(mass[:, None])
