"""What the history says of the candidate's features: every number equals a loop over events and classes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import close

from recsys2stage.data.batches import Padded, left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, SideTable, Table
from recsys2stage.ranking.signals import affinity
from recsys2stage.ranking.signals.affinity import Affinity
from recsys2stage.ranking.signals.base import Requests, load_signals, save_signals

USERS, ITEMS, NOW = 25, 18, 1_500_000_000
NAMES = (
    *("kinds_share", "kinds_recent", "kinds_newest", "brand_share", "brand_recent", "brand_newest"),
    *("year_from_mean", "year_from_newest", "years_since_release"),
)
FEATURES = {"kinds": Feature("multi"), "brand": Feature("categorical"), "year": Feature("numeric")}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of none to three kinds, some without brand or year; one is met in no training event."""
    rng, folder = np.random.default_rng(11), tmp_path_factory.mktemp("affinity")
    events = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        taken = rng.integers(1, ITEMS, size=2 + user % 9)
        events += [f"{user},{item},{NOW - 10**6 + place}" for place, item in enumerate(taken)]
    events += [f"{USERS},{item},{NOW - 10**6 + item}" for item in (1, 2, ITEMS)]  # the last item is a test target
    items = ["item_id,kinds,brand,year"]
    for item in range(1, ITEMS + 1):
        kinds = "|".join(name for bit, name in enumerate("abc") if item >> bit & 1)
        items.append(
            f"{item},{kinds},{'' if item % 5 == 0 else 'xyz'[item % 3]},{'' if item % 7 == 0 else 1960 + item}"
        )
    (folder / "events.csv").write_text("\n".join([*events, ""]))
    (folder / "items.csv").write_text("\n".join([*items, ""]))
    source = Table(folder / "events.csv", items=SideTable("items.csv", "item_id", FEATURES))
    prepare(source, folder / "data", repeats="keep")
    return folder / "data"


NO_RETRIEVER = np.zeros((ITEMS + 1, 2), np.float32), np.zeros((1, 2), np.float32)  # its vectors, its queries


def fitted(path: Path, **options: Any) -> Affinity:
    signal = Affinity(**{"released": "year"} | options)
    signal.fit(Dataset(path), np.zeros((ITEMS + 1, 2), np.float32))
    return signal


def asked(histories: list[list[int]], items: list[int], now: int = NOW) -> Requests:
    """The same candidates at the end of each history."""
    ends = np.cumsum([len(history) for history in histories])
    events = np.concatenate([np.array(history, dtype=np.int64) for history in histories])
    padded = left_aligned(events, np.full(len(events), now), ends - [len(history) for history in histories], ends)
    rows = len(histories)
    return Requests(np.tile(items, (rows, 1)), padded, np.full(rows, now), *NO_RETRIEVER)


def naive(dataset: Dataset, history: list[int], item: int, now: int, decay: float, smoothing: float) -> list[float]:
    train = [
        int(dataset.items[place])
        for user in range(dataset.num_users)
        for place in range(int(dataset.offsets[user]), int(dataset.train_ends[user]))
    ]
    numbers: list[float] = []
    for feature in dataset.item_features:
        values = feature["values"]
        if feature["kind"] == "numeric":
            seen = [float(values[other]) for other in train if not math.isnan(values[other])]
            mean = sum(seen) / len(seen)
            spread = math.sqrt(sum((value - mean) ** 2 for value in seen) / len(seen))
            known = [float(values[other]) for other in history if not math.isnan(values[other])]
            own = float(values[item])
            from_mean = abs(own - sum(known) / len(known)) / spread if known else 0.0
            from_newest = abs(own - float(values[history[-1]])) / spread if history else 0.0
            numbers += [0.0 if math.isnan(number) else number for number in (from_mean, from_newest)]
            continue

        def classes(of: int, values: np.ndarray = values) -> set[int]:
            return {int(code) for code in np.atleast_1d(values[of]) if code}

        own = classes(item)
        usual = sum((sum(g in classes(e) for e in train) + 1) / (len(train) + feature["size"]) for g in own)
        for factor in (1.0, decay):
            weights = [factor**place for place in range(len(history))]
            met = sum(w * len(classes(e) & own) for w, e in zip(weights, reversed(history), strict=True))
            lift = math.log((met + smoothing * usual) / ((sum(weights) + smoothing) * usual)) if own else 0.0
            numbers.append(lift)
        newest = classes(history[-1]) if history else set()
        numbers.append(len(own & newest) / len(own | newest) if own | newest else 0.0)
    year = float(dataset.item_features[2]["values"][item])
    age = 1970 + now / (365.2425 * 86_400) - year
    return [*numbers, 0.0 if math.isnan(age) else math.log1p(max(age, 0))]


HISTORIES = [[3, 5, 7, 3], [8], [], [16, 5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [7, 14], [5, 8]]


@pytest.mark.parametrize("cells", [affinity.CELLS, 0], ids=["few classes", "many classes"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.5, "smoothing": 7.0}])
def test_every_number_equals_a_loop(
    path: Path, options: dict[str, float], cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "CELLS", cells)
    dataset, items = Dataset(path), list(range(1, ITEMS + 1))
    signal = fitted(path, **options)
    assert signal.names == NAMES
    numbers = signal(asked(HISTORIES, items))
    chosen = {"decay": 0.9, "smoothing": 1.0} | options
    expected = [[naive(dataset, history, item, NOW, **chosen) for item in items] for history in HISTORIES]
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(numbers, expected, atol=1e-5)


