"""Base class of sequence encoders: vectors in, vectors out; an encoder never reads item IDs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.shapes import Embedded, Lengths, Times


class Memory(ABC):
    """What a causal encoder keeps of the first positions of one history, so that it need not read them again."""

    truncatable: ClassVar[bool]  # whether `truncate` may be called with fewer positions than it holds
    positions: int  # how many it holds

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of memory."""

    @abstractmethod
    def truncate(self, positions: int) -> None:
        """Forgets the positions from this one on."""


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

    @property
    def extends(self) -> bool:
        """Whether `newest` can keep memories and `extend` continue them."""
        return False

    def newest(
        self,
        x: Embedded,
        lengths: Lengths,
        times: Times,
        request: Times | None,
        keep: list[Memory] | None = None,
    ) -> Float[Tensor, "B D"]:
        """The states of `forward` at the newest position of each history; at padding for an empty one.

        Args:
            x: as in `forward`.
            lengths: as in `forward`.
            times: as in `forward`.
            request: as in `forward`.
            keep: gets the memory of each history's positions but the newest; only where `extends` is true.
        """
        last = (lengths - 1).clamp(min=0)
        newest: Tensor = self(x, lengths, times, request)[torch.arange(last.size(0), device=last.device), last]
        return newest

    def extend(
        self, x: Embedded, memories: Sequence[Memory], times: Sequence[Tensor], request: Sequence[Tensor | None]
    ) -> Float[Tensor, "B D"]:
        """The states of `newest` for histories whose first positions are in memories.

        The memories then hold all positions but the newest.

        Args:
            x: (B, S, D) embedded items of the last S positions of each history.
            memories: of the positions before them, one for each history.
            times: (1, L) seconds of all events of each history.
            request: (1, L) request times of all positions of each history; None without request times.
        """
        # not abstract: an encoder of one's own need not keep memories
        raise NotImplementedError(f"{type(self).__name__} keeps no memory; call newest")


EncoderFactory = Callable[[int, int], Encoder]  # (dim, max_length) -> Encoder


def declares(kind: type, flag: str, method: str) -> bool:
    """Whether a class sets `flag` for the `method` that it has: a subclass that overrides the method sets it anew."""
    for base in kind.__mro__:
        if flag in vars(base):
            return bool(vars(base)[flag])
        if method in vars(base):
            return False
    return False


def is_inference(x: Tensor) -> bool:
    """Whether no gradient, lower precision or graph is asked for, so that partial computation may be used."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return not (torch.is_grad_enabled() or autocast or torch.compiler.is_compiling())
