"""Times: gaps fall into the published buckets, calendars agree with datetime, and no second is lost to rounding."""

import itertools
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal, getcontext

import pytest
import torch
from closeness import close
from torch import Tensor

from recsys2stage.retrieval.encoders import times as module
from recsys2stage.retrieval.encoders.times import (
    Calendar,
    Combined,
    HybridTimestamp,
    LogBuckets,
    LogSpaced,
    RequestGap,
    Time,
    TimeFactory,
)
from recsys2stage.shapes import Shape

NOW = 1_700_000_000
DAY = 86_400
YEAR = 365.2425 * DAY
SHAPE = Shape(dim=2, max_length=9, heads=1)
WIDE = Shape(dim=8, max_length=9, heads=2, layers=3)
TWO_SIDED = Shape(dim=8, max_length=9, heads=2, causal=False)


# --- RequestGap


def buckets(gaps: list[int], number: int = 32) -> list[int]:
    """The bucket of each gap, read off what is added."""
    clock = RequestGap(SHAPE, number)
    with torch.no_grad():
        clock.vectors.weight.copy_(torch.arange(number)[:, None].expand(number, 2))
    times = torch.full((1, len(gaps)), NOW)
    added: Tensor = clock.embed(torch.zeros(1, len(gaps), 2), times, times + torch.tensor([gaps]))
    return added[0, :, 0].long().tolist()


def test_buckets_at_their_corners() -> None:
    assert buckets([0, 1, 2, 3, 6, 7, 8, 14, 15]) == [0, 1, 1, 2, 2, 3, 3, 3, 4]
    corners = range(1, 31)
    assert buckets([2**n - 2 for n in corners]) == [n - 1 for n in corners]
    assert buckets([2**n - 1 for n in corners]) == list(corners)


def test_gaps_beyond_the_last_bucket_and_before_the_event_are_capped() -> None:
    assert buckets([2**31 - 2, 2**31 - 1, 2**32, 2**40]) == [30, 31, 31, 31]
    assert buckets([0, 6, 7, 2**20], number=4) == [0, 2, 3, 3]
    assert buckets([-1, -(10**9)]) == [0, 0]
    assert buckets([2**61 - 2, 2**61 - 1], number=70) == [60, 61], "a float64 would round them to one"


def test_request_gap_is_added_to_the_input() -> None:
    clock, x = RequestGap(SHAPE), torch.randn(1, 2, 2)
    times = torch.tensor([[NOW, NOW + 50]])
    added = clock.embed(x, times, times + torch.tensor([[3, 8]])) - x
    torch.testing.assert_close(added[0], clock.vectors.weight[[2, 3]], rtol=0, atol=1e-6)
    assert clock.vectors.weight.std().item() == pytest.approx(0.02, rel=0.4)


def test_request_gap_refuses_an_encoder_that_sees_both_sides() -> None:
    with pytest.raises(ValueError, match=r"bidirectional.*choose LogBuckets, LogSpaced or Calendar"):
        RequestGap(TWO_SIDED)


# --- what all of them hold


def test_the_base_has_no_clock() -> None:
    x, times = torch.randn(1, 2, 2), torch.tensor([[1, 2]])
    for request in (times, None):
        assert Time(SHAPE).embed(x, times, request) is x
        assert Time(SHAPE).buckets(times, request) is None
    assert Time(SHAPE).table(0) is None
    assert not Time(SHAPE).in_attention


def of_request(shape: Shape) -> Calendar:
    return Calendar(shape, of="request")


@pytest.mark.parametrize("time", [RequestGap, of_request, HybridTimestamp, LogBuckets, LogSpaced])
def test_a_clock_without_a_request_says_what_to_set(time: Callable[[Shape], Time]) -> None:
    clock, times = time(SHAPE), torch.zeros(1, 2, dtype=torch.long)
    expected = (
        f"{type(clock).__name__} needs .*request_time is 'none'; set data.init_args.request_time to 'target' or "
        "'last_event', or leave out the time encoding"
    )
    with pytest.raises(ValueError, match=expected):
        clock.buckets(times, None) if clock.in_attention else clock.embed(torch.zeros(1, 2, 2), times, None)


