"""Base class of the losses with sampled negatives, and the masks that exclude candidates from them."""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from recsys2stage.options import check_number
from recsys2stage.retrieval.losses.base import Catalogue, Loss, Targets
from recsys2stage.retrieval.losses.blocks import mean_loss, products
from recsys2stage.retrieval.losses.negatives import Negatives, SampledNegatives

# (negative, rows, sets): writes −inf over the scores of excluded candidates
MaskCandidates = Callable[[Tensor, slice, slice], Tensor]


class Block(NamedTuple):
    """Scores of a block of M rows and N candidates; S is 1 if the rows share one candidate set, else M.

    `sample_counts`, `log_expected` and `target_log_q` are as in SampledNegatives.
    """

    positive: Float[Tensor, " M"]  # scores q·v / τ of the targets
    negative: Float[Tensor, "M N"]  # of the candidates, −inf if masked; may be overwritten
    sample_counts: Float[Tensor, "S N"]
    log_expected: Float[Tensor, "S N"]
    target_log_q: Float[Tensor, " M"]
    ratings: Float[Tensor, " M"] | None
    num_items: int
    progress: float


# loss per row, and its gradients for the positive and negative scores
LossTerms = tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, "M N"]]


class Sampled(Loss):
    """Loss of each target against sampled negatives. Subclasses define `loss_terms`.

    A target is never its own negative.

    Args:
        temperature: τ; scores are q·v / τ. None: 0.05 for cosines, 1 for dot products.
        negatives: negative sampler.
        same_sequence: exclude items of the row's own window from its negatives; no effect with `repeats: keep`.
    """

    def __init__(self, temperature: float | None, negatives: Negatives, same_sequence: bool = False) -> None:
        super().__init__()
        other = "null for the usual one of the similarity"
        check_number("temperature", temperature, above=0, other=other, example=0.05)
        self.temperature, self.negatives, self.same_sequence = temperature, negatives, same_sequence

    @property
    def scheduled(self) -> bool:
        return self.negatives.scheduled

    def facts(self, progress: float) -> dict[str, float]:
        return self.negatives.facts(progress)

    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        if not len(queries):
            raise ValueError("the loss got no rows; a batch needs at least one target position")
        sampled, num_items = self.negatives(targets, catalogue), len(catalogue.counts) - 1
        distinct, target, sets = distinct_items(targets.items, sampled.items, num_items)
        vectors = catalogue.vectors(distinct)  # each is computed once
        temperature = self.temperature or {"cosine": 0.05, "dot": 1.0}[catalogue.similarity]
        masks = self.masks(targets, sampled, target, sets, vectors.detach()[:, : catalogue.dim], num_items)
        sample_counts, expected, target_log_q = (
            values.to(queries.dtype) for values in (sampled.sample_counts, sampled.log_expected, sampled.target_log_q)
        )

        weights = None if targets.weights is None else (targets.weights / targets.weights.mean()).to(queries.dtype)

        def loss_terms(positive: Tensor, negative: Tensor, rows: slice, part: slice) -> tuple[Tensor, Tensor, Tensor]:
            for mask in masks:
                mask(negative, rows, part)
            ratings = None if targets.ratings is None else targets.ratings[rows].to(positive.dtype)
            row_losses, d_positive, d_negative = self.loss_terms(
                Block(
                    *(positive, negative, sample_counts[part], expected[part], target_log_q[rows]),
                    *(ratings, num_items, targets.progress),
                )
            )
            if weights is None:
                return row_losses, d_positive, d_negative
            own = weights[rows]
            return row_losses * own, d_positive * own, d_negative.mul_(own[:, None])

        return mean_loss(queries / temperature, vectors, target, sets, sampled.starts, loss_terms)

    def masks(
        self,
        targets: Targets,
        sampled: SampledNegatives,
        target: Int[Tensor, " M"],
        sets: Int[Tensor, "S N"],
        vectors: Float[Tensor, "U D"],
        num_items: int,
    ) -> list[MaskCandidates]:
        """Masks of excluded candidates; `target` and `sets` are indices into `vectors`."""
        masks = [mask_target(target, sets, vectors.dtype)]
        if self.same_sequence:
            masks.append(mask_window_items(targets, sampled, num_items))
        return masks

    @abstractmethod
    def loss_terms(self, block: Block) -> LossTerms:
        """Loss per row, and its gradients for `positive` and `negative`."""


def distinct_items(
    targets: Int[Tensor, " M"], sampled: Int[Tensor, "S N"], num_items: int
) -> tuple[Int[Tensor, " U"], Int[Tensor, " M"], Int[Tensor, "S N"]]:
    """The distinct items, ascending, and the index of each target and sample among them.

    Neither way costs more than the targets and samples are many, however large the catalogue.
    """
    if num_items > targets.numel() + sampled.numel():
        distinct, index = torch.unique(torch.cat([targets, sampled.flatten()]), return_inverse=True)
        return distinct, index[: len(targets)], index[len(targets) :].view_as(sampled)
    used = torch.zeros(num_items + 1, dtype=torch.bool, device=targets.device)  # several times as fast as sorting
    used[targets] = used[sampled] = True
    index = used.cumsum(0) - 1
    return used.nonzero()[:, 0], index[targets], index[sampled]


def mask_target(target: Int[Tensor, " M"], sets: Int[Tensor, "S N"], dtype: torch.dtype) -> MaskCandidates:
    """Masks the target itself among its candidates."""
    if len(sets) > 1:
        return lambda negative, rows, part: negative.masked_fill_(sets[part] == target[rows, None], -torch.inf)
    # a shared set is sorted and unique
    position = torch.searchsorted(sets[0], target).clamp_(max=sets.size(1) - 1)[:, None]
    penalty = torch.zeros_like(position, dtype=dtype).masked_fill_(sets[0][position] == target[:, None], -torch.inf)
    return lambda negative, rows, part: negative.scatter_add_(1, position[rows], penalty[rows])


def mask_window_items(targets: Targets, sampled: SampledNegatives, num_items: int) -> MaskCandidates:
    """Masks items of the row's own window."""
    window = targets.window_items
    if len(sampled.items) == 1:  # sorted and unique
        items = sampled.items[0]
        column = torch.searchsorted(items, window).clamp_(max=len(items) - 1)
        column = column.where(items[column] == window, len(items))  # a last column for items that are no candidates
        window_items = torch.zeros(len(window), len(items) + 1, dtype=torch.bool, device=window.device)
        window_items = window_items.scatter_(1, column, True)[:, :-1]
        return lambda negative, rows, part: negative.masked_fill_(window_items[targets.rows[rows]], -torch.inf)
    users, width = torch.arange(len(window), device=window.device)[:, None], num_items + 1
    window_keys = (users * width + window).flatten().sort().values

    def mask(negative: Tensor, rows: slice, part: slice) -> Tensor:
        candidate_keys = targets.rows[rows, None] * width + sampled.items[part]
        position = torch.searchsorted(window_keys, candidate_keys).clamp_(max=len(window_keys) - 1)
        return negative.masked_fill_(window_keys[position] == candidate_keys, -torch.inf)

    return mask


def mask_similar(
    near: float, target: Int[Tensor, " M"], sets: Int[Tensor, "S N"], vectors: Float[Tensor, "U D"]
) -> MaskCandidates:
    """Masks items with a cosine to the target above `near`."""
    units = F.normalize(vectors, dim=1)

    def mask(negative: Tensor, rows: slice, part: slice) -> Tensor:
        return negative.masked_fill_(products(units[target[rows]], units, sets[part]) > near, -torch.inf)

    return mask
