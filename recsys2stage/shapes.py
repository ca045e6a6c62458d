"""The alphabet of shapes, used by every module, and the types that cross module borders.

B batch, L history, D width, H heads, K width of a head, V items (tables have V + 1 rows: row 0 is padding),
M answered places, U distinct items, C candidates, F numeric features, N buckets of a relative bias.

Histories are left-aligned: the oldest event first, padding at the end, with explicit lengths.
"""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Items = Int[Tensor, "B L"]  # item numbers, 0 after the end of the history
Times = Int[Tensor, "B L"]  # seconds
Lengths = Int[Tensor, " B"]
Embedded = Float[Tensor, "B L D"]
Heads = Float[Tensor, "B H L K"]


class History(NamedTuple):
    """What a user did before a request, and when each place's request happens.

    `request` at place i is the moment at which the event after place i is asked for, or, where an event is hidden and
    asked for in its own place, that place's own; None when the model is not told.
    """

    items: Items
    lengths: Lengths
    times: Times
    request: Times | None


@dataclass(frozen=True)
class Shape:
    """Sizes an encoder hands to its position and time encodings."""

    dim: int
    max_length: int
    heads: int = 1
    layers: int = 1
    causal: bool = True  # whether a place sees only itself and what came before

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}; change one of them")
