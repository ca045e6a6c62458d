"""Transformer building blocks: attention encoder, attention layer; pre-norm, post-norm, parallel and gated blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from recsys2stage.options import check_number
from recsys2stage.retrieval.encoders.attention import Bias, softmax_attention
from recsys2stage.retrieval.encoders.base import Encoder
from recsys2stage.retrieval.encoders.layers import Dropout, FeedForward, FeedForwardFactory, Norm, NormFactory
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.retrieval.encoders.times import Time, TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times


class AttentiveEncoder(Encoder):
    """Base class of encoders with attention; calls all hooks of the position and time encodings.

    Args:
        shape: sizes; the width must be a multiple of the heads.
        position: position encoding.
        time: time encoding; None: no time encoding.
    """

    def __init__(self, shape: Shape, position: PositionFactory, time: TimeFactory | None) -> None:
        super().__init__()
        self.layers = shape.layers
        self.position: Position = position(shape)
        self.time: Time = (time or Time)(shape)

    @property
    def reads_times(self) -> bool:
        return type(self.time) is not Time

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        """Adds the position and time embeddings to the input."""
        return self.time.embed(self.position.embed(x), times, request)

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


class Block(nn.Module, ABC):
    """Attention and feed-forward as residual branches. Subclasses define the order of norm, branch and addition.

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


class PreNorm(Block):
    """x = x + Attention(norm(x)); x = x + FeedForward(norm(x)) (Xiong et al. 2020, figure 1b)."""

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        x = x + self.dropout(self.attention(self.attention_norm(x), lengths, position, bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class PostNorm(Block):
    """x = norm(x + Attention(x)); x = norm(x + FeedForward(x)) (Vaswani et al. 2017)."""

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        x = self.attention_norm(x + self.dropout(self.attention(x, lengths, position, bias)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Parallel(Block):
    """x = x + Attention(norm(x)) + FeedForward(norm'(x)), both from the same x (GPT-NeoX: Black et al. 2022, eq. 1)."""

    def forward(self, x: Embedded, lengths: Lengths, position: Position, bias: Bias) -> Embedded:
        attended = self.dropout(self.attention(self.attention_norm(x), lengths, position, bias))
        return x + attended + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Gated(Block):
    """x = x + σ(Wa x) * Attention(norm(x)); x = x + σ(Wf x) * FeedForward(norm(x)) (LiGR: Borisyuk et al. 2025)."""

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
    """Initialises all linear layers in the modules: weights with `fill`, biases with zero."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                fill(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
