"""LiGR layers (Borisyuk et al. 2025) in SASRec: the encoder of eSASRec (Tikhonovich et al. 2025, arXiv 2508.06450).

    x = dropout(E + P)
    x = x + dropout(σ(Wa x + ba) * Attention(LayerNorm(x)))
    x = x + dropout(σ(Wf x + bf) * W2 dropout(SiLU(W1 h) * W3 h)),  h = LayerNorm(x)

The gates read the unnormalized residual stream. The feed-forward has hidden width 4 D in all three matrices and no
biases. There is no final norm. Initial weights are Xavier-normal, biases zero.
"""

from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder, Gated, blocks, initialise
from recsys2stage.retrieval.encoders.layers import Dropout, FeedForwardFactory, LayerNorm, SwiGLU
from recsys2stage.retrieval.encoders.positions import Learned, PositionFactory
from recsys2stage.retrieval.encoders.times import TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times


class LiGR(AttentiveEncoder):
    """A transformer with learned gates on its residual branches.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L.
        layers: number of blocks.
        heads: attention heads.
        dropout: on the input, both branches and inside the feed-forward.
        attention_dropout: on attention weights; None: same as `dropout`. On a CPU, 0 is twice as fast.
        feed_forward: SwiGLU, GeGLU, GELU or ReLU; None: SwiGLU.
        position: position encoding; None: Learned.
        time: time encoding; None: no time encoding.
    """

    partial = True

    def __init__(
        self,
        dim: int,
        max_length: int,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        feed_forward: FeedForwardFactory | None = None,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        shape = Shape(dim=dim, max_length=max_length, heads=heads, layers=layers)
        super().__init__(shape, position or Learned, time)
        self.dropout = Dropout(dropout)
        self.blocks = blocks(shape, Gated, feed_forward or SwiGLU, LayerNorm, dropout, attention_dropout)
        initialise(nn.init.xavier_normal_, self.blocks)

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        return self.apply_blocks(self.blocks, self.enter(x, times, request), lengths, times, request)

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        return self.dropout(self.embed(x, times, request, start))

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return x
