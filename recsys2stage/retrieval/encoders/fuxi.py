"""FuXi-α (Ye et al. 2025, arXiv 2502.03036): attention with separate semantic, positional and temporal channels.

    U, V, Q, K = SiLU(Linear(RMSNorm(x)))
    x = x + Linear(dropout(RMSNorm([P v, T v, SiLU(q_i·k_j) / N · v_j]) * U))      causal; N is the longest history
    x = x + W2(SiLU(W1 h) * W3 h),  h = dropout(RMSNorm(x))                        norms without weights

P and T, the biases of the position and the time encoding, are used as attention weights without activation; an encoding
without a bias has no channel. Only the output projection to D has a bias. Initial weights are as in the authors' code,
U, V, Q, K from N(0, 0.02) and the others Xavier-uniform, but that bias is zero.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.retrieval.encoders.attention import Bias, bias_attention, pointwise_attention
from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder, initialise
from recsys2stage.retrieval.encoders.hstu import learned_and_per_distance
from recsys2stage.retrieval.encoders.layers import Dropout, RMSNorm, SwiGLU
from recsys2stage.retrieval.encoders.partial import Part
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.retrieval.encoders.times import TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Rows, Shape, Times


class FuXi(AttentiveEncoder):
    """A causal stack of FuXi-α blocks.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L; also N, the divisor of the semantic weights, whatever the length of a batch.
        layers: number of blocks.
        heads: attention heads.
        expansion: hidden width of the feed-forward as a multiple of `dim`; in the paper 1 on ML-1M, 4 on ML-20M.
        dropout: on the input, before each output projection and before each feed-forward.
        scale_input: whether to multiply item vectors by √D before adding positions; None: yes.
        position: position encoding; None: Learned and PerDistance.
        time: time encoding, in the paper times.LogBuckets; None: no time encoding.
    """

    partial = True

    def __init__(
        self,
        dim: int,
        max_length: int,
        layers: int = 2,
        heads: int = 2,
        expansion: float = 4.0,
        dropout: float = 0.2,
        scale_input: bool | None = None,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        shape = Shape(dim=dim, max_length=max_length, heads=heads, layers=layers)
        super().__init__(shape, position or learned_and_per_distance, time)
        self.scale = 1.0 if scale_input is False else dim**0.5
        self.dropout = Dropout(dropout)
        channels = 1 + sum(bias is not None for bias in (self.position.bias(0, 1), self.time.table(0)))
        self.blocks = nn.ModuleList(Block(dim, max_length, heads, channels, expansion, dropout) for _ in range(layers))

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.enter(x, times, request)
        for block, bias in zip(self.blocks, self.biases(times, request), strict=True):
            x = block(x, self.position, bias)
        return x

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        return self.dropout(self.embed(self.scale * x, times, request, start))

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return x


class Block(nn.Module):
    partial = True

    def __init__(self, dim: int, max_length: int, heads: int, channels: int, expansion: float, dropout: float) -> None:
        super().__init__()
        self.divisor, self.heads = float(max_length), heads
        self.norm = RMSNorm(dim, affine=False)
        self.uvqk = nn.Linear(dim, (channels + 3) * dim, bias=False)
        self.mixed_norm = RMSNorm(channels * dim, affine=False)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(channels * dim, dim)
        self.feed_forward_norm = RMSNorm(dim, affine=False)
        self.feed_forward = SwiGLU(dim, dropout=0.0, expansion=expansion)
        initialise(nn.init.xavier_uniform_, self)
        nn.init.normal_(self.uvqk.weight, std=0.02)

    def forward(self, x: Embedded, position: Position, bias: Bias) -> Embedded:
        B, L, D = x.shape
        u, *vqk = torch.split(F.silu(self.uvqk(self.norm(x))), [self.out.in_features, D, D, D], dim=-1)
        v, q, k = (part.view(B, L, self.heads, -1).transpose(1, 2) for part in vqk)  # each (B, H, L, K)
        channels = [bias_attention(v, part) for part in (Bias(bias.position), bias._replace(position=None)) if part]
        channels.append(pointwise_attention(position.rotate(q), position.rotate(k), v, Bias(), divisor=self.divisor))
        mixed = torch.cat(channels, dim=-1)  # (B, H, L, channels · K)
        x = x + self.out(self.dropout(self.mixed_norm(mixed.transpose(1, 2).flatten(2)) * u))
        return x + self.feed_forward(self.dropout(self.feed_forward_norm(x)))

    def extend(self, x: Embedded, part: Part) -> Rows:
        """As `forward` without dropout, for the rows that `part` owns."""
        own, h, wide = part.own(x), self.norm(x), self.out.in_features
        sizes = [wide, *(3 * [self.out.out_features])]
        if own is x:
            u, v, q, k = torch.split(F.silu(self.uvqk(h), inplace=True), sizes, dim=-1)
        else:  # gates and queries of the newest position only
            own_h, weights = self.norm(own), torch.split(self.uvqk.weight, sizes)
            u, v, q, k = (F.silu(F.linear(*of)) for of in zip((own_h, h, own_h, h), weights, strict=True))
        part.put(k, v, self.heads)
        channels = [part.attend("identity", terms=term) for term in part.terms()]
        channels.append(part.attend("silu", q, divisor=self.divisor, terms="none"))
        per_head = [channel.view(*own.shape[:2], self.heads, -1) for channel in channels]
        mixed = torch.stack(per_head, dim=3).flatten(2)
        x = own + self.out(self.mixed_norm(mixed) * u)
        return x + self.feed_forward(self.feed_forward_norm(x))