@pytest.mark.parametrize(
    ("time", "inside"),
    [(RequestGap, False), (Calendar, False), (HybridTimestamp, False), (LogBuckets, True), (LogSpaced, True)],
)
def test_what_acts_inside_attention_says_so(time: Callable[[Shape], Time], inside: bool) -> None:
    clock, times, x = time(WIDE), torch.full((1, 3), NOW), torch.randn(1, 3, 8)
    found, table, same = clock.buckets(times, times), clock.table(0), torch.equal(clock.embed(x, times, times), x)
    assert (clock.in_attention, found is not None, table is not None, same) == (inside,) * 4


# --- the time between events and requests


def between(clock: Time, seconds: list[int]) -> list[int]:
    """The bucket of each time between a request and an event."""
    events = NOW - torch.tensor([seconds])
    found = clock.buckets(events, torch.full_like(events, NOW))
    assert found is not None
    assert (found == found[:, :1]).all(), "all requests are made at one moment"
    return found[0, 0].tolist()


def hstu_bucket(seconds: int) -> int:
    """floor(log(max(|t|, 1)) / 0.301) with 50 digits."""
    getcontext().prec = 50
    return int(Decimal(max(abs(seconds), 1)).ln() / Decimal("0.301"))


def test_log_buckets_are_those_of_hstu_to_the_second() -> None:
    begins = [math.floor(math.exp(0.301 * n)) for n in range(93)]  # to 3e4 years
    seconds = sorted({begin + off for begin in begins for off in (-2, -1, 0, 1, 2)} | {10**12, 59, 60, DAY, -DAY})
    assert between(LogBuckets(SHAPE), seconds) == [hstu_bucket(s) for s in seconds]
    assert between(LogBuckets(SHAPE), [-1, 0, 1, 2]) == [0, 0, 0, 2]  # no whole second falls into bucket 1


def test_log_buckets_beyond_the_last_are_capped() -> None:
    seconds = [0, 10, 10**3, 10**6, 10**9, 10**15]
    for number in (2, 10, 50):
        clock = LogBuckets(SHAPE, buckets=number)
        assert between(clock, seconds) == [min(hstu_bucket(s), number - 1) for s in seconds]
        assert clock.table(0).shape == (1, number)
    assert between(LogBuckets(SHAPE), [2**62]) == [128]


def test_log_spaced_bounds_are_whole_seconds_up_to_30_days() -> None:
    step = math.log10(30 * DAY) / 99
    bounds = sorted({round(10 ** (step * n)) for n in range(100)})[1:]  # what lies below the second is bucket 0
    clock = LogSpaced(SHAPE)
    assert clock.boundaries.tolist() == bounds
    assert clock.boundaries.dtype == torch.long
    assert (bounds[0], bounds[-1]) == (2, 30 * DAY)
    seconds = [0, 1, -5, *(bound + off for bound in bounds for off in (-1, 0)), 10**10]
    assert between(clock, seconds) == [sum(bound <= abs(s) for bound in bounds) for s in seconds]
    assert clock.table(0).shape == (1, len(bounds) + 1)
    assert LogSpaced(SHAPE, days=1.0).boundaries[-1] == DAY


@pytest.mark.parametrize("shape", [WIDE, TWO_SIDED], ids=["causal", "two-sided"])
def test_a_row_is_a_request_and_a_column_an_event(shape: Shape) -> None:
    events = NOW + torch.randint(30 * DAY, (3, 5)).cumsum(1)
    requests = events + torch.randint(-DAY, 100 * DAY, (3, 5))
    found = LogBuckets(shape).buckets(events, requests)
    for row, i, j in itertools.product(range(3), range(5), range(5)):
        assert found[row, i, j] == hstu_bucket(int(requests[row, i]) - int(events[row, j]))


def test_how_many_pairs_are_in_flight_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events = NOW + torch.randint(30 * DAY, (7, 4)).cumsum(1)
    expected = LogBuckets(WIDE).buckets(events, events + 5)
    for pairs in (1, 16, 40, 111):
        monkeypatch.setattr(module, "BUCKETS_IN_FLIGHT", pairs)
        assert torch.equal(LogBuckets(WIDE).buckets(events, events + 5), expected)


def test_buckets_take_as_few_bytes_as_they_can() -> None:
    events = torch.tensor([[NOW, NOW + 1]])
    assert LogBuckets(SHAPE).buckets(events, events).dtype == torch.uint8
    many = LogSpaced(SHAPE, buckets=500)
    assert 256 <= len(many.boundaries) < 512
    assert many.buckets(events, events).element_size() == 2
    assert between(many, [10**9]) == [len(many.boundaries)]


