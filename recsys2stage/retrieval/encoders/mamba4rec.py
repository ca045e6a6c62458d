"""Mamba4Rec (Liu et al. 2024, arXiv 2403.03900) with the layers of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060).

    x = LayerNorm(dropout(E))
    x = LayerNorm(x + dropout(Mamba2(x)));  x = LayerNorm(x + dropout(W2 dropout(GELU(W1 x + b1)) + b2))

    Mamba2(x) = Wo RMSNorm(y * SiLU(z))              z, (v, b, c), dt: one linear map of x, without biases
    v, b, c = SiLU(causal convolution of each channel);  dt = softplus(dt + its bias)
    h_t = exp(-rate · dt_t) h_{t-1} + dt_t b_t v_t;  y_t = c_t h_t (+ D v_t)         in each head

The defaults follow Google's RecML: no position encoding, since a recurrence is ordered, and no skip D. `forward` is
linear in the length of a history; `step` takes constant time per event.

Initial linear weights are Xavier-uniform, biases zero; the convolution is uniform in ±1/√W, rate uniform in 1 to 16 and
dt of a zero input log-uniform in 0.001 to 0.1, as in the code of Mamba-2. Shapes: E is the inner width of a layer (H
heads of K), S the state width, W the convolution width and C = E + 2 S its channels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recsys2stage.options import MAX_LENGTH, MAX_WIDTH, check_integer
from recsys2stage.retrieval.encoders.base import Encoder
from recsys2stage.retrieval.encoders.blocks import initialise
from recsys2stage.retrieval.encoders.layers import GELU, Dropout, LayerNorm, RMSNorm, use_cpu_blocks, without_autocast
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.retrieval.encoders.times import Time, TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times

EPS = 1e-12  # of the LayerNorms, as published
MIN_LOG_DECAY = -60.0  # e^-60 is negligible; denormals, not far below it, are 80 times slower on a CPU

Event = Float[Tensor, "B D"]
Seconds = Int[Tensor, " B"]


class LayerState(NamedTuple):
    """State of a layer: the last inputs of its convolution and the state of its recurrence."""

    conv_state: Float[Tensor, "B W-1 C"]
    ssm_state: Float[Tensor, "B S H K"]


class State(NamedTuple):
    """State of the encoder after some events of each history: their number and the states of the layers."""

    events: int
    layers: tuple[LayerState, ...]


class Mamba4Rec(Encoder):
    """A causal stack of selective state space layers.

    Args:
        dim: width D.
        max_length: longest history L, for the position encoding.
        layers: number of blocks.
        state: state width S of each channel.
        expand: inner width E of a state space layer as a multiple of `dim`.
        ssm_heads: number of heads H, each with its own decay rate; must divide E.
        conv_width: kernel width W of the convolution, in events.
        chunk: maximum chunk length of the scan; affects only speed.
        skip: whether each layer adds D v to its output, as in Mamba-2.
        expansion: hidden width of the feed-forward as a multiple of `dim`.
        dropout: on the input, both branches and inside the feed-forward.
        position: position encoding, added to the input; None: no position encoding.
        time: time encoding, added to the input; None: no time encoding.
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
        for name, value, most, usual in (
            ("dim", dim, MAX_WIDTH, 64),
            ("state", state, MAX_WIDTH, 64),
            ("expand", expand, 64, 2),
            ("ssm_heads", ssm_heads, MAX_WIDTH, 8),
            ("conv_width", conv_width, MAX_WIDTH, 4),
            ("chunk", chunk, MAX_LENGTH, 40),  # 40 is quick on a CPU
        ):
            check_integer(name, value, 1, most, example=usual)
        width = expand * dim
        if width % ssm_heads:
            raise ValueError(f"expand · dim = {width} is not a multiple of ssm_heads {ssm_heads}; change one of them")
        shape = Shape(dim=dim, max_length=max_length, layers=layers)
        self.max_length = max_length
        self.position: Position = (position or Position)(shape)
        self.time: Time = (time or Time)(shape)
        _reject_attention(self.position, "Learned, Sinusoidal or no position")
        _reject_attention(self.time, "RequestGap, Calendar, HybridTimestamp or no time")
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim, EPS)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # torch types the elements as Module
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
        """The state of `batch` empty histories."""
        return State(0, tuple(block.mamba.start(batch) for block in self.blocks))

    def step(
        self, x: Event, state: State, time: Seconds | None = None, request: Seconds | None = None
    ) -> tuple[Event, State]:
        """Appends one event: returns the output of `forward` at its position, and the new state.

        Args:
            x: the embedded event of each history.
            state: state after the previous events; not modified.
            time: seconds of the event; required with a time encoding.
            request: request time of the next event, in seconds; None without request times.

        Raises:
            ValueError: if the time encoding lacks its times, or the position encoding has no position left.
        """
        event = x[:, None]
        if type(self.position) is not Position:
            if state.events >= self.max_length:
                name = type(self.position).__name__
                raise ValueError(
                    f"{name} has {self.max_length} positions and this is event {state.events + 1} of a history; raise "
                    "max_length, or start a new state from its last events"
                )
            event = self.position.embed(F.pad(event, (0, 0, state.events, 0)))[:, -1:]
        if time is not None:
            event = self.time.embed(event, time[:, None], None if request is None else request[:, None])
        elif type(self.time) is not Time:
            raise ValueError(f"{type(self.time).__name__} needs the time of the event; give step a time")
        x = self.norm(self.dropout(event[:, 0]))
        layers = []
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x, new_state = block.step(x, layer)
            layers.append(new_state)
        return x, State(state.events + 1, tuple(layers))


