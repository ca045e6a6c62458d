"""Nothing that trains, counts or chooses may know what comes later: alter the later events and compare bytes."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pipeline_fixtures import Run, recsys
from worlds import Event, write_movielens

from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.baselines import EASE, ItemKNN, Markov, Popularity, TransitionGraph
from recsys2stage.options import Part

USERS, ITEMS = 90, 40
DAY = 86_400
VAL = 2  # events of a user that validate: the third and the second from its end
# told of times, ratings and kinds (which are ratings), so that a leak through those of a later event would show, too
TOLD = (
    *("--data.init_args.request_time", "target"),
    *("--model.init_args.encoder.init_args.time", "recsys2stage.retrieval.encoders.times.RequestGap"),
    *("--data.init_args.next_action", "target"),
    *("--model.init_args.inputs", "[RatingEmbedding, ActionEmbedding, NextAction]"),
)


STAGES = ("export_index", "mine_with_signals", "mine_plainly")
MOVIES = {
    item: (f"Movie {item} ({1960 + item})", ("Drama", "War", "Drama|War")[item % 3]) for item in range(1, ITEMS + 1)
}


class Twice(Run):
    """A run that mines a second time, into plain/."""

    def mine_with_signals(self, *words: object) -> None:
        """So few candidates that some are not the index's."""
        super().mine_with_signals("--k", 15, *words)

    def mine_plainly(self) -> None:
        """One target a user, and the index's candidates alone."""
        of = ("--data", self.data, "--index", self.index, "--output", self.folder / "plain", "--k", 20)
        recsys("mine-negatives", *of, "--targets", 1)


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
    run = Twice(folder)
    raw = write_movielens(folder / "raw", events, MOVIES)
    run.prepare(raw, "--source.rating_actions", "true", "--split", "LeaveOneOut", "--split.val", VAL)
    run.fit_retriever(*TOLD)
    for stage in stages:
        getattr(run, stage)()
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("base"), world(), *STAGES, "fit_ranker")


@pytest.fixture(scope="module")
def other_tests(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("test"), altered(world(), 1), *STAGES, "fit_ranker")


