"""The scorer interface: `Scorer` and its inputs, `RankerInputs`; scorers with calibrated weights, and boosted ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class RankerInputs(NamedTuple):
    """Scorer inputs of B requests with C candidates each and the R newest events of their histories.

    State and vectors have unit length; an item's vector is zero at padding and where its ID is masked.
    """

    state: Float[Tensor, "B D"]  # the users' query vectors
    vectors: Float[Tensor, "B C D"]  # of the candidates
    features: Float[Tensor, "B C F"]  # all other features of each candidate
    recent: Float[Tensor, "B R D"]  # vectors of the newest events' items, newest first
    ages: Float[Tensor, "B R"]  # log(1 + seconds from the event to the request), 0 at padding
    real: Bool[Tensor, "B R"]  # False at padding
    base: Float[Tensor, "B C"]  # the logits that the scorer corrects; 0 where the retriever's score is hidden
    listed: Bool[Tensor, "B C"]  # False where a list has no candidate


class Scorer(nn.Module, ABC):
    """Adds a correction to the retriever's score of each candidate; outputs 0 at initialization."""

    reads_ages: bool = False  # whether `RankerInputs.ages` is used
    listwise: bool = False  # whether a candidate's score depends on the other candidates of its list

    @abstractmethod
    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]: ...

    def corrections(self, inputs: RankerInputs) -> list[Float[Tensor, "B C"]]:
        """The corrections that gradients train; each has a ranking loss of its own."""
        return [self(inputs)]


ScorerFactory = Callable[[int, int], Scorer]  # (D, F) -> Scorer


class CalibratedScorer(Scorer, ABC):
    """Outputs the weighted sum of K logits, minus the base; the weights are fitted to validation lists.

    Args:
        count: K. The weights begin at 1/K.
    """

    weights: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((count,), 1 / count))

    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]:
        summed = torch.stack(self.parts(inputs), dim=-1) @ self.weights
        return summed + (self.weights.sum() - 1) * inputs.base

    @abstractmethod
    def parts(self, inputs: RankerInputs) -> list[Float[Tensor, "B C"]]:
        """The K corrections of the base: the logits without it, before they are weighted."""

    def calibrate(self, logits: Float[Tensor, "N C K"], positive: Int[Tensor, " N"], real: Bool[Tensor, "N C"]) -> None:
        """Fits the weights to N lists: one factor, so that the softmax of the scores fits the positives.

        Args:
            logits: of the parts, with the base.
            positive: index of the positive in each list.
            real: False at padding.
        """
        share = torch.ones_like(self.weights) / len(self.weights)
        self.weights.copy_(share * fit_scale(logits @ share, positive, real))


class ListTable(NamedTuple):
    """Training lists as one table: N candidates of B lists, one list after the other."""

    features: Float[np.ndarray, "N F"]  # float32
    base: Float[np.ndarray, " N"]  # float32
    label: Int[np.ndarray, " N"]  # int8; 1 for positives
    sizes: Int[np.ndarray, " B"]  # candidates of each list


class BoostedScorer(CalibratedScorer, ABC):
    """A scorer that grows in rounds over all training lists at once, instead of by gradients of batches.

    The ranker calls `prepare` before the first epoch, and `grow` at the beginning of each.
    """

    def check_installed(self) -> None:  # most need no package
        """Raises a ValueError where a package that fits the scorer is not installed."""

    @abstractmethod
    def prepare(self, lists: ListTable, seed: int) -> None:
        """Takes the training lists; the same lists and seed lead to the same scorer."""

    @abstractmethod
    def grow(self, epochs: int) -> bool:
        """Grows to the size of this many epochs; False if that is no larger than before."""


def fit_scale(logits: Float[Tensor, "N C"], positive: Int[Tensor, " N"], real: Bool[Tensor, "N C"]) -> float:
    """The factor, of a grid, that minimizes the softmax cross-entropy of the logits; 1 if they are all equal.

    Args:
        logits: of N lists.
        positive: index of the positive in each list.
        real: False at padding.
    """
    if not len(logits):
        return 1.0
    count = real.sum(1, keepdim=True).clamp(min=1)
    centered = logits - logits.where(real, 0).sum(1, keepdim=True) / count  # softmax ignores the mean of a list
    spread = centered[real].square().mean().sqrt()
    if not spread > 0:
        return 1.0
    # cosines within a list differ by tenths, dot products perhaps by hundreds: the grid is in units of the spread
    scales = torch.logspace(-1.5, 2, 141, device=logits.device) / spread
    losses = [nn.functional.cross_entropy((s * centered).masked_fill(~real, -torch.inf), positive) for s in scales]
    return float(scales[int(torch.stack(losses).argmin())])
