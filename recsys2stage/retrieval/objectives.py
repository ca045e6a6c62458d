"""What a history is asked in training."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.columns import MASK, UNKNOWN
from recsys2stage.shapes import History, Items


class Question(NamedTuple):
    """A history, the places at which an item is asked for, and the items that are right there with their ratings."""

    history: History
    places: Bool[Tensor, "B L"]
    targets: Int[Tensor, " M"]
    ratings: Float[Tensor, " M"] | None = None


class Objective(nn.Module, ABC):
    """Turns windows of events into questions and their right answers."""

    causal: ClassVar[bool] = True  # whether it is meant for encoders that see only what came before a place

    @abstractmethod
    def forward(self, window: History) -> Question:
        """
        Args:
            window: events of which the newest is only ever an answer; what `window.request` and `window.asked` say
                belongs to the places before it.
        """


class NextItem(Objective):
    """At every place, the item that comes next."""

    def forward(self, window: History) -> Question:
        history = window._replace(
            items=window.items[:, :-1],
            lengths=(window.lengths - 1).clamp(min=0),
            times=window.times[:, :-1],
            request=None if window.request is None else window.request[:, :-1],
            ratings=None if window.ratings is None else window.ratings[:, :-1],
            actions=None if window.actions is None else window.actions[:, :-1],
            target_action=None if window.target_action is None else window.target_action[:, :-1],
        )
        places = visible(history.items, history.lengths)
        ratings = None if window.ratings is None else window.ratings[:, 1:][places]
        return Question(history, places, window.items[:, 1:][places], ratings)


class Cloze(Objective):
    """Events hidden behind a mask, to be told from those on both sides (Sun et al. 2019, section 3.6).

    Each event is hidden with probability `rate`, and the newest in any row that would hide none. In a share of the rows
    only the newest is hidden, which is how the model will be asked. A hidden event's time is what a request for it
    would tell of it: with `request_time: target` its own time, otherwise that of the newest visible event before it. A
    row's first event, which has none, is then never hidden unless it stands alone. Its rating and kind are hidden, too;
    where the model is told the kind of action that is asked for, it is told each hidden event's own.

    Args:
        rate: probability that an event is hidden; the paper's best was 0.2 on MovieLens and 0.6 on Amazon Beauty.
        newest: share of the rows in which only the newest event is hidden; the authors' code makes one such row for
            every ten others.
    """

    causal = False

    def __init__(self, rate: float = 0.2, newest: float = 1 / 11) -> None:
        super().__init__()
        if not (0 < rate < 1 and 0 <= newest <= 1):
            raise ValueError(f"rate is {rate} and newest {newest}; expected shares between 0 and 1, rate above 0")
        self.rate, self.newest = rate, newest

    def forward(self, window: History) -> Question:
        items, lengths, times, request = window[:4]
        told = request is not None and not torch.equal(request, times)  # request_time: target
        place, last = torch.arange(items.size(1), device=items.device), (lengths - 1)[:, None]
        hidden = (torch.rand(items.shape, device=items.device) < self.rate) & (place <= last)
        hidden[:, 0] &= told  # else it has no event before it
        only_newest = (torch.rand(len(items), 1, device=items.device) < self.newest) | ~hidden.any(1, keepdim=True)
        hidden = torch.where(only_newest, place == last, hidden)
        if not told:
            times = times.gather(1, torch.where(hidden, 0, place).cummax(dim=1).values)
        history = window._replace(
            items=items.masked_fill(hidden, MASK),
            times=times,
            request=None if request is None else times,
            ratings=None if window.ratings is None else window.ratings.masked_fill(hidden, 0),
            actions=None if window.actions is None else window.actions.masked_fill(hidden, UNKNOWN),
            target_action=None if window.target_action is None or window.actions is None else window.actions,
        )
        return Question(history, hidden, items[hidden], None if window.ratings is None else window.ratings[hidden])


def visible(items: Items, lengths: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """Which places are real."""
    return torch.arange(items.size(1), device=items.device) < lengths[:, None]
