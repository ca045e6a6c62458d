"""When an event happened and when its successor is asked for. Hooks are neutral by default, like those of positions.

`Time` itself is the encoding that says nothing. What a request time is depends on what a history is asked: for the next
item it is the moment at which the event after a place is asked for, for a hidden item that of the hidden event itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from recsys2stage.retrieval.encoders.layers import in_cache
from recsys2stage.shapes import Embedded, Shape, Times

DAY = 86_400
WEEK, YEAR = 7 * DAY, 365.2425 * DAY
BUCKETS_IN_FLIGHT = 1 << 18  # pairs of places whose time between them is looked at together: they stay in cache


class Time(nn.Module):
    """No time; the base of all encodings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        """Added to the input, once.

        Args:
            x: embedded items.
            times: seconds of each event.
            request: seconds at which each place is asked; None when the model is not told.
        """
        return x

    def buckets(self, times: Times, request: Times | None) -> Integer[Tensor, "B L L"] | None:
        """The bucket of the time from event j (column) to the request at place i (row); once for all layers."""
        return None

    def table(self, layer: int) -> Float[Tensor, "#H N"] | None:
        """What each bucket adds to an attention logit of a layer."""
        return None

    @property
    def in_attention(self) -> bool:
        """Whether it acts inside attention, so that an encoder without attention would not hear it."""
        return type(self).buckets is not Time.buckets


TimeFactory = Callable[[Shape], Time]


def told(request: Times | None, who: Time) -> Times:
    """The request times, which `who` cannot do without."""
    if request is None:
        raise ValueError(
            f"{type(who).__name__} needs to know when a recommendation is asked for, but request_time is 'none'; set "
            "data.init_args.request_time to 'target' or 'last_event', or leave out the time encoding"
        )
    return request


def _follows(shape: Shape, who: Time) -> None:
    """Refuses an encoding of the gap to the request where there is none."""
    if not shape.causal:
        raise ValueError(
            f"{type(who).__name__} looks at the gap between an event and the request that follows it, but an encoder "
            "that sees both sides is asked in each place at its own time; choose LogBuckets, LogSpaced or Calendar"
        )


class RequestGap(Time):
    """A learned vector for the gap between an event and the request that follows it, in log2 buckets.

    Bucket = floor(log2(1 + gap in seconds)), capped. It tells a model whether the next event belongs to the same
    sitting or comes a year later.

    Args:
        shape: sizes of the encoder.
        buckets: number of gaps told apart; 32 reach 68 years.
    """

    def __init__(self, shape: Shape, buckets: int = 32) -> None:
        super().__init__(shape)
        if buckets < 1:
            raise ValueError(f"RequestGap got {buckets} buckets, expected at least 1; 32 reach 68 years")
        _follows(shape, self)
        self.vectors = nn.Embedding(buckets, shape.dim)
        nn.init.normal_(self.vectors.weight, std=0.02)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        gap = (told(request, self) - times).clamp(min=0).double()  # float32 would round gaps of years
        bucket = torch.log2(1 + gap).long().clamp(max=self.vectors.num_embeddings - 1)
        return x + self.vectors(bucket)


