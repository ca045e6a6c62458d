"""SASRec (Kang & McAuley 2018, arXiv 1808.09781).

    x = dropout(norm(E + P))
    x = x + dropout(Attention(LayerNorm(x)));  x = x + dropout(W2 dropout(GELU(W1 LayerNorm(x) + b1)) + b2)
    out = LayerNorm(x)

in the form of Google's RecML (pre-norm, GELU of four times the width; there without dropout inside the feed-forward).
The paper's own has a ReLU of the same width and no norm at the input: `feed_forward` ReLU with expansion 1,
`input_norm` false; its authors' code also multiplies items by √D (`scale_input` true), and takes the residual from the
normalised query, which neither the paper nor this does. Weights are Xavier-uniform at first, biases zero.
"""

from torch import nn

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
        dropout: on the input, on both branches and inside the feed-forward.
        attention_dropout: on attention weights; None: as `dropout`. On a CPU, 0 is twice as fast.
        scale_input: whether items are multiplied by √D before positions are added; None: no.
        input_norm: whether there is a LayerNorm on the input.
        feed_forward: GELU or ReLU; None: GELU.
        position: where an event stands; None: Learned.
        time: when it happened; None: the model has no clock.
    """

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
        x = self.dropout(self.input_norm(self.embed(self.scale * x, times, request)))
        return self.norm(self.through(self.blocks, x, lengths, times, request))
