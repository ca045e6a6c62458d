"""What is known of an event besides its item, added to its vector: its kind, its rating, what is asked for next."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import nn

from recsys2stage.shapes import Embedded, History


class Input(nn.Module, ABC):
    """Adds something to embedded events.

    Args:
        dim: width D.
        actions: kinds of events; kind n is actions[n - 1], and 0 is unknown.
    """

    def __init__(self, dim: int, actions: Sequence[str]) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Embedded, history: History) -> Embedded: ...


InputFactory = Callable[[int, Sequence[str]], Input]  # (dim, actions) -> Input
