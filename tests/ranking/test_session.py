"""The user's clock: every number equals a loop over the events."""

import itertools
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from recsys2stage.data.batches import left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Table
from recsys2stage.ranking.signals.base import Requests, load_signals, save_signals
from recsys2stage.ranking.signals.session import Session

NOW = int(datetime(2021, 3, 4, 18, 0, tzinfo=UTC).timestamp())  # a Thursday
NOTHING = np.zeros((5, 2), np.float32)
PLACE = {name: place for place, name in enumerate(Session.names)}


def asked(histories: list[list[int]], now: list[int], candidates: int = 1) -> Requests:
    """Requests after events at these times; each names items 1, 2, ..."""
    ends = np.cumsum([len(history) for history in histories])
    times = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    padded = left_aligned(np.ones_like(times), times, ends - [len(history) for history in histories], ends)
    return Requests(np.tile(np.arange(candidates) + 1, (len(now), 1)), padded, np.array(now), NOTHING, NOTHING)


def naive(times: list[int], now: int, session: int) -> list[float]:
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    gap = max(now - times[-1], 0) if times else 0
    new = not times or gap > session
    start = 0
    for place, before in enumerate(gaps):
        if before > session:
            start = place + 1
    recent = [math.log1p(before) for before in gaps[-9:]]
    when = datetime.fromtimestamp(now, tz=UTC)
    hour = 2 * math.pi * (when.hour + when.minute / 60 + when.second / 3600) / 24
    weekday = 2 * math.pi * (when.isoweekday() % 7) / 7
    return [
        math.log1p(gap),
        math.log1p(len(times)),
        0.0 if new else math.log1p(len(times) - start),
        float(new),
        0.0 if new else math.log1p(max(now - times[start], 0)),
        *(math.sin(hour), math.cos(hour), math.sin(weekday), math.cos(weekday)),
        sum(recent) / len(recent) if recent else 0.0,
    ]


@pytest.mark.parametrize("session", [0, 60, 1800, 10**8])
def test_every_number_equals_a_loop(session: int, rng: np.random.Generator) -> None:
    waits = np.array([0, 1, 59, 60, 61, 1799, 1800, 1801, 86_400, 10**7])
    histories = [np.cumsum(10**9 + rng.choice(waits, size=size)).tolist() for size in [*range(14), 40]]
    now = [(history[-1] if history else NOW) + int(rng.choice(waits)) for history in histories]
    expected = [naive(history, end, session) for history, end in zip(histories, now, strict=True)]
    numbers = Session(session)(asked(histories, now))
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers[:, 0], expected, atol=1e-5)


def test_a_session_ends_with_the_last_longer_gap() -> None:
    times = [NOW - 10_000, NOW - 9_990, NOW - 1_000, NOW - 500, NOW - 400]
    numbers = np.expm1(Session()(asked([times, times], [NOW, NOW - 400 + 1801]))[:, 0])
    events, seconds = PLACE["session_events"], PLACE["session_seconds"]
    np.testing.assert_allclose(numbers[:, events], [3, 0], atol=1e-5)
    np.testing.assert_allclose(numbers[:, seconds], [1_000, 0], rtol=1e-5)
    assert Session()(asked([times, times], [NOW, NOW - 400 + 1801]))[:, 0, PLACE["new_session"]].tolist() == [0, 1]
    assert Session()(asked([times], [NOW - 400 + 1800]))[0, 0, PLACE["new_session"]] == 0  # longer, not as long


def test_an_empty_history_opens_a_session_and_has_no_gap() -> None:
    numbers = Session()(asked([[], [NOW - 5]], [NOW, NOW]))[0, 0]
    assert numbers[:5].tolist() == [0, 0, 0, 1, 0]
    assert numbers[PLACE["mean_gap"]] == 0
    np.testing.assert_allclose(numbers[5:9], [-1, 0, math.sin(8 * math.pi / 7), math.cos(8 * math.pi / 7)], atol=1e-6)


def test_a_clock_that_goes_back_is_no_negative_gap() -> None:
    numbers = Session()(asked([[NOW, NOW - 7, NOW - 3], [0]], [NOW - 9, -5]))
    assert np.isfinite(numbers).all()
    assert not numbers[:, 0, [PLACE["gap"], PLACE["session_seconds"]]].any()
    np.testing.assert_allclose(numbers[0, 0, PLACE["mean_gap"]], math.log1p(4) / 2, rtol=1e-6)


def test_all_candidates_hear_the_same_and_no_candidate_nothing() -> None:
    requests = asked([[NOW - 100, NOW - 50], [NOW - 90_000]], [NOW, NOW], candidates=4)
    requests.items[0, 2] = 0
    numbers = Session()(requests)
    assert numbers.shape == (2, 4, len(Session.names))
    assert not numbers[0, 2].any()
    for row, column in [(0, 1), (0, 3), (1, 1), (1, 2), (1, 3)]:
        np.testing.assert_array_equal(numbers[row, column], numbers[row, 0])


def test_what_stands_in_the_padding_is_not_looked_at() -> None:
    requests = asked([[NOW - 100, NOW - 50], list(range(NOW - 8, NOW))], [NOW, NOW])
    before = Session()(requests)
    requests.history.times[0, 2:] = 10**12
    np.testing.assert_array_equal(Session()(requests), before)


def test_it_needs_times_and_nothing_else(cycle: Path, tmp_path: Path) -> None:
    signal, requests = Session(session=60), asked([[NOW - 100, NOW - 50]], [NOW])
    signal.fit(Dataset(cycle), NOTHING)
    assert signal.reads_times
    save_signals([signal], tmp_path / "signals")
    (loaded,) = load_signals(tmp_path / "signals")
    np.testing.assert_array_equal(loaded(requests), signal(requests))
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"1,{item}\n" for item in range(4)))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    with pytest.raises(ValueError, match="an order and no times; leave Session out"):
        signal.fit(Dataset(tmp_path / "data"), NOTHING)


def test_a_session_of_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="session is -1"):
        Session(session=-1)
