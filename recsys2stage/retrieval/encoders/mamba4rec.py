"""Mamba4Rec (Liu et al. 2024, arXiv 2403.03900) with the layers of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060).

    x = LayerNorm(dropout(E))
    x = LayerNorm(x + dropout(Mamba2(x)));  x = LayerNorm(x + dropout(W2 dropout(GELU(W1 x + b1)) + b2))

    Mamba2(x) = Wo RMSNorm(y * SiLU(z))              z, (v, b, c), dt: one linear map of x, without biases
    v, b, c = SiLU(causal convolution of each channel);  dt = softplus(dt + its bias)
    h_t = exp(-rate · dt_t) h_{t-1} + dt_t b_t v_t;  y_t = c_t h_t (+ D v_t)         in each head

in the form of Google's RecML: no position, since a recurrence knows the order, and no skip D. A history costs time in
proportion to its length, and one event more costs `step` the same however long the history is.

Linear maps are Xavier-uniform at first and biases zero; the convolution is uniform in ±1/√(its width), rate uniform
in 1 to 16 and dt of a zero input log-uniform in 0.001 to 0.1, as in the code of Mamba-2. Beside the usual letters, E is
the width inside a layer (H heads of K), S that of a state, W that of the convolution and C = E + 2 S its channels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.retrieval.encoders.base import Encoder
from recsys2stage.retrieval.encoders.blocks import initialise
from recsys2stage.retrieval.encoders.layers import GELU, Dropout, LayerNorm, RMSNorm, in_cache, without_autocast
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.retrieval.encoders.times import Time, TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times

EPS = 1e-12  # of the LayerNorms, as published
FAINTEST = -60.0  # e^-60 is lost beside anything else, and denormals, not far below, cost a CPU 80 times the time

Event = Float[Tensor, "B D"]
Moment = Int[Tensor, " B"]


class LayerState(NamedTuple):
    """What a layer remembers: the last inputs of its convolution and the state of its recurrence."""

    tail: Float[Tensor, "B W-1 C"]
    memory: Float[Tensor, "B S H K"]


class State(NamedTuple):
    """What the encoder remembers of histories: how many events each has, and the states of the layers."""

    events: int
    layers: tuple[LayerState, ...]


class Mamba4Rec(Encoder):
    """A causal stack of selective state space layers.

    Args:
        dim: width D.
        max_length: longest history L, for positions.
        layers: number of blocks.
        state: width S of the state of each channel.
        expand: width E of a state space layer as a multiple of `dim`.
        ssm_heads: groups of channels, each with its own rate of forgetting; they divide E.
        conv_width: number of events that the convolution sees, W.
        chunk: places that are computed at once, at most; it changes nothing but the time.
        skip: whether each layer adds D v to its output, as in Mamba-2.
        expansion: hidden width of the feed-forward as a multiple of `dim`.
        dropout: on the input, on both branches and inside the feed-forward.
        position: where an event stands, as a term of the input; None: the model counts nothing.
        time: when it happened, as a term of the input; None: the model has no clock.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        layers: int = 2,
        state: int = 64,
        expand: int = 2,
        ssm_heads: int = 8,
        conv_width: int = 4,
        chunk: int = 40,
        skip: bool = False,
        expansion: float = 4.0,
        dropout: float = 0.2,
        position: PositionFactory | None = None,
        time: TimeFactory | None = None,
    ) -> None:
        super().__init__()
        width = expand * dim
        if width % ssm_heads:
            raise ValueError(f"expand · dim = {width} is not a multiple of ssm_heads {ssm_heads}; change one of them")
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1; 40 is quick on a CPU")
        shape = Shape(dim=dim, max_length=max_length, layers=layers)
        self.max_length = max_length
        self.position: Position = (position or Position)(shape)
        self.time: Time = (time or Time)(shape)
        _refuse_attention(self.position, "Learned, Sinusoidal or no position")
        _refuse_attention(self.time, "RequestGap, Calendar, HybridTimestamp or no time")
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim, EPS)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # torch: of modules
            Block(Mamba2(dim, width, state, ssm_heads, conv_width, chunk, skip), GELU(dim, dropout, expansion), dropout)
            for _ in range(layers)
        )
        initialise(nn.init.xavier_uniform_, *self.blocks)

    @property
    def reads_times(self) -> bool:
        return type(self.time) is not Time

    def forward(self, x: Embedded, lengths: Lengths, times: Times, request: Times | None) -> Embedded:
        x = self.norm(self.dropout(self.time.embed(self.position.embed(x), times, request)))
        for block in self.blocks:
            x = block(x)
        return x

    def start(self, batch: int) -> State:
        """The state of so many empty histories."""
        return State(0, tuple(block.mamba.start(batch) for block in self.blocks))

    def step(
        self, x: Event, state: State, time: Moment | None = None, request: Moment | None = None
    ) -> tuple[Event, State]:
        """One event more: what `forward` gives at its place, and the state after it.

        Args:
            x: the embedded event of each history.
            state: after the events before it; it is not changed.
            time: seconds of the event; an encoder with a clock needs them.
            request: seconds at which the event after it is asked for; None when the model is not told.

        Raises:
            ValueError: without the time that the clock needs, or beyond the last place that the position knows.
        """
        place = x[:, None]
        if type(self.position) is not Position:
            if state.events >= self.max_length:
                name = type(self.position).__name__
                raise ValueError(
                    f"{name} knows {self.max_length} places and this is event {state.events + 1} of a history; raise "
                    "max_length, or start anew with its last events"
                )
            place = self.position.embed(F.pad(place, (0, 0, state.events, 0)))[:, -1:]
        if time is not None:
            place = self.time.embed(place, time[:, None], None if request is None else request[:, None])
        elif type(self.time) is not Time:
            raise ValueError(f"{type(self.time).__name__} needs the time of the event; give step a time")
        x = self.norm(self.dropout(place[:, 0]))
        after = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            x, own = block.step(x, before)
            after.append(own)
        return x, State(state.events + 1, tuple(after))


