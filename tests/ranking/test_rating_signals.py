"""Ratings before a request: every number equals a loop over training events."""

import math
from pathlib import Path

import numpy as np
import pytest
from closeness import close

from recsys2stage.data.batches import left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Table
from recsys2stage.ranking.signals.base import Requests, load_signals, save_signals
from recsys2stage.ranking.signals.ratings import Ratings

USERS, ITEMS, START = 30, 12, 10**9
NOTHING = np.zeros((ITEMS + 1, 2), np.float32)
PLACE = {name: place for place, name in enumerate(Ratings.names)}
ALL = list(range(1, ITEMS + 1))


def write(folder: Path, ordered: bool) -> Path:
    """Events at few distinct seconds, rated 0 (not at all) to 5; item 12 is met in test events only."""
    rng = np.random.default_rng(9)
    rows = ["user_id,item_id,rating" + ("" if ordered else ",timestamp")]
    for user in range(USERS):
        for _ in range(2 + user % 7):
            item, rating = int(rng.integers(1, ITEMS)), round(rng.integers(0, 11) / 2, 1)
            rows.append(f"{user},{item},{rating}" + ("" if ordered else f",{START + int(rng.integers(40))}"))
        if user < 3:
            rows.append(f"{user},{ITEMS},5.0" + ("" if ordered else f",{START + 50}"))
    folder.mkdir(exist_ok=True)
    (folder / "events.csv").write_text("\n".join([*rows, ""]))
    source = Table(folder / "events.csv", rating="rating", **({"time": None, "time_unit": "order"} if ordered else {}))
    prepare(source, folder / "data", repeats="keep")
    return folder / "data"


@pytest.fixture(scope="module", params=[False, True], ids=["seconds", "order"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("ratings"), request.param)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("timed"), False)


def fitted(dataset: Dataset, prior: float = 20.0) -> Ratings:
    signal = Ratings(prior)
    signal.fit(dataset, NOTHING)
    return signal


def asked(ratings: list[list[float]], now: list[int], items: list[int] | None = None) -> Requests:
    """The same candidates after events that are rated so."""
    ends = np.cumsum([len(row) for row in ratings])
    given = np.concatenate([np.array(row, dtype=np.float32) for row in ratings])
    ones = np.ones(len(given), dtype=np.int64)
    padded = left_aligned(ones, ones, ends - [len(row) for row in ratings], ends, given)
    return Requests(np.tile(items or ALL, (len(now), 1)), padded, np.array(now), NOTHING, NOTHING)


def naive(dataset: Dataset, ratings: list[float], item: int, now: int, prior: float) -> list[float]:
    assert dataset.ratings is not None
    events = [
        (int(dataset.items[place]), int(dataset.times[place]), float(dataset.ratings[place]))
        for user in range(dataset.num_users)
        for place in range(int(dataset.offsets[user]), int(dataset.train_ends[user]))
        if dataset.ratings[place] != 0
    ]
    mean = sum(rating for _, _, rating in events) / len(events)
    own = [rating for other, time, rating in events if other == item and (time < now or not dataset.has_time)]
    item_mean = (sum(own) + prior * mean) / (len(own) + prior)
    given = [rating for rating in ratings if rating != 0]
    user_mean = sum(given) / len(given) if given else mean
    newest = given[-1] - user_mean if given else 0.0
    spread = math.sqrt(sum((rating - user_mean) ** 2 for rating in given) / len(given)) if given else 0.0
    return [item_mean, math.log1p(len(own)), user_mean, newest, spread, item_mean - user_mean]


HISTORIES = [[4.0, 0.5, 3.0], [], [0.0, 5.0, 0.0], [2.5], [0.0, 0.0], [1.0, 2.0, 3.0, 4.0, 5.0, 0.5, 0.0]]


@pytest.mark.parametrize("prior", [20.0, 0.5])
@pytest.mark.parametrize("after", [-(10**9), -1, 0, 1, 17, 39, 40, 51, 10**10])
def test_every_number_equals_a_loop(path: Path, after: int, prior: float) -> None:
    dataset, now = Dataset(path), START + after
    numbers = fitted(dataset, prior)(asked(HISTORIES, [now] * len(HISTORIES)))
    expected = [[naive(dataset, history, item, now, prior) for item in ALL] for history in HISTORIES]
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers, expected, atol=1e-5)


