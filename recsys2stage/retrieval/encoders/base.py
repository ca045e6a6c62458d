"""What an encoder is: a map over histories of vectors that never sees item numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import nn

from recsys2stage.shapes import Embedded, Lengths, Times


class Encoder(nn.Module, ABC):
    """Turns embedded events into states, (B, L, D) -> (B, L, D), ready to be compared with item vectors.

    Histories are left-aligned, so a causal encoder is exact at every real place without knowing the lengths; what
    stands at padded places is undefined and never read.
    """

    causal: ClassVar[bool] = True  # whether a place sees only itself and what came before: the tests hold it to that.
    # An encoder that sees both sides is asked in a place of its own: it must take max_length + 1 places.

    @property
    def reads_times(self) -> bool:
        """Whether it looks at the times of events, and so cannot do without them."""
        return False

    @abstractmethod
    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        """
        Args:
            x: embedded items, zero at padding.
            lengths: number of real places in each row.
            times: seconds of each event.
            request: seconds at which each place is asked: by a causal encoder for the event after it, by one that sees
                both sides for its own; None when the model is not told.
        """


EncoderFactory = Callable[[int, int], Encoder]  # (dim, max_length) -> Encoder