def _refuse_attention(part: Position | Time, instead: str) -> None:
    if part.in_attention:
        raise ValueError(f"{type(part).__name__} acts inside attention, and Mamba4Rec has none; choose {instead}")


class Block(nn.Module):
    """LayerNorm(x + Mamba2(x)), and the same around a feed-forward."""

    def __init__(self, mamba: "Mamba2", feed_forward: GELU, dropout: float) -> None:
        super().__init__()
        dim = mamba.out.out_features
        self.mamba, self.feed_forward, self.dropout = mamba, feed_forward, Dropout(dropout)
        self.mamba_norm, self.feed_forward_norm = LayerNorm(dim, EPS), LayerNorm(dim, EPS)

    def forward(self, x: Embedded) -> Embedded:
        return self._after(x, self.mamba(x))

    def step(self, x: Event, state: LayerState) -> tuple[Event, LayerState]:
        mixed, state = self.mamba.step(x, state)
        return self._after(x, mixed), state

    def _after(self, x: Float[Tensor, "*B D"], mixed: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        x = self.mamba_norm(x + self.dropout(mixed))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Mamba2(nn.Module):
    """The selective state space layer, with one group of b and c for all heads.

    Args:
        dim: D.
        width: E.
        state: S.
        heads: H.
        conv_width: W.
        chunk: places that are computed at once, at most.
        skip: whether D v is added to y.
    """

    def __init__(self, dim: int, width: int, state: int, heads: int, conv_width: int, chunk: int, skip: bool) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.vbc = [width, state, state]
        channels = sum(self.vbc)
        self.parts = [width, channels, heads]  # z, (v, b, c), dt
        self.into = nn.Linear(dim, sum(self.parts), bias=False)
        self.taps = nn.Parameter(torch.empty(channels, conv_width).uniform_(-1, 1) / conv_width**0.5)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())  # softplus of it is dt
        self.skip = nn.Parameter(torch.ones(heads)) if skip else None
        self.norm = RMSNorm(width, 1e-5)
        self.out = nn.Linear(width, dim, bias=False)

    def forward(self, x: Embedded) -> Embedded:
        length = x.size(1)
        chunks = (length + self.chunk - 1) // self.chunk
        places = -(-length // chunks) if in_cache(x) else self.chunk  # a compiler wants to know it
        extra = chunks * places - length  # places after the end, which no other sees
        z, vbc, dt = self._project(x)
        dt = F.pad(dt, (0, 0, 0, extra))
        vbc = F.silu(self._convolve(F.pad(vbc, (0, 0, self.taps.size(1) - 1, extra)))).to(dt.dtype)
        v, b, c = torch.split(vbc, self.vbc, dim=-1)
        v = v.view(*v.shape[:-1], self.heads, -1)
        with without_autocast(x):  # sums over a whole history want more than 8 bits
            y = scan(v, b, c, dt, self.log_rate.exp(), places)
        return self._finish(y[:, :length], v[:, :length], z)

    def start(self, batch: int) -> LayerState:
        tail = self.taps.new_zeros(batch, self.taps.size(1) - 1, len(self.taps))
        return LayerState(tail, self.taps.new_zeros(batch, self.vbc[1], self.heads, self.vbc[0] // self.heads))

    def step(self, x: Event, state: LayerState) -> tuple[Event, LayerState]:
        z, vbc, dt = self._project(x)
        seen = torch.cat([state.tail, vbc[:, None]], dim=1)  # (B, W, C)
        v, b, c = torch.split(F.silu((seen * self.taps.T).sum(1)), self.vbc, dim=-1)
        v = v.view(*v.shape[:-1], self.heads, -1)
        kept = (-self.log_rate.exp() * dt).exp()[:, None, :, None]
        memory = kept * state.memory + b[..., None, None] * (dt[..., None] * v)[:, None]
        y = (c[..., None, None] * memory).sum(1)
        return self._finish(y, v, z), LayerState(seen[:, 1:], memory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, (v, b, c) before the convolution, and dt. Three products, for each result in one piece of memory."""
        z, vbc, dt = (F.linear(x, weight) for weight in torch.split(self.into.weight, self.parts))
        return z, vbc, F.softplus(dt + self.dt_bias)

    def _convolve(self, vbc: Float[Tensor, "B longer C"]) -> Float[Tensor, "B L C"]:
        """Each channel by itself. In memory the history is a picture, one pixel high, with its channels last; that
        convolution is the fastest that a CPU has."""
        picture = vbc.transpose(1, 2).unsqueeze(2)
        return F.conv2d(picture, self.taps[:, None, None], groups=len(self.taps)).squeeze(2).transpose(1, 2)

    def _finish(self, y: Float[Tensor, "*B H K"], v: Float[Tensor, "*B H K"], z: Tensor) -> Tensor:
        if self.skip is not None:
            y = y + self.skip[:, None] * v
        return self.out(self.norm(y.flatten(-2) * F.silu(z)))


def scan(
    v: Float[Tensor, "B L H K"],
    b: Float[Tensor, "B L S"],
    c: Float[Tensor, "B L S"],
    dt: Float[Tensor, "B L H"],
    rate: Float[Tensor, " H"],
    places: int,
) -> Float[Tensor, "B L H K"]:
    """y of the recurrence, chunk by chunk: matrix products inside a chunk, a recurrence between chunks.

    With u_i = dt_i v_i, s_i the sum of -rate · dt from a chunk's first place to its place i, and h the state before it
    (Dao & Gu 2024, section 6),

        y_i = Σ_{j ≤ i} (c_i·b_j) e^(s_i - s_j) u_j + e^(s_i) c_i h
        h after the chunk = e^(s_n) h + Σ_j e^(s_n - s_j) b_j u_j,  n its last place

    Args:
        v: what is written into the states.
        b: how it is written.
        c: how it is read.
        dt: how much of it.
        rate: of forgetting.
        places: of a chunk; L is a multiple of it.
    """
    if in_cache(v):
        return _Scan.apply(v, b, c, dt, rate, places)  # type: ignore[no-untyped-call]  # torch: no types
    return _whole_scan(v, b, c, dt, rate, places)


def _whole_scan(v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, places: int) -> Tensor:
    """All chunks at once, n of P places; the recurrence between them is one product with n × n weights."""
    u, b, c, s = (_chunked(x, places) for x in (v * dt[..., None], b, c, dt * -rate))
    s = s.cumsum(2).transpose(2, 3)  # (B, n, H, P)
    inside = (c @ b.mT).tril()[:, :, None] * (s[..., None] - s[..., None, :]).clamp(max=0).exp()
    y = (inside @ u.transpose(2, 3)).transpose(2, 3)
    added = torch.einsum("bnphk,bnhp,bnps->bnshk", u, (s[..., -1:] - s).exp(), b)
    past = s[..., -1].cumsum(1)  # (B, n, H)
    between = (F.pad(past[:, :-1], (0, 0, 1, 0))[:, :, None] - past[:, None]).clamp(max=0).exp()  # (B, n, n, H)
    earlier = torch.ones_like(between[0, :, :, 0]).tril(-1)
    states = torch.einsum("bnmh,nm,bmshk->bnshk", between, earlier, added)
    return (y + torch.einsum("bnps,bnshk,bnhp->bnphk", c, states, s.exp())).reshape(v.shape)


def _chunked(x: Tensor, places: int) -> Tensor:
    return x.reshape(len(x), -1, places, *x.shape[2:])


class _Scan(torch.autograd.Function):
    """The weights inside chunks are made for one head at a time and never kept: they stay in cache, and the gradient
    makes them again. As s_i scales y_i by e^(s_i) and u_i by e^(-s_i), its own gradient is y_i·dy_i - u_i·du_i."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, places: int) -> Tensor:
        own = _Chunks(v, b, c, dt, rate, places)
        states = own.b.mT @ (own.u * own.until_end).flatten(2)  # what each chunk adds, (B n, S, E)
        own.carry(states, range(own.chunks))
        y = (own.c @ states).view_as(own.u).mul_(own.since_start)
        for head in range(len(rate)):
            y[:, :, head] += own.decay(head).mul_(own.products) @ own.u[:, :, head]
        y = y.view(v.shape)
        ctx.save_for_backward(v, b, c, dt, rate, states, y)
        ctx.places = places
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, b, c, dt, rate, states, y = ctx.saved_tensors
        with without_autocast(v):
            own = _Chunks(v, b, c, dt, rate, ctx.places)
            by_head = dy.reshape(own.u.shape)
            faded = (by_head * own.since_start).flatten(2)
            dstates = own.c.mT @ faded
            own.carry(dstates, range(own.chunks - 1, -1, -1))
            dc = faded @ states.mT
            db = (own.u * own.until_end).flatten(2) @ dstates.mT
            du = (own.b @ dstates).view_as(own.u).mul_(own.until_end)
            dproducts = torch.zeros_like(own.products)
            for head in range(len(rate)):
                decay, here = own.decay(head), by_head[:, :, head]
                dproducts.addcmul_(decay, here @ own.u[:, :, head].mT)
                du[:, :, head] += decay.mul_(own.products).mT @ here
            dproducts.tril_()
            dc.baddbmm_(dproducts, own.b)
            db.baddbmm_(dproducts.mT, own.c)
            du = du.view(v.shape)
            ddt = (du * v).sum(-1)
            ds = (dy * y).sum(-1) - dt * ddt
            later = ds.flip(1).cumsum(1).flip(1)  # a place's dt is in every s from there on
            dv = du.mul_(dt[..., None])
            return dv, db.view(b.shape), dc.view(c.shape), ddt - rate * later, -(dt * later).sum((0, 1)), None


class _Chunks:
    """What both directions need, with the chunks of all histories below each other, (B n, P, ...)."""

    def __init__(self, v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, places: int) -> None:
        self.chunks = v.size(1) // places
        self.u, self.b, self.c, s = (_chunked(x, places).flatten(0, 1) for x in (v * dt[..., None], b, c, dt * -rate))
        s = s.cumsum(1)  # (B n, P, H)
        self.s = s.permute(2, 0, 1).contiguous()
        self.since_start = s.clamp(min=FAINTEST).exp_()[..., None]
        self.until_end = (s[:, -1:] - s).clamp_(min=FAINTEST).exp_()[..., None]
        self.products = (self.c @ self.b.mT).tril_()  # c_i·b_j

    def decay(self, head: int) -> Tensor:
        """e^(s_i - s_j) of one head; above the diagonal, where it is of no use, it must not overflow."""
        return (self.s[head, :, :, None] - self.s[head, :, None]).clamp_(FAINTEST, 0).exp_()

    def carry(self, states: Tensor, order: range) -> None:
        """Replaces what each chunk adds to the state by the state that it finds; chunks follow in `order`."""
        kept = self.since_start[:, -1].view(-1, self.chunks, 1, self.u.size(2), 1)
        added = states.view(-1, self.chunks, states.size(1), *self.u.shape[2:])  # (B, n, S, H, K)
        state = torch.zeros_like(added[:, 0])
        for chunk in order:
            after = torch.addcmul(added[:, chunk], state, kept[:, chunk])
            added[:, chunk] = state
            state = after
