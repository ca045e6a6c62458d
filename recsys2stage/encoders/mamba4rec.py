"""Mamba4Rec (Liu et al. 2024, arXiv 2403.03900) with the layer of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060).

    x = LayerNorm(dropout(E))
    x = LayerNorm(x + dropout(Mamba2(x)));  x = LayerNorm(x + dropout(W2 dropout(GELU(W1 x + b1)) + b2))

    Mamba2(x) = Wo RMSNorm(y * SiLU(z))       z, (v, b, c), dt from one linear map of x without biases
    v, b, c = SiLU(a causal convolution of each channel);   dt = softplus(dt + its bias)
    h_t = exp(-exp(A) dt_t) h_{t-1} + dt_t b_t v_t;   y_t = c_t h_t (+ D v_t)      for each head

in the form of Google's RecML: no position, since a recurrence knows the order, and no skip D. A history of any length
costs time in proportion to it, and one more event costs `step` the same however long the history is.
Linear maps are Xavier-uniform at first and biases zero; the convolution starts uniform in ±1/√(its width), exp(A) uniform
in 1 to 16 and softplus(bias of dt) log-uniform in 0.001 to 0.1, as in the authors' code.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.encoders.base import Encoder
from recsys2stage.encoders.blocks import initialise
from recsys2stage.layers import GELU, Dropout, LayerNorm, RMSNorm
from recsys2stage.positions import Position, PositionFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times
from recsys2stage.times import Time, TimeFactory

EPS = 1e-12  # of LayerNorms, as in both papers' code
FAINT = (
    -60.0
)  # e^-60 is lost beside anything in float32; smaller yet are denormals, which a CPU multiplies 80 times slower

Values = Float[Tensor, "B L H K"]
PerHead = Float[Tensor, "B L H"]
States = Float[Tensor, "B L S"]


class LayerState(NamedTuple):
    """What a layer remembers: the last inputs of its convolution and the state of its recurrence."""

    tail: Float[Tensor, "B W C"]
    memory: Float[Tensor, "B S H K"]


class State(NamedTuple):
    """What the encoder remembers of histories: how many events they have, and the state of each layer."""

    count: int
    layers: tuple[LayerState, ...]


class Mamba4Rec(Encoder):
    """A causal stack of selective state space layers.

    Args:
        dim: width D.
        max_length: longest history L, as positions need it.
        layers: number of blocks.
        state: width S of the state that each channel has.
        expand: width of a state space layer as a multiple of `dim`.
        heads: channels are dealt to so many heads, which forget at rates of their own.
        conv_width: events that the convolution sees.
        chunk: places that are computed together; it changes the speed only.
        skip: whether each layer adds D v, its input, to its output (in Mamba-2, not in RecML).
        expansion: hidden width of the feed-forward as a multiple of `dim`.
        dropout: on the input, on both branches and inside the feed-forward.
        position: where an event stands, as a term of the input.
        time: when it happened, as a term of the input; None: the model has no clock.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        layers: int = 2,
        state: int = 64,
        expand: int = 2,
        heads: int = 8,
        conv_width: int = 4,
        chunk: int = 32,
        skip: bool = False,
        expansion: float = 4.0,
        dropout: float = 0.2,
        position: PositionFactory = Position,
        time: TimeFactory | None = None,
    ) -> None:
        super().__init__()
        if expand * dim % heads:
            raise ValueError(f"expand · dim = {expand * dim} is not a multiple of heads {heads}; change one of them")
        shape = Shape(dim=dim, max_length=max_length, heads=heads, layers=layers)
        self.max_length = max_length
        self.position: Position = position(shape)
        self.time: Time = (time or Time)(shape)
        for part, others in ((self.position, "Learned, Sinusoidal"), (self.time, "RequestGap, Calendar")):
            if part.in_attention:
                raise ValueError(
                    f"{type(part).__name__} acts inside attention, and Mamba4Rec has none; choose {others} or nothing"
                )
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim, EPS)
        self.blocks = nn.ModuleList(
            Block(
                Mamba2(dim, state, expand * dim, heads, conv_width, chunk, skip), GELU(dim, dropout, expansion), dropout
            )
            for _ in range(layers)
        )
        initialise(self, nn.init.xavier_uniform_)

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.norm(self.dropout(self.time.embed(self.position.embed(x), times, request)))
        for block in self.blocks:
            x = block(x)
        return x

    def start(self, batch: int) -> State:
        """The state of `batch` empty histories."""
        return State(0, tuple(block.mamba.start(batch) for block in self.blocks))

    def step(
        self,
        x: Float[Tensor, "B D"],
        state: State,
        time: Float[Tensor, " B"] | None = None,
        request: Float[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B D"], State]:
        """One more event for each history: what `forward` gives at its place, at a cost that does not grow.

        Args:
            x: the embedded event.
            state: of the events before it; it is left as it is.
            time: seconds of the event, where the encoder has a clock.
            request: seconds at which the event after it is asked for; None when the model is not told.
        """
        ...


class Block(nn.Module):
    """A state space layer and a feed-forward, each followed by a LayerNorm over the sum with its input."""

    def __init__(self, mamba: "Mamba2", feed_forward: GELU, dropout: float) -> None:
        super().__init__()
        dim = mamba.out.out_features
        self.mamba, self.feed_forward, self.dropout = mamba, feed_forward, Dropout(dropout)
        self.mamba_norm, self.feed_forward_norm = LayerNorm(dim, EPS), LayerNorm(dim, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.mamba(x))

    def join(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.mamba_norm(x + self.dropout(mixed))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Mamba2(nn.Module):
    def __init__(self, dim: int, state: int, width: int, heads: int, conv_width: int, chunk: int, skip: bool) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.channels = [width, state, state]
        self.into = nn.Linear(dim, 2 * width + 2 * state + heads, bias=False)
        self.taps = nn.Parameter(torch.empty(width + 2 * state, conv_width).uniform_(-1, 1) / conv_width**0.5)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.step_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # the inverse of softplus
        self.skip = nn.Parameter(torch.ones(heads)) if skip else None
        self.norm = RMSNorm(width, 1e-5)
        self.out = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        L = x.size(1)
        chunks = -(-L // self.chunk)
        extra = -L % chunks
        gate, vbc, step = self.into(x).split([self.channels[0], sum(self.channels), self.heads], dim=-1)
        padded = F.pad(vbc, (0, 0, self.taps.size(1) - 1, extra))
        vbc = F.silu(convolve(padded, self.taps))
        v, b, c = vbc.split(self.channels, dim=-1)
        step = F.pad(F.softplus(step + self.step_bias), (0, 0, 0, extra))
        y = _Scan.apply(v.unflatten(-1, (self.heads, -1)), step, -self.log_rate.exp(), b, c, chunks)
        y = y[:, :L].flatten(2)
        return self.out(self.norm(y * F.silu(gate)))


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    wide = x.transpose(1, 2)[:, :, None]  # in memory a picture of one row whose channels come last
    return F.conv2d(wide, taps[:, None, None], groups=len(taps))[:, :, 0].transpose(1, 2)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, rate, B, C, n):
        b, L, H, P = x.shape
        N = B.size(-1)
        c = L // n
        u = (x * dt[..., None]).view(b * n, c, H, P)
        B = B.reshape(b * n, c, N)
        C = C.reshape(b * n, c, N)
        s = (dt * rate).view(b * n, c, H).cumsum(1)
        left = (s[:, -1:] - s).clamp_(min=FAINT).exp_()[..., None]
        since = s.clamp(min=FAINT).exp_()[..., None]
        S = (B.mT @ (u * left).flatten(2)).view(b, n, N, H, P)
        carry(S, since.view(b, n, c, H, 1)[:, :, -1:], range(n))
        y = (C @ S.view(b * n, N, H * P)).view(b * n, c, H, P).mul_(since)
        G = (C @ B.mT).tril_()
        for h in range(H):
            y[:, :, h].add_(decay(s[:, :, h]).mul_(G) @ u[:, :, h])
        y = y.view(b, L, H, P)
        ctx.save_for_backward(x, dt, rate, B, C, s, S, y)
        ctx.n = n
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, dt, rate, B, C, s, S, y = ctx.saved_tensors
        n = ctx.n
        b, L, H, P = x.shape
        N = B.size(-1)
        c = L // n
        gy = gy.contiguous()
        u = (x * dt[..., None]).view(b * n, c, H, P)
        left = (s[:, -1:] - s).clamp_(min=FAINT).exp_()[..., None]
        since = s.clamp(min=FAINT).exp_()[..., None]
        g5 = gy.view(b * n, c, H, P)
        gd = (g5 * since).flatten(2)
        gS = (C.mT @ gd).view(b, n, N, H, P)
        carry(gS, since.view(b, n, c, H, 1)[:, :, -1:], range(n - 1, -1, -1))
        gS = gS.view(b * n, N, H * P)
        gC = gd @ S.view(b * n, N, H * P).mT
        gB = torch.mul(u, left, out=gd.view(b * n, c, H, P)).flatten(2) @ gS.mT
        gu = (B @ gS).view(b * n, c, H, P).mul_(left)
        G = (C @ B.mT).tril_()
        gG = torch.zeros_like(G)
        for h in range(H):
            E = decay(s[:, :, h])
            gG.addcmul_(E, g5[:, :, h] @ u[:, :, h].mT)
            gu[:, :, h].add_(E.mul_(G).mT @ g5[:, :, h])
        gG.tril_()
        gC.baddbmm_(gG, B)
        gB.baddbmm_(gG.mT, C)
        gu = gu.view(b, L, H, P)
        gdt = (x * gu).sum(-1)
        gs = (gy * y).sum(-1) - dt * gdt
        ga = gs.flip(1).cumsum(1).flip(1)
        return gu.mul_(dt[..., None]), gdt + ga * rate, (ga * dt).sum((0, 1)), gB.view(b, L, N), gC.view(b, L, N), None


def decay(s):
    return (s[:, :, None] - s[:, None]).clamp_(FAINT, 0).exp_()


def carry(S, dec, order):
    state = torch.zeros_like(S[:, 0])
    for k in order:
        after = torch.addcmul(S[:, k], state, dec[:, k])
        S[:, k] = state
        state = after