@pytest.fixture(scope="module")
def other_validation(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every event that validates is another."""
    return train(tmp_path_factory.mktemp("val"), altered(altered(world(), 2), 3), *STAGES)


@pytest.fixture(scope="module")
def other_training(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tmp_path_factory.mktemp("train"), altered(world(), 4), *STAGES)


@pytest.fixture(scope="module")
def other_newest(base: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The newest event that validates is another, and so is the test's; the index is the same."""
    run = Twice(tmp_path_factory.mktemp("newest"))
    raw = write_movielens(run.folder / "raw", altered(altered(world(), 1), 2), MOVIES)
    run.prepare(raw, "--source.rating_actions", "true", "--split", "LeaveOneOut", "--split.val", VAL)
    shutil.copytree(base.index, run.index)
    manifest = json.loads((run.index / "manifest.json").read_text())
    manifest["split_hash"] = Dataset(run.data).manifest["split_hash"]  # who made the index knew of neither
    (run.index / "manifest.json").write_text(json.dumps(manifest))
    run.mine_with_signals()
    return run


def tables(run: Run) -> dict[str, bytes]:
    """All that the signals have counted."""
    return {file.name: file.read_bytes() for file in sorted((run.candidates / "signals").iterdir())}


def counted(run: Run) -> dict[str, bytes]:
    """Those of them that are counts of training events, whatever the retriever is."""
    described = json.loads((run.candidates / "signals/signals.json").read_text())
    kinds = [signal["class_path"].rpartition(".")[2] for signal in described]
    whole = ("PopularityAsOf", "Transitions", "Ratings")
    return {name: table for name, table in tables(run).items() if name[0].isdigit() and kinds[int(name[0])] in whole}


def rows(run: Run, newest: bool) -> pl.DataFrame:
    """The mined rows of each user's newest validation target, or of the others, but for what is drawn."""
    requests = pl.read_parquet(run.candidates / "requests.parquet").with_row_index("request")
    last = pl.col("place") == pl.col("place").max().over("user")
    chosen = requests.filter(last if newest else ~last).select(pl.col("request").cast(pl.Int32))
    table = pl.read_parquet(run.candidates / "candidates.parquet").filter(pl.col("origin") == "candidate")
    return table.join(chosen, on="request", how="semi")


def same_but_for_rounding(one: pl.DataFrame, other: pl.DataFrame) -> bool:
    """Whether two runs mined the same rows: queries round differently in batches of other histories.

    A near tie may change the order of two candidates, or the last of a list, in one row of a hundred.
    """
    floats = [name for name, kind in one.schema.items() if kind.is_float()]
    both = one.join(other, on=["request", "item"], suffix="_other")
    if len(both) < 0.99 * max(len(one), len(other)):
        return False
    others = [name for name in one.columns if name not in (*floats, "request", "item")]
    alike = [bool((both[name] == both[f"{name}_other"]).mean() >= 0.99) for name in others]
    apart = [np.abs(both[name].to_numpy() - both[f"{name}_other"].to_numpy()) for name in floats]
    near = [
        bool((gap <= 1e-4 * np.maximum(1, np.abs(both[name].to_numpy()))).mean() >= 0.99)
        for name, gap in zip(floats, apart, strict=True)
    ]
    return all(alike) and all(near)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def same_weights(one: Path, other: Path) -> bool:
    return same_tensors(weights(one), weights(other))


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
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
    ends = dataset.target_indices(split)
    kept = np.concatenate([np.arange(start, end) for start, end in zip(dataset.offsets[:-1], ends, strict=True)])
    arrays = [np.load(run.data / f"events.{name}.npy") for name in ("item", "time", "rating", "action")]
    return [array[kept].tobytes() for array in arrays]


def baselines(run: Run) -> list[bytes]:
    """All that the baselines have counted."""
    dataset = Dataset(run.data)
    markov, counted = Markov().fit(dataset), [kind().fit(dataset) for kind in (TransitionGraph, ItemKNN, EASE)]
    tables = [table for baseline in counted for table in baseline.signal.tables.values()]
    return [array.tobytes() for array in (markov.next, markov.counts, markov.offsets, markov.popularity, *tables)]


def target_counts(run: Run) -> list[bytes]:
    dataset = Dataset(run.data)
    return [dataset.target_counts.tobytes(), dataset.last_times.tobytes()]


def test_the_test_events_really_are_altered(base: Run, other_tests: Run) -> None:
    assert not same_targets(base, other_tests, "test").any()
    assert same_targets(base, other_tests, "val").all()
    one, other = Dataset(base.data), Dataset(other_tests.data)
    users = one.users("test")
    assert (one.request_times(users, "test") < other.request_times(users, "test")).all()
    assert (one.target_action(users, "test", "target") != other.target_action(users, "test", "target")).all()
    assert one.manifest["split_hash"] != other.manifest["split_hash"]


def test_what_is_prepared_for_training_does_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert before(base, "test") == before(other_tests, "test")
    for name in ("users.offsets.npy", "users.train_end.npy", "users.val_end.npy", "items.cold.npy", "items.parquet"):
        assert (base.data / name).read_bytes() == (other_tests.data / name).read_bytes(), name


def test_counts_and_tables_do_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert Dataset(base.data).train_counts.tobytes() == Dataset(other_tests.data).train_counts.tobytes()
    assert target_counts(base) == target_counts(other_tests)
    assert np.array_equal(*(Popularity().fit(Dataset(run.data)).popularity for run in (base, other_tests)))
    assert baselines(base) == baselines(other_tests)


def test_the_retriever_does_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert same_weights(base.retriever, other_tests.retriever)


@pytest.mark.parametrize("name", ["index.npy", "index.json", "popularity.npy", "items.parquet"])
def test_the_index_does_not_know_the_test_events(base: Run, other_tests: Run, name: str) -> None:
    assert (base.index / name).read_bytes() == (other_tests.index / name).read_bytes()


@pytest.mark.parametrize("name", ["candidates.parquet", "requests.parquet", "states.npy"])
def test_what_is_mined_does_not_know_the_test_events(base: Run, other_tests: Run, name: str) -> None:
    """With all signals, candidates of all sources and several targets; and without any of them."""
    for mined in ("candidates", "plain"):
        one, other = (run.folder / mined / name for run in (base, other_tests))
        assert one.read_bytes() == other.read_bytes(), mined


def test_signals_do_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert tables(base) == tables(other_tests)
    assert len(tables(base)) > 6


def test_the_lists_are_those_of_several_targets_and_sources(base: Run) -> None:
    """Else it would be no wonder that they do not change."""
    requests = pl.read_parquet(base.candidates / "requests.parquet")
    assert len(requests) == VAL * USERS
    table = pl.read_parquet(base.candidates / "candidates.parquet")
    sources = [name for name in table.columns if name.startswith("source.")]
    assert len(sources) == 4
    served = table.filter(pl.col("origin") == "candidate")
    assert (served["source.index"] == 0).any()
    assert len(pl.read_parquet(base.folder / "plain/requests.parquet")) == USERS


def test_a_list_does_not_know_the_targets_after_its_own(base: Run, other_newest: Run) -> None:
    """Of several validation targets the older are asked for as if the newer had not happened."""
    older, newer = (rows(run, newest=False) for run in (base, other_newest))
    assert same_but_for_rounding(older, newer)
    assert len(older) > USERS
    assert not same_but_for_rounding(rows(base, newest=True), rows(other_newest, newest=True)), "the other side"
    assert tables(base) == tables(other_newest)


def test_the_ranker_does_not_know_the_test_events(base: Run, other_tests: Run) -> None:
    assert same_weights(base.ranker, other_tests.ranker)
    assert same_weights(base.ranker.with_name("last.ckpt"), other_tests.ranker.with_name("last.ckpt"))


def test_a_refit_does_not_know_the_test_events(base: Run, other_tests: Run, tmp_path: Path) -> None:
    """Retriever, index, signals and the ranker's tables, trained until the test targets; `end` does know them."""
    runs = [run.refit(tmp_path / str(number), "test", *TOLD) for number, run in enumerate((base, other_tests))]
    assert same_weights(*(run.retriever for run in runs))
    files = [path.relative_to(runs[0].bundle) for path in sorted(runs[0].bundle.rglob("*")) if path.is_file()]
    assert {"index.npy", "popularity.npy", "reranker.pt", "towers.pt"} < {str(file) for file in files}
    for file in files:
        if file.name not in ("manifest.json", "README.md"):  # hold paths, dates and hashes of the data
            one, other = (run.bundle / file for run in runs)
            if file.suffix == ".pt":
                assert same_tensors(*(torch.load(path, weights_only=True) for path in (one, other))), file
            else:
                assert one.read_bytes() == other.read_bytes(), file
    known = Dataset(base.data, "test").train_counts
    assert np.array_equal(np.load(runs[0].bundle / "popularity.npy"), known)
    assert not same_weights(base.retriever, runs[0].retriever)
    assert not np.array_equal(*(Dataset(run.data, "end").train_counts for run in (base, other_tests))), "the other side"


def test_a_refit_does_know_the_validation_events(base: Run, other_validation: Run) -> None:
    assert not np.array_equal(*(Dataset(run.data, "test").train_counts for run in (base, other_validation)))
    ends = [Dataset(run.data, "test").train_ends for run in (base, other_validation)]
    assert np.array_equal(*ends)


def test_the_retrievers_weights_do_not_know_the_validation_events(base: Run, other_validation: Run) -> None:
    assert not same_targets(base, other_validation, "val").any()
    assert same_targets(base, other_validation, "test").all()
    # the last weights: which epoch is the best is chosen by the validation events
    assert same_weights(base.retriever.with_name("last.ckpt"), other_validation.retriever.with_name("last.ckpt"))


def test_counts_and_tables_do_not_know_the_validation_events(base: Run, other_validation: Run) -> None:
    assert before(base, "val") == before(other_validation, "val")
    assert Dataset(base.data).train_counts.tobytes() == Dataset(other_validation.data).train_counts.tobytes()
    assert target_counts(base) == target_counts(other_validation)
    assert baselines(base) == baselines(other_validation)
    assert counted(base) == counted(other_validation)


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
    assert baselines(base) != baselines(other_training)
    assert not same_weights(base.retriever.with_name("last.ckpt"), other_training.retriever.with_name("last.ckpt"))
    theirs = counted(other_training)
    differ = {name.partition(".")[0] for name, table in counted(base).items() if table != theirs[name]}
    assert len(differ) == 3, "some table of each signal that counts"
    for name in ("candidates/candidates.parquet", "candidates/states.npy", "index/index.npy", "index/popularity.npy"):
        assert (base.folder / name).read_bytes() != (other_training.folder / name).read_bytes(), name


def test_the_same_events_give_the_same_bytes_again(base: Run, tmp_path: Path) -> None:
    """Without this the comparisons of equality above could only ever pass by luck, and fail by luck."""
    again = train(tmp_path, world())
    assert same_weights(base.retriever, again.retriever)
