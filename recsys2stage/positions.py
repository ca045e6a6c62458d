"""Where an event stands in its history. Every hook has a neutral default, so attention calls them all, unasked.

`Position` itself is the encoding that says nothing.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.shapes import Embedded, Shape

Heads = Float[Tensor, "B H L K"]


class Position(nn.Module):
    """No position; the base of all encodings. Subclasses override one hook."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Embedded) -> Embedded:
        """Added to the input, once."""
        return x

    def rotate(self, q: Heads) -> Heads:
        """Applied to queries and to keys, in each layer."""
        return q


PositionFactory = Callable[[Shape], Position]


class Learned(Position):
    """A learned vector for each place, counted from the oldest event in sight (Kang & McAuley 2018)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.table = nn.Parameter(torch.empty(shape.max_length, shape.dim))
        nn.init.normal_(self.table, std=0.02)

    def embed(self, x: Embedded) -> Embedded:
        return x + self.table[: x.size(1)]


class Rotary(Position):
    """Rotary position (Su et al. 2021, eq. 34), in the rotate-half layout: dimension k turns with dimension k + K/2.

    Args:
        shape: sizes of the encoder.
        base: the slowest wave has a period of about 2π·base places; histories are short, hence not 10,000.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, base: float = 500.0) -> None:
        super().__init__(shape)
        width = shape.dim // shape.heads
        if width % 2:
            raise ValueError(
                f"Rotary turns pairs of dimensions but a head is {width} wide (dim {shape.dim} / heads {shape.heads}); "
                "choose an even head width"
            )
        frequency = base ** -(torch.arange(0, width, 2) / width)
        angle = torch.outer(torch.arange(shape.max_length), frequency).repeat(1, 2)  # (L, K)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, q: Heads) -> Heads:
        length = q.size(2)
        one, two = q.chunk(2, dim=-1)
        turned = torch.cat([-two, one], dim=-1)
        return (q * self.cos[:length] + turned * self.sin[:length]).to(q.dtype)
