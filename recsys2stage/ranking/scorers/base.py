"""What a scorer is: a second opinion on each candidate."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn


class Shown(NamedTuple):
    """What a scorer sees of B requests with C candidates each and the R newest events of their histories.

    State and vectors are unit; an item's vector is zero where its id is masked or nothing is there.
    """

    state: Float[Tensor, "B D"]  # the users' query vectors
    vectors: Float[Tensor, "B C D"]  # of the candidates
    features: Float[Tensor, "B C F"]  # everything else known of each candidate
    recent: Float[Tensor, "B R D"]  # vectors of the newest items, newest first
    ages: Float[Tensor, "B R"]  # log(1 + seconds from each of them to the request), 0 where nothing is there
    real: Bool[Tensor, "B R"]  # where something is there


class Scorer(nn.Module, ABC):
    """Corrects the retriever's score of each candidate; says 0 everywhere before it has learned anything."""

    reads_ages: ClassVar[bool] = False  # whether it looks at how long ago the newest events were

    @abstractmethod
    def forward(self, shown: Shown) -> Float[Tensor, "B C"]: ...


ScorerFactory = Callable[[int, int], Scorer]  # (D, F) -> Scorer
