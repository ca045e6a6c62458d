"""Nothing that trains, counts or chooses may know what comes later: alter the later events and compare bytes."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline_fixtures import Run
from worlds import Event, write_movielens

from recsys2stage.baselines import Markov, Popularity
from recsys2stage.dataset import Dataset, Part

USERS, ITEMS = 90, 40
DAY = 86_400
# told of times, ratings and kinds (which are ratings), so that a leak through those of a later event would show, too
TOLD = (
    *("--data.init_args.request_time", "target"),
    *("--model.init_args.encoder.init_args.time", "recsys2stage.times.RequestGap"),
    *("--data.init_args.next_action", "target"),
    *("--model.init_args.inputs", "[RatingEmbedding, ActionEmbedding, NextAction]"),
)


def world() -> list[Event]:
    """Random walks over a small catalogue, every item so frequent that none depends on a single event."""
    rng = np.random.default_rng(0)
    share = np.linspace(2, 1, ITEMS) / np.linspace(2, 1, ITEMS).sum()
    events: list[Event] = []
    for user in range(1, USERS + 1):
        items = 1 + rng.choice(ITEMS, rng.integers(6, 16), replace=False, p=share)
        times = 1_000_000_000 + np.cumsum(rng.integers(100, 3 * DAY, len(items)))
        ratings = rng.integers(1, 11, len(items)) / 2
        rows = zip(items.tolist(), ratings.tolist(), times.tolist(), strict=True)
        events += [(user, item, rating, time) for item, rating, time in rows]
    return events


def altered(events: list[Event], from_end: int) -> list[Event]:
    """Each user's event at this place from the end with another item, another rating and a later time, in order still.

    The new item is one that the user has not met, so no other event becomes a repeat.
    """
    rng = np.random.default_rng(from_end)
    users: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        users[event[0]].append(event)
    for own in users.values():
        user, _, rating, time = own[-from_end]
        new = sorted(set(range(1, ITEMS + 1)) - {event[1] for event in own})
        later = time + 50 if from_end > 1 else time + 1000 * DAY
        own[-from_end] = (user, int(rng.choice(new)), 5.5 - rating, later)
    return [event for own in users.values() for event in own]


def train(folder: Path, events: list[Event], *stages: str) -> Run:
    run = Run(folder)
    run.prepare(write_movielens(folder / "raw", events), "--source.rating_actions", "true")
    run.fit_retriever(*TOLD)
    for stage in stages:
        getattr(run, stage)()
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("base"), world(), "export_index", "mine", "fit_ranker")


@pytest.fixture(scope="module")
def other_tests(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("test"), altered(world(), 1), "export_index", "mine", "fit_ranker")


@pytest.fixture(scope="module")
def other_validation(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("val"), altered(world(), 2), "export_index", "mine")


@pytest.fixture(scope="module")
def other_training(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("train"), altered(world(), 3), "export_index", "mine")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def same_targets(one: Run, other: Run, split: Part) -> np.ndarray:
    first, second = Dataset(one.data), Dataset(other.data)
    users = first.users(split)
    assert len(users) == USERS
    return first.targets(users, split) == second.targets(users, split)


def before(run: Run, split: Part) -> list[bytes]:
    """Every event before the targets of a split: items, times, ratings and kinds."""
    dataset = Dataset(run.data)
    ends = dataset.target_places(split)
    kept = np.concatenate([np.arange(start, end) for start, end in zip(dataset.offsets[:-1], ends, strict=True)])
    arrays = [np.load(run.data / f"events.{name}.npy") for name in ("item", "time", "rating", "action")]
    return [array[kept].tobytes() for array in arrays]


def markov(run: Run) -> list[bytes]:
    table = Markov(Dataset(run.data))
    return [array.tobytes() for array in (table.next, table.counts, table.offsets, table.tie_break)]


def target_counts(run: Run) -> list[bytes]:
    dataset = Dataset(run.data)
    return [dataset.target_counts.tobytes(), dataset.last_times.tobytes()]


def test_the_test_events_really_are_altered(base: Run, other_tests: Run) -> None:
    assert not same_targets(base, other_tests, "test").any()
    assert same_targets(base, other_tests, "val").all()
    one, other = Dataset(base.data), Dataset(other_tests.data)
    users = one.users("test")
    assert (one.request_times(users, "test") < other.request_times(users, "test")).all()
    assert (one.asked(users, "test", "target") != other.asked(users, "test", "target")).all()
    assert one.manifest["split_hash"] != other.manifest["split_hash"]


def test_what_is_prepared_for_training_does_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert before(base, "test") == before(other_tests, "test")
    for name in ("users.offsets.npy", "users.train_end.npy", "users.val_end.npy", "items.cold.npy", "items.parquet"):
        assert (base.data / name).read_bytes() == (other_tests.data / name).read_bytes(), name


def test_counts_and_tables_do_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert Dataset(base.data).train_counts.tobytes() == Dataset(other_tests.data).train_counts.tobytes()
    assert target_counts(base) == target_counts(other_tests)
    assert np.array_equal(Popularity(Dataset(base.data)).counts, Popularity(Dataset(other_tests.data)).counts)
    assert markov(base) == markov(other_tests)


def test_the_retriever_does_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert same_weights(base.retriever, other_tests.retriever)


@pytest.mark.parametrize("name", ["index.npy", "index.json", "popularity.npy", "items.parquet"])
def test_the_index_does_not_know_the_test_events(base: Run, other_tests: Run, name: str) -> None:
    assert (base.index / name).read_bytes() == (other_tests.index / name).read_bytes()


@pytest.mark.parametrize("name", ["candidates.parquet", "states.npy"])
def test_what_is_mined_does_not_know_the_test_events(base: Run, other_tests: Run, name: str) -> None:
    assert (base.candidates / name).read_bytes() == (other_tests.candidates / name).read_bytes()


def test_the_ranker_does_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert same_weights(base.ranker, other_tests.ranker)
    assert same_weights(base.ranker.with_name("last.ckpt"), other_tests.ranker.with_name("last.ckpt"))


def test_the_retrievers_weights_do_not_know_the_validation_events(base: Run, other_validation: Run) -> None:
    assert not same_targets(base, other_validation, "val").any()
    assert same_targets(base, other_validation, "test").all()
    # the last weights: which epoch is the best is chosen by the validation events
    assert same_weights(base.retriever.with_name("last.ckpt"), other_validation.retriever.with_name("last.ckpt"))


def test_counts_and_tables_do_not_know_the_validation_events(base: Run, other_validation: Run) -> None:
    assert before(base, "val") == before(other_validation, "val")
    assert Dataset(base.data).train_counts.tobytes() == Dataset(other_validation.data).train_counts.tobytes()
    assert target_counts(base) == target_counts(other_validation)
    assert markov(base) == markov(other_validation)


def test_what_is_mined_does_know_the_validation_events(base: Run, other_validation: Run) -> None:
    one, other = (run.candidates / "candidates.parquet" for run in (base, other_validation))
    assert one.read_bytes() != other.read_bytes()


def test_everything_does_know_the_training_events(base: Run, other_training: Run) -> None:
    """The other side: were these comparisons blind, this one would fail."""
    assert same_targets(base, other_training, "val").all()
    assert same_targets(base, other_training, "test").all()
    assert before(base, "val") != before(other_training, "val")
    assert not np.array_equal(Dataset(base.data).train_counts, Dataset(other_training.data).train_counts)
    assert target_counts(base) != target_counts(other_training)
    assert markov(base) != markov(other_training)
    assert not same_weights(base.retriever.with_name("last.ckpt"), other_training.retriever.with_name("last.ckpt"))
    for name in ("candidates/candidates.parquet", "candidates/states.npy", "index/index.npy", "index/popularity.npy"):
        assert (base.folder / name).read_bytes() != (other_training.folder / name).read_bytes(), name


def test_the_same_events_give_the_same_bytes_again(base: Run, tmp_path: Path) -> None:
    """Without this the comparisons of equality above could only ever pass by luck, and fail by luck."""
    again = train(tmp_path, world())
    assert same_weights(base.retriever, again.retriever)
