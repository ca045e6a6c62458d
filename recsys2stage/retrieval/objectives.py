"""Training objectives: next-item prediction and masked-item prediction (cloze)."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.columns import MASK, UNKNOWN
from recsys2stage.options import check_integer, check_number
from recsys2stage.retrieval.losses.schedule import Schedule
from recsys2stage.shapes import History, Items


class TrainingBatch(NamedTuple):
    """Input histories, the target positions in them, and the M target items with their ratings and weights."""

    history: History
    target_positions: Bool[Tensor, "B L"]
    targets: Int[Tensor, " M"]
    ratings: Float[Tensor, " M"] | None = None
    weights: Float[Tensor, " M"] | None = None  # in the loss; None: all alike


class Objective(nn.Module, ABC):
    """Turns windows of events into model inputs and targets."""

    causal: ClassVar[bool] = True  # for causal encoders; False: for bidirectional ones

    @property
    def reads_times(self) -> bool:
        """Whether it needs the times of the events."""
        return False

    @property
    def scheduled(self) -> bool:
        """Whether any option changes with training progress."""
        return False

    @abstractmethod
    def forward(self, window: History, progress: float = 0.0) -> TrainingBatch:
        """
        Args:
            window: events; the newest of each row is only a target. `window.request` and `window.target_action` are
                valid at the positions before it.
            progress: completed fraction of the training run, for schedules.
        """


class NextItem(Objective):
    """Predicts the next item at every position.

    Most events of a log continue a session, but many requests of a site begin one. A larger weight of the targets that
    begin a session fits the model to these requests. They are few, so a large weight from the start overfits; raise it
    at the end of the run.

    Args:
        session_weight: weight in the loss of a target that begins a session, relative to other targets; or points
            [[share of the run, weight], ...].
        gap: seconds since the event before from which a target begins a session.
    """

    def __init__(self, session_weight: float | list[tuple[float, float]] = 1.0, gap: int = 3600) -> None:
        super().__init__()
        self.session_weight: Schedule[float] = Schedule("session_weight", session_weight)
        for weight in self.session_weight.values:
            check_number("session_weight", weight, above=0, example=10.0, what="a weight")
        check_integer("gap", gap, example=3600)
        self.gap = gap

    @property
    def reads_times(self) -> bool:
        return self.session_weight.values != [1]

    @property
    def scheduled(self) -> bool:
        return self.session_weight.varies

    def forward(self, window: History, progress: float = 0.0) -> TrainingBatch:
        history = window._replace(
            items=window.items[:, :-1],
            lengths=(window.lengths - 1).clamp(min=0),
            times=window.times[:, :-1],
            request=None if window.request is None else window.request[:, :-1],
            ratings=None if window.ratings is None else window.ratings[:, :-1],
            actions=None if window.actions is None else window.actions[:, :-1],
            target_action=None if window.target_action is None else window.target_action[:, :-1],
        )
        target_positions = real_positions(history.items, history.lengths)
        ratings = None if window.ratings is None else window.ratings[:, 1:][target_positions]
        weights, weight = None, self.session_weight.at(progress)
        if weight != 1:
            begins = (window.times[:, 1:] - window.times[:, :-1])[target_positions] >= self.gap
            weights = torch.where(begins, float(weight), 1.0)
        return TrainingBatch(history, target_positions, window.items[:, 1:][target_positions], ratings, weights)


class Cloze(Objective):
    """Predicts masked events from those on both sides (BERT4Rec, Sun et al. 2019, section 3.6).

    Each event is masked with probability `rate`, and the newest of a row if no other is. In a share of the rows only
    the newest is masked, as in serving. A masked event keeps the time that the model would read for a request: with
    `request_time: target` its own time, otherwise the time of the newest unmasked event before it. In the latter case
    a row's first event is masked only if it is the only one. Ratings and actions of masked events are set to
    unknown. A model with target actions reads each masked event's own action as its target action.

    Args:
        rate: masking probability; the best in the paper is 0.2 on MovieLens and 0.6 on Amazon Beauty.
        newest: share of the rows with only the newest event masked; the authors' code makes one such row for every ten
            others.
    """

    causal = False

    def __init__(self, rate: float = 0.2, newest: float = 1 / 11) -> None:
        super().__init__()
        check_number("rate", rate, above=0, below=1, example=0.2, what="a share")
        check_number("newest", newest, low=0, high=1, example=0.1, what="a share")
        self.rate, self.newest = rate, newest

    def forward(self, window: History, progress: float = 0.0) -> TrainingBatch:
        items, lengths, times, request = window[:4]
        with_target_time = request is not None and not torch.equal(request, times)  # request_time: target
        position, last = torch.arange(items.size(1), device=items.device), (lengths - 1)[:, None]
        masked = (torch.rand(items.shape, device=items.device) < self.rate) & (position <= last)
        masked[:, 0] &= with_target_time  # else the first event has no earlier event to take the time of
        only_newest = (torch.rand(len(items), 1, device=items.device) < self.newest) | ~masked.any(1, keepdim=True)
        masked = torch.where(only_newest, position == last, masked)
        if not with_target_time:
            times = times.gather(1, torch.where(masked, 0, position).cummax(dim=1).values)
        history = window._replace(
            items=items.masked_fill(masked, MASK),
            times=times,
            request=None if request is None else times,
            ratings=None if window.ratings is None else window.ratings.masked_fill(masked, 0),
            actions=None if window.actions is None else window.actions.masked_fill(masked, UNKNOWN),
            target_action=None if window.target_action is None or window.actions is None else window.actions,
        )
        return TrainingBatch(history, masked, items[masked], None if window.ratings is None else window.ratings[masked])


def real_positions(items: Items, lengths: Int[Tensor, " B"]) -> Bool[Tensor, "B L"]:
    """Mask of the positions that are not padding."""
    return torch.arange(items.size(1), device=items.device) < lengths[:, None]
