"""Event inputs: embeddings of action type, rating and target action, added to the item embedding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from recsys2stage.columns import UNKNOWN
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import MAX_WIDTH, check_integer, check_number
from recsys2stage.shapes import Embedded, History

Field = Literal["ratings", "actions", "target_action"]  # of a History


class Input(nn.Module, ABC):
    """Adds an embedding of one event field to the embedded events.

    Args:
        dim: width D.
        actions: action types; number n is actions[n - 1], and 0 is unknown.
    """

    reads: ClassVar[tuple[Field, ...]] = ()  # fields it reads; unknown everywhere if the history lacks them
    # Whether `forward` embeds each event by its own fields alone, so that it may be given the newest events only; a
    # subclass that overrides `forward` sets it anew.
    local: ClassVar[bool] = False

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Embedded, history: History) -> Embedded: ...

    def check(self, dataset: Dataset) -> None:
        """Raises a ValueError if it cannot use the fields of this dataset."""


InputFactory = Callable[[int, Sequence[str]], Input]  # (dim, actions) -> Input


class ActionEmbedding(Input):
    """Learned embedding of the action type of each event, with one for unknown."""

    reads, local = ("actions",), True

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__(dim, actions)
        self.table = feature_table(len(actions), dim)

    def forward(self, x: Embedded, history: History) -> Embedded:
        return x + self.table(or_unknown(history.actions, history))


class RatingEmbedding(Input):
    """Learned embedding of the rating of each event, rounded to the nearest of evenly spaced levels.

    A table, not a linear function: the effect of a rating on the next item need not be monotonic. Rating 0 means
    unknown and has its own embedding.

    Args:
        dim: width D.
        actions: unused.
        low: lowest level; lower ratings are clipped to it.
        high: highest level; higher ratings are clipped to it.
        levels: number of levels. The defaults are the half stars of MovieLens.
    """

    reads, local = ("ratings",), True

    def __init__(
        self, dim: int, actions: Sequence[str] = (), low: float | int = 0.5, high: float | int = 5.0, levels: int = 10
    ) -> None:
        super().__init__(dim, actions)
        check_integer("levels", levels, 2, MAX_WIDTH, example=10)
        for name, value, usual in (("low", low, 0.5), ("high", high, 5.0)):
            check_number(name, value, example=usual)
        if low >= high:
            raise ValueError(f"low is {low} and high {high}, expected low below high; set them to the range of ratings")
        self.low, self.high, self.step = low, high, (high - low) / (levels - 1)
        self.table = feature_table(levels, dim)

    def forward(self, x: Embedded, history: History) -> Embedded:
        return x + self.table(self.level(history))

    def level(self, history: History) -> Int[Tensor, "B L"]:
        """Level of each event, from 1; 0 if its rating is unknown."""
        if history.ratings is None:
            return or_unknown(None, history)
        nearest = 1 + ((history.ratings.clamp(self.low, self.high) - self.low) / self.step).round().long()
        return nearest.masked_fill(history.ratings == 0, UNKNOWN)

    def check(self, dataset: Dataset) -> None:
        assert dataset.ratings is not None
        low, high = float(dataset.ratings.min()), float(dataset.ratings.max())
        if low < self.low - self.step or high > self.high + self.step:
            raise ValueError(
                f"RatingEmbedding has levels from {self.low:g} to {self.high:g}, but the ratings of {dataset.path} "
                f"go from {low:g} to {high:g}; set its low and high to these"
            )


class NextAction(Input):
    """Learned embedding of the target action after each event, as in the model of a TAAC 2025 finalist.

    In training it is the next event's action type, so the model predicts the next item conditioned on its action. A
    request sets it, for example to click or purchase. An unknown target action has its own embedding. Requires
    `next_action` in the data's options.
    """

    reads, local = ("target_action",), True

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__(dim, actions)
        self.table = feature_table(len(actions), dim)

    def forward(self, x: Embedded, history: History) -> Embedded:
        return x + self.table(or_unknown(history.target_action, history))


def feature_table(num_values: int, dim: int, std: float = 0.02) -> nn.Embedding:
    """Embedding table of feature values: row 0 for unknown, values from 1.

    Row 0 is trained like any other but starts at zero, the mean of the other rows. It stays there if a log has no
    unknown values, and remains a neutral input if values are unknown when serving.
    """
    table = nn.Embedding(num_values + 1, dim)
    nn.init.normal_(table.weight, std=std)
    with torch.no_grad():
        table.weight[UNKNOWN] = 0
    return table


def or_unknown(values: Int[Tensor, "B L"] | None, history: History) -> Int[Tensor, "B L"]:
    return torch.full_like(history.items, UNKNOWN) if values is None else values


def fields_read(inputs: Iterable[nn.Module]) -> set[Field]:
    """Fields that the inputs read, combined."""
    return {field for part in inputs if isinstance(part, Input) for field in part.reads}


def check_inputs(inputs: Iterable[nn.Module], dataset: Dataset, next_action: str) -> None:
    """Raises a ValueError if the data lack a field that an input reads, or if `next_action` does not fit the inputs.

    Args:
        inputs: inputs of the model.
        dataset: data for training or evaluation.
        next_action: option of the data: none, target or an action type.
    """
    parts = [part for part in inputs if isinstance(part, Input)]
    available = {"ratings": dataset.ratings is not None, "actions": dataset.actions is not None}
    for part in parts:
        name = type(part).__name__
        for field, column in (("ratings", "rating"), ("actions", "action")):
            if field in part.reads and not available[field]:
                raise ValueError(
                    f"{name} reads the {field} of events, and {dataset.path} has none; leave it out of the model's "
                    f"inputs, or prepare the data with a column `{column}`"
                )
        if "target_action" in part.reads and next_action == "none":
            raise ValueError(
                f"{name} reads the target action, and next_action is 'none'; set the data's next_action to target "
                "or to the name of an action type, or leave it out of the model's inputs"
            )
        part.check(dataset)
    if next_action != "none" and "target_action" not in fields_read(parts):
        raise ValueError(
            f"next_action is {next_action!r}, and no input of the model reads it; add NextAction to the model's "
            "inputs, or use next_action: none"
        )
