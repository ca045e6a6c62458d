"""Position encodings: learned, sinusoidal, rotary, and relative biases per distance or T5 bucket.

The base class `Position` is the identity: every hook has a neutral default, so encoders call all hooks.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_LENGTH, MAX_WIDTH, check_integer, check_number
from recsys2stage.retrieval.encoders.base import declares
from recsys2stage.shapes import Embedded, Heads, Shape


class Position(nn.Module):
    """No position encoding; base class of all. Subclasses override the hooks they need.

    A subclass with `local = True` has hooks that take `start`: the position of the first row that they are given. Its
    embeddings and rotations of a position must not depend on other positions. Serving then computes new positions only
    (`TwoTower.queries` with states). A subclass that overrides a hook without setting `local` is computed in full.
    """

    local: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Embedded, start: int = 0) -> Embedded:
        """Adds position embeddings to the input; called once."""
        return x

    def rotate(self, q: Heads, start: int = 0) -> Heads:
        """Rotates queries and keys; called in each layer."""
        return q

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"] | None:
        """Bias added to the attention logit of query i (row) and key j (column); called in each layer."""
        return None

    def bias_from(self, layer: int, length: int, start: int) -> Float[Tensor, "#H S L"] | None:
        """The rows of `bias` from position `start` on."""
        bias = self.bias(layer, length)
        return None if bias is None else bias[:, start:]

    @property
    def rotates(self) -> bool:
        """Whether `rotate` does anything."""
        return type(self).rotate is not Position.rotate

    @property
    def is_local(self) -> bool:
        """Whether its hooks can be given part of the positions."""
        return all(declares(type(self), "local", hook) for hook in ("embed", "rotate"))

    @property
    def in_attention(self) -> bool:
        """Whether it acts inside attention, so that it has no effect in an encoder without attention."""
        return type(self).rotate is not Position.rotate or type(self).bias is not Position.bias


PositionFactory = Callable[[Shape], Position]


class Learned(Position):
    """A learned vector per position, counted from the oldest event of the window (Kang & McAuley 2018).

    Args:
        shape: sizes of the encoder.
        std: standard deviation of the initial vectors; the default is that of item vectors.
    """

    local = True

    def __init__(self, shape: Shape, std: float = 0.02) -> None:
        super().__init__(shape)
        check_number("std", std, low=0, example=0.02)
        self.table = nn.Parameter(torch.empty(shape.max_length, shape.dim))
        nn.init.normal_(self.table, std=std)

    def embed(self, x: Embedded, start: int = 0) -> Embedded:
        return x + self.table[start : start + x.size(1)]


class Sinusoidal(Position):
    """Fixed vectors (Vaswani et al. 2017, section 3.5): sin(i / 10000^(2d/D)) in even dimensions, cos in odd ones.

    Args:
        shape: sizes of the encoder.
        scale: amplitude. Item vectors start at a standard deviation of 0.02, so the paper's amplitude of 1 would
            drown them; use 1 with encoders that multiply their input by √D.
    """

    local = True
    waves: Tensor

    def __init__(self, shape: Shape, scale: float = 0.02) -> None:
        super().__init__(shape)
        check_number("scale", scale, above=0, example=0.02)
        frequency = 10_000.0 ** -(torch.arange(0, shape.dim, 2) / shape.dim)
        angle = torch.outer(torch.arange(shape.max_length), frequency)
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, : shape.dim]  # (L, D)
        self.register_buffer("waves", scale * waves, persistent=False)

    def embed(self, x: Embedded, start: int = 0) -> Embedded:
        return x + self.waves[start : start + x.size(1)]


class Rotary(Position):
    """Rotary position (Su et al. 2021, eq. 34), in the rotate-half layout: dimension k pairs with dimension k + K/2.

    Args:
        shape: sizes of the encoder.
        base: periods range from 2π to nearly 2π·base positions; histories are short, so not 10,000.
    """

    local = True
    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, base: float = 500.0) -> None:
        super().__init__(shape)
        check_number("base", base, low=1, example=500.0)
        width = shape.dim // shape.heads
        if width % 2:
            raise ValueError(
                f"Rotary rotates pairs of dimensions but a head is {width} wide (dim {shape.dim} / heads {shape.heads})"
                "; choose an even head width"
            )
        frequency = base ** -(torch.arange(0, width, 2) / width)
        angle = torch.outer(torch.arange(shape.max_length), frequency).repeat(1, 2)  # (L, K)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, q: Heads, start: int = 0) -> Heads:
        rows = slice(start, start + q.size(2))
        first, second = q.chunk(2, dim=-1)
        rotated = torch.cat([-second, first], dim=-1)
        return (q * self.cos[rows] + rotated * self.sin[rows]).to(q.dtype)


class PerDistance(Position):
    """A learned attention bias per distance i − j (HSTU, Zhai et al. 2024).

    Args:
        shape: sizes of the encoder.
        shared: one table for all layers instead of one per layer.
        per_head: one bias per head instead of one for all heads.
    """

    def __init__(self, shape: Shape, shared: bool = False, per_head: bool = False) -> None:
        super().__init__(shape)
        self.shared, self.negative = shared, 0 if shape.causal else shape.max_length - 1  # number of distances below 0
        layers, heads = 1 if shared else shape.layers, shape.heads if per_head else 1
        self.tables = nn.Parameter(torch.empty(layers, heads, self.negative + shape.max_length))
        nn.init.normal_(self.tables, std=0.02)

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"]:
        return self.bias_from(layer, length, 0)

    def bias_from(self, layer: int, length: int, start: int) -> Float[Tensor, "#H S L"]:
        table = self.tables[0 if self.shared else layer]
        if self.negative:
            diagonals = table[:, self.negative - length + 1 : self.negative + length]
        elif start and start == length - 1:
            return table[:, None, :length].flip(-1)  # distances L − 1, ..., 0
        else:
            diagonals = F.pad(table[:, :length], (length - 1, 0))  # future keys are masked
        return by_distance(diagonals, start)


def by_distance(diagonals: Float[Tensor, "#H P"], start: int = 0) -> Float[Tensor, "#H S L"]:
    """Rows `start` to L − 1 of the matrix with value[i − j] at (i, j), from the values of distances −L + 1 to L − 1."""
    length = (diagonals.size(-1) + 1) // 2
    if torch.compiler.is_compiling():  # `unfold` would fix the length of an exported model
        position = torch.arange(length, device=diagonals.device)
        return diagonals[:, position[start:, None] - position + length - 1]
    return diagonals.unfold(-1, length, 1)[:, start:].flip(-1)  # row i: distances i, i − 1, ..., i − L + 1


class T5Buckets(Position):
    """T5's relative bias (Raffel et al. 2020, section 2.1): one learned bias per distance bucket and head.

    Half of the buckets hold one distance each, the others grow logarithmically, and the last holds `max_distance` and
    beyond. All layers share the biases. A bidirectional encoder uses half of all buckets for each direction.

    Args:
        shape: sizes of the encoder.
        buckets: number of buckets N.
        max_distance: all distances from here on share the last bucket.
    """

    bucket: Tensor

    def __init__(self, shape: Shape, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(shape)
        check_integer("buckets", buckets, 2, MAX_WIDTH, example=32)
        check_integer("max_distance", max_distance, 1, MAX_LENGTH, example=128)
        sides = 1 if shape.causal else 2
        if buckets < 2 * sides or buckets % (2 * sides) or max_distance <= buckets // sides // 2:
            raise ValueError(
                f"T5Buckets got {buckets} buckets and max_distance {max_distance}; expected a multiple of {2 * sides} "
                f"buckets and a max_distance above {buckets // sides // 2}; set them to 32 and 128, for example"
            )
        self.table = nn.Parameter(torch.empty(shape.heads, buckets))
        nn.init.normal_(self.table, std=0.02)
        offset = torch.arange(1 - shape.max_length, shape.max_length)  # distance i − j
        per_side = buckets // sides
        exact, distance = per_side // 2, offset.abs() if sides == 2 else offset.clamp(min=0)
        growth = (distance.double() / exact).log() / math.log(max_distance / exact)
        far = (exact + growth * (per_side - exact)).clamp(max=per_side - 1)
        bucket = torch.where(distance < exact, distance, far.long().clamp(min=0))
        if sides == 2:
            bucket = bucket + per_side * (offset < 0)
        self.register_buffer("bucket", bucket, persistent=False)  # (2 max_length − 1)

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"]:
        middle = len(self.bucket) // 2
        return by_distance(self.table[:, self.bucket[middle - length + 1 : middle + length]])


class Combined(Position):
    """Several encodings at once, such as rotary and learned: hooks are applied in turn, biases are summed.

    Args:
        shape: sizes of the encoder.
        parts: the encodings.
    """

    local = True

    def __init__(self, shape: Shape, parts: list[PositionFactory]) -> None:
        super().__init__(shape)
        # torch types the elements of a ModuleList as Module
        self.parts: Sequence[Position] = nn.ModuleList(part(shape) for part in parts)  # type: ignore[assignment]

    def embed(self, x: Embedded, start: int = 0) -> Embedded:
        for part in self.parts:
            x = part.embed(x, start) if start else part.embed(x)  # other classes need not take it
        return x

    def rotate(self, q: Heads, start: int = 0) -> Heads:
        for part in self.parts:
            q = part.rotate(q, start) if start else part.rotate(q)
        return q

    @property
    def is_local(self) -> bool:
        return super().is_local and all(part.is_local for part in self.parts)

    def bias(self, layer: int, length: int) -> Float[Tensor, "#H L L"] | None:
        return _total([part.bias(layer, length) for part in self.parts])

    def bias_from(self, layer: int, length: int, start: int) -> Float[Tensor, "#H S L"] | None:
        return _total([part.bias_from(layer, length, start) for part in self.parts])

    @property
    def rotates(self) -> bool:
        return type(self).rotate is not Combined.rotate or any(part.rotates for part in self.parts)

    @property
    def in_attention(self) -> bool:
        return any(part.in_attention for part in self.parts)


def _total(biases: Sequence[Tensor | None]) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return sum(present[1:], start=present[0]) if present else None
