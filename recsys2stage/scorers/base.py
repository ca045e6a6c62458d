"""What a scorer is: a second opinion on each candidate."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


class Scorer(nn.Module, ABC):
    """Corrects the retriever's score of each candidate; says 0 everywhere before it has learned anything."""

    @abstractmethod
    def forward(
        self, state: Float[Tensor, "B D"], vectors: Float[Tensor, "B C D"], features: Float[Tensor, "B C F"]
    ) -> Float[Tensor, "B C"]:
        """
        Args:
            state: the user's query vector.
            vectors: item vectors of the candidates, zero where the id is masked.
            features: everything else known of each candidate.
        """


ScorerFactory = Callable[[int, int], Scorer]  # (D, F) -> Scorer