def _reject_attention(part: Position | Time, instead: str) -> None:
    if part.in_attention:
        raise ValueError(f"{type(part).__name__} acts inside attention, and Mamba4Rec has none; choose {instead}")


class Block(nn.Module):
    """x = LayerNorm(x + Mamba2(x)); x = LayerNorm(x + FeedForward(x))."""

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
        chunk: maximum chunk length; None: one chunk of any length, for a model that is exported.
        skip: whether to add D v to y.
    """

    def __init__(
        self, dim: int, width: int, state: int, heads: int, conv_width: int, chunk: int | None, skip: bool
    ) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.vbc = [width, state, state]
        channels = sum(self.vbc)
        self.parts = [width, channels, heads]  # z, (v, b, c), dt
        self.into = nn.Linear(dim, sum(self.parts), bias=False)
        self.taps = nn.Parameter(torch.empty(channels, conv_width).uniform_(-1, 1) / conv_width**0.5)
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(dt + (-torch.expm1(-dt)).log())  # softplus(dt_bias) = dt
        self.skip = nn.Parameter(torch.ones(heads)) if skip else None
        self.norm = RMSNorm(width, 1e-5)
        self.out = nn.Linear(width, dim, bias=False)

    def forward(self, x: Embedded) -> Embedded:
        length = x.size(1)
        chunks, chunk_length = 1, length
        if self.chunk is not None:
            chunks = (length + self.chunk - 1) // self.chunk
            chunk_length = -(-length // chunks) if use_cpu_blocks(x) else self.chunk  # static for the compiler
        extra = chunks * chunk_length - length  # padding at the end; the scan is causal
        z, vbc, dt = self._project(x)
        dt = F.pad(dt, (0, 0, 0, extra))
        vbc = F.silu(self._convolve(F.pad(vbc, (0, 0, self.taps.size(1) - 1, extra)))).to(dt.dtype)
        v, b, c = torch.split(vbc, self.vbc, dim=-1)
        v = v.view(*v.shape[:-1], self.heads, -1)
        with without_autocast(x):  # sums over a history need more than bf16's 8 bits
            y = scan(v, b, c, dt, self.log_rate.exp(), chunk_length)
        return self._finish(y[:, :length], v[:, :length], z)

    def start(self, batch: int) -> LayerState:
        conv_state = self.taps.new_zeros(batch, self.taps.size(1) - 1, len(self.taps))
        return LayerState(conv_state, self.taps.new_zeros(batch, self.vbc[1], self.heads, self.vbc[0] // self.heads))

    def step(self, x: Event, state: LayerState) -> tuple[Event, LayerState]:
        z, vbc, dt = self._project(x)
        window = torch.cat([state.conv_state, vbc[:, None]], dim=1)  # (B, W, C)
        v, b, c = torch.split(F.silu((window * self.taps.T).sum(1)), self.vbc, dim=-1)
        v = v.view(*v.shape[:-1], self.heads, -1)
        decay = (-self.log_rate.exp() * dt).exp()[:, None, :, None]
        ssm_state = decay * state.ssm_state + b[..., None, None] * (dt[..., None] * v)[:, None]
        y = (c[..., None, None] * ssm_state).sum(1)
        return self._finish(y, v, z), LayerState(window[:, 1:], ssm_state)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns z, (v, b, c) before the convolution, and dt; three products, so that each result is contiguous."""
        z, vbc, dt = (F.linear(x, weight) for weight in torch.split(self.into.weight, self.parts))
        return z, vbc, F.softplus(dt + self.dt_bias)

    def _convolve(self, vbc: Float[Tensor, "B longer C"]) -> Float[Tensor, "B L C"]:
        """Depthwise causal convolution, as a channels-last conv2d over an image of height 1: the fastest on a CPU."""
        image = vbc.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image, self.taps[:, None, None], groups=len(self.taps)).squeeze(2).transpose(1, 2)

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
    chunk_length: int,
) -> Float[Tensor, "B L H K"]:
    """Computes y of the recurrence in chunks: matrix products inside a chunk, a recurrence between chunks.

    With u_i = dt_i v_i, s_i the sum of -rate · dt from a chunk's first position to its position i, and h the state
    before the chunk (Dao & Gu 2024, section 6),

        y_i = Σ_{j ≤ i} (c_i·b_j) e^(s_i - s_j) u_j + e^(s_i) c_i h
        h after the chunk = e^(s_n) h + Σ_j e^(s_n - s_j) b_j u_j,  n its last position

    Args:
        v: inputs (x in Mamba-2).
        b: input projection into the state (B).
        c: output projection from the state (C).
        dt: step sizes (Δ).
        rate: decay rates (−A).
        chunk_length: P; L is a multiple of it.
    """
    if use_cpu_blocks(v):
        return _Scan.apply(v, b, c, dt, rate, chunk_length)  # type: ignore[no-untyped-call]  # torch: no types
    return _full_scan(v, b, c, dt, rate, chunk_length)


