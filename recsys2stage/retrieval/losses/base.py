"""Interface of retriever losses: `Loss`, with the targets of a batch and the item catalogue as its inputs.

To add a loss, subclass `Loss`; or `sampled.Sampled` for one over sampled negatives that is computed in blocks, with its
own gradient; or `pairwise.Pointwise` for one whose gradient autograd computes from the loss of each row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.shapes import Items, Similarity


class Targets(NamedTuple):
    """Target items of the M target positions in a batch of histories."""

    items: Int[Tensor, " M"]
    rows: Int[Tensor, " M"]  # row of each target position's history in the batch, ascending
    window_items: Items  # (B, L) items of each window, targets included, 0 for padding; all 0 if the data keep repeats
    ratings: Float[Tensor, " M"] | None = None  # of the targets, as in the log
    weights: Float[Tensor, " M"] | None = None  # of the targets in the mean; None: all alike
    progress: float = 0.0  # completed fraction of the training run, for schedules


class Catalogue(NamedTuple):
    """Vectors and counts of the V items. Row 0 of every table is padding."""

    vectors: Callable[[Tensor], Tensor]  # item numbers (U,) -> vectors (U, D); a score is q·v
    counts: Int[Tensor, " W"]  # (V + 1,) how often each item is a training target
    last_times: Int[Tensor, " W"]  # (V + 1,) time of the newest training event in seconds; 0 if none
    similarity: Similarity = "cosine"  # q·v is a cosine or a dot product
    dim: int | None = None  # D without the bias, if vectors end with one


class Loss(nn.Module, ABC):
    """Training loss of the retriever, a weighted mean over the targets. It chooses its own negatives."""

    every_item: ClassVar[bool] = False  # whether each step computes the gradient of every item of the catalogue

    @property
    def scheduled(self) -> bool:
        """Whether any option changes with training progress."""
        return False

    @abstractmethod
    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        """
        Args:
            queries: one per target position, without padding.
            targets: target items, with the windows and ratings of the batch.
            catalogue: vectors and counts of all items.
        """

    def facts(self, progress: float) -> dict[str, float]:
        """Values to log besides the loss, at this training progress (0 to 1)."""
        return {}
