"""What a history is asked in training."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from recsys2stage.shapes import History, Items


class Question(NamedTuple):
    """A history, the places at which an item is asked for, and the items that are right there."""

    history: History
    places: Bool[Tensor, "B L"]
    answers: Int[Tensor, " M"]


class Objective(nn.Module, ABC):
    """Turns windows of events into questions and their right answers."""

    @abstractmethod
    def forward(self, window: History) -> Question:
        """
        Args:
            window: events of which the newest is only ever an answer; `window.request` belongs to the places before it.
        """


class NextItem(Objective):
    """At every place, the item that comes next."""

    def forward(self, window: History) -> Question:
        items, lengths, times, request = window
        history = History(
            items[:, :-1], (lengths - 1).clamp(min=0), times[:, :-1], None if request is None else request[:, :-1]
        )
        places = visible(history.items, history.lengths)
        return Question(history, places, items[:, 1:][places])


def visible(items: Items, lengths: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """Which places are real."""
    return torch.arange(items.size(1), device=items.device) < lengths[:, None]