def _full_scan(v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, chunk_length: int) -> Tensor:
    """Computes all n chunks of length P at once; the recurrence between them is one product with n × n weights."""
    u, b, c, s = (_chunked(x, chunk_length) for x in (v * dt[..., None], b, c, dt * -rate))
    s = s.cumsum(2).transpose(2, 3)  # (B, n, H, P)
    inside = (c @ b.mT).tril()[:, :, None] * (s[..., None] - s[..., None, :]).clamp(max=0).exp()
    y = (inside @ u.transpose(2, 3)).transpose(2, 3)
    added = torch.einsum("bnphk,bnhp,bnps->bnshk", u, (s[..., -1:] - s).exp(), b)
    total = s[..., -1].cumsum(1)  # (B, n, H)
    between = (F.pad(total[:, :-1], (0, 0, 1, 0))[:, :, None] - total[:, None]).clamp(max=0).exp()  # (B, n, n, H)
    earlier = torch.ones_like(between[0, :, :, 0]).tril(-1)
    states = torch.einsum("bnmh,nm,bmshk->bnshk", between, earlier, added)
    return (y + torch.einsum("bnps,bnshk,bnhp->bnphk", c, states, s.exp())).reshape(v.shape)


def _chunked(x: Tensor, chunk_length: int) -> Tensor:
    return x.reshape(x.size(0), -1, chunk_length, *x.shape[2:])


