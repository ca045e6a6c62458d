"""The scorer interface: `Scorer` and its inputs, `RankerInputs`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Float
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


class Scorer(nn.Module, ABC):
    """Adds a correction to the retriever's score of each candidate; outputs 0 at initialization."""

    reads_ages: ClassVar[bool] = False  # whether `RankerInputs.ages` is used

    @abstractmethod
    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]: ...


ScorerFactory = Callable[[int, int], Scorer]  # (D, F) -> Scorer