class _Between(Time):
    """A learned number for each bucket of the time between an event and a request, joined to the attention logit."""

    boundaries: Tensor

    def __init__(self, shape: Shape, boundaries: Int[Tensor, " N"], shared: bool, per_head: bool) -> None:
        """
        Args:
            shape: sizes of the encoder.
            boundaries: seconds at which buckets 1, 2, ... begin, ascending.
            shared: one table for all layers, instead of one each.
            per_head: one number for each head, instead of one for all.
        """
        super().__init__(shape)
        self.shared = shared
        self.register_buffer("boundaries", boundaries, persistent=False)
        layers, heads = 1 if shared else shape.layers, shape.heads if per_head else 1
        self.tables = nn.Parameter(torch.empty(layers, heads, len(boundaries) + 1))
        nn.init.normal_(self.tables, std=0.02)

    def buckets(self, times: Times, request: Times | None) -> Integer[Tensor, "B L L"]:
        request, (rows, length) = told(request, self), times.shape
        kind = torch.uint8 if len(self.boundaries) < 256 else torch.int16
        found = torch.empty(rows, length, length, dtype=kind, device=times.device)
        block = max(1, BUCKETS_IN_FLIGHT // length**2) if in_cache(times) else rows
        for start in range(0, rows, block):
            part = slice(start, start + block)
            between = (request[part, :, None] - times[part, None, :]).abs()
            found[part] = torch.bucketize(between, self.boundaries, right=True)
        return found

    def table(self, layer: int) -> Float[Tensor, "#H N"]:
        return self.tables[0 if self.shared else layer]


class LogBuckets(_Between):
    """HSTU's time bias (Zhai et al. 2024): bucket = floor(log(max(|t_request − t_event|, 1)) / 0.301), capped.

    Args:
        shape: sizes of the encoder.
        buckets: their number N; 0.301 is about log(1.35), so that 129 reach beyond any clock.
        shared: one table for all layers, instead of one each.
        per_head: one number for each head, instead of one for all.
    """

    def __init__(self, shape: Shape, buckets: int = 129, shared: bool = False, per_head: bool = False) -> None:
        if not 2 <= buckets <= 146:
            raise ValueError(
                f"LogBuckets got {buckets} buckets, expected 2 to 146, which is as long as a clock can tell"
            )
        begins = [math.ceil(math.exp(0.301 * n)) for n in range(1, buckets)]
        super().__init__(shape, torch.tensor(begins), shared, per_head)


class LogSpaced(_Between):
    """Buckets whose bounds are log-spaced whole seconds from 1 s to 30 days (the RAB of a TAAC 2025 finalist).

    Args:
        shape: sizes of the encoder.
        buckets: number of bounds; those that round to the same second are merged, which leaves 93 buckets of 100.
        days: where the last bucket begins.
        shared: one table for all layers, as published, instead of one each.
        per_head: one number for each head, instead of one for all.
    """

    def __init__(
        self, shape: Shape, buckets: int = 100, days: float = 30.0, shared: bool = True, per_head: bool = False
    ) -> None:
        if buckets < 2 or days * DAY <= 2:
            raise ValueError(f"LogSpaced got {buckets} buckets and {days} days, expected 2 and more, and some seconds")
        bounds = torch.logspace(0, math.log10(days * DAY), buckets, dtype=torch.float64).round().long()
        super().__init__(
            shape, torch.unique(bounds)[1:], shared, per_head
        )  # what is below the second bound is bucket 0


class Calendar(Time):
    """Hour of the day and day of the week (UTC) as points on circles, through a linear map (a TAAC 2025 finalist).

    x + W [sin, cos](2π · hour / 24), [sin, cos](2π · weekday / 7), with hour = (t mod 86400) / 3600 and
    weekday = (⌊t / 86400⌋ + 4) mod 7, which is 0 on a Sunday.

    Args:
        shape: sizes of the encoder.
        of: whose time: each event's own, or that of the request at its place.
    """

    def __init__(self, shape: Shape, of: Literal["event", "request"] = "event") -> None:
        super().__init__(shape)
        if of not in ("event", "request"):
            raise ValueError(f"of is {of!r}, expected 'event' or 'request'")
        self.of = of
        self.linear = nn.Linear(4, shape.dim, bias=False)
        nn.init.normal_(self.linear.weight, std=0.02)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        when = times if self.of == "event" else told(request, self)
        hour = when.remainder(DAY).double() / DAY
        weekday = (when.div(DAY, rounding_mode="floor") + 4).remainder(7).double() / 7
        circles = 2 * math.pi * torch.stack([hour, weekday], dim=-1)  # (B, L, 2)
        points = torch.stack([circles.sin(), circles.cos()], dim=-1).flatten(-2)
        return x + self.linear(points.to(x.dtype))


class HybridTimestamp(Time):
    """Half of the width for the absolute time, half for the time until the request; waves through linear maps.

    Absolute: sin and cos of periods of a day, a week, 30.4 days and a year, and a linear trend in years since 2020.
    Relative: sin and cos of the time until the request with periods log-spaced from a minute to ten years, and
    log(1 + seconds). The published idea (Jing Lu, "User interest modeling", 2025) gives no formula; this one is ours.

    Args:
        shape: sizes of the encoder.
        periods: number of relative periods.
    """

    def __init__(self, shape: Shape, periods: int = 16) -> None:
        super().__init__(shape)
        _follows(shape, self)
        if periods < 1:
            raise ValueError(
                f"HybridTimestamp got {periods} periods, expected at least 1; 16 reach from a minute to years"
            )
        # plain numbers: a buffer would be rounded with the weights, and a day in bf16 is 86,528 seconds
        self.absolute = [float(DAY), float(WEEK), YEAR / 12, YEAR]
        self.relative = torch.logspace(math.log10(60), math.log10(10 * YEAR), periods, dtype=torch.float64).tolist()
        half = shape.dim // 2
        self.of_time = nn.Linear(2 * len(self.absolute) + 1, half)
        self.of_gap = nn.Linear(2 * periods + 1, shape.dim - half)
        for linear in (self.of_time, self.of_gap):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        gap = (told(request, self) - times).clamp(min=0)
        trend = (times - 1_577_836_800).double() / YEAR
        time = torch.cat([waves(times, self.absolute), trend[..., None]], dim=-1)
        until = torch.cat([waves(gap, self.relative), gap[..., None].double().log1p()], dim=-1)
        return x + torch.cat([self.of_time(time.to(x.dtype)), self.of_gap(until.to(x.dtype))], dim=-1)


def waves(seconds: Times, periods: list[float]) -> Float[Tensor, "B L P"]:
    """sin and cos of each period, in double: a float32 cannot tell two seconds of this century apart."""
    turns = seconds[..., None].double() / torch.tensor(periods, dtype=torch.float64, device=seconds.device)
    phase = 2 * math.pi * turns.frac()
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Combined(Time):
    """Several encodings at once, such as a gap embedding and a bias: each is applied in turn.

    Args:
        shape: sizes of the encoder.
        parts: the encodings, at most one of which acts inside attention.
    """

    def __init__(self, shape: Shape, parts: list[TimeFactory]) -> None:
        super().__init__(shape)
        # a ModuleList is a sequence, but torch only says of modules
        self.parts: Sequence[Time] = nn.ModuleList(part(shape) for part in parts)  # type: ignore[assignment]
        inside = [part for part in self.parts if part.in_attention]
        if len(inside) > 1:
            names = ", ".join(type(part).__name__ for part in inside)
            raise ValueError(f"{names} all bias attention by the same gaps; keep one of them")

    @property
    def inside(self) -> Time | None:
        return next((part for part in self.parts if part.in_attention), None)

    def embed(self, x: Embedded, times: Times, request: Times | None) -> Embedded:
        for part in self.parts:
            x = part.embed(x, times, request)
        return x

    def buckets(self, times: Times, request: Times | None) -> Integer[Tensor, "B L L"] | None:
        return self.inside.buckets(times, request) if self.inside else None

    def table(self, layer: int) -> Float[Tensor, "#H N"] | None:
        return self.inside.table(layer) if self.inside else None

    @property
    def in_attention(self) -> bool:
        return self.inside is not None
