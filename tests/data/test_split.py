"""Who trains, validates and tests, on worlds small enough to mark by hand."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Table
from recsys2stage.data.split import Baskets, GlobalTime, LeaveOneOut, Marked, SessionStarts, Split, basket_starts

TIMES = np.array([10, 20, 30, 40, 5, 15, 7, 35, 36, 37])
OFFSETS = np.array([0, 4, 6, 7, 10])  # users of 4, 2, 1 and 3 events


def marks(split: Split, times: np.ndarray = TIMES, offsets: np.ndarray = OFFSETS) -> list[str]:
    """One word a user: t train, v validation, x test, an event a letter."""
    train_end, val_end = split.ends(times, offsets)
    runs = zip(offsets[:-1], train_end, val_end, offsets[1:], strict=True)
    return ["t" * (b - a) + "v" * (d - b) + "x" * (e - d) for a, b, d, e in runs]


def test_leave_one_out_takes_the_last_two_of_those_who_have_three() -> None:
    assert marks(LeaveOneOut()) == ["ttvx", "tt", "t", "tvx"]


@pytest.mark.parametrize(
    ("val", "words"),
    [
        (1, ["tttttvx", "ttvx", "tt", "t", "tvx"]),
        (2, ["ttttvvx", "tvvx", "tt", "t", "tvx"]),
        (3, ["tttvvvx", "tvvx", "tt", "t", "tvx"]),
        (99, ["tvvvvvx", "tvvx", "tt", "t", "tvx"]),
    ],
)
def test_more_events_may_validate_but_the_first_of_each_user_trains(val: int, words: list[str]) -> None:
    offsets = np.array([0, 7, 11, 13, 14, 17])
    assert marks(LeaveOneOut(val), np.arange(17), offsets) == words


def test_the_test_event_is_the_same_however_many_validate() -> None:
    offsets = np.concatenate([[0], np.cumsum(np.random.default_rng(0).integers(1, 12, 200))])
    times, lengths = np.arange(offsets[-1]), np.diff(offsets)
    one = LeaveOneOut().ends(times, offsets)
    for val in (2, 3, 5, 50):
        train_end, val_end = LeaveOneOut(val).ends(times, offsets)
        assert np.array_equal(val_end, one[1])
        assert (val_end == offsets[1:] - (lengths >= 3)).all(), "the last event, of those who have three"
        assert (train_end > offsets[:-1]).all(), "everybody trains"
        assert np.array_equal(val_end - train_end, np.where(lengths >= 3, np.minimum(val, lengths - 2), 0))


@pytest.mark.parametrize("val", [0, -1])
def test_somebody_must_validate(val: int) -> None:
    with pytest.raises(ValueError, match=f"val is {val}, expected at least 1"):
        LeaveOneOut(val)


def test_global_time_cuts_all_users_at_the_same_moments() -> None:
    assert marks(GlobalTime(val=30, test=36)) == ["ttvx", "tt", "t", "vxx"]


def test_shares_count_the_latest_events() -> None:
    # the latest three of ten are 36, 37, 40; the two before them 30 and 35
    assert marks(GlobalTime(val=0.2, test=0.3)) == ["ttvx", "tt", "t", "vxx"]


def test_simultaneous_events_stay_on_one_side_of_the_cut() -> None:
    assert marks(GlobalTime(val=0.25, test=0.25), np.array([1, 2, 2, 2]), np.array([0, 2, 4])) == ["tx", "xx"]


def test_every_event_has_one_mark_whatever_the_split() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([np.sort(rng.integers(0, 100, length)) for length in lengths])
    for split in (LeaveOneOut(), LeaveOneOut(3), GlobalTime(), GlobalTime(val=20, test=200), GlobalTime(val=1, test=2)):
        words = marks(split, times, offsets)
        assert [len(word) for word in words] == lengths.tolist()
        assert all(word == "".join(sorted(word, key="tvx".index)) for word in words)


@pytest.mark.parametrize(("val", "test"), [(0.6, 0.5), (0, 0.1), (100, 50), (0.1, 100), (-1, 0.5)])
def test_cuts_that_make_no_sense_are_refused_with_their_values(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=f"val={val}, test={test}"):
        GlobalTime(val, test)


def test_describe_says_name_and_options() -> None:
    assert LeaveOneOut().describe() == {"split": "LeaveOneOut", "val": 1}
    assert LeaveOneOut(4).describe() == {"split": "LeaveOneOut", "val": 4}
    assert GlobalTime(0.1, 0.2).describe() == {"split": "GlobalTime", "val": 0.1, "test": 0.2}


# several targets per user

HOUR = 3_600


def log(words: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and offsets of users, a word each: s an event two hours after the one before, . a minute, = no time."""
    waits = {"s": 2 * HOUR, ".": 60, "=": 0}
    times = [np.cumsum([waits[letter] for letter in word]) for word in words.split()]
    return np.concatenate(times), np.concatenate([[0], np.cumsum([len(word) for word in words.split()])])


def parts_of(split: Split, words: str) -> list[str]:
    """A word per user: t train; v and x validation and test targets; - and + the other events of these parts."""
    times, offsets = log(words)
    listed = split.targets(times, offsets)
    assert listed is not None
    letters = np.array(list("".join(marks(split, times, offsets))))
    letters[letters == "v"], letters[letters == "x"] = "-", "+"
    for events, part, letter in zip(listed, "-+", "vx", strict=True):
        assert (np.diff(events) > 0).all()
        assert (letters[events] == part).all(), "a target lies in its own part"
        letters[events] = letter
    return ["".join(letters[a:b]) for a, b in pairwise(offsets)]


