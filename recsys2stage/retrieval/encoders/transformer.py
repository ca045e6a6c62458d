"""Transformer with RoPE, SwiGLU and pre-RMSNorm, a final norm and a final projection.

    x = x + dropout(Attention(RMSNorm(x)))      fused biased q, k, v; rotary on q and k; causal; output projection
    x = x + dropout(W2(dropout(SiLU(W1 h) * W3 h))),  h = RMSNorm(x)      no biases
    out = Linear(RMSNorm(x))

This is the architecture of nanoRecSys (github.com/zheliu17/nanoRecSys). Initial weights are Xavier-uniform and biases
zero; the outputs of both branches (attention output, W2) are scaled by 1/sqrt(2 · layers), as in GPT-2. Norm,
feed-forward, block, position and time encoding are options.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder, BlockFactory, PreNorm, blocks, initialise
from recsys2stage.retrieval.encoders.layers import Dropout, FeedForwardFactory, NormFactory, RMSNorm, SwiGLU
from recsys2stage.retrieval.encoders.positions import PositionFactory, Rotary
from recsys2stage.retrieval.encoders.times import TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times


class Transformer(AttentiveEncoder):
    """A causal transformer over histories.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L.
        layers: number of blocks.
        heads: attention heads.
        dropout: on the input, both branches and inside the feed-forward.
        attention_dropout: on attention weights; None: same as `dropout`. On a CPU, 0 is twice as fast.
        block: PreNorm, PostNorm, Parallel or Gated.
        norm: RMSNorm or LayerNorm.
        feed_forward: SwiGLU, GeGLU, GELU or ReLU; None: SwiGLU.
        position: position encoding; None: Rotary.
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
        block: BlockFactory = PreNorm,
        norm: NormFactory = RMSNorm,
        feed_forward: FeedForwardFactory | None = None,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        shape = Shape(dim=dim, max_length=max_length, heads=heads, layers=layers)
        super().__init__(shape, position or Rotary, time)
        self.dropout = Dropout(dropout)
        self.blocks = blocks(shape, block, feed_forward or SwiGLU, norm, dropout, attention_dropout)
        self.norm = norm(dim)
        self.projection = nn.Linear(dim, dim)
        initialise(nn.init.xavier_uniform_, self.blocks, self.projection)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", "feed_forward.w2.weight")):
                    weight.div_((2 * layers) ** 0.5)

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.enter(x, times, request)
        return self.leave(self.apply_blocks(self.blocks, x, lengths, times, request))

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        return self.dropout(self.embed(x, times, request, start))

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.projection(self.norm(x))
