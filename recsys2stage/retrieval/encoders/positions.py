"""Where an event stands in its history. Every hook has a neutral default, so encoders call them all, unasked.

`Position` itself is the encoding that says nothing.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.shapes import Embedded, Heads, Shape


class Position(nn.Module):
    """No position; the base of all encodings. Subclasses override the hooks they need."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Embedded) -> Embedded:
        """Added to the input, once."""
        return x

    def rotate(self, q: Heads) -> Heads:
        """Applied to queries and to keys, in each layer."""
        return q

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"] | None:
        """Joins the attention logit of place i (row) and place j (column), in each layer."""
        return None

    @property
    def in_attention(self) -> bool:
        """Whether it acts inside attention, so that an encoder without attention would not hear it."""
        return type(self).rotate is not Position.rotate or type(self).bias is not Position.bias


PositionFactory = Callable[[Shape], Position]


class Learned(Position):
    """A learned vector for each place, counted from the oldest event in sight (Kang & McAuley 2018).

    Args:
        shape: sizes of the encoder.
        std: of the initial vectors, by default as short as those of items.
    """

    def __init__(self, shape: Shape, std: float = 0.02) -> None:
        super().__init__(shape)
        self.table = nn.Parameter(torch.empty(shape.max_length, shape.dim))
        nn.init.normal_(self.table, std=std)

    def embed(self, x: Embedded) -> Embedded:
        return x + self.table[: x.size(1)]


class Sinusoidal(Position):
    """Fixed waves (Vaswani et al. 2017, section 3.5): sin(i / 10000^(2d/D)) in even dimensions, cos in odd ones.

    Args:
        shape: sizes of the encoder.
        scale: of the waves. Item vectors start at a standard deviation of 0.02, beside which waves of height 1, the
            paper's, would leave nothing of the items; encoders that multiply their input by √D want 1.
    """

    waves: Tensor

    def __init__(self, shape: Shape, scale: float = 0.02) -> None:
        super().__init__(shape)
        frequency = 10_000.0 ** -(torch.arange(0, shape.dim, 2) / shape.dim)
        angle = torch.outer(torch.arange(shape.max_length), frequency)
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, : shape.dim]  # (L, D)
        self.register_buffer("waves", scale * waves, persistent=False)

    def embed(self, x: Embedded) -> Embedded:
        return x + self.waves[: x.size(1)]


class Rotary(Position):
    """Rotary position (Su et al. 2021, eq. 34), in the rotate-half layout: dimension k turns with dimension k + K/2.

    Args:
        shape: sizes of the encoder.
        base: waves have periods from 2π to nearly 2π·base places; histories are short, hence not 10,000.
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


class PerDistance(Position):
    """A learned number for each distance i − j, joined to the attention logit (HSTU, Zhai et al. 2024).

    Args:
        shape: sizes of the encoder.
        shared: one table for all layers, instead of one each.
        per_head: one number for each head, instead of one for all.
    """

    def __init__(self, shape: Shape, shared: bool = False, per_head: bool = False) -> None:
        super().__init__(shape)
        self.shared, self.ahead = shared, 0 if shape.causal else shape.max_length - 1  # distances below 0
        layers, heads = 1 if shared else shape.layers, shape.heads if per_head else 1
        self.tables = nn.Parameter(torch.empty(layers, heads, self.ahead + shape.max_length))
        nn.init.normal_(self.tables, std=0.02)

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"]:
        table = self.tables[0 if self.shared else layer]
        if self.ahead:
            diagonals = table[:, self.ahead - length + 1 : self.ahead + length]
        else:
            diagonals = F.pad(table[:, :length], (length - 1, 0))  # nobody looks ahead
        return by_distance(diagonals)


def by_distance(diagonals: Float[Tensor, "#H P"]) -> Float[Tensor, "#H L L"]:
    """A matrix whose (i, j) is the value of the distance i − j, from the values of distances −L + 1 to L − 1."""
    length = (diagonals.size(-1) + 1) // 2
    return diagonals.unfold(-1, length, 1).flip(-1)  # row i: distances i, i − 1, ..., i − L + 1


class T5Buckets(Position):
    """T5's relative bias (Raffel et al. 2020, section 2.1): a number for each bucket of distance and each head.

    Half of the buckets hold one distance each, the rest grow logarithmically, and the last takes `max_distance` and
    whatever lies beyond. All layers share it. An encoder that sees both sides has half of all buckets for each side.

    Args:
        shape: sizes of the encoder.
        buckets: number of buckets N.
        max_distance: distance from which on none is told from another.
    """

    bucket: Tensor

    def __init__(self, shape: Shape, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(shape)
        sides = 1 if shape.causal else 2
        if buckets < 2 * sides or buckets % (2 * sides) or max_distance <= buckets // sides // 2:
            raise ValueError(
                f"T5Buckets got {buckets} buckets and max_distance {max_distance}; expected a multiple of {2 * sides} "
                f"buckets and a max_distance above {buckets // sides // 2}"
            )
        self.table = nn.Parameter(torch.empty(shape.heads, buckets))
        nn.init.normal_(self.table, std=0.02)
        back = torch.arange(1 - shape.max_length, shape.max_length)  # distance i − j
        own = buckets // sides
        exact, distance = own // 2, back.abs() if sides == 2 else back.clamp(min=0)
        growth = (distance.double() / exact).log() / math.log(max_distance / exact)
        far = (exact + growth * (own - exact)).clamp(max=own - 1)
        bucket = torch.where(distance < exact, distance, far.long().clamp(min=0))
        if sides == 2:
            bucket = bucket + own * (back < 0)
        self.register_buffer("bucket", bucket, persistent=False)  # (2 max_length − 1)

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"]:
        middle = len(self.bucket) // 2
        return by_distance(self.table[:, self.bucket[middle - length + 1 : middle + length]])


class Combined(Position):
    """Several encodings at once, such as rotary and learned: each hook is applied in turn, biases add up.

    Args:
        shape: sizes of the encoder.
        parts: the encodings.
    """

    def __init__(self, shape: Shape, parts: list[PositionFactory]) -> None:
        super().__init__(shape)
        # a ModuleList is a sequence, but torch only says of modules
        self.parts: Sequence[Position] = nn.ModuleList(part(shape) for part in parts)  # type: ignore[assignment]

    def embed(self, x: Embedded) -> Embedded:
        for part in self.parts:
            x = part.embed(x)
        return x

    def rotate(self, q: Heads) -> Heads:
        for part in self.parts:
            q = part.rotate(q)
        return q

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"] | None:
        biases = [part.bias(layer, length) for part in self.parts]
        found = [bias for bias in biases if bias is not None]
        return sum(found[1:], start=found[0]) if found else None

    @property
    def in_attention(self) -> bool:
        return any(part.in_attention for part in self.parts)
