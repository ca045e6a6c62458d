"""Inference for part of the positions: the newest one of each history, or those after positions computed before.

Training computes every position with `forward`. A request needs the state of one position, so its last block computes
keys and values of all positions, but queries, output projection and feed-forward of the newest only (`Whole`). And as
the keys and values of a causal encoder never change once an event is followed by another, they are kept as
`KeysValues`, and a request after one more event computes two positions instead of all (`Suffix`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from recsys2stage.retrieval.encoders.attention import Bias, softmax_attention
from recsys2stage.retrieval.encoders.layers import use_cpu_blocks
from recsys2stage.retrieval.encoders.memory import KeysValues
from recsys2stage.retrieval.encoders.positions import Position
from recsys2stage.retrieval.encoders.times import Time
from recsys2stage.shapes import Embedded, Heads, Lengths, Rows, Times

TILE = 64  # queries per block: half of the pairs of a causal encoder are skipped, with few calls

Activation = Literal["softmax", "silu", "identity"]  # as in attention.py
Terms = Literal["both", "position", "time", "none"]  # biases that are added to the logits


def weigh(
    activation: Activation,
    q: Float[Tensor, "B H T K"] | None,
    k: Float[Tensor, "B H n K"],
    v: Float[Tensor, "B H n K"],
    biases: Sequence[Tensor | None],
    start: int,
    scale: float = 1.0,
    divisor: float = 1.0,
    hidden: Bool[Tensor, "B 1 1 n"] | None = None,
) -> Float[Tensor, "B H T K"]:
    """Attention of the queries at positions start, start + 1, ... over keys up to the last of them.

    Args:
        activation: of the logits; "identity" with biases alone.
        q: queries (B, H, T, K); None: no dot products.
        k: keys (B, H, n, K).
        v: values (B, H, n, K).
        biases: added to the logits, each broadcast to (B, H, T, n); None: no such term.
        start: position of the first query; with several queries, future keys are masked.
        scale: factor of the dot products.
        divisor: divides the attention weights.
        hidden: keys that are masked besides.
    """
    terms = [bias for bias in biases if bias is not None]
    if q is None:
        logits = terms[0] + terms[1] if len(terms) > 1 else terms[0].clone()
    else:
        logits = (q if scale == 1.0 else q * scale) @ k.mT
        for bias in terms:
            logits += bias
    several = logits.size(-2) > 1
    if activation == "softmax":
        if several:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu_(start + 1)
            logits.masked_fill_(future, -torch.inf)
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        weights = logits.softmax(-1)
    else:
        weights = F.silu(logits, inplace=True) if activation == "silu" else logits
        if several:
            weights.tril_(start)
        if hidden is not None:
            weights = weights.masked_fill(hidden, 0)
    if weights.size(1) == 1 and v.size(1) > 1:  # one weight for all heads: one wide product
        mixed = weights[:, 0] @ v.transpose(1, 2).flatten(2)
        mixed = split_heads(mixed, v.size(1))
    else:
        mixed = weights @ v
    return mixed if divisor == 1.0 else mixed.div_(divisor)


class Encodings(NamedTuple):
    """What a part needs of its encoder."""

    position: Position
    time: Time
    layers: int
    max_length: int
    causal: bool
    rotates: bool  # whether the position encoding rotates queries and keys

    def tables(self) -> Tensor | None:
        """The time biases of all layers, (layers, #H, N); None: there are none, or they differ in shape."""
        tables = [self.time.table(layer) for layer in range(self.layers)]
        present = [table for table in tables if table is not None]
        same = len(present) == len(tables) and all(table.shape == present[0].shape for table in present)
        return torch.stack(present) if same else None


class Part(ABC):
    """The positions that blocks compute, and what they attend to."""

    layer: int = 0  # set before each block
    newest: bool = False  # whether the block computes only the newest position of each history

    def __init__(self, encoder: Encodings) -> None:
        self.encoder = encoder

    def terms(self) -> list[Terms]:
        """The encodings that have a bias."""
        present = {"position": self.encoder.position.bias(0, 1), "time": self.encoder.time.table(0)}
        return [name for name in ("position", "time") if present[name] is not None]

    @abstractmethod
    def own(self, x: Embedded) -> Rows:
        """The rows of x that the block computes: all, or (B, 1, D) in the last block."""

    @abstractmethod
    def put(self, k: Float[Tensor, "B S HK"], v: Float[Tensor, "B S HK"], heads: int) -> None:
        """Takes the keys and values of this layer, which the following calls of `attend` read."""

    @abstractmethod
    def attend(
        self,
        activation: Activation,
        q: Float[Tensor, "B T HK"] | None = None,
        scale: float = 1.0,
        divisor: float = 1.0,
        terms: Terms = "both",
    ) -> Float[Tensor, "B T HK"]:
        """Attention of the rows of `own`; arguments as in `weigh`, before they are split into heads."""


def split_heads(x: Float[Tensor, "B S HK"], heads: int) -> Heads:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def heads_of(x: Float[Tensor, "B S HK"], heads: int) -> Heads:
    """Splits the last axis into heads; contiguous where batches of products need it."""
    split = split_heads(x, heads)
    return split if len(x) == 1 else split.contiguous()


def merged(x: Heads) -> Float[Tensor, "B S HK"]:
    return x.transpose(1, 2).flatten(2)


class Whole(Part):
    """All positions of a batch of histories; in the last block only the newest of each.

    Args:
        encoder: its encodings.
        lengths: of the histories; an empty one counts as one position of padding.
        times: (B, L) seconds of each event.
        request: (B, L) request times.
        keep: whether keys and values are kept for `memories`.
    """

    def __init__(self, encoder: Encodings, lengths: Lengths, times: Times, request: Times | None, keep: bool) -> None:
        super().__init__(encoder)
        self.lengths, self.times, self.request = lengths, times, request
        self.length, self.causal = times.size(1), encoder.causal
        self.last, self.row = (lengths - 1).clamp(min=0), torch.arange(len(lengths), device=lengths.device)
        # whether there is no padding; elsewhere than on a CPU the device would have to be waited for
        self.even = use_cpu_blocks(times) and bool((self.last == self.length - 1).all())
        self.kept: list[tuple[Heads, Heads]] | None = [] if keep else None
        self.k = self.v = torch.empty(0)
        self._tiles: list[Tensor | None] | None = None
        self._buckets: Tensor | None = None

    def own(self, x: Embedded) -> Rows:
        if not self.newest:
            return x
        return x[:, -1:] if self.even else x[self.row, self.last][:, None]

    def put(self, k: Tensor, v: Tensor, heads: int) -> None:
        self.k, self.v = self.encoder.position.rotate(heads_of(k, heads)), heads_of(v, heads)
        if self.kept is not None:
            self.kept.append((self.k, self.v))

    def attend(
        self,
        activation: Activation,
        q: Tensor | None = None,
        scale: float = 1.0,
        divisor: float = 1.0,
        terms: Terms = "both",
    ) -> Tensor:
        k, v, position, time = self.k, self.v, self.encoder.position, self.encoder.time
        q = None if q is None else heads_of(q, k.size(1))
        table = time.table(self.layer) if terms in ("both", "time") else None
        if self.newest:
            biases = [self._position_row() if terms in ("both", "position") else None, self._time_row(table)]
            hidden = None
            if not self.even:
                hidden = (torch.arange(self.length, device=k.device) > self.last[:, None])[:, None, None]
            q = None if q is None else self._rotate_newest(q)
            return merged(weigh(activation, q, k, v, biases, self.length - 1, scale, divisor, hidden))
        q = None if q is None else position.rotate(q)
        matrix = position.bias(self.layer, self.length) if terms in ("both", "position") else None
        if activation == "softmax" and (not self.causal or (matrix is None and table is None)):
            assert q is not None
            bias = Bias(matrix, None if table is None else self.buckets(), table)
            return merged(softmax_attention(q, k, v, bias, self.causal, self.lengths))
        out = v.new_empty(len(v), self.length, v.size(1), v.size(3))
        for (start, stop), bucket in zip(self.tiles(), self.tile_buckets(), strict=True):
            biases = [
                None if matrix is None else matrix[None, :, start:stop, :stop],
                None if table is None or bucket is None else look_up(table, bucket),
            ]
            queries = None if q is None else q[:, :, start:stop]
            mixed = weigh(activation, queries, k[:, :, :stop], v[:, :, :stop], biases, start, scale, divisor)
            out[:, start:stop] = mixed.transpose(1, 2)
        return out.flatten(2)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """First and last query of each block."""
        return ((start, min(start + TILE, self.length)) for start in range(0, self.length, TILE))

    def buckets(self) -> Tensor | None:
        """Time buckets of all pairs, (B, L, L)."""
        if self._buckets is None:
            self._buckets = self.encoder.time.buckets(self.times, self.request)
        return self._buckets

    def tile_buckets(self) -> list[Tensor | None]:
        """Time buckets of each block, (B, T, n), for keys up to its last query; computed once for all layers."""
        if self._tiles is None:
            time, full = self.encoder.time, None
            if time.table(0) is not None and not time.is_local:
                full = self.buckets()
            self._tiles = []
            for start, stop in self.tiles():
                if full is not None:
                    found: Tensor | None = full[:, start:stop, :stop]
                else:
                    found = time.buckets(self.times[:, :stop], rows_of(self.request, start, stop))
                self._tiles.append(None if found is None else found.int())
        return self._tiles

    def _position_row(self) -> Tensor | None:
        """Position bias of the newest positions, broadcast to (B, H, 1, L)."""
        position, length = self.encoder.position, self.length
        if self.even:
            return batched(position.bias_from(self.layer, length, length - 1))
        matrix = position.bias(self.layer, length)
        return None if matrix is None else matrix[:, self.last].transpose(0, 1)[:, :, None]

    def _time_row(self, table: Tensor | None) -> Tensor | None:
        """Time bias of the newest positions, (B, #H, 1, L)."""
        if table is None:
            return None
        if self.encoder.time.is_local:
            request = None if self.request is None else self.request[self.row, self.last][:, None]
            bucket = self.encoder.time.buckets(self.times, request)
        else:
            full = self.buckets()
            bucket = None if full is None else full[self.row, self.last][:, None]
        return None if bucket is None else look_up(table, bucket.int())

    def _rotate_newest(self, q: Heads) -> Heads:
        position = self.encoder.position
        if self.even and position.is_local:
            return position.rotate(q, self.length - 1)
        spread = q.new_zeros(*q.shape[:2], self.length, q.size(3))
        spread[self.row, :, self.last] = q[:, :, 0]
        rotated = position.rotate(spread)
        return q if rotated is spread else rotated[self.row, :, self.last][:, :, None]

    def memories(self) -> list[KeysValues]:
        """Keys and values of the final positions, all but the newest, of each history."""
        assert self.kept is not None
        found = []
        for row, newest in enumerate(self.last.tolist()):
            memory = KeysValues(len(self.kept), self.kept[0][0][row, :, :newest], self.encoder.max_length)
            for layer, (k, v) in enumerate(self.kept):
                memory.planes[2 * layer, :, :newest] = k[row, :, :newest]
                memory.planes[2 * layer + 1, :, :newest] = v[row, :, :newest]
            memory.positions = newest
            found.append(memory)
        return found


class Suffix(Part):
    """The positions after those of memories, S of each history; only the newest stays out of the memory.

    Args:
        encoder: its encodings, which are local; it is causal.
        memories: of the earlier positions; the new ones are written behind them.
        times: (1, n) seconds of each event, of every history.
        request: (1, n) request times, of every history; None: no request times.
        count: S.
    """

    def __init__(
        self,
        encoder: Encodings,
        memories: Sequence[KeysValues],
        times: Sequence[Tensor],
        request: Sequence[Tensor | None],
        count: int,
    ) -> None:
        super().__init__(encoder)
        self.memories, self.count, self.heads = memories, count, 1
        position, time, layers = encoder.position, encoder.time, range(encoder.layers)
        self.biases: list[tuple[list[Tensor | None], list[Tensor | None]]] = []
        tables = encoder.tables() if time.in_attention else None
        for memory, seconds, asked in zip(memories, times, request, strict=True):
            start, stop = memory.positions, memory.positions + count
            memory.reserve(stop)
            bucket = time.buckets(seconds, rows_of(asked, start, stop)) if time.in_attention else None
            own: list[Tensor | None] = [None] * encoder.layers
            if bucket is not None and tables is not None:  # one look-up for all layers
                flat = tables.flatten(0, 1).index_select(1, bucket.int().view(-1))
                own = list(flat.view(encoder.layers, 1, -1, count, stop).unbind())
            elif bucket is not None:
                own = [_row(time.table(layer), bucket.int()) for layer in layers]
            self.biases.append(([batched(position.bias_from(layer, stop, start)) for layer in layers], own))

    def own(self, x: Embedded) -> Rows:
        return x[:, -1:] if self.newest and self.count > 1 else x

    def put(self, k: Tensor, v: Tensor, heads: int) -> None:
        self.heads = heads
        keys, values = split_heads(k, heads), split_heads(v, heads)
        for row, memory in enumerate(self.memories):
            start, stop, own = memory.positions, memory.positions + self.count, keys[row]
            if self.encoder.rotates:
                own = self.encoder.position.rotate(keys[row : row + 1], start)[0]
            memory.planes[2 * self.layer, :, start:stop] = own
            memory.planes[2 * self.layer + 1, :, start:stop] = values[row]

    def attend(
        self,
        activation: Activation,
        q: Tensor | None = None,
        scale: float = 1.0,
        divisor: float = 1.0,
        terms: Terms = "both",
    ) -> Tensor:
        queries = None if q is None else split_heads(q, self.heads)
        mixed = []
        for row, (memory, (positions, times)) in enumerate(zip(self.memories, self.biases, strict=True)):
            stop = memory.positions + self.count
            start = stop - 1 if self.newest else memory.positions
            own = None if queries is None else queries[row : row + 1]
            if own is not None and self.encoder.rotates:
                own = self.encoder.position.rotate(own, start)
            k, v = memory.planes[None, 2 * self.layer : 2 * self.layer + 2, :, :stop].unbind(1)
            biases = [
                positions[self.layer] if terms in ("both", "position") else None,
                times[self.layer] if terms in ("both", "time") else None,
            ]
            if self.newest and self.count > 1:
                biases = [None if bias is None else bias[..., -1:, :] for bias in biases]
            mixed.append(weigh(activation, own, k, v, biases, start, scale, divisor))
        return merged(mixed[0] if len(mixed) == 1 else torch.cat(mixed))

    def commit(self) -> None:
        """Makes all positions but the newest part of the memories."""
        for memory in self.memories:
            memory.positions += self.count - 1


def look_up(table: Float[Tensor, "#H N"], bucket: Tensor) -> Float[Tensor, "B H T n"]:
    """Biases of buckets (B, T, n)."""
    flat = bucket.reshape(-1)
    if len(table) == 1:
        return table[0].index_select(0, flat).view(bucket.shape)[:, None]
    return torch.stack([head.index_select(0, flat).view(bucket.shape) for head in table.unbind()], dim=1)


def _row(table: Tensor | None, bucket: Tensor) -> Tensor | None:
    return None if table is None else look_up(table, bucket)


def batched(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[None]


def rows_of(request: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if request is None else request[:, start:stop]
