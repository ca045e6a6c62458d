"""Base class of sequence encoders: vectors in, vectors out; an encoder never reads item IDs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import nn

from recsys2stage.shapes import Embedded, Lengths, Times


class Encoder(nn.Module, ABC):
    """Maps embedded events to states, (B, L, D) -> (B, L, D), which are scored against item vectors.

    Histories are left-aligned, so a causal encoder is exact at every real position without the lengths. Outputs at
    padding are undefined and never read.
    """

    causal: ClassVar[bool] = True  # whether a position sees only itself and earlier positions (tested).
    # For a bidirectional encoder a mask position is appended to the history: it must take max_length + 1 positions.

    @property
    def reads_times(self) -> bool:
        """Whether the encoder needs the times of events."""
        return False

    @abstractmethod
    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        """
        Args:
            x: embedded items, zero at padding.
            lengths: history length of each row.
            times: seconds of each event.
            request: request time of each position, in seconds: for a causal encoder the time of the next event's
                request, for a bidirectional one that of the position's own event; None without request times.
        """


EncoderFactory = Callable[[int, int], Encoder]  # (dim, max_length) -> Encoder
