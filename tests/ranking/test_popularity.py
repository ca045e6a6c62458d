"""Popularity as of a request against a loop over all training events, and nothing of what comes later."""

from math import log1p
from pathlib import Path

import numpy as np
import pytest
from closeness import close
from worlds import write_movielens

from recsys2stage.data.batches import Padded, Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens, Table
from recsys2stage.ranking.signals.base import Requests, load_signals, save_signals, specify
from recsys2stage.ranking.signals.popularity import HOUR, PopularityAsOf

DAY, BEGIN = 86_400, 10**9
USERS, ITEMS, SPAN = 60, 30, 90 * DAY
WINDOWS = [DAY, 7 * DAY, 30 * DAY]
NO_VECTORS = np.zeros((ITEMS + 1, 1), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Events on whole hours, so that many are at the same time; items repeat; the last third of the time is quiet."""
    rng, path = np.random.default_rng(3), tmp_path_factory.mktemp("popularity")
    share = np.linspace(3, 0.1, ITEMS) / np.linspace(3, 0.1, ITEMS).sum()
    events = []
    for user in range(USERS):
        length = int(rng.integers(3, 25))
        hours = np.sort(rng.integers(0, int(SPAN / HOUR * (1 if user % 6 == 0 else 0.6)), length))
        for item, hour in zip(rng.choice(ITEMS, length, p=share) + 1, hours, strict=True):
            events.append((user, int(item), 4.0, BEGIN + int(hour) * HOUR))
    prepare(MovieLens(write_movielens(path / "raw", events)), path / "data", repeats="keep")
    return path / "data"


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return Dataset(folder)


def training(dataset: Dataset) -> list[tuple[int, int]]:
    """Item and time of each training event."""
    return [
        (int(dataset.items[event]), int(dataset.times[event]))
        for user in range(dataset.num_users)
        for event in range(int(dataset.offsets[user]), int(dataset.train_ends[user]))
    ]


def asked_at(now: np.ndarray, items: np.ndarray | None = None) -> Requests:
    nothing = np.zeros((len(now), 1), dtype=np.int64)
    history = Padded(nothing, nothing, np.zeros(len(now), dtype=np.int64))
    return Requests(nothing if items is None else items, history, now, NO_VECTORS, NO_VECTORS)


def moments(dataset: Dataset) -> np.ndarray:
    """Times of events exactly, between them, before and long after all of them."""
    times = np.unique(dataset.times)
    own = np.concatenate([times[::9], times[::9] + 1_234, times[[0, -1]], times[[0, -1]] + 1])
    return np.concatenate([own, [0, -(10**12), times[0] - DAY, times[-1] + 3 * DAY, times[-1] + 1000 * DAY, 10**15]])


def nobody(rows: int) -> Ragged:
    return Ragged(np.zeros(0, dtype=np.int64), np.zeros(rows + 1, dtype=np.int64))


def fitted(dataset: Dataset, **options: object) -> PopularityAsOf:
    signal = PopularityAsOf(**{"windows": WINDOWS, **options})  # type: ignore[arg-type]  # options of all sorts
    signal.fit(dataset, NO_VECTORS)
    return signal


def by_hand(events: list[tuple[int, int]], item: int, now: int, trending: int) -> list[float]:
    now = min(now, max(time for _, time in events) + 1)
    own = sorted(time for other, time in events if other == item and time < now)
    every = [time for _, time in events if time < now]
    counts = [sum(time >= now - window for time in own) for window in WINDOWS]
    trend, age, gap = 0.0, 0, max(now - min(time for _, time in events), 0)
    if own:
        lately = sum(time >= now - trending for time in every)
        usual = len(own) * min(1.0, lately / sum(time >= own[0] for time in every))
        trend = log1p(counts[WINDOWS.index(trending)]) - log1p(usual)
        age, gap = now - own[0], now - own[-1]
    return [*map(log1p, counts), log1p(len(own)), trend, log1p(age), log1p(gap)]


@pytest.mark.parametrize("trending", WINDOWS)
def test_the_numbers_equal_a_loop_over_all_events(dataset: Dataset, trending: int) -> None:
    now = moments(dataset)
    items = np.random.default_rng(0).integers(1, ITEMS + 1, (len(now), 8))
    signal = fitted(dataset, trending=trending)
    numbers, events = signal(asked_at(now, items)), training(dataset)
    assert numbers.dtype == np.float32
    assert numbers.shape == (*items.shape, len(signal.names))
    assert np.isfinite(numbers).all()
    for row, column in np.ndindex(items.shape):
        want = by_hand(events, int(items[row, column]), int(now[row]), trending)
        assert numbers[row, column] == pytest.approx(want, rel=1e-6, abs=1e-6)


def test_an_event_counts_from_the_second_after_it(dataset: Dataset) -> None:
    dataset.items = np.where(np.arange(len(dataset.items)) == dataset.offsets[0], ITEMS, 1)  # that item once
    time, signal = int(dataset.times[dataset.offsets[0]]), fitted(dataset)
    day, week = signal.names.index("popularity_1d"), signal.names.index("popularity_7d")
    at = np.array([time, time + 1, time + DAY, time + DAY + 1])
    numbers = signal(asked_at(at, np.full((4, 1), ITEMS)))[:, 0]
    assert np.expm1(numbers[:, day]).round().tolist() == [0, 1, 1, 0]
    assert np.expm1(numbers[:, week]).round().tolist() == [0, 1, 1, 1]


def test_no_candidate_is_zero(dataset: Dataset) -> None:
    now = moments(dataset)
    signal = fitted(dataset)
    numbers = signal(asked_at(now, np.tile([0, 3, 0], (len(now), 1))))
    assert not numbers[:, [0, 2]].any()
    close(numbers[:, 1:2], signal(asked_at(now, np.full((len(now), 1), 3))))
    assert signal(asked_at(now[:0], np.zeros((0, 4), np.int64))).shape == (0, 4, len(signal.names))


def test_what_was_trending_rises(dataset: Dataset) -> None:
    """An item that got its events of a year within the last week, beside one that got as many evenly."""
    dataset.items = np.tile([1, 3, 3, 3, 3, 3], 1 + len(dataset.items) // 6)[: len(dataset.items)]
    dataset.times = BEGIN + np.arange(len(dataset.items)) * HOUR
    dataset.train_ends = dataset.offsets[1:]
    newest = int(dataset.times[-1])
    late = np.flatnonzero((dataset.times >= newest - 2 * DAY) & (dataset.items == 3))[::3]
    dataset.items[late] = 2
    dataset.items[5] = 2  # known for long
    trend = fitted(dataset)(asked_at(np.array([newest]), np.array([[1, 2]])))[0, :, len(WINDOWS) + 1]
    assert abs(trend[0]) < 0.1
    assert trend[1] > 0.5


def ranking(events: list[tuple[int, int]], now: int, window: float) -> list[int]:
    hour = min(now // HOUR * HOUR, max(time for _, time in events) + 1)
    happened = [item for item, time in events if hour - window <= time < hour]
    return sorted(set(happened), key=lambda item: (-happened.count(item), item))


@pytest.mark.parametrize("candidates", [1, 6, 50])
@pytest.mark.parametrize("trending", WINDOWS[1:])
def test_proposals_are_the_most_frequent_that_are_not_known(dataset: Dataset, candidates: int, trending: int) -> None:
    now, events = moments(dataset), training(dataset)
    rng = np.random.default_rng(1)
    knows = [rng.choice(ITEMS, rng.integers(0, ITEMS + 1), replace=False) + 1 for _ in now]
    knows[3] = np.arange(1, ITEMS + 1)
    known = Ragged(np.concatenate(knows), np.cumsum([0, *map(len, knows)]))
    proposed = fitted(dataset, candidates=candidates, trending=trending).propose(asked_at(now), known)
    assert proposed.dtype == np.int64
    assert (proposed[3] == -1).all()
    for row, moment in enumerate(now.tolist()):
        want: list[int] = []
        for window in [*WINDOWS[WINDOWS.index(trending) :], float("inf")]:  # a longer one fills what is missing
            want += [item for item in ranking(events, moment, window) if item not in {*want, *knows[row].tolist()}]
        want = want[:candidates]
        assert proposed[row].tolist() == want + [-1] * (candidates - len(want))


def test_where_none_are_asked_for_none_are_named(dataset: Dataset) -> None:
    now = moments(dataset)
    assert fitted(dataset).propose(asked_at(now), nobody(len(now))).shape == (len(now), 0)
    assert fitted(dataset, candidates=3).propose(asked_at(now[:0]), nobody(0)).shape == (0, 3)


def test_requests_of_an_hour_share_proposals(dataset: Dataset) -> None:
    newest = int(dataset.times.max())
    now = np.array([newest - newest % HOUR, newest - newest % HOUR + HOUR - 1])
    proposed = fitted(dataset, candidates=5).propose(asked_at(now), nobody(2))
    assert np.array_equal(proposed[0], proposed[1])
    assert (proposed > 0).all()


def test_requests_long_after_the_last_training_event_are_like_one_right_after_it(dataset: Dataset) -> None:
    events = training(dataset)
    last = max(time for _, time in events)
    now = last + np.array([1, 60, 30 * DAY, 2000 * DAY])
    signal = fitted(dataset, candidates=5)
    values = signal(asked_at(now, np.tile(np.arange(1, ITEMS + 1), (4, 1))))
    assert np.expm1(values[0, :, signal.names.index("popularity_1d")]).any()
    close(values, np.broadcast_to(values[0], values.shape))  # log1p may round by the place in a vector register
    for item, own in enumerate(values[0], 1):
        assert own == pytest.approx(by_hand(events, item, last + 1, 7 * DAY), rel=1e-6, abs=1e-6)
    proposed = signal.propose(asked_at(now[2:]), nobody(2))
    week = ranking(events, int(now[3]), 7 * DAY)[:5]
    assert len(week) > 2
    assert proposed[0, : len(week)].tolist() == week
    assert np.array_equal(proposed[0], proposed[1])


def test_both_ways_to_count_a_window_agree(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    signal, now = fitted(dataset, candidates=ITEMS), moments(dataset)
    begins, ends = np.sort(np.random.default_rng(0).integers(0, len(signal.tables["times"]), (2, 50)), axis=0)
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        counts = np.bincount(signal.tables["items"][begin:end], minlength=ITEMS + 1)
        assert signal._count(begin, end).tolist() == sorted(np.flatnonzero(counts), key=lambda i: (-counts[i], i))
    one = signal.propose(asked_at(now), nobody(len(now)))
    for looks in (0, 1 / ITEMS):  # always counted by item; always by event, or, if there are none, by item
        monkeypatch.setattr("recsys2stage.ranking.signals.popularity.LOOKS", looks)
        signal.restore(signal.tables)  # forgets the lists
        assert np.array_equal(signal.propose(asked_at(now), nobody(len(now))), one)


def test_later_events_and_those_of_no_training_change_nothing(dataset: Dataset) -> None:
    rng, signal = np.random.default_rng(2), fitted(dataset, candidates=8)
    now = np.sort(np.asarray(dataset.times))[[len(dataset.times) // 4, len(dataset.times) // 3]]
    asked = asked_at(now, np.tile(np.arange(1, ITEMS + 1), (2, 1)))
    numbers, proposed = signal(asked), signal.propose(asked, nobody(2))
    train = np.zeros(len(dataset.items), dtype=bool)
    for start, end in zip(dataset.offsets[:-1], dataset.train_ends, strict=True):
        train[start:end] = True
    for other in (~train, dataset.times >= now.max()):
        changed = Dataset(dataset.path)
        changed.items = np.where(other, rng.integers(1, ITEMS + 1, len(train)), dataset.items)
        changed.times = np.where(other, now.max() + rng.integers(0, DAY, len(train)), dataset.times)
        assert not np.array_equal(changed.items, dataset.items)
        again = fitted(changed, candidates=8)
        assert np.array_equal(again(asked), numbers)
        assert np.array_equal(again.propose(asked, nobody(2)), proposed)


def test_saved_and_loaded_it_says_the_same(dataset: Dataset, tmp_path: Path) -> None:
    signal, now = fitted(dataset, candidates=4), moments(dataset)
    save_signals([signal], tmp_path / "signals")
    (loaded,) = load_signals(tmp_path / "signals")
    assert specify(loaded) == specify(signal)
    asked = asked_at(now, np.tile([1, 5], (len(now), 1)))
    assert np.array_equal(loaded(asked), signal(asked))
    assert isinstance(loaded, PopularityAsOf)
    assert np.array_equal(loaded.propose(asked, nobody(len(now))), signal.propose(asked, nobody(len(now))))


def test_names_say_the_windows() -> None:
    names = PopularityAsOf(windows=[HOUR, 2 * DAY], trending=HOUR).names
    assert names == ("popularity_3600s", "popularity_2d", "popularity_all", "trend", "age", "gap")


@pytest.mark.parametrize("windows", [[], [0, 5], [7, 5], [5, 5]])
def test_windows_that_are_none_are_an_error(windows: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ascending|list of integers"):
        PopularityAsOf(windows=windows, trending=5)


def test_other_options_that_cannot_be_are_an_error() -> None:
    with pytest.raises(ValueError, match="trending is 7, expected one of"):
        PopularityAsOf(trending=7)
    with pytest.raises(ValueError, match="candidates is -1"):
        PopularityAsOf(-1)


def test_data_without_times_or_without_training_events_are_an_error(dataset: Dataset, tmp_path: Path) -> None:
    dataset.train_ends = dataset.offsets[:-1]
    with pytest.raises(ValueError, match="no training events"):
        fitted(dataset)
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"1,{item}\n" for item in range(9)))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    with pytest.raises(ValueError, match="an order and no times"):
        fitted(Dataset(tmp_path / "data"))
