"""BERT4Rec (Sun et al. 2019, arXiv 1904.06690).

    x = dropout(LayerNorm(E + P + T))
    x = LayerNorm(x + dropout(Attention(x)));  x = LayerNorm(x + dropout(W2 GELU(W1 x + b1) + b2))
    out = LayerNorm(GELU(Wp x + bp))

Every position attends to all non-padding positions. Training predicts masked items (`objectives.Cloze`); serving
predicts a mask appended after the newest event. With learned positions, some training histories must be as long as the
longest at serving: a position that no training window reaches keeps its random initial vector. The last line is BERT's
masked-LM head; the product with the item table and the bias per item are part of the towers (`item_bias: true`).
Initial weights are N(0, 0.02²), truncated at two standard deviations, and biases zero.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_LENGTH, check_integer
from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder, PostNorm, blocks, initialise
from recsys2stage.retrieval.encoders.layers import GELU, Dropout, FeedForwardFactory, LayerNorm
from recsys2stage.retrieval.encoders.positions import Learned, PositionFactory
from recsys2stage.retrieval.encoders.times import TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times

EPS = 1e-12


class BERT4Rec(AttentiveEncoder):
    """A bidirectional transformer over histories with masked events.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L; the appended mask takes one more position.
        layers: number of blocks.
        heads: attention heads.
        dropout: on the input and both branches, but not inside the feed-forward.
        attention_dropout: on attention weights; None: same as `dropout`. On a CPU, 0 is twice as fast.
        type_embedding: whether to add BERT's segment embedding: one vector, as a history is one segment.
        feed_forward: feed-forward layer; None: GELU.
        position: position encoding; None: Learned.
        time: time encoding; None: no time encoding.
    """

    causal, partial = False, True

    def __init__(
        self,
        dim: int,
        max_length: int,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        type_embedding: bool = False,
        feed_forward: FeedForwardFactory | None = None,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        check_integer("max_length", max_length, 1, MAX_LENGTH, example=200)
        shape = Shape(dim=dim, max_length=max_length + 1, heads=heads, layers=layers, causal=False)
        super().__init__(shape, position or Learned, time)
        norm = partial(LayerNorm, eps=EPS)
        self.segment = nn.Parameter(torch.empty(dim)) if type_embedding else None
        self.input_norm, self.dropout = norm(dim), Dropout(dropout)
        self.blocks = blocks(
            shape, PostNorm, feed_forward or GELU, norm, dropout, attention_dropout, hidden_dropout=0.0
        )
        self.dense, self.norm = nn.Linear(dim, dim), norm(dim)
        initialise(partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04), self.blocks, self.dense)
        if self.segment is not None:
            nn.init.trunc_normal_(self.segment, std=0.02, a=-0.04, b=0.04)

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.enter(x, times, request)
        return self.leave(self.apply_blocks(self.blocks, x, lengths, times, request))

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        x = self.embed(x, times, request, start)
        if self.segment is not None:
            x = x + self.segment
        return self.dropout(self.input_norm(x))

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.norm(F.gelu(self.dense(x)))
