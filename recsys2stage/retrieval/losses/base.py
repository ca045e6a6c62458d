"""What a loss of the retriever is, and what it may know of the answers and of the items."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.shapes import Items, Similarity


class Targets(NamedTuple):
    """What is right at M places of a batch of histories."""

    items: Int[Tensor, " M"]
    rows: Int[Tensor, " M"]  # which history of the batch each place belongs to, ascending
    window_items: Items  # (B, L) items of each window, answers included, 0 for padding; all 0 where repeats are kept
    ratings: Float[Tensor, " M"] | None = None  # of the answers, as in the log
    progress: float = 0.0  # share of the training run that is done, for what changes on the way


class Catalogue(NamedTuple):
    """What is known of the V items. Row 0 of every table is padding."""

    vectors: Callable[[Tensor], Tensor]  # item numbers (U,) -> vectors (U, D) whose products with queries are scores
    counts: Int[Tensor, " W"]  # (V + 1,) how often each item is a training target
    last_times: Int[Tensor, " W"]  # (V + 1,) seconds of its newest training event; 0 where it has none
    similarity: Similarity = "cosine"  # what a product of vectors is
    dim: int | None = None  # D, where vectors have a bias behind it


class Loss(nn.Module, ABC):
    """How well queries find their answers among negatives of the loss's own choosing."""

    @property
    def scheduled(self) -> bool:
        """Whether it changes with the share of the run that is done."""
        return False

    @abstractmethod
    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        """
        Args:
            queries: one for each answered place; padding is not among them.
            answers: the right items, and what else the batch says of them.
            catalogue: vectors and counts of all items.
        """

    def facts(self, progress: float) -> dict[str, float]:
        """What is worth logging at this point of the run, beside the loss."""
        return {}