@pytest.mark.parametrize("time", [LogBuckets, LogSpaced])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_tables_are_shared_as_asked(time: Callable[..., Time], shared: bool, per_head: bool) -> None:
    clock = time(WIDE, shared=shared, per_head=per_head)
    tables = [clock.table(layer) for layer in range(WIDE.layers)]
    assert {len(table) for table in tables} == {2 if per_head else 1}
    assert all(torch.equal(table, tables[0]) == shared for table in tables[1:])
    (weights,) = clock.parameters()
    assert weights.numel() == tables[0].numel() * (1 if shared else WIDE.layers)
    assert weights.std().item() == pytest.approx(0.02, rel=0.3)
    assert list(clock.state_dict()) == ["tables"]


def test_tables_are_shared_as_published() -> None:
    assert len(next(LogBuckets(WIDE).parameters())) == WIDE.layers
    assert len(next(LogSpaced(WIDE).parameters())) == 1


# --- Calendar


MOMENTS = [0, 1, 59, 3_599, DAY - 1, DAY, NOW, 951_782_399, 951_782_400, 1_709_164_800, 4_102_444_799, -1, -5 * DAY]


@pytest.mark.parametrize("of", ["event", "request"])
def test_calendar_agrees_with_datetime(of: str) -> None:
    clock, x = Calendar(WIDE, of=of).double(), torch.randn(1, len(MOMENTS), 8, dtype=torch.float64)
    moments, others = torch.tensor([MOMENTS]), torch.randint(NOW, (1, len(MOMENTS)))
    added = clock.embed(x, *((moments, others) if of == "event" else (others, moments))) - x
    for place, moment in enumerate(MOMENTS):
        when = datetime.fromtimestamp(moment, UTC)
        hour, weekday = when.hour + when.minute / 60 + when.second / 3_600, when.isoweekday() % 7
        angles = [2 * math.pi * hour / 24, 2 * math.pi * weekday / 7]
        waves = torch.tensor([wave(angle) for angle in angles for wave in (math.sin, math.cos)], dtype=torch.float64)
        torch.testing.assert_close(added[0, place], clock.linear.weight @ waves, rtol=0, atol=1e-7)


def test_the_calendar_of_events_needs_no_request() -> None:
    clock, x, times = Calendar(WIDE), torch.randn(1, 2, 8), torch.tensor([[NOW, NOW + 7_000]])
    assert torch.equal(clock.embed(x, times, None), clock.embed(x, times, times + 9))
    assert clock.linear.bias is None


# --- HybridTimestamp


def hybrid_by_hand(clock: HybridTimestamp, time: int, request: int, periods: int) -> Tensor:
    def waves(seconds: int, lengths: list[float]) -> list[float]:
        angles = [2 * math.pi * math.fmod(seconds, length) / length for length in lengths]
        return [*map(math.sin, angles), *map(math.cos, angles)]

    start = datetime(2020, 1, 1, tzinfo=UTC).timestamp()
    absolute = [*waves(time, [DAY, 7 * DAY, YEAR / 12, YEAR]), (time - start) / YEAR]
    gap, growth = max(request - time, 0), (10 * YEAR / 60) ** (1 / (periods - 1))
    relative = [*waves(gap, [60 * growth**n for n in range(periods)]), math.log1p(gap)]
    halves = []
    for linear, features in ((clock.of_time, absolute), (clock.of_gap, relative)):
        halves.append(linear.weight @ torch.tensor(features, dtype=torch.float64) + linear.bias)
    return torch.cat(halves)


@pytest.mark.parametrize("dim", [8, 7])
def test_hybrid_timestamp_is_its_docstring(dim: int) -> None:
    clock = HybridTimestamp(Shape(dim=dim, max_length=9), periods=5).double()
    with torch.no_grad():
        for weight in clock.parameters():
            weight.copy_(torch.randn_like(weight))
    assert clock.of_time.out_features == dim // 2
    times = torch.tensor([[NOW, 0, NOW + 12_345_678], [4_102_444_799, 1_577_836_800, NOW]])
    request = times + torch.tensor([[0, 1, 59], [10**9, 86_400 * 400, -77]])
    x = torch.randn(2, 3, dim, dtype=torch.float64)
    added = clock.embed(x, times, request) - x
    for row, place in itertools.product(range(2), range(3)):
        expected = hybrid_by_hand(clock, int(times[row, place]), int(request[row, place]), periods=5)
        rounded = 1e-16 * abs(int(request[row, place] - times[row, place]))  # periods are, and gaps hold many of them
        torch.testing.assert_close(added[row, place], expected, rtol=0, atol=1e-9 + rounded)