class _Scan(torch.autograd.Function):
    """Computes the weights inside chunks for one head at a time, so that they stay in cache, and recomputes them in
    backward. As s_i scales y_i by e^(s_i) and u_i by e^(-s_i), its gradient is y_i·dy_i - u_i·du_i."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, chunk_length: int) -> Tensor:
        chunks = _Chunks(v, b, c, dt, rate, chunk_length)
        states = chunks.b.mT @ (chunks.u * chunks.decay_to_end).flatten(2)  # added by each chunk, (B n, S, E)
        chunks.carry(states, range(chunks.count))
        y = (chunks.c @ states).view_as(chunks.u).mul_(chunks.decay_from_start)
        for head in range(len(rate)):
            y[:, :, head] += chunks.decay(head).mul_(chunks.products) @ chunks.u[:, :, head]
        y = y.view(v.shape)
        ctx.save_for_backward(v, b, c, dt, rate, states, y)
        ctx.chunk_length = chunk_length
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, b, c, dt, rate, states, y = ctx.saved_tensors
        with without_autocast(v):
            chunks = _Chunks(v, b, c, dt, rate, ctx.chunk_length)
            dy_chunks = dy.reshape(chunks.u.shape)
            dy_decayed = (dy_chunks * chunks.decay_from_start).flatten(2)
            dstates = chunks.c.mT @ dy_decayed
            chunks.carry(dstates, range(chunks.count - 1, -1, -1))
            dc = dy_decayed @ states.mT
            db = (chunks.u * chunks.decay_to_end).flatten(2) @ dstates.mT
            du = (chunks.b @ dstates).view_as(chunks.u).mul_(chunks.decay_to_end)
            dproducts = torch.zeros_like(chunks.products)
            for head in range(len(rate)):
                decay, dy_head = chunks.decay(head), dy_chunks[:, :, head]
                dproducts.addcmul_(decay, dy_head @ chunks.u[:, :, head].mT)
                du[:, :, head] += decay.mul_(chunks.products).mT @ dy_head
            dproducts.tril_()
            dc.baddbmm_(dproducts, chunks.b)
            db.baddbmm_(dproducts.mT, chunks.c)
            du = du.view(v.shape)
            ddt = (du * v).sum(-1)
            ds = (dy * y).sum(-1) - dt * ddt
            later = ds.flip(1).cumsum(1).flip(1)  # dt_i is part of s at i and all later positions
            dv = du.mul_(dt[..., None])
            return dv, db.view(b.shape), dc.view(c.shape), ddt - rate * later, -(dt * later).sum((0, 1)), None


class _Chunks:
    """Intermediate results of forward and backward, with the chunks of all histories stacked, (B n, P, ...)."""

    def __init__(self, v: Tensor, b: Tensor, c: Tensor, dt: Tensor, rate: Tensor, chunk_length: int) -> None:
        self.count = v.size(1) // chunk_length
        self.u, self.b, self.c, s = (
            _chunked(x, chunk_length).flatten(0, 1) for x in (v * dt[..., None], b, c, dt * -rate)
        )
        s = s.cumsum(1)  # (B n, P, H)
        self.s = s.permute(2, 0, 1).contiguous()
        self.decay_from_start = s.clamp(min=MIN_LOG_DECAY).exp_()[..., None]
        self.decay_to_end = (s[:, -1:] - s).clamp_(min=MIN_LOG_DECAY).exp_()[..., None]
        self.products = (self.c @ self.b.mT).tril_()  # c_i·b_j

    def decay(self, head: int) -> Tensor:
        """e^(s_i - s_j) of one head; clamped so that the unused part above the diagonal does not overflow."""
        return (self.s[head, :, :, None] - self.s[head, :, None]).clamp_(MIN_LOG_DECAY, 0).exp_()

    def carry(self, states: Tensor, order: range) -> None:
        """Replaces, in place, the state added by each chunk by the state before it; chunks are taken in `order`."""
        decay = self.decay_from_start[:, -1].view(-1, self.count, 1, self.u.size(2), 1)
        added = states.view(-1, self.count, states.size(1), *self.u.shape[2:])  # (B, n, S, H, K)
        state = torch.zeros_like(added[:, 0])
        for chunk in order:
            next_state = torch.addcmul(added[:, chunk], state, decay[:, chunk])
            added[:, chunk] = state
            state = next_state