def test_the_newest_session_beginnings_test_and_those_before_them_validate() -> None:
    log_of = "s..s=s.s.. s.s.s ss s.. s =ss"
    assert parts_of(SessionStarts(HOUR, test=1, val=1), log_of) == ["tttttv-x++", "ttv-x", "tx", "ttt", "t", "tvx"]
    assert parts_of(SessionStarts(HOUR, test=2, val=1), log_of) == ["tttv-x+x++", "ttx+x", "tx", "ttt", "t", "txx"]
    assert parts_of(SessionStarts(HOUR, test=1, val=9), log_of) == ["tttv-v-x++", "ttv-x", "tx", "ttt", "t", "tvx"]
    assert parts_of(SessionStarts(HOUR, test=9, val=9), log_of) == ["tttx+x+x++", "ttx+x", "tx", "ttt", "t", "txx"]


def test_a_session_begins_after_the_gap_and_not_a_second_before() -> None:
    times, offsets = np.array([0, HOUR, 2 * HOUR - 1, 9 * HOUR, 0, 9 * HOUR]), np.array([0, 4, 6])
    val, test = SessionStarts(HOUR, test=1, val=5).targets(times, offsets)
    assert (val.tolist(), test.tolist()) == ([1], [3, 5]), "event 4 is another user's first"


def test_the_last_basket_tests_whole_and_those_before_validate() -> None:
    log_of = "s=s==s= s=. s= s s.s="
    assert parts_of(Baskets(), log_of) == ["ttvvvxx", "ttx", "tt", "t", "tvxx"]
    assert parts_of(Baskets(5), log_of) == ["ttvvvxx", "ttx", "tt", "t", "tvxx"]
    assert parts_of(Baskets(2), "sss=s") == ["tvvvx"]
    assert parts_of(Baskets(1), "sss=s") == ["ttvvx"]
    times, offsets = log("s=s s==")
    assert basket_starts(times, offsets).tolist() == [0, 0, 2, 3, 3, 3]


@pytest.mark.parametrize("split", [SessionStarts(40, 2, 3), SessionStarts(40, 1, 1), Baskets(), Baskets(3)])
def test_targets_lie_in_their_part_and_have_a_history(split: Split) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 15, 80)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    times = np.concatenate([10 * np.sort(rng.integers(0, 30, length)) for length in lengths])
    train_end, val_end = split.ends(times, offsets)
    listed = split.targets(times, offsets)
    assert listed is not None
    assert (train_end > offsets[:-1]).all(), "everybody trains"
    for events, starts, ends in zip(listed, (train_end, val_end), (val_end, offsets[1:]), strict=True):
        users = np.searchsorted(offsets, events, side="right") - 1
        assert 20 < len(np.unique(users)) <= len(users)
        assert np.array_equal(np.unique(users), np.flatnonzero(starts < ends)), "a part begins with a target"
        assert (basket_starts(times, offsets)[events] > offsets[users]).all() or not split.baskets
        assert np.isin(starts[starts < ends], events).all()


@pytest.mark.parametrize("name", ["gap", "test", "val"])
def test_session_starts_need_positive_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1; set {name} to"):
        SessionStarts(**{name: 0})


# marks


def marked(words: str, times: list[int]) -> tuple[list[int], list[int]]:
    """The ends for users of the words' letters: t train, v validation, x test."""
    parts = np.array(["tvx".index(letter) for letter in words.replace(" ", "")], dtype=np.int8)
    offsets = np.concatenate([[0], np.cumsum([len(word) for word in words.split()])])
    train_end, val_end = Marked().ends(np.array(times), offsets, parts)
    return train_end.tolist(), val_end.tolist()


def test_marked_events_do_what_they_are_marked_for() -> None:
    assert marked("ttvx tt vv xx tvvx t", list(range(15))) == ([2, 6, 6, 8, 11, 15], [3, 6, 8, 8, 13, 15])


def test_marks_against_the_order_of_time_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 of 4 users have events marked train, val, test in another order"):
        marked("tvt ttv xvtx t", list(range(11)))


def test_events_without_marks_cannot_be_split_by_them() -> None:
    with pytest.raises(ValueError, match="the events are not marked; name the column of marks"):
        Marked().ends(TIMES, OFFSETS)


@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_marks_come_from_a_column_and_decide_between_equal_times(tmp_path: Path, name: str) -> None:
    rows = [
        *((1, 10, 5, "val"), (1, 11, 5, "train"), (1, 12, 3, "train")),  # the file has the later one first
        *((2, 10, 1, "train"), (2, 12, 9, "test"), (2, 11, 9, "val")),
        (3, 13, 4, "train"),
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "use"], orient="row")
    path = tmp_path / name
    frame.write_csv(path) if path.suffix == ".csv" else frame.write_parquet(path)
    prepare(Table(path, part="use"), tmp_path / "data", split=Marked())
    dataset = Dataset(tmp_path / "data")
    ids = pl.read_parquet(dataset.path / "items.parquet")["item_id"].to_list()
    assert [ids[item - 1] for item in dataset.items.tolist()] == [12, 11, 10, 10, 11, 12, 13]
    assert dataset.train_ends.tolist() == [2, 4, 7]
    assert dataset.val_ends.tolist() == [3, 5, 7]
    assert dataset.protocol["split"] == "Marked"
    with pytest.raises(ValueError, match="use split: Marked, or leave out part"):
        prepare(Table(path, part="use"), tmp_path / "other")
    with pytest.raises(ValueError, match="the events are not marked"):
        prepare(Table(path), tmp_path / "other", split=Marked())
    frame.with_columns(use=pl.lit("valid")).write_parquet(tmp_path / "bad.parquet")
    with pytest.raises(
        ValueError, match="column 'use': none of the 7 values is train or val or test, for example 'valid'"
    ):
        prepare(Table(tmp_path / "bad.parquet", part="use"), tmp_path / "other", split=Marked())
