"""Transformer building blocks: attention encoder, attention layer; pre-norm, post-norm, parallel and gated blocks."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import check_number
from recsys2stage.retrieval.encoders.attention import Bias, softmax_attention
from recsys2stage.retrieval.encoders.base import Encoder, Memory, declares, is_inference
from recsys2stage.retrieval.encoders.layers import Dropout, FeedForward, FeedForwardFactory, Norm, NormFactory
from recsys2stage.retrieval.encoders.memory import KeysValues
from recsys2stage.retrieval.encoders.partial import Encodings, Part, Suffix, Whole
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.retrieval.encoders.times import Time, TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Rows, Shape, Times


class AttentiveEncoder(Encoder):
    """Base class of encoders with attention; calls all hooks of the position and time encodings.

    A subclass with `partial = True` has `enter`, what its `forward` does before the blocks, and `leave`, what it does
    after them, and its blocks have `extend`; `newest` and `extend` then compute only the positions that are needed.

    Args:
        shape: sizes; the width must be a multiple of the heads.
        position: position encoding.
        time: time encoding; None: no time encoding.
    """

    blocks: nn.ModuleList

    def __init__(self, shape: Shape, position: PositionFactory, time: TimeFactory | None) -> None:
        super().__init__()
        self.layers, self.position_count = shape.layers, shape.max_length
        self.position: Position = position(shape)
        self.time: Time = (time or Time)(shape)

    @property
    def reads_times(self) -> bool:
        return type(self.time) is not Time

    def embed(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        """Adds the position and time embeddings to the input, whose first row is position `start`."""
        x = self.position.embed(x, start) if start else self.position.embed(x)
        return self.time.embed(x, times, request)

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        """The input of the first block; arguments as in `embed`."""
        # not abstract: only encoders that set `partial` need it
        raise NotImplementedError(f"{type(self).__name__} sets partial = True but has no method enter; add one")

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        """The states, of the output of the last block."""
        raise NotImplementedError(f"{type(self).__name__} has partial = True and no leave")

    @functools.cached_property
    def is_partial(self) -> bool:
        """Whether positions can be computed alone: the encoder and its blocks say how."""
        return declares(type(self), "partial", "forward") and all(
            declares(type(block), "partial", "forward") for block in self.blocks
        )

    @functools.cached_property
    def encodings(self) -> Encodings:
        rotates = self.position.rotates
        return Encodings(self.position, self.time, self.layers, self.position_count, self.causal, rotates)

    @functools.cached_property
    def extends(self) -> bool:
        return self.causal and self.is_partial and self.position.is_local and self.time.is_local

    def newest(
        self,
        x: Embedded,
        lengths: Lengths,
        times: Times,
        request: Times | None,
        keep: list[Memory] | None = None,
    ) -> Float[Tensor, "B D"]:
        if not (self.is_partial and is_inference(x)):
            return super().newest(x, lengths, times, request)
        part = Whole(self.encodings, lengths, times, request, keep is not None)
        x = self._extended(self.enter(x, times, request), part)
        if keep is not None:
            keep.extend(part.memories())
        return x

    def extend(
        self, x: Embedded, memories: Sequence[Memory], times: Sequence[Tensor], request: Sequence[Tensor | None]
    ) -> Float[Tensor, "B D"]:
        known = cast(Sequence[KeysValues], memories)
        part, count = Suffix(self.encodings, known, times, request, x.size(1)), x.size(1)
        rows = []
        for row, memory in enumerate(memories):
            start, asked = memory.positions, request[row]
            new = slice(start, start + count)
            rows.append(
                self.enter(
                    x[row : row + 1], times[row][:, new], None if asked is None else asked[:, new], memory.positions
                )
            )
        x = self._extended(rows[0] if len(rows) == 1 else torch.cat(rows), part)
        part.commit()
        return x

    def _extended(self, x: Embedded, part: Part) -> Float[Tensor, "B D"]:
        for layer, block in enumerate(self.blocks):
            part.layer, part.newest = layer, layer == self.layers - 1
            x = cast(Block, block).extend(x, part)
        return self.leave(x[:, -1])

    def biases(self, times: Times, request: Times | None) -> Iterator[Bias]:
        """The attention bias of each layer; time buckets are computed once for all layers."""
        buckets = self.time.buckets(times, request)
        for layer in range(self.layers):
            yield Bias(self.position.bias(layer, times.size(1)), buckets, self.time.table(layer))

    def apply_blocks(
        self, blocks: nn.ModuleList, x: Embedded, lengths: Lengths, times: Times, request: Times | None
    ) -> Embedded:
        """Applies all blocks, each with the bias of its layer."""
        for block, bias in zip(blocks, self.biases(times, request), strict=True):
            x = block(x, lengths, self.position, bias)
        return x


class Attention(nn.Module):
    """Multi-head softmax attention with fused projections.

    Args:
        dim: D, a multiple of `heads`.
        heads: H.
        dropout: of attention weights.
        causal: whether a position attends only to itself and earlier positions.
    """

    def __init__(self, dim: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, L, K)
        q, k = position.rotate(q), position.rotate(k)
        y = softmax_attention(q, k, v, bias, self.causal, lengths, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, L, D))

    def extend(self, x: Embedded, part: Part) -> Rows:
        """As `forward`, for the rows that `part` owns."""
        own = part.own(x)
        if own is x:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:  # queries of the newest position only
            dim = self.out.in_features
            q = F.linear(own, self.qkv.weight[:dim], self.qkv.bias[:dim])
            k, v = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        part.put(k, v, self.heads)
        return self.out(part.attend("softmax", q, (self.out.in_features // self.heads) ** -0.5))


class Block(nn.Module, ABC):
    """Attention and feed-forward as residual branches. Subclasses define the order of norm, branch and addition.

    A subclass with `partial = True` has `extend`: its `forward` at inference, for the rows that a part owns.

    Args:
        attention: the first branch.
        feed_forward: the second branch.
        norms: one per branch.
        dropout: on each branch.
    """

    def __init__(
        self, attention: Attention, feed_forward: FeedForward, norms: tuple[Norm, Norm], dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = norms
        self.attention, self.feed_forward, self.dropout = attention, feed_forward, Dropout(dropout)

    @abstractmethod
    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        """Returns the residual stream after the block."""

    def extend(self, x: Embedded, part: Part) -> Rows:
        """As `forward` without dropout, for the rows of x that `part` owns, (B, T, D)."""
        raise NotImplementedError(f"{type(self).__name__} has partial = True and no extend")


class PreNorm(Block):
    """x = x + Attention(norm(x)); x = x + FeedForward(norm(x)) (Xiong et al. 2020, figure 1b)."""

    partial = True

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        x = x + self.dropout(self.attention(self.attention_norm(x), lengths, position, bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def extend(self, x: Embedded, part: Part) -> Rows:
        x = part.own(x) + self.attention.extend(self.attention_norm(x), part)
        return x + self.feed_forward(self.feed_forward_norm(x))


class PostNorm(Block):
    """x = norm(x + Attention(x)); x = norm(x + FeedForward(x)) (Vaswani et al. 2017)."""

    partial = True

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        x = self.attention_norm(x + self.dropout(self.attention(x, lengths, position, bias)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))

    def extend(self, x: Embedded, part: Part) -> Rows:
        x = self.attention_norm(part.own(x) + self.attention.extend(x, part))
        return self.feed_forward_norm(x + self.feed_forward(x))


class Parallel(Block):
    """x = x + Attention(norm(x)) + FeedForward(norm'(x)), both from the same x (GPT-NeoX: Black et al. 2022, eq. 1)."""

    partial = True

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        attended = self.dropout(self.attention(self.attention_norm(x), lengths, position, bias))
        return x + attended + self.dropout(self.feed_forward(self.feed_forward_norm(x)))

    def extend(self, x: Embedded, part: Part) -> Rows:
        own = part.own(x)
        attended = self.attention.extend(self.attention_norm(x), part)
        return own + attended + self.feed_forward(self.feed_forward_norm(own))


class Gated(Block):
    """x = x + σ(Wa x) * Attention(norm(x)); x = x + σ(Wf x) * FeedForward(norm(x)) (LiGR: Borisyuk et al. 2025)."""

    partial = True

    def __init__(
        self, attention: Attention, feed_forward: FeedForward, norms: tuple[Norm, Norm], dropout: float
    ) -> None:
        super().__init__(attention, feed_forward, norms, dropout)
        dim = attention.out.out_features
        self.attention_gate, self.feed_forward_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        attended = self.attention(self.attention_norm(x), lengths, position, bias)
        x = x + self.dropout(torch.sigmoid(self.attention_gate(x)) * attended)
        return x + self.dropout(torch.sigmoid(self.feed_forward_gate(x)) * self.feed_forward(self.feed_forward_norm(x)))

    def extend(self, x: Embedded, part: Part) -> Rows:
        own = part.own(x)
        attended = self.attention.extend(self.attention_norm(x), part)
        x = own + torch.sigmoid(self.attention_gate(own)) * attended
        return x + torch.sigmoid(self.feed_forward_gate(x)) * self.feed_forward(self.feed_forward_norm(x))


BlockFactory = Callable[[Attention, FeedForward, tuple[Norm, Norm], float], Block]


def blocks(
    shape: Shape,
    block: BlockFactory,
    feed_forward: FeedForwardFactory,
    norm: NormFactory,
    dropout: float,
    attention_dropout: float | None,
    hidden_dropout: float | None = None,
) -> nn.ModuleList:
    """Builds the blocks of an encoder. `attention_dropout` and `hidden_dropout` (feed-forward) default to `dropout`."""
    other = "null for the value of dropout"
    check_number("attention_dropout", attention_dropout, low=0, below=1, other=other, example=0.1, what="a share")
    attention_dropout = dropout if attention_dropout is None else attention_dropout
    hidden_dropout = dropout if hidden_dropout is None else hidden_dropout
    return nn.ModuleList(
        block(
            Attention(shape.dim, shape.heads, attention_dropout, shape.causal),
            feed_forward(shape.dim, hidden_dropout),
            (norm(shape.dim), norm(shape.dim)),
            dropout,
        )
        for _ in range(shape.layers)
    )


def initialise(fill: Callable[[Tensor], object], *modules: nn.Module) -> None:
    """Initializes all linear layers in the modules: weights with `fill`, biases with zero."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                fill(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
