"""The modern transformer: RoPE, SwiGLU, RMSNorm before each branch, a final norm and projection.

    x = x + dropout(Attention(RMSNorm(x)))      fused biased q, k, v; rotary on q and k; causal; output projection
    x = x + dropout(W2(dropout(SiLU(W1 h) * W3 h))),  h = RMSNorm(x)      no biases
    out = Linear(RMSNorm(x))

This is the architecture of nanoRecSys (github.com/zheliu17/nanoRecSys). Weights are Xavier-uniform at first and biases
zero; what writes into the residual stream (attention output, W2) is scaled by 1/sqrt(2 · layers), as in GPT-2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.encoders.base import Encoder
from recsys2stage.positions import Position, PositionFactory, Rotary
from recsys2stage.shapes import Embedded, Lengths, Shape, Times
from recsys2stage.times import Time, TimeFactory

EPS = 1e-6


class Transformer(Encoder):
    """A causal transformer over histories.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L.
        layers: number of blocks.
        heads: attention heads.
        expansion: hidden width of the feed-forward as a multiple of `dim`.
        dropout: on the input, on both branches and inside the feed-forward.
        attention_dropout: on attention weights; None: as `dropout`. On a CPU anything but 0 forgoes the fused kernel.
        position: where an event stands.
        time: when it happened; None: the model has no clock.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        layers: int = 2,
        heads: int = 2,
        expansion: float = 4.0,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        position: PositionFactory = Rotary,
        time: TimeFactory | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}; change one of them")
        shape = Shape(dim=dim, max_length=max_length, heads=heads)
        self.position: Position = position(shape)
        self.time: Time = (time or Time)(shape)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                dim, heads, round(expansion * dim), dropout, dropout if attention_dropout is None else attention_dropout
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(dim, eps=EPS)
        self.projection = nn.Linear(dim, dim)
        self._initialise()

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.dropout(self.time.embed(self.position.embed(x), times, request))
        for block in self.blocks:
            x = block(x, self.position)
        return self.projection(self.norm(x))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", "feed_forward.w2.weight")):
                    weight.div_((2 * len(self.blocks)) ** 0.5)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=EPS)
        self.attention = Attention(dim, heads, attention_dropout)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=EPS)
        self.feed_forward = SwiGLU(dim, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Position) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), position))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, position: Position) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, L, K)
        y = F.scaled_dot_product_attention(
            position.rotate(q), position.rotate(k), v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(y.transpose(1, 2).reshape(B, L, D))


class SwiGLU(nn.Module):
    """Shazeer 2020, eq. 6, without biases."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.dropout(F.silu(self.w1(x)) * self.w3(x)))
