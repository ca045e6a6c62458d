"""Every look at a prepared dataset, one gather over many users, equals a loop over the events of each user."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import write_movielens

from recsys2stage.data.batches import (
    Padded,
    as_history,
    left_aligned,
    newest_first,
    padded_indices,
    recent_events,
    spans,
    windows,
)
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens, Table
from recsys2stage.data.split import GlobalTime, LeaveOneOut
from recsys2stage.options import RequestTime

USERS, ITEMS = 40, 25
OPTIONS: dict[str, dict[str, Any]] = {
    "leave one out": {},
    "repeats kept": {"repeats": "keep"},
    "several validate": {"repeats": "keep", "split": LeaveOneOut(3)},
    "global time": {"repeats": "keep", "split": GlobalTime(0.2, 0.2)},
    "cold items": {"cold_items": 0.2},
}


@pytest.fixture(scope="module", params=list(OPTIONS))
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Histories of 1 to 30 events with ties and repeats; genres of none to three."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("ragged")
    events = [
        (user, int(rng.integers(ITEMS)) + 1, 3.5, 10**9 + int(rng.integers(60)))
        for user in range(USERS)
        for _ in range(int(rng.integers(1, 30)))
    ]
    genres = ["(no genres listed)", "Drama", "Drama|War", "Crime|Drama|War"]
    movies = {item: (f"Movie {item} ({1960 + item})", genres[item % 4]) for item in range(1, ITEMS + 1)}
    prepare(MovieLens(write_movielens(folder / "raw", events, movies)), folder / "data", **OPTIONS[request.param])
    return Dataset(folder / "data")


def events_of(dataset: Dataset, user: int) -> tuple[list[int], list[int]]:
    own = slice(int(dataset.offsets[user]), int(dataset.offsets[user + 1]))
    return dataset.items[own].tolist(), dataset.times[own].tolist()


def target_of(dataset: Dataset, user: int, split: str) -> int | None:
    """The place of a user's target among the user's events."""
    start, end = int(dataset.offsets[user]), int(dataset.offsets[user + 1])
    train, val = int(dataset.train_ends[user]) - start, int(dataset.val_ends[user]) - start
    if split == "val":
        return train if train < val else None
    return val if val < end - start else None


def rows(padded: Padded) -> list[list[int]]:
    """Items without the padding, which must be 0."""
    for items, times, length in zip(padded.items, padded.times, padded.lengths, strict=True):
        assert not items[length:].any()
        assert not times[length:].any()
    return [row[:length].tolist() for row, length in zip(padded.items, padded.lengths, strict=True)]


@pytest.mark.parametrize("split", ["val", "test"])
def test_users_of_a_split_are_those_with_a_target(dataset: Dataset, split: Any) -> None:
    want = [user for user in range(dataset.num_users) if target_of(dataset, user, split) is not None]
    assert dataset.users(split).tolist() == want
    assert 0 < len(want) < dataset.num_users, "the world must have users of both sorts"


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("length", [1, 4, 1000])
def test_histories_targets_and_times_equal_a_loop(dataset: Dataset, split: Any, length: int) -> None:
    users = np.random.default_rng(0).permutation(dataset.users(split))
    padded = dataset.histories(users, split, length)
    items, times, targets, moments = [], [], [], []
    for user in users:
        happened, when = events_of(dataset, user)
        place = target_of(dataset, user, split)
        assert place is not None
        items.append(happened[:place][-length:])
        times.append(when[:place][-length:])
        targets.append(happened[place])
        moments.append(when[place])
    assert rows(padded) == items
    assert [row[:n].tolist() for row, n in zip(padded.times, padded.lengths, strict=True)] == times
    assert padded.items.shape[1] == max(1, *map(len, items)), "cut to the longest"
    assert dataset.targets(users, split).tolist() == targets
    assert dataset.request_times(users, split).tolist() == moments


# --- several targets of a user


def val_targets(dataset: Dataset, newest: int | None, gap: int = 0) -> list[tuple[int, int]]:
    """User and place of every validation event that is not its user's first and late enough, by a loop."""
    found = []
    for user in range(dataset.num_users):
        start, train, val = (int(a[user]) for a in (dataset.offsets, dataset.train_ends, dataset.val_ends))
        late = [place for place in range(start + 1, val) if dataset.times[place] - dataset.times[place - 1] >= gap]
        own = [(user, place) for place in late if place >= train]
        found += own if newest is None else own[-newest:]
    return found