def test_a_second_of_this_century_is_not_lost_in_float32() -> None:
    clock = HybridTimestamp(WIDE)
    times = torch.tensor([[NOW, NOW, NOW + 1, 0, 0]])
    request = torch.tensor([[NOW + 90, NOW + 91, NOW + 91, 90, 91]])
    with torch.no_grad():
        added = clock.embed(torch.zeros(1, 5, 8), times, request)[0]
        exact = clock.double().embed(torch.zeros(1, 5, 8, dtype=torch.float64), times, request)[0]
    absolute, relative = added[:, :4], added[:, 4:]
    rounding = 1e-7  # of numbers below 1/4, seven units in the last place; a second moves them by 1e-6 and more
    close(absolute[0], absolute[1], rounding)
    close(relative[0], relative[2], rounding)
    close(relative[:2], relative[3:], rounding)  # the epoch must not be felt
    for half, one, two in ((slice(4, 8), 0, 1), (slice(0, 4), 0, 2)):
        moved = (exact[two] - exact[one])[half]
        assert moved.abs().max() > 1e-6
        torch.testing.assert_close((added[two] - added[one])[half].double(), moved, rtol=0, atol=rounding)


def test_only_the_absolute_half_sees_a_shift_of_all_times() -> None:
    clock = HybridTimestamp(WIDE)
    times = NOW + torch.randint(300 * DAY, (2, 4))
    request = times + torch.randint(300 * DAY, (2, 4))
    with torch.no_grad():
        before = clock.embed(torch.zeros(2, 4, 8), times, request)
        for shift in (1, DAY, -100 * DAY, 7 * DAY * 52):
            after = clock.embed(torch.zeros(2, 4, 8), times + shift, request + shift)
            assert torch.equal(before[..., 4:], after[..., 4:])
            assert not torch.equal(before[..., :4], after[..., :4])


@pytest.mark.parametrize("time", [Calendar, HybridTimestamp, RequestGap])
def test_clocks_tell_the_time_in_a_model_of_bf16(time: Callable[[Shape], Time]) -> None:
    clock = time(WIDE)
    times = NOW + torch.arange(48).view(1, 48) * 1_800
    with torch.no_grad():
        for weight in clock.parameters():
            weight.copy_(torch.randn_like(weight).bfloat16())
        exact = clock.embed(torch.zeros(1, 48, 8), times, times + 4_000)
        rough = clock.to(torch.bfloat16).embed(torch.zeros(1, 48, 8).bfloat16(), times, times + 4_000)
    assert rough.dtype == torch.bfloat16
    assert ((rough.float() - exact).norm() / exact.norm()).item() < 0.005


# --- several at once


def test_combined_applies_every_hook_in_turn() -> None:
    torch.manual_seed(1)
    both = Combined(WIDE, [RequestGap, LogBuckets, Calendar])
    torch.manual_seed(1)
    gap, buckets, calendar = RequestGap(WIDE), LogBuckets(WIDE), Calendar(WIDE)
    x, times = torch.randn(2, 3, 8), NOW + torch.randint(30 * DAY, (2, 3)).cumsum(1)
    request = times + 1_000
    assert torch.equal(both.embed(x, times, request), calendar.embed(gap.embed(x, times, request), times, request))
    assert torch.equal(both.buckets(times, request), buckets.buckets(times, request))
    for layer in range(WIDE.layers):
        assert torch.equal(both.table(layer), buckets.table(layer))


def test_combined_keeps_each_weight_once() -> None:
    both = Combined(WIDE, [RequestGap, LogBuckets])
    assert len(both.state_dict()) == len(list(both.parameters())) == 2


@pytest.mark.parametrize(
    ("parts", "inside"), [([], False), ([RequestGap, Calendar], False), ([Calendar, LogSpaced], True)]
)
def test_combined_acts_inside_attention_where_a_part_does(parts: list[TimeFactory], inside: bool) -> None:
    times = torch.tensor([[NOW, NOW + 5]])
    for clock in (Combined(WIDE, parts), Combined(WIDE, [lambda shape: Combined(shape, parts)])):
        assert clock.in_attention is inside
        assert (clock.buckets(times, times) is not None) is inside
        assert (clock.table(0) is not None) is inside


def test_two_biases_by_the_same_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="LogBuckets, LogSpaced all bias attention by the same gaps; keep one of them"):
        Combined(WIDE, [LogBuckets, Calendar, LogSpaced])
