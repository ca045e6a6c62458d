"""What the losses with drawn negatives share: who is no negative, and the scores of a block of rows."""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from recsys2stage.retrieval.losses.base import Catalogue, Loss, Targets
from recsys2stage.retrieval.losses.blocks import mean_loss, products
from recsys2stage.retrieval.losses.negatives import Drawn, Negatives

Hide = Callable[[Tensor, slice, slice], Tensor]  # (others, rows, sets): puts −inf where a candidate is no negative


class Block(NamedTuple):
    """Some rows of a batch; S is 1 where they share their candidates."""

    own: Float[Tensor, " M"]  # scores q·v / τ of the answers
    others: Float[Tensor, "M N"]  # of the candidates; −inf for what is no negative. Free to be written over
    draws: Float[Tensor, "S N"]
    log_expected: Float[Tensor, "S N"]  # as in Drawn
    target_log_q: Float[Tensor, " M"]
    ratings: Float[Tensor, " M"] | None
    num_items: int
    progress: float


LossTerms = tuple[Float[Tensor, " M"], Float[Tensor, " M"], Float[Tensor, "M N"]]  # costs, gradients for own and others


class Sampled(Loss):
    """An answer against drawn negatives; a subclass says what they cost.

    The same item as the answer is never its negative.

    Args:
        temperature: τ; scores are q·v / τ. None: 0.05 for cosines, 1 for dot products.
        negatives: the candidates.
        same_sequence: whether items of the row's own window of events are no negatives; with `repeats: keep` they are.
    """

    def __init__(self, temperature: float | None, negatives: Negatives, same_sequence: bool = False) -> None:
        super().__init__()
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature is {temperature}, expected a number above 0; 0.05 suits cosine similarity")
        self.temperature, self.negatives, self.same_sequence = temperature, negatives, same_sequence

    @property
    def scheduled(self) -> bool:
        return self.negatives.scheduled

    def facts(self, progress: float) -> dict[str, float]:
        return self.negatives.facts(progress)

    def forward(self, queries: Float[Tensor, "M D"], targets: Targets, catalogue: Catalogue) -> Float[Tensor, ""]:
        if not len(queries):
            raise ValueError("the loss got no rows; a batch needs at least one answered place")
        sampled, num_items = self.negatives(targets, catalogue), len(catalogue.counts) - 1
        seen = torch.zeros(num_items + 1, dtype=torch.bool, device=queries.device)
        seen[targets.items] = seen[sampled.items] = True
        number = seen.cumsum(0) - 1  # of each item among the distinct ones: a vector is computed once
        vectors = catalogue.vectors(seen.nonzero()[:, 0])
        target, sets = number[targets.items], number[sampled.items]
        temperature = self.temperature or {"cosine": 0.05, "dot": 1.0}[catalogue.similarity]
        filters = self.filters(targets, sampled, target, sets, vectors.detach()[:, : catalogue.dim], num_items)
        draws, expected, own_expected = (
            values.to(queries.dtype) for values in (sampled.draws, sampled.log_expected, sampled.target_log_q)
        )

        def loss_terms(own: Tensor, others: Tensor, rows: slice, part: slice) -> tuple[Tensor, Tensor, Tensor]:
            for hide in filters:
                hide(others, rows, part)
            ratings = None if targets.ratings is None else targets.ratings[rows].to(own.dtype)
            return self.loss_terms(
                Block(
                    *(own, others, draws[part], expected[part], own_expected[rows]),
                    *(ratings, num_items, targets.progress),
                )
            )

        return mean_loss(queries / temperature, vectors, target, sets, sampled.starts, loss_terms)

    def filters(
        self,
        targets: Targets,
        sampled: Drawn,
        target: Int[Tensor, " M"],
        sets: Int[Tensor, "S N"],
        vectors: Float[Tensor, "U D"],
        num_items: int,
    ) -> list[Hide]:
        """Who is no negative; `answer` and `sets` are numbers among the vectors."""
        filters = [mask_target(target, sets, vectors.dtype)]
        if self.same_sequence:
            filters.append(in_history(targets, sampled, num_items))
        return filters

    @abstractmethod
    def loss_terms(self, block: Block) -> LossTerms:
        """What each row costs, and the gradients for `own` and `others`."""


def mask_target(target: Int[Tensor, " M"], sets: Int[Tensor, "S N"], dtype: torch.dtype) -> Hide:
    """The same item as the answer."""
    if len(sets) > 1:
        return lambda others, rows, part: others.masked_fill_(sets[part] == target[rows, None], -torch.inf)
    place = torch.searchsorted(sets[0], target).clamp_(max=sets.size(1) - 1)[:, None]  # once at most, and in order
    hidden = torch.zeros_like(place, dtype=dtype).masked_fill_(sets[0][place] == target[:, None], -torch.inf)
    return lambda others, rows, part: others.scatter_add_(1, place[rows], hidden[rows])


def in_history(targets: Targets, sampled: Drawn, num_items: int) -> Hide:
    """Items that the row's own window of events holds."""
    users, width = torch.arange(len(targets.window_items), device=targets.window_items.device)[:, None], num_items + 1
    if len(sampled.items) == 1:
        columns = sampled.items.size(1)
        column = torch.full((width,), columns, device=users.device)
        column[sampled.items[0]] = torch.arange(columns, device=users.device)
        window_items = torch.zeros(len(users), columns + 1, dtype=torch.bool, device=users.device)
        window_items = window_items.scatter_(1, column[targets.window_items], True)[:, :-1]
        return lambda others, rows, part: others.masked_fill_(window_items[targets.rows[rows]], -torch.inf)
    events = (users * width + targets.window_items).flatten().sort().values

    def hide(others: Tensor, rows: slice, part: slice) -> Tensor:
        candidate = targets.rows[rows, None] * width + sampled.items[part]
        place = torch.searchsorted(events, candidate).clamp_(max=len(events) - 1)
        return others.masked_fill_(events[place] == candidate, -torch.inf)

    return hide


def alike(near: float, target: Int[Tensor, " M"], sets: Int[Tensor, "S N"], vectors: Float[Tensor, "U D"]) -> Hide:
    """Items whose cosine to the answer is above `near`."""
    units = F.normalize(vectors, dim=1)

    def hide(others: Tensor, rows: slice, part: slice) -> Tensor:
        return others.masked_fill_(products(units[target[rows]], units, sets[part]) > near, -torch.inf)

    return hide
