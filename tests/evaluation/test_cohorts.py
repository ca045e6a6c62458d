"""Cohorts: every user is in one group of each kind, and the groups are what their names say."""

from pathlib import Path

import numpy as np
import pytest
from pipeline_fixtures import Run
from worlds import Event, write_movielens

from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens, Table
from recsys2stage.evaluation.cohorts import age_cohorts, cohorts, gap_cohorts, history_cohorts, popularity_cohorts
from recsys2stage.evaluation.evaluate import summarise
from recsys2stage.metrics import compute_metrics

DAY = 86_400


@pytest.fixture(scope="module")
def dataset(trained: Run) -> Dataset:
    return Dataset(trained.data)


def test_cohorts_partition_the_users(dataset: Dataset, rng: np.random.Generator) -> None:
    users = dataset.users("test")
    ranks = rng.integers(1, 30, len(users))
    report = summarise(dataset, {"retriever": ranks}, users, "test", 20, seed=0)
    assert list(report["cohorts"]) == list(cohorts(dataset, users, "test"))
    for kind in (history_cohorts, popularity_cohorts, gap_cohorts, age_cohorts):
        for split in ("val", "test"):
            of = dataset.users(split)
            assert (sum(member.astype(int) for _, member in kind(dataset, of, split)) == 1).all()
    for groups in report["cohorts"].values():
        assert sum(group["users"] for group in groups.values()) == len(users)
        mean = sum(group["users"] * group["retriever"]["ndcg@10"] for group in groups.values()) / len(users)
        assert mean == pytest.approx(compute_metrics(ranks)["ndcg@10"].mean())


def test_cohorts_are_named_after_what_is_in_them(dataset: Dataset) -> None:
    users = dataset.users("test")
    lengths = dataset.target_indices("test")[users] - dataset.offsets[users]
    for label, member in history_cohorts(dataset, users, "test"):
        low, high = map(int, label.removesuffix(" events").split("-"))
        assert member.any()
        assert lengths[member].min() >= low
        assert lengths[member].max() <= high
    counts = dataset.train_counts[dataset.targets(users, "test")]
    for label, member in popularity_cohorts(dataset, users, "test"):
        if member.any() and "-" in label:
            low, high = map(int, label.removesuffix(" events").split("-"))
            assert low <= counts[member].min() <= counts[member].max() <= high


def test_users_of_one_length_are_one_cohort(cycle: Path) -> None:
    dataset = Dataset(cycle)
    users = dataset.users("test")
    ((label, member),) = history_cohorts(dataset, users, "test")
    assert label == "11 events"
    assert member.all()


def found(groups: list[tuple[str, np.ndarray]]) -> list[str]:
    """The label of each user."""
    return [next(label for label, member in groups if member[row]) for row in range(len(groups[0][1]))]


GAPS = [
    *((0, "the same second"), (1, "under a minute"), (59, "under a minute")),
    *((60, "a minute to an hour"), (3_599, "a minute to an hour")),
    *((3_600, "an hour to a day"), (DAY - 1, "an hour to a day"), (DAY, "a day to a month")),
    *((30 * DAY - 1, "a day to a month"), (30 * DAY, "a month or longer"), (4_000 * DAY, "a month or longer")),
]


def test_the_gap_is_that_from_the_newest_event_to_the_target(tmp_path: Path) -> None:
    """User u waits GAPS[u] before the last event."""
    events: list[Event] = []
    for user, (gap, _) in enumerate(GAPS):
        times = [10**9, 10**9 + 100 * DAY, 10**9 + 500 * DAY, 10**9 + 500 * DAY + gap]
        events += [(user, 1 + (user + step) % 7, 4.0, time) for step, time in enumerate(times)]
    prepare(MovieLens(write_movielens(tmp_path / "raw", events)), tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    users = dataset.users("test")
    assert found(list(gap_cohorts(dataset, users, "test"))) == [label for _, label in GAPS]
    assert set(found(list(gap_cohorts(dataset, users, "val")))) == {"a month or longer"}


def test_who_has_no_event_before_the_target_has_no_gap(tmp_path: Path) -> None:
    events = [(user, item, 4.0, 10**9 + item) for user in range(3) for item in (1, 2)]
    prepare(MovieLens(write_movielens(tmp_path / "raw", events)), tmp_path / "data")
    path = tmp_path / "data" / "users.val_end.npy"
    starts = np.load(tmp_path / "data" / "users.offsets.npy")[:-1]
    for name in ("users.train_end.npy", "users.val_end.npy"):
        np.save(path.with_name(name), starts + np.array([0, 1, 1]))
    labels = found(list(gap_cohorts(Dataset(tmp_path / "data"), np.arange(3), "test")))
    assert labels == ["no event before", "under a minute", "under a minute"]


def aged(folder: Path, debut: int, others: int) -> Dataset:
    """User 0 takes item 9 after 1,000 days; user 1 has met it in training at `debut`, user 2 as the last of all."""
    events = [(0, 1, 4.0, 10), (0, 2, 4.0, 20), (0, 3, 4.0, 30), (0, 9, 4.0, 1_000 * DAY)]
    events += [(1, 9, 4.0, debut), *((1, item, 4.0, debut + item) for item in (1, 2, 3))]
    events += [(2, 1, 4.0, 1), (2, 2, 4.0, 2), (2, 3, 4.0, 3), (2, 9, 4.0, others)]
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data")
    return Dataset(folder / "data")


@pytest.mark.parametrize(
    ("before", "label"),
    [
        (-5, "not seen before the request"),
        (0, "not seen before the request"),
        (1, "under a month"),
        (30 * DAY - 1, "under a month"),
        (30 * DAY, "a month to a year"),
        (365 * DAY, "a month to a year"),
        (366 * DAY, "a year or older"),
    ],
)
def test_the_age_of_a_target_is_that_of_its_first_training_event(tmp_path: Path, before: int, label: str) -> None:
    for others in (5, 2_000 * DAY):  # a test event says nothing, whenever it was
        dataset = aged(tmp_path / str(others), 1_000 * DAY - before, others)
        assert found(list(age_cohorts(dataset, np.array([0]), "test"))) == [label]


def test_data_without_times_have_no_cohorts_of_time(tmp_path: Path) -> None:
    lines = ["user_id,item_id", *(f"{user},{(user + step) % 6}" for user in range(5) for step in range(4))]
    (tmp_path / "events.csv").write_text("\n".join([*lines, ""]))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    assert not dataset.has_time
    assert list(cohorts(dataset, dataset.users("test"), "test")) == ["history_length", "target_popularity"]
