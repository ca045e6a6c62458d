"""What people of one kind take: every number equals a loop over training events."""

import math
from pathlib import Path

import numpy as np
import pytest

from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, SideTable, Table
from recsys2stage.ranking.signals import Demographics, Requests

USERS, ITEMS = 30, 12


def prepared(folder: Path, last: int = 0, users: bool = True) -> Dataset:
    """Users of two kinds and some of none; those of kind x take even items. `last` shifts each user's test item."""
    rng = np.random.default_rng(5)
    events = ["user_id,item_id,timestamp"]
    for user in range(USERS):
        taken = rng.permutation(np.arange(1, ITEMS + 1))[: 4 + user % 4]
        taken = np.where((user % 3 == 0) & (taken % 2 == 1), taken + 1, taken).clip(max=ITEMS)
        taken[-1] = (taken[-1] + last - 1) % ITEMS + 1
        events += [f"{user},{item},{1_000 + place}" for place, item in enumerate(taken)]
    people = ["user_id,kind,age", *(f"{user},{('x', 'y', '')[user % 3]},{20 + user}" for user in range(USERS)), ""]
    folder.mkdir()
    (folder / "events.csv").write_text("\n".join([*events, ""]))
    (folder / "users.csv").write_text("\n".join(people))
    told = {"kind": Feature("categorical"), "age": Feature("numeric")}
    source = Table(folder / "events.csv", users=SideTable("users.csv", "user_id", told) if users else None)
    prepare(source, folder / "data", repeats="keep")
    return Dataset(folder / "data")


def asked(dataset: Dataset, users: np.ndarray) -> Requests:
    """All items, and one place without, for each user's test."""
    items = np.tile(np.arange(dataset.num_items + 1), (len(users), 1))
    vectors = np.zeros((dataset.num_items + 1, 2), np.float32)
    now = dataset.request_times(users, "test")
    return Requests(items, dataset.histories(users, "test", 50), now, vectors, vectors)


def fitted(dataset: Dataset, alpha: float = 2.0) -> Demographics:
    signal = Demographics(alpha)
    signal.fit(dataset, np.zeros((dataset.num_items + 1, 2), np.float32))
    return signal


def test_numbers_are_those_of_a_loop(tmp_path: Path) -> None:
    dataset = prepared(tmp_path / "world")
    signal, users = fitted(dataset), np.arange(USERS)
    assert signal.names == ("kind_lift",)
    numbers = signal(asked(dataset, users))
    kinds = dataset.user_features[0]["values"]
    events = [
        (kinds[user], dataset.items[place])
        for user in range(USERS)
        for place in range(dataset.offsets[user], dataset.train_ends[user])
    ]
    assert numbers.shape == (USERS, dataset.num_items + 1, 1)
    for user in users:
        for item in range(dataset.num_items + 1):
            n = sum(b == item for _, b in events)
            both = sum((g, b) == (kinds[user], item) for g, b in events)
            share = sum(g == kinds[user] for g, _ in events) / len(events)
            expected = math.log((both + 2) / (n * share + 2)) if n and kinds[user] else 0
            assert numbers[user, item, 0] == pytest.approx(expected, abs=1e-6)
    assert numbers.std() > 0.1


def test_test_events_count_for_nothing(tmp_path: Path) -> None:
    one, other = (prepared(tmp_path / f"world{last}", last) for last in (0, 3))
    assert not np.array_equal(one.items, other.items)
    tables = fitted(one).tables, fitted(other).tables
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0])


def test_people_of_whom_nothing_is_known(tmp_path: Path) -> None:
    dataset = prepared(tmp_path / "world")
    requests = asked(dataset, np.arange(4))
    assert not fitted(dataset)(requests._replace(history=requests.history._replace(user=None))).any()


def test_users_without_features_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no categorical features; declare some when the data are prepared"):
        fitted(prepared(tmp_path / "world", users=False))
    with pytest.raises(ValueError, match=r"alpha is 0\.0, expected a number of events above 0"):
        Demographics(0.0)
