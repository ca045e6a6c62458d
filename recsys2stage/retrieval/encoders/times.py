"""Time encodings: gap to the request, relative time biases, calendar features, hybrid timestamp.

The base class `Time` is the identity: its hooks are neutral, as those of `Position`. The request time of a position
depends on the objective: for next-item prediction it is the time at which the next event is requested, for masked-item
prediction (cloze) the time of the masked event itself.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from recsys2stage.options import MAX_WIDTH, check_integer, check_number, check_option
from recsys2stage.retrieval.encoders.base import declares
from recsys2stage.retrieval.encoders.layers import use_cpu_blocks
from recsys2stage.shapes import Embedded, Shape, Times

DAY = 86_400
WEEK, YEAR = 7 * DAY, 365.2425 * DAY
MAX_BUCKETS = 63  # of gaps of int64 seconds
BUCKETS_IN_FLIGHT = 1 << 18  # pairs of positions per block, which stays in cache


class Time(nn.Module):
    """No time encoding; base class of all. Subclasses override the hooks they need.

    A subclass with `local = True` embeds each position by its own times alone, and finds buckets for part of the
    requests: `request` (B, S) beside `times` (B, L) gives (B, S, L). Serving then computes new positions only
    (`TwoTower.queries` with states). A subclass that overrides a hook without setting `local` is computed in full.
    """

    local: ClassVar[bool] = True

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        """Adds time embeddings to the input; called once.

        Args:
            x: embedded items.
            times: seconds of each event.
            request: request time of each position, in seconds; None without request times.
        """
        return x

    def buckets(self, times: Times, request: Int[Tensor, "B S"] | None) -> Integer[Tensor, "B S L"] | None:
        """Bucket of the time from event j (column) to the request of position i (row); called once for all layers."""
        return None

    def table(self, layer: int) -> Float[Tensor, "#H N"] | None:
        """Attention bias of each bucket in a layer."""
        return None

    @property
    def is_local(self) -> bool:
        """Whether its hooks can be given part of the positions."""
        return all(declares(type(self), "local", hook) for hook in ("embed", "buckets"))

    @property
    def in_attention(self) -> bool:
        """Whether it acts inside attention, so that it has no effect in an encoder without attention."""
        return type(self).buckets is not Time.buckets


TimeFactory = Callable[[Shape], Time]


def require_request(request: Int[Tensor, "B S"] | None, encoding: Time) -> Int[Tensor, "B S"]:
    """Returns the request times; raises where there are none, as `encoding` needs them."""
    if request is None:
        raise ValueError(
            f"{type(encoding).__name__} needs request times, but request_time is 'none'; set "
            "data.init_args.request_time to 'target' or 'last_event', or leave out the time encoding"
        )
    return request


def _require_causal(shape: Shape, encoding: Time) -> None:
    """Rejects an encoding of the gap to the request in a bidirectional encoder, where that gap is always 0."""
    if not shape.causal:
        raise ValueError(
            f"{type(encoding).__name__} encodes the gap between an event and the next request, but in a bidirectional "
            "encoder the request time of a position is the time of its event; choose LogBuckets, LogSpaced or Calendar"
        )


class RequestGap(Time):
    """A learned vector for the gap between an event and the next request, in log2 buckets.

    Bucket = floor(log2(1 + gap in seconds)), capped. The model can tell a request in the same session from one a year
    later.

    Args:
        shape: sizes of the encoder.
        buckets: number of buckets; 32 reach 68 years.
    """

    local = True
    powers: Tensor

    def __init__(self, shape: Shape, buckets: int = 32) -> None:
        super().__init__(shape)
        check_integer("buckets", buckets, 1, MAX_WIDTH, example=32)  # 32 reach 68 years
        _require_causal(shape, self)
        # whole numbers: a logarithm may round to the bucket below, and does so differently elsewhere
        self.register_buffer("powers", 2 ** torch.arange(1, min(buckets, MAX_BUCKETS)), persistent=False)
        self.vectors = nn.Embedding(buckets, shape.dim)
        nn.init.normal_(self.vectors.weight, std=0.02)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        gap = (require_request(request, self) - times).clamp(min=0)
        return x + self.vectors(torch.bucketize(1 + gap, self.powers, right=True))


class _TimeBias(Time):
    """A learned attention bias per bucket of the time between an event and a request."""

    local = True
    boundaries: Tensor

    def __init__(self, shape: Shape, boundaries: Int[Tensor, " N"], shared: bool, per_head: bool) -> None:
        """
        Args:
            shape: sizes of the encoder.
            boundaries: lower bounds of buckets 1, 2, ... in seconds, ascending.
            shared: one table for all layers instead of one per layer.
            per_head: one bias per head instead of one for all heads.
        """
        super().__init__(shape)
        self.shared = shared
        self.register_buffer("boundaries", boundaries, persistent=False)
        layers, heads = 1 if shared else shape.layers, shape.heads if per_head else 1
        self.tables = nn.Parameter(torch.empty(layers, heads, len(boundaries) + 1))
        nn.init.normal_(self.tables, std=0.02)

    def buckets(self, times: Times, request: Int[Tensor, "B S"] | None) -> Integer[Tensor, "B S L"]:
        request, (rows, length) = require_request(request, self), times.shape
        dtype = torch.uint8 if len(self.boundaries) < 256 else torch.int16
        if not use_cpu_blocks(times):
            return self._bucket(times, request).to(dtype)
        out = torch.empty(rows, request.size(1), length, dtype=dtype, device=times.device)
        block = max(1, BUCKETS_IN_FLIGHT // length**2)
        for start in range(0, rows, block):
            part = slice(start, start + block)
            out[part] = self._bucket(times[part], request[part])
        return out

    def _bucket(self, times: Times, request: Int[Tensor, "B S"]) -> Int[Tensor, "B S L"]:
        between = (request[:, :, None] - times[:, None, :]).abs()
        return torch.bucketize(between, self.boundaries, right=True)

    def table(self, layer: int) -> Float[Tensor, "#H N"]:
        return self.tables[0 if self.shared else layer]


class LogBuckets(_TimeBias):
    """HSTU's time bias (Zhai et al. 2024): bucket = floor(log(max(|t_request − t_event|, 1)) / 0.301), capped.

    Args:
        shape: sizes of the encoder.
        buckets: number of buckets N; 0.301 is about log(1.35), so 129 cover any time difference.
        shared: one table for all layers instead of one per layer.
        per_head: one bias per head instead of one for all heads.
    """

    def __init__(self, shape: Shape, buckets: int = 129, shared: bool = False, per_head: bool = False) -> None:
        check_integer("buckets", buckets, 2, 146, example=129)  # more would exceed the range of int64 seconds
        bounds = [math.ceil(math.exp(0.301 * n)) for n in range(1, buckets)]
        super().__init__(shape, torch.tensor(bounds), shared, per_head)


class LogSpaced(_TimeBias):
    """Attention bias with log-spaced bucket bounds in whole seconds, 1 s to 30 days (RAB of a TAAC 2025 finalist).

    Args:
        shape: sizes of the encoder.
        buckets: number of bounds; those that round to the same second are merged, which leaves 93 buckets of 100.
        days: lower bound of the last bucket.
        shared: one table for all layers, as published, instead of one per layer.
        per_head: one bias per head instead of one for all heads.
    """

    def __init__(
        self, shape: Shape, buckets: int = 100, days: float = 30.0, shared: bool = True, per_head: bool = False
    ) -> None:
        check_integer("buckets", buckets, 2, MAX_WIDTH, example=100)
        check_number("days", days, above=2 / DAY, high=1e6, example=30.0, what="a number of days")
        bounds = torch.logspace(0, math.log10(days * DAY), buckets, dtype=torch.float64).round().long()
        boundaries = torch.unique(bounds)[1:]  # below the second bound is bucket 0
        super().__init__(shape, boundaries, shared, per_head)


class Calendar(Time):
    """Cyclic features of hour and weekday (UTC), linearly projected and added (a TAAC 2025 finalist).

        x + W [sin, cos](2π · hour / 24), [sin, cos](2π · weekday / 7)

    with hour = (t mod 86400) / 3600 and weekday = (⌊t / 86400⌋ + 4) mod 7, which is 0 on a Sunday.

    Args:
        shape: sizes of the encoder.
        of: which time to encode: that of each event ("event") or of its position's request ("request").
    """

    local = True

    def __init__(self, shape: Shape, of: Literal["event", "request"] = "event") -> None:
        super().__init__(shape)
        check_option("of", of, Literal["event", "request"])
        self.of = of
        self.linear = nn.Linear(4, shape.dim, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        when = times if self.of == "event" else require_request(request, self)
        hour = when.remainder(DAY).double() / DAY
        weekday = (when.div(DAY, rounding_mode="floor") + 4).remainder(7).double() / 7
        angles = 2 * math.pi * torch.stack([hour, weekday], dim=-1)  # (B, L, 2)
        features = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        return x + self.linear(features.to(x.dtype))


class HybridTimestamp(Time):
    """Half the width for the event time, half for the time to the request; periodic features, linearly projected.

    Absolute: sin and cos of periods of a day, a week, 30.4 days and a year, and a linear trend in years since 2020.
    Relative: sin and cos of the time to the request with periods log-spaced from a minute to ten years, and
    log(1 + seconds). The publication (Jing Lu, "User interest modeling", 2025) gives no formula; this one is ours.

    Args:
        shape: sizes of the encoder.
        periods: number of relative periods.
    """

    local = True

    def __init__(self, shape: Shape, periods: int = 16) -> None:
        super().__init__(shape)
        _require_causal(shape, self)
        check_integer("periods", periods, 1, MAX_WIDTH, example=16)
        # lists, not buffers: buffers are cast with the weights, and a day in bf16 is 86,528 seconds
        self.absolute = [float(DAY), float(WEEK), YEAR / 12, YEAR]
        self.relative = torch.logspace(math.log10(60), math.log10(10 * YEAR), periods, dtype=torch.float64).tolist()
        half = shape.dim // 2
        self.of_time = nn.Linear(2 * len(self.absolute) + 1, half)
        self.of_gap = nn.Linear(2 * periods + 1, shape.dim - half)
        for linear in (self.of_time, self.of_gap):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        gap = (require_request(request, self) - times).clamp(min=0)
        trend = (times - 1_577_836_800).double() / YEAR
        absolute = torch.cat([periodic_features(times, self.absolute), trend[..., None]], dim=-1)
        relative = torch.cat([periodic_features(gap, self.relative), gap[..., None].double().log1p()], dim=-1)
        return x + torch.cat([self.of_time(absolute.to(x.dtype)), self.of_gap(relative.to(x.dtype))], dim=-1)


def periodic_features(seconds: Times, periods: list[float]) -> Float[Tensor, "B L P"]:
    """sin and cos of each period, in float64: float32 does not resolve seconds in current timestamps."""
    turns = seconds[..., None].double() / torch.tensor(periods, dtype=torch.float64, device=seconds.device)
    phase = 2 * math.pi * turns.frac()
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Combined(Time):
    """Several encodings at once, such as a gap embedding and a bias, applied in turn.

    Args:
        shape: sizes of the encoder.
        parts: the encodings; at most one may act inside attention.
    """

    local = True

    def __init__(self, shape: Shape, parts: list[TimeFactory]) -> None:
        super().__init__(shape)
        # torch types the elements of a ModuleList as Module
        self.parts: Sequence[Time] = nn.ModuleList(part(shape) for part in parts)  # type: ignore[assignment]
        inside = [part for part in self.parts if part.in_attention]
        if len(inside) > 1:
            names = ", ".join(type(part).__name__ for part in inside)
            raise ValueError(f"{names} all bias attention by the same gaps; keep one of them")

    @functools.cached_property
    def inside(self) -> Time | None:
        return next((part for part in self.parts if part.in_attention), None)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        for part in self.parts:
            x = part.embed(x, times, request)
        return x

    def buckets(self, times: Times, request: Int[Tensor, "B S"] | None) -> Integer[Tensor, "B S L"] | None:
        return self.inside.buckets(times, request) if self.inside else None

    def table(self, layer: int) -> Float[Tensor, "#H N"] | None:
        return self.inside.table(layer) if self.inside else None

    @property
    def is_local(self) -> bool:
        return super().is_local and all(part.is_local for part in self.parts)

    @property
    def in_attention(self) -> bool:
        return self.inside is not None
