"""SASRec (Kang & McAuley 2018, arXiv 1808.09781).

    x = dropout(norm(E + P))
    x = x + dropout(Attention(LayerNorm(x)));  x = x + dropout(W2 dropout(GELU(W1 LayerNorm(x) + b1)) + b2)
    out = LayerNorm(x)

The defaults follow Google's RecML: pre-norm, GELU of hidden width 4 D (RecML has no dropout inside the feed-forward).
The paper has a ReLU of width D and no input norm: `feed_forward` ReLU with expansion 1, `input_norm` false. The
authors' code also multiplies item vectors by √D (`scale_input` true). It takes the residual from the normalized query,
unlike the paper and this module. Initial weights are Xavier-uniform, biases zero.
"""

from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder, PreNorm, blocks, initialise
from recsys2stage.retrieval.encoders.layers import GELU, Dropout, FeedForwardFactory, LayerNorm
from recsys2stage.retrieval.encoders.positions import Learned, PositionFactory
from recsys2stage.retrieval.encoders.times import TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times


class SASRec(AttentiveEncoder):
    """Self-attentive sequential recommendation.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L.
        layers: number of blocks.
        heads: attention heads.
        dropout: on the input, both branches and inside the feed-forward.
        attention_dropout: on attention weights; None: same as `dropout`. On a CPU, 0 is twice as fast.
        scale_input: whether to multiply item vectors by √D before adding positions; None: no.
        input_norm: whether the input has a LayerNorm.
        feed_forward: GELU or ReLU; None: GELU.
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
        scale_input: bool | None = None,
        input_norm: bool = True,
        feed_forward: FeedForwardFactory | None = None,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        shape = Shape(dim=dim, max_length=max_length, heads=heads, layers=layers)
        super().__init__(shape, position or Learned, time)
        self.scale = dim**0.5 if scale_input else 1.0
        self.input_norm = LayerNorm(dim) if input_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.blocks = blocks(shape, PreNorm, feed_forward or GELU, LayerNorm, dropout, attention_dropout)
        self.norm = LayerNorm(dim)
        initialise(nn.init.xavier_uniform_, self.blocks)

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.enter(x, times, request)
        return self.leave(self.apply_blocks(self.blocks, x, lengths, times, request))

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        return self.dropout(self.input_norm(self.embed(self.scale * x, times, request, start)))

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.norm(x)