def test_each_request_has_its_own_now(timed: Path) -> None:
    signal, now = fitted(Dataset(timed)), [START + 30, START - 5, START + 3, START + 60]
    together = signal(asked([[4.0]] * 4, now))
    close(together, np.concatenate([signal(asked([[4.0]], [when])) for when in now]))
    counts = together[..., PLACE["item_count"]].sum(1)
    assert counts[1] == 0 < counts[2] < counts[0] < counts[3]


def test_an_event_at_the_moment_of_the_request_is_not_yet_known(timed: Path) -> None:
    dataset = Dataset(timed)
    signal, place = fitted(dataset), int(dataset.offsets[0])
    item, time = int(dataset.items[place]), int(dataset.times[place])
    at, later = np.expm1(signal(asked([[], []], [time, time + 1], [item]))[:, 0, PLACE["item_count"]])
    assert later >= at + 1 - 1e-6


def test_later_ratings_do_not_reach_back(timed: Path) -> None:
    """They are dealt out anew, so that the mean over the whole log stays."""
    dataset, now = Dataset(timed), START + 20
    before = fitted(dataset)(asked(HISTORIES, [now] * len(HISTORIES)))
    train = np.arange(len(dataset.items)) < np.repeat(dataset.train_ends, np.diff(dataset.offsets))
    later = np.flatnonzero(train & (dataset.times >= now))
    items, ratings = np.array(dataset.items), np.array(dataset.ratings)
    items[later], ratings[later] = items[later][::-1], ratings[np.roll(later, 3)]
    dataset.items, dataset.ratings = items, ratings
    signal = fitted(dataset)
    np.testing.assert_array_equal(signal(asked(HISTORIES, [now] * len(HISTORIES))), before)
    assert (signal(asked([[]], [START + 60])) != fitted(Dataset(timed))(asked([[]], [START + 60]))).any()


def test_only_training_events_are_counted(path: Path) -> None:
    dataset, same = Dataset(path), fitted(Dataset(path))
    assert dataset.ratings is not None
    later = np.arange(len(dataset.items)) >= np.repeat(dataset.train_ends, np.diff(dataset.offsets))
    dataset.items, dataset.ratings = np.where(later, 1, dataset.items), np.where(later, 5, dataset.ratings)
    signal = fitted(dataset)
    assert signal.tables.keys() == same.tables.keys()
    for name, table in signal.tables.items():
        np.testing.assert_array_equal(table, same.tables[name])


def test_without_ratings_at_a_request_its_user_is_an_average_one(path: Path) -> None:
    signal, requests = fitted(Dataset(path)), asked([[1.0, 1.0], [5.0]], [START + 30] * 2)
    silent = requests._replace(history=requests.history._replace(ratings=None))
    np.testing.assert_array_equal(signal(silent), signal(asked([[], []], [START + 30] * 2)))


def test_where_no_candidate_is_all_is_zero(path: Path) -> None:
    numbers = fitted(Dataset(path))(asked([[4.0, 2.0]], [START + 30], [0, 3, 0]))
    assert not numbers[0, [0, 2]].any()
    assert numbers[0, 1].all()


def test_loaded_it_says_the_same(path: Path, tmp_path: Path) -> None:
    signal, requests = fitted(Dataset(path), 3.0), asked(HISTORIES, [START + 20] * len(HISTORIES))
    save_signals([signal], tmp_path / "signals")
    (loaded,) = load_signals(tmp_path / "signals")
    np.testing.assert_array_equal(loaded(requests), signal(requests))
    assert loaded.reads_times == signal.reads_times == Dataset(path).has_time
    assert loaded.reads_ratings


def test_data_without_ratings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,rating\n" + "".join(f"1,{item},0\n" for item in range(4)))
    for rating, told in ((None, "have no ratings; leave Ratings out"), ("rating", "no training event of .* has a")):
        prepare(Table(tmp_path / "events.csv", rating=rating, time=None, time_unit="order"), tmp_path / "data")
        with pytest.raises(ValueError, match=told):
            fitted(Dataset(tmp_path / "data"))


def test_a_prior_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prior is 0.0, expected a number of ratings above 0"):
        Ratings(prior=0.0)