@pytest.mark.parametrize("newest", [None, 1, 2, 100])
def test_validation_targets_equal_a_loop(dataset: Dataset, newest: int | None) -> None:
    users, ends = dataset.val_targets(newest)
    assert list(zip(users.tolist(), ends.tolist(), strict=True)) == val_targets(dataset, newest)
    most = np.bincount(users).max()
    assert (most > 1) == (newest != 1 and dataset.protocol.get("val") != 1), "the world must show both cases"


@pytest.mark.parametrize("newest", [None, 1, 2])
def test_validation_targets_after_a_gap_equal_a_loop(dataset: Dataset, newest: int | None) -> None:
    every = dataset.val_targets()[1]
    gap = int(np.quantile(dataset.times[every] - dataset.times[every - 1], 0.6)) + 1
    users, ends = dataset.val_targets(newest, gap)
    assert list(zip(users.tolist(), ends.tolist(), strict=True)) == val_targets(dataset, newest, gap)
    assert 0 < len(users) < len(every)


def test_a_first_event_is_no_target(tmp_path: Path) -> None:
    """Before it there is nothing to recommend by."""
    events = [(1, 1, 20), (1, 2, 21), (1, 3, 22), (1, 4, 31), (2, 1, 5), (2, 2, 20), (2, 3, 33), (3, 1, 25), (3, 2, 40)]
    rows = "".join(f"{user},{item},{time}\n" for user, item, time in events)
    (tmp_path / "events.csv").write_text(f"user_id,item_id,timestamp\n{rows}")
    prepare(Table(tmp_path / "events.csv"), tmp_path / "data", split=GlobalTime(val=20, test=30))
    dataset = Dataset(tmp_path / "data")
    assert dataset.users("val").tolist() == [0, 1, 2]
    for newest, places_of in ((None, [1, 2, 5]), (2, [1, 2, 5]), (1, [2, 5])):
        users, ends = dataset.val_targets(newest)
        assert ends.tolist() == places_of
        assert users.tolist() == [0] * (len(ends) - 1) + [1]


