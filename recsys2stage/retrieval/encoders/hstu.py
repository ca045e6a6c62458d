"""HSTU (Zhai et al. 2024, arXiv 2402.17152, eq. 1-3): SiLU instead of softmax, a gate instead of a feed-forward.

    U, V, Q, K = SiLU(Linear(LayerNorm(x)))
    x = x + Linear(dropout(LayerNorm(SiLU(q_i·k_j + b_ij) / N · v_j) * U))      causal; N is the longest history

The attention weights do not sum to 1, so the output keeps the intensity of a preference. The defaults follow the
authors' public code; options give the other published variants:

                                    scaling  input_norm  affine  bias  scale_input  final_norm  position  time
    generative-recommenders (Meta)  length   True        False   out   True         False       both      LogBuckets
    RecML (configs/with/hstu-recml) length   True        True    none  False        True        Learned   none
    TAAC finalist (with/hstu-taac)  width    False       True    all   False        False       Learned   LogSpaced

Initial weights are as in the authors' code, U, V, Q, K from N(0, 0.02) and outputs Xavier-uniform, but biases are zero.
"""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_WIDTH, check_integer, check_option
from recsys2stage.retrieval.encoders.attention import Bias, pointwise_attention
from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder, initialise
from recsys2stage.retrieval.encoders.layers import Dropout, LayerNorm
from recsys2stage.retrieval.encoders.partial import Part
from recsys2stage.retrieval.encoders.positions import Combined, Learned, PerDistance, Position, PositionFactory
from recsys2stage.retrieval.encoders.times import TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Rows, Shape, Times

Scaling = Literal["length", "width", "both"]
Biases = Literal["none", "out", "all"]


def learned_and_per_distance(shape: Shape) -> Position:
    """Positions of HSTU and FuXi-α: learned vectors at the scale of √D times item vectors, and a bias per distance."""
    return Combined(shape, [partial(Learned, std=shape.dim**-0.5), PerDistance])


class HSTU(AttentiveEncoder):
    """A causal stack of hierarchical sequential transduction units.

    Args:
        dim: width D, a multiple of `heads`.
        max_length: longest history L; also N, the divisor of the weights, whatever the length of a batch.
        layers: number of blocks.
        heads: attention heads.
        width: head width K of queries, keys and values; None: dim / heads.
        dropout: on the input and before each output projection.
        scaling: divide the weights by N ("length"), the dot products by √K ("width"), or "both".
        input_norm: whether each block starts with a LayerNorm.
        affine: whether LayerNorms have weights and biases.
        bias: which linear layers have biases: "none", "out" (the output projections) or "all".
        scale_input: whether to multiply item vectors by √D before adding positions; None: yes.
        final_norm: whether the stack ends with a LayerNorm.
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
        width: int | None = None,
        dropout: float = 0.2,
        scaling: Scaling = "length",
        input_norm: bool = True,
        affine: bool = False,
        bias: Biases = "out",
        scale_input: bool | None = None,
        final_norm: bool = False,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        shape = Shape(dim=dim, max_length=max_length, heads=heads, layers=layers)
        super().__init__(shape, position or learned_and_per_distance, time)
        check_integer("width", width, 1, MAX_WIDTH, other="null for dim / heads", example=dim // heads)
        width = width or dim // heads
        head = torch.empty(1, heads, 1, dim // heads)
        if width != dim // heads and self.position.rotate(head) is not head:
            raise ValueError(
                f"the position encoding rotates heads of dim / heads = {dim // heads} dimensions but width is "
                f"{width}; leave out width or choose a position encoding without rotation"
            )
        check_option("scaling", scaling, Scaling)
        check_option("bias", bias, Biases)
        self.scale = 1.0 if scale_input is False else dim**0.5
        self.dropout = Dropout(dropout)
        scale = 1.0 if scaling == "length" else width**-0.5
        divisor = 1.0 if scaling == "width" else float(max_length)
        self.blocks = nn.ModuleList(
            Block(dim, heads, width, dropout, scale, divisor, input_norm, affine, bias) for _ in range(layers)
        )
        self.norm = LayerNorm(dim, affine=affine) if final_norm else nn.Identity()

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.enter(x, times, request)
        for block, bias in zip(self.blocks, self.biases(times, request), strict=True):
            x = block(x, self.position, bias)
        return self.leave(x)

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        return self.dropout(self.embed(self.scale * x, times, request, start))

    def leave(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return self.norm(x)


class Block(nn.Module):
    partial = True

    def __init__(
        self,
        dim: int,
        heads: int,
        width: int,
        dropout: float,
        scale: float,
        divisor: float,
        input_norm: bool,
        affine: bool,
        bias: Biases,
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.divisor = heads, scale, divisor
        self.norm = LayerNorm(dim, affine=affine) if input_norm else nn.Identity()
        self.uvqk = nn.Linear(dim, 4 * heads * width, bias=bias == "all")
        self.mixed_norm = LayerNorm(heads * width, affine=affine)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(heads * width, dim, bias=bias != "none")
        initialise(nn.init.xavier_uniform_, self)
        nn.init.normal_(self.uvqk.weight, std=0.02)

    def forward(self, x: Embedded, position: Position, bias: Bias) -> Embedded:
        B, L, _ = x.shape
        u, *vqk = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        v, q, k = (part.view(B, L, self.heads, -1).transpose(1, 2) for part in vqk)  # each (B, H, L, K)
        mixed = pointwise_attention(position.rotate(q), position.rotate(k), v, bias, self.scale, self.divisor)
        return x + self.out(self.dropout(self.mixed_norm(mixed.transpose(1, 2).flatten(2)) * u))

    def extend(self, x: Embedded, part: Part) -> Rows:
        """As `forward` without dropout, for the rows that `part` owns."""
        own, h = part.own(x), self.norm(x)
        if own is x:
            u, v, q, k = F.silu(self.uvqk(h), inplace=True).chunk(4, dim=-1)
        else:  # gates and queries of the newest position only
            own_h, weights = part.own(h), self.uvqk.weight.chunk(4)
            biases = [None] * 4 if self.uvqk.bias is None else self.uvqk.bias.chunk(4)
            inputs = (own_h, h, own_h, h)
            u, v, q, k = (F.silu(F.linear(*of)) for of in zip(inputs, weights, biases, strict=True))
        part.put(k, v, self.heads)
        return own + self.out(self.mixed_norm(part.attend("silu", q, self.scale, self.divisor)) * u)
