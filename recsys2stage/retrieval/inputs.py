"""What is known of an event besides its item, added to its vector: its kind, its rating, what is asked for next."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from recsys2stage.columns import UNKNOWN
from recsys2stage.data.dataset import Dataset
from recsys2stage.shapes import Embedded, History

Field = Literal["ratings", "actions", "target_action"]  # of a History


class Input(nn.Module, ABC):
    """Adds something to embedded events.

    Args:
        dim: width D.
        actions: kinds of events; kind n is actions[n - 1], and 0 is unknown.
    """

    reads: ClassVar[tuple[Field, ...]] = ()  # what it looks at; where a history has it not, that is all unknown

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Embedded, history: History) -> Embedded: ...

    def check(self, dataset: Dataset) -> None:
        """Raises a ValueError where it cannot make sense of what it reads in these data."""


InputFactory = Callable[[int, Sequence[str]], Input]  # (dim, actions) -> Input


class ActionEmbedding(Input):
    """A learned vector for the kind of each event; what is unknown has one of its own."""

    reads = ("actions",)

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__(dim, actions)
        self.table = feature_table(len(actions), dim)

    def forward(self, x: Embedded, history: History) -> Embedded:
        return x + self.table(or_unknown(history.actions, history))


class RatingEmbedding(Input):
    """A learned vector for each of some evenly spaced levels of the rating of each event; the nearest counts.

    A table and not a line through the ratings: what a rating says of the next item need not grow with it. A rating of
    0, as histories have it where none is known, has a vector of its own.

    Args:
        dim: width D.
        actions: kinds of events, of which it makes nothing.
        low: the lowest level; what lies below it counts as it.
        high: the highest level; what lies above it counts as it.
        levels: how many there are. The defaults are the half stars of MovieLens.
    """

    reads = ("ratings",)

    def __init__(
        self, dim: int, actions: Sequence[str] = (), low: float | int = 0.5, high: float | int = 5.0, levels: int = 10
    ) -> None:
        super().__init__(dim, actions)
        if levels < 2 or low >= high:
            raise ValueError(f"there are {levels} levels from {low} to {high}; expected two or more, low below high")
        self.low, self.high, self.step = low, high, (high - low) / (levels - 1)
        self.table = feature_table(levels, dim)

    def forward(self, x: Embedded, history: History) -> Embedded:
        return x + self.table(self.level(history))

    def level(self, history: History) -> Int[Tensor, "B L"]:
        """The level of each event, from 1; 0 where its rating is unknown."""
        if history.ratings is None:
            return or_unknown(None, history)
        nearest = 1 + ((history.ratings.clamp(self.low, self.high) - self.low) / self.step).round().long()
        return nearest.masked_fill(history.ratings == 0, UNKNOWN)

    def check(self, dataset: Dataset) -> None:
        assert dataset.ratings is not None
        low, high = float(dataset.ratings.min()), float(dataset.ratings.max())
        if low < self.low - self.step or high > self.high + self.step:
            raise ValueError(
                f"RatingEmbedding tells ratings from {self.low:g} to {self.high:g} apart, but those of {dataset.path} "
                f"go from {low:g} to {high:g}; set its low and high to these"
            )


class NextAction(Input):
    """A learned vector for the kind of action that is asked for after each event, as a TAAC 2025 finalist has it.

    In training that is the next event's own kind, so the model learns what follows given what is done with it; a
    request says whether, say, clicks or purchases are wanted. A kind that is not told has a vector of its own. Wants
    `next_action` in the data's options.
    """

    reads = ("target_action",)

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__(dim, actions)
        self.table = feature_table(len(actions), dim)

    def forward(self, x: Embedded, history: History) -> Embedded:
        return x + self.table(or_unknown(history.target_action, history))


def feature_table(kinds: int, dim: int, std: float = 0.02) -> nn.Embedding:
    """A vector for each kind, from 1, and row 0 for the unknown.

    Row 0 learns as any other, but from zero, the mean of the known at the start: where nothing in a log is unknown, it
    stays there, and still means something when a server knows less than the log.
    """
    table = nn.Embedding(kinds + 1, dim)
    nn.init.normal_(table.weight, std=std)
    with torch.no_grad():
        table.weight[UNKNOWN] = 0
    return table


def or_unknown(kinds: Int[Tensor, "B L"] | None, history: History) -> Int[Tensor, "B L"]:
    return torch.full_like(history.items, UNKNOWN) if kinds is None else kinds


def fields_read(inputs: Iterable[nn.Module]) -> set[Field]:
    """What some inputs look at, taken together."""
    return {field for part in inputs if isinstance(part, Input) for field in part.reads}


def check_inputs(inputs: Iterable[nn.Module], dataset: Dataset, next_action: str) -> None:
    """Refuses data that do not hold what a model's inputs read, and a next action that goes unread or untold.

    Args:
        inputs: of the model.
        dataset: it is to be trained on, or asked about.
        next_action: what the model is told of the kind of action that is asked for.
    """
    parts = [part for part in inputs if isinstance(part, Input)]
    has = {"ratings": dataset.ratings is not None, "actions": dataset.actions is not None}
    for part in parts:
        name = type(part).__name__
        for field, column in (("ratings", "rating"), ("actions", "action")):
            if field in part.reads and not has[field]:
                raise ValueError(
                    f"{name} reads the {field} of events, and {dataset.path} has none; leave it out of the model's "
                    f"inputs, or prepare the data with a column `{column}`"
                )
        if "target_action" in part.reads and next_action == "none":
            raise ValueError(
                f"{name} reads what kind of action is asked for, and next_action is 'none'; set the data's next_action "
                "to target or to the name of a kind, or leave it out of the model's inputs"
            )
        part.check(dataset)
    if next_action != "none" and "target_action" not in fields_read(parts):
        raise ValueError(
            f"next_action is {next_action!r}, and no input of the model reads it; add NextAction to the model's "
            "inputs, or use next_action: none"
        )