def test_each_of_several_targets_has_the_history_before_it(dataset: Dataset) -> None:
    users, ends = dataset.val_targets()
    padded, known = dataset.histories(users, ends, 5), dataset.filtered_items(users, ends)
    histories, targets, moments = rows(padded), dataset.targets(users, ends), dataset.request_times(users, ends)
    for row, (user, end) in enumerate(zip(users.tolist(), ends.tolist(), strict=True)):
        items, times = events_of(dataset, user)
        place = end - int(dataset.offsets[user])
        assert place >= 1
        assert histories[row] == items[:place][-5:]
        assert (targets[row], moments[row]) == (items[place], times[place])
        met = items[:place] if dataset.seen_rule == "filter" else []
        assert known.values[known.offsets[row] : known.offsets[row + 1]].tolist() == met


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_place_says_the_same_as_the_name_of_its_part(dataset: Dataset, split: Any) -> None:
    users = dataset.users(split)
    ends = dataset.target_indices(split)[users]
    for one, other in zip(dataset.histories(users, split, 4)[:3], dataset.histories(users, ends, 4)[:3], strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(dataset.filtered_items(users, split), dataset.filtered_items(users, ends), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(dataset.targets(users, split), dataset.targets(users, ends))


def test_the_newest_events_are_told_newest_first_with_their_ages() -> None:
    padded = Padded(
        np.array([[7, 8, 9], [4, 0, 0], [0, 0, 0]]),
        np.array([[10, 20, 50], [90, 0, 0], [0, 0, 0]]),
        np.array([3, 1, 0]),
    )
    assert newest_first(padded.items, padded.lengths, 2).tolist() == [[9, 8], [4, 0], [0, 0]]
    assert newest_first(padded.items, padded.lengths, 5).tolist() == [[9, 8, 7, 0, 0], [4, 0, 0, 0, 0], [0] * 5]
    items, ages = recent_events(padded, np.array([60, 80, 99]), 4, has_time=True)
    assert items.tolist() == [[9, 8, 7, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    want = [[10, 40, 50, 0], [0, 0, 0, 0], [0, 0, 0, 0]]  # an event after the request is of age 0
    assert np.expm1(ages.numpy()) == pytest.approx(np.array(want), rel=1e-5)
    assert not recent_events(padded, np.array([60, 80, 99]), 4, has_time=False)[1].any(), "an order has no ages"
    items, ages = recent_events(padded, np.array([60, 80, 99]), 0, has_time=True)
    assert items.shape == ages.shape == (3, 0)


def test_the_whole_history_serves(dataset: Dataset) -> None:
    users = np.arange(dataset.num_users)
    assert rows(dataset.histories(users, "all", 7)) == [events_of(dataset, user)[0][-7:] for user in users]
    assert rows(dataset.histories(users[:0], "all", 7)) == []


@pytest.mark.parametrize("split", ["val", "test", "all"])
def test_known_equals_a_loop(dataset: Dataset, split: Any) -> None:
    users = np.arange(dataset.num_users) if split == "all" else dataset.users(split)[::-1]
    seen, known = dataset.seen(users, split), dataset.filtered_items(users, split)
    assert seen.rows.tolist() == sorted(seen.rows.tolist())
    repeated = 0
    for row, user in enumerate(users):
        items, _ = events_of(dataset, user)
        place = None if split == "all" else target_of(dataset, user, split)
        met = items[:place]
        assert seen.values[seen.offsets[row] : seen.offsets[row + 1]].tolist() == met
        repeated += place is not None and items[place] in met
    if dataset.seen_rule == "filter":
        assert np.array_equal(known.values, seen.values)
        assert np.array_equal(known.offsets, seen.offsets)
    else:  # a target can be a seen item, so none is filtered
        assert not len(known.values)
        assert known.offsets.tolist() == [0] * (len(users) + 1)
    if split != "all":
        assert (repeated > 0) == (dataset.protocol["repeats"] == "keep"), "the world must show both cases"


def test_train_counts_and_cold_items(dataset: Dataset) -> None:
    counts = np.zeros(dataset.num_items + 1, dtype=int)
    for user in range(dataset.num_users):
        start, end = int(dataset.offsets[user]), int(dataset.train_ends[user])
        for item in dataset.items[start:end]:
            counts[item] += 1
    assert dataset.train_counts.tolist() == counts.tolist()
    assert not counts[dataset.cold].any()
    assert dataset.cold.any() == bool(dataset.protocol["cold_items"])


def test_features_are_padded_with_unknown(dataset: Dataset) -> None:
    genres, decade = sorted(dataset.item_features, key=lambda feature: -len(feature["name"]))
    assert (genres["name"], genres["kind"], genres["size"]) == ("genres", "multi", 4)  # unknown, Crime, Drama, War
    assert (decade["name"], decade["kind"]) == ("decade", "categorical")
    names = {1: "Crime", 2: "Drama", 3: "War"}
    import polars as pl

    raw = pl.read_parquet(dataset.path / "items.parquet")["item_id"].to_list()
    expected = [[], ["Drama"], ["Drama", "War"], ["Crime", "Drama", "War"]]
    assert genres["values"].shape == (dataset.num_items + 1, 3)
    for item, raw_id in enumerate(raw, start=1):
        codes = genres["values"][item]
        assert [names[code] for code in codes if code] == expected[raw_id % 4]
    assert not genres["values"][0].any()
    assert decade["values"].shape == (dataset.num_items + 1,)
    assert len(set(decade["values"][1:])) == 3  # pre-1970, 1970s and 1980s


def test_what_is_there_is_memory_mapped(dataset: Dataset) -> None:
    assert isinstance(dataset.items, np.memmap)
    assert isinstance(dataset.times, np.memmap)


# --- windows


def test_every_event_but_a_users_first_is_a_target_exactly_once() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        sizes = rng.integers(0, rng.integers(1, 40), size=rng.integers(1, 12))
        withheld = rng.integers(0, 4, size=len(sizes))  # events after the train end
        starts = np.concatenate([[0], np.cumsum(sizes + withheld)])[:-1] + rng.integers(5)
        ends = starts + sizes
        length = int(rng.integers(1, 12))
        first, last = windows(starts, ends, length)

        asked = np.concatenate([np.arange(a + 1, b) for a, b in zip(first, last, strict=True)] or [np.zeros(0, int)])
        want = np.concatenate([np.arange(a + 1, b) for a, b in zip(starts, ends, strict=True)])
        assert sorted(asked.tolist()) == want.tolist(), (
            "each event once, none of another user, none after the train end"
        )
        owner = np.searchsorted(starts, first, side="right") - 1
        assert (first >= starts[owner]).all(), "a window starts with its user"
        assert (last <= ends[owner]).all(), "a window ends before the train end"
        assert (last - first >= 2).all(), "no window without a question"
        assert (last - first <= length + 1).all()
        assert np.diff(owner).min(initial=0) >= 0
        short = last - first < length + 1
        assert (first[short] == starts[owner[short]]).all(), "only the oldest window may be short"


def test_windows_are_full_from_the_newest_event_back() -> None:
    first, last = windows(np.array([10, 30, 50]), np.array([18, 31, 50]), 3)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [(14, 18), (11, 15), (10, 12)]


# --- requests


def padded_of(*times: list[int]) -> Padded:
    width = max(map(len, times))
    filled = np.array([[*row, *[0] * (width - len(row))] for row in times])
    return Padded(np.where(filled > 0, 1, 0), filled, np.array(list(map(len, times))))


def requests(padded: Padded, mode: RequestTime, target: np.ndarray | None) -> np.ndarray:
    told = as_history(padded, mode, target).request
    assert told is not None
    return told.numpy()


def test_requests_none_last_event_and_target() -> None:
    padded, target = padded_of([10, 20, 40], [5], []), np.array([70, 6, 9])
    assert as_history(padded, "none", target).request is None
    assert requests(padded, "last_event", target).tolist() == [[10, 20, 40], [5, 0, 0], [0, 0, 0]]
    told = requests(padded, "target", target)
    assert told[0].tolist() == [20, 40, 70]
    assert told[1, 0] == 6
    assert told[2, 0] == 9
    untold = requests(padded, "target", None)  # what comes after the last place is only ever an answer
    assert untold[0].tolist() == [20, 40, 40]
    assert untold[1, 0] == 5


def test_requests_at_the_target_equal_a_loop(dataset: Dataset) -> None:
    users = dataset.users("test")
    padded = dataset.histories(users, "test", 6)
    told = requests(padded, "target", dataset.request_times(users, "test"))
    for row, user in enumerate(users):
        place = target_of(dataset, user, "test")
        assert place is not None
        times = events_of(dataset, user)[1]
        length = min(place, 6)
        assert told[row, :length].tolist() == times[place - length + 1 : place + 1]


def test_request_time_needs_real_times(tmp_path: Path, dataset: Dataset) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"1,{item}\n" for item in range(5)))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    timeless = Dataset(tmp_path / "data")
    assert not timeless.has_time
    timeless.check_request_time("none")
    for wish in ("last_event", "target"):
        with pytest.raises(ValueError, match=f"request_time is '{wish}' but .* has an order and no"):
            timeless.check_request_time(wish)
        dataset.check_request_time(wish)


# --- the gathers themselves


def test_spans_and_places_equal_a_loop(rng: np.random.Generator) -> None:
    for _ in range(50):
        starts = rng.integers(0, 50, size=rng.integers(1, 9))
        ends = starts + rng.integers(0, 6, size=len(starts))
        flat = spans(starts, ends)
        want = [list(range(a, b)) for a, b in zip(starts, ends, strict=True)]
        assert flat.values.tolist() == [index for row in want for index in row]
        assert flat.rows.tolist() == [row for row, own in enumerate(want) for _ in own]
        index, real = padded_indices(starts, ends)
        assert [index[row][real[row]].tolist() for row in range(len(want))] == want
        assert not index[~real].any()
        assert index.shape[1] == max(1, *map(len, want))


def test_nothing_to_gather_from_is_padding() -> None:
    empty = np.zeros(0, dtype=np.int64)
    padded = left_aligned(empty, empty, np.array([0, 0]), np.array([0, 0]))
    assert padded.items.tolist() == padded.times.tolist() == [[0], [0]]
    assert padded.lengths.tolist() == [0, 0]


def test_a_folder_without_a_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run: recsys prepare-data --config CONFIG --output"):
        Dataset(tmp_path)
