"""Who trains, validates and tests, on worlds small enough to mark by hand."""

import numpy as np
import pytest

from recsys2stage.split import GlobalTime, LeaveOneOut, Split

TIMES = np.array([10, 20, 30, 40, 5, 15, 7, 35, 36, 37])
OFFSETS = np.array([0, 4, 6, 7, 10])  # users of 4, 2, 1 and 3 events


def marks(split: Split, times: np.ndarray = TIMES, offsets: np.ndarray = OFFSETS) -> list[str]:
    """One word a user: t train, v validation, x test, an event a letter."""
    train_end, val_end = split.ends(times, offsets)
    runs = zip(offsets[:-1], train_end, val_end, offsets[1:], strict=True)
    return ["t" * (b - a) + "v" * (d - b) + "x" * (e - d) for a, b, d, e in runs]


def test_leave_one_out_takes_the_last_two_of_those_who_have_three() -> None:
    assert marks(LeaveOneOut()) == ["ttvx", "tt", "t", "tvx"]


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
    for split in (LeaveOneOut(), GlobalTime(), GlobalTime(val=20, test=200), GlobalTime(val=1, test=2)):
        words = marks(split, times, offsets)
        assert [len(word) for word in words] == lengths.tolist()
        assert all(word == "".join(sorted(word, key="tvx".index)) for word in words)


@pytest.mark.parametrize(("val", "test"), [(0.6, 0.5), (0, 0.1), (100, 50), (0.1, 100), (-1, 0.5)])
def test_cuts_that_make_no_sense_are_refused_with_their_values(val: float, test: float) -> None:
    with pytest.raises(ValueError, match=f"val={val}, test={test}"):
        GlobalTime(val, test)


def test_describe_says_name_and_options() -> None:
    assert LeaveOneOut().describe() == {"split": "LeaveOneOut"}
    assert GlobalTime(0.1, 0.2).describe() == {"split": "GlobalTime", "val": 0.1, "test": 0.2}