def test_a_history_lifts_its_own_classes_and_lately_the_newest(path: Path) -> None:
    """Items 1, 2 and 4 are of one kind each, a, b and c; a history of a turns to b."""
    share, recent = np.moveaxis(fitted(path)(asked([[1] * 30 + [2] * 10], [1, 2, 4]))[0, :, :2], -1, 0)
    assert share[0] > 0 > recent[0]
    assert recent[1] > 0 > share[1]
    assert share[2] < 0 > recent[2]


def test_an_empty_history_says_nothing(path: Path) -> None:
    numbers = fitted(path, released=None)(asked([[]], list(range(ITEMS + 1))))
    assert numbers.shape == (1, ITEMS + 1, 8)
    assert not numbers.any()


def test_where_no_candidate_is_all_is_zero(path: Path) -> None:
    numbers = fitted(path)(asked([[3, 5], [7]], [0, 3, 0]))
    assert not numbers[:, [0, 2]].any()
    assert numbers[:, 1].any()


def test_a_row_does_not_look_at_its_neighbours(path: Path) -> None:
    signal, items = fitted(path), [3, 9, 16]
    together = signal(asked(HISTORIES, items))
    alone = np.concatenate([signal(asked([history], items)) for history in HISTORIES])
    close(together, alone)


def test_only_training_events_are_counted(path: Path) -> None:
    dataset = Dataset(path)
    later = np.arange(len(dataset.items)) >= np.repeat(dataset.train_ends, np.diff(dataset.offsets))
    assert later.any()
    dataset.items = np.where(later, 1, dataset.items)
    signal, same = Affinity(released="year"), fitted(path)
    signal.fit(dataset, np.zeros((ITEMS + 1, 2), np.float32))
    assert signal.tables.keys() == same.tables.keys()
    for name, table in signal.tables.items():
        np.testing.assert_array_equal(table, same.tables[name])


def test_loaded_it_says_the_same_under_the_same_names(path: Path, tmp_path: Path) -> None:
    signal, requests = fitted(path, decay=0.7), asked(HISTORIES, [1, 5, 18])
    save_signals([signal], tmp_path / "signals")
    (loaded,) = load_signals(tmp_path / "signals")
    assert loaded.names == NAMES
    np.testing.assert_array_equal(loaded(requests), signal(requests))


def test_years_since_release_follow_the_clock(path: Path) -> None:
    signal = fitted(path)
    ages = [np.expm1(signal(asked([[1]], [1, 7], now))[0, :, -1]) for now in (-(10**9), 0, 10**9)]
    assert ages[0].tolist() == [0, 0]  # it came out in 1961, the request is of 1938
    np.testing.assert_allclose([age[0] for age in ages[1:]], [9, 9 + 10**9 / 31_556_952], rtol=1e-5)
    assert [age[1] for age in ages] == [0, 0, 0]  # nobody knows when


def test_an_outlier_lies_no_further_than_others_can(path: Path) -> None:
    dataset = Dataset(path)
    year = dataset.item_features[2]["values"]
    year[ITEMS], year[1] = 3e38, np.inf  # the one is in no training event, the other is no number
    signal = Affinity()
    signal.fit(dataset, np.zeros((ITEMS + 1, 2), np.float32))
    numbers = signal(asked([[2], [1]], [ITEMS, 1]))
    assert np.isfinite(numbers).all()
    assert numbers[0, :, -1].tolist() == [10, 0]
    assert not numbers[1, :, -1].any()


def test_a_number_that_is_the_same_everywhere_is_no_distance(path: Path) -> None:
    dataset = Dataset(path)
    dataset.item_features[2]["values"][1:] = 2000
    signal = Affinity()
    signal.fit(dataset, np.zeros((ITEMS + 1, 2), np.float32))
    assert not signal(asked([[2, 3]], [1, 4]))[..., -2:].any()


@pytest.mark.parametrize("options", [{"decay": 0.0}, {"decay": 1.1}, {"smoothing": 0.0}])
def test_an_option_that_says_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Affinity(**options)


@pytest.mark.parametrize(("released", "told"), [("brand", "which has year"), ("month", "which has year")])
def test_a_release_that_is_no_number_is_refused(path: Path, released: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        fitted(path, released=released)


def test_a_release_in_seconds_is_refused(path: Path) -> None:
    dataset = Dataset(path)
    dataset.item_features[2]["values"][3] = 1e9
    with pytest.raises(ValueError, match=r"1e\+09; expected years"):
        Affinity(released="year").fit(dataset, np.zeros((ITEMS + 1, 2), np.float32))


def test_items_without_features_and_events_without_times_are_refused(tmp_path: Path, path: Path) -> None:
    events = [f"{user},{item}" for user in range(3) for item in range(4)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id", *events, ""]))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    with pytest.raises(ValueError, match="no categorical, multi or numeric features"):
        Affinity().fit(dataset, np.zeros((5, 2), np.float32))
    dataset.item_features = Dataset(path).item_features
    with pytest.raises(ValueError, match="no times; leave released out"):
        affinity.years(dataset, "year")


def test_only_an_age_looks_at_the_clock() -> None:
    assert Affinity(released="year").reads_times
    assert not Affinity().reads_times


def test_an_empty_batch_is_an_empty_answer(path: Path) -> None:
    nobody = Padded(np.zeros((0, 1), np.int64), np.zeros((0, 1), np.int64), np.zeros(0, np.int64))
    empty = Requests(np.zeros((0, 4), np.int64), nobody, np.zeros(0, np.int64), *NO_RETRIEVER)
    assert fitted(path)(empty).shape == (0, 4, 9)
