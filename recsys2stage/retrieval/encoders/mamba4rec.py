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
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_LENGTH, MAX_WIDTH, check_integer
from recsys2stage.retrieval.encoders.base import Encoder, Memory, declares, is_inference
from recsys2stage.retrieval.encoders.blocks import initialise
from recsys2stage.retrieval.encoders.layers import GELU, Dropout, LayerNorm, RMSNorm, use_cpu_blocks, without_autocast
from recsys2stage.retrieval.encoders.positions import Position, PositionFactory
from recsys2stage.retrieval.encoders.scan import decay_to, final_state, scan
from recsys2stage.retrieval.encoders.times import Time, TimeFactory
from recsys2stage.shapes import Embedded, Lengths, Shape, Times

EPS = 1e-12  # of the LayerNorms, as published

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


class Recurrence(Memory):
    """The memory of one history: the state after its first positions. It cannot go back.

    Args:
        state: with a batch of one.
    """

    truncatable = False

    def __init__(self, state: State) -> None:
        self.state, self.positions = state, state.events

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.state.layers for part in layer)

    def truncate(self, positions: int) -> None:
        if positions != self.positions:
            raise ValueError(f"the state after {self.positions} events has no state after {positions}; drop it")


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

    partial = True

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
        x = self.enter(x, times, request)
        for block in self.blocks:
            x = block(x)
        return x

    def enter(self, x: Embedded, times: Times, request: Times | None, start: int = 0) -> Embedded:
        """The input of the first block, whose first row is position `start`."""
        x = self.position.embed(x, start) if start else self.position.embed(x)
        return self.norm(self.dropout(self.time.embed(x, times, request)))

    @property
    def extends(self) -> bool:
        return declares(type(self), "partial", "forward") and self.position.is_local and self.time.is_local

    def newest(
        self,
        x: Embedded,
        lengths: Lengths,
        times: Times,
        request: Times | None,
        keep: list[Memory] | None = None,
    ) -> Float[Tensor, "B D"]:
        if not (declares(type(self), "partial", "forward") and is_inference(x)):
            return super().newest(x, lengths, times, request)
        last, states = (lengths - 1).clamp(min=0), list[LayerState]()
        x = self.enter(x, times, request)
        for block in self.blocks[:-1]:
            x = block(x, last, None if keep is None else states)
        x = self.blocks[-1].newest(x, last, None if keep is None else states)
        if keep is not None:
            for row, events in enumerate(last.tolist()):
                own = tuple(LayerState(*(part[row : row + 1].clone() for part in layer)) for layer in states)
                keep.append(Recurrence(State(events, own)))
        return x

    def extend(
        self, x: Embedded, memories: Sequence[Memory], times: Sequence[Tensor], request: Sequence[Tensor | None]
    ) -> Float[Tensor, "B D"]:
        known, count = cast(Sequence[Recurrence], memories), x.size(1)
        rows = []
        for row, (memory, seconds, asked) in enumerate(zip(known, times, request, strict=True)):
            new = slice(memory.positions, memory.positions + count)
            own = x[row : row + 1], seconds[:, new], None if asked is None else asked[:, new]
            rows.append(self.enter(*own, start=memory.positions))
        events = torch.cat(rows)
        layers = [
            LayerState(*(torch.cat([memory.state.layers[number][part] for memory in known]) for part in (0, 1)))
            for number in range(len(self.blocks))
        ]
        for place in range(count):
            if place == count - 1:  # the newest position stays out
                for row, memory in enumerate(known):
                    own_states = (LayerState(*(part[row : row + 1].clone() for part in layer)) for layer in layers)
                    memory.positions += count - 1
                    memory.state = State(memory.positions, tuple(own_states))
            x = events[:, place]
            for number, block in enumerate(self.blocks):
                x, layers[number] = block.step(x, layers[number])
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

    def forward(self, x: Embedded, events: Lengths | None = None, keep: list[LayerState] | None = None) -> Embedded:
        return self._after(x, self.mamba(x, events, keep))

    def newest(self, x: Embedded, last: Lengths, keep: list[LayerState] | None) -> Event:
        """The output of `forward` at one position of each history; the state before it goes to `keep`."""
        return self._after(x[torch.arange(len(x), device=x.device), last], self.mamba.newest(x, last, keep))

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

    def forward(self, x: Embedded, events: Lengths | None = None, keep: list[LayerState] | None = None) -> Embedded:
        """
        Args:
            x: inputs.
            events: with `keep`, a number of events of each history.
            keep: gets the state after so many events.
        """
        length = x.size(1)
        chunks, chunk_length = 1, length
        if self.chunk is not None:
            chunks = (length + self.chunk - 1) // self.chunk
            chunk_length = -(-length // chunks) if use_cpu_blocks(x) else self.chunk  # static for the compiler
        extra = chunks * chunk_length - length  # padding at the end; the scan is causal
        z, vbc, dt = self._project(x)
        dt = F.pad(dt, (0, 0, 0, extra))
        padded = F.pad(vbc, (0, 0, self.taps.size(1) - 1, extra))
        vbc = F.silu(self._convolve(padded)).to(dt.dtype)
        v, b, c = torch.split(vbc, self.vbc, dim=-1)
        v = v.view(*v.shape[:-1], self.heads, -1)
        with without_autocast(x):  # sums over a history need more than bf16's 8 bits
            y = scan(v, b, c, dt, self.log_rate.exp(), chunk_length)
        if keep is not None and events is not None:
            keep.append(LayerState(self._window(padded, events), final_state(v, b, dt, self.log_rate.exp(), events)))
        return self._finish(y[:, :length], v[:, :length], z)

    def newest(self, x: Embedded, last: Lengths, keep: list[LayerState] | None) -> Event:
        """The output of `forward` at one position of each history; the state before it goes to `keep`."""
        width, rate, row = self.vbc[0], self.log_rate.exp(), torch.arange(len(x), device=x.device)
        w_z, w_vbc, w_dt = torch.split(self.into.weight, self.parts)
        dt = F.softplus(F.linear(x, w_dt) + self.dt_bias)
        padded = F.pad(F.linear(x, w_vbc), (0, 0, self.taps.size(1) - 1, 0))
        v, b, c = torch.split(F.silu(self._convolve(padded)), self.vbc, dim=-1)
        v = v.view(*v.shape[:-1], self.heads, -1)
        products = (b @ c[row, last][..., None]) * decay_to(dt, rate, last + 1)  # c_n·b_j e^(s_n - s_j) dt_j, (B, L, H)
        y = (products.transpose(1, 2)[:, :, None] @ v.transpose(1, 2))[:, :, 0]
        if keep is not None:
            keep.append(LayerState(self._window(padded, last), final_state(v, b, dt, rate, last)))
        z = F.linear(x[row, last], w_z)
        return self._finish(y.view(len(x), self.heads, width // self.heads), v[row, last], z)

    def _window(self, padded: Float[Tensor, "B longer C"], events: Lengths) -> Float[Tensor, "B shorter C"]:
        """The inputs of the convolution at the last W - 1 of the first events of each history."""
        places = events[:, None] + torch.arange(self.taps.size(1) - 1, device=events.device)
        return padded[torch.arange(len(padded), device=events.device)[:, None], places]

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
