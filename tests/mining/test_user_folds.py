"""Folds over users: who is left out of training and counts, and which of their events become lists."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import K, Run, recsys
from worlds import write_movielens

from recsys2stage import columns as c
from recsys2stage.artifacts import read_manifest
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.folds import Fold, without_fold
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens
from recsys2stage.data.split import GlobalTime, LeaveOneOut, Split
from recsys2stage.mining.fold_targets import CLOSE, fold_targets, inclusion, rake
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.lists import CANDIDATES, REQUESTS, STATES, validation_users
from recsys2stage.retrieval.histories import Histories

FOLD = Fold(1, 3)
HOUR = 3_600


def sessions(folder: Path, split: Split, users: int = 400) -> Dataset:
    """Users of 4 to 30 events: sessions of three in the same minute, each a day after the one before.

    The validation target of a user, the event before the last, begins a session or not, as the length has it.
    """
    rng = np.random.default_rng(0)
    events = []
    for user in range(users):
        count, begin = 4 + user % 27, 10**9 + int(rng.integers(100)) * 86_400
        items = rng.permutation(60)[:count] + 1
        events += [(user, int(items[n]), 4.0, begin + n // 3 * 86_400 + n % 3 * 20) for n in range(count)]
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data", split=split)
    return Dataset(folder / "data")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return sessions(tmp_path_factory.mktemp("sessions"), LeaveOneOut())


def sample(dataset: Dataset, **options: object) -> tuple[np.ndarray, np.ndarray]:
    usual = {"targets": 2, "gap": 0, "match": True, "select": 0.2, "users": None, "seed": 0}
    found = fold_targets(dataset, FOLD, **(usual | options))  # type: ignore[arg-type]
    return found.users, found.places


# --- who is left out


def test_each_user_is_in_one_fold_and_folds_are_of_about_equal_size() -> None:
    members = np.stack([Fold(number, 5).members(10_000) for number in range(5)])
    assert (members.sum(0) == 1).all()
    assert np.abs(members.sum(1) - 2_000).max() < 200  # five standard deviations of the binomial


def test_a_fold_is_independent_of_the_validation_users() -> None:
    """Else a fold would have all of them, or none."""
    both = validation_users(np.arange(10_000), 0.2, 0) & Fold(0, 5).members(10_000)
    assert abs(both.sum() - 400) < 100


@pytest.mark.parametrize("text", ["5/5", "0/1", "1", "-1/5", "0/5/5", "a/b", "0/1001", "", None, 3])
def test_what_is_no_fold_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"^fold is .*, expected NUMBER/TOTAL .*; set fold to 0/5"):
        Fold.parse(text)


def test_all_counts_leave_out_the_events_of_the_fold(dataset: Dataset) -> None:
    view, members = without_fold(dataset, FOLD), FOLD.members(dataset.num_users)
    expected = np.zeros(dataset.num_items + 1, dtype=np.int64)
    for user in np.flatnonzero(~members):
        np.add.at(expected, dataset.items[dataset.offsets[user] : dataset.train_ends[user]], 1)
    assert np.array_equal(view.train_counts, expected)
    assert view.train_counts.sum() < dataset.train_counts.sum()
    assert view.manifest["split_hash"] == dataset.manifest["split_hash"]


def test_a_fold_of_all_users_or_of_nobody_is_refused(tmp_path: Path) -> None:
    few = sessions(tmp_path, LeaveOneOut(), users=3)
    empty = next(number for number in range(50) if not Fold(number, 50).members(few.num_users).any())
    with pytest.raises(ValueError, match="has no user with training events in it, expected some in and some outside"):
        without_fold(few, Fold(empty, 50))


def test_a_retriever_trains_on_windows_of_the_other_users_and_validates_on_all(dataset: Dataset) -> None:
    data, members = Histories(dataset.path, fold=str(FOLD)), FOLD.members(dataset.num_users)
    everybody = Histories(dataset.path)
    assert not members[data.window_users].any()
    assert set(data.window_users) == set(everybody.window_users[~members[everybody.window_users]])
    validated = [np.concatenate([batch.users.numpy() for batch in one.val_dataloader()]) for one in (data, everybody)]
    assert np.array_equal(*validated)


# --- which events become lists


@pytest.mark.parametrize("match", [True, False])
def test_targets_are_events_of_the_fold_that_train_or_validate(dataset: Dataset, match: bool) -> None:
    users, places = sample(dataset, match=match, targets=None)
    assert len(users) > 500
    assert FOLD.members(dataset.num_users)[users].all()
    assert not validation_users(users, 0.2, 0).any()
    assert (places > dataset.offsets[users]).all(), "each has a history"
    assert (places < dataset.val_ends[users]).all(), "none is a test event"
    assert len(np.unique(places)) == len(places)
    assert (np.diff(places) > 0).all()


def test_targets_depend_on_neither_the_number_of_lists_nor_the_order(dataset: Dataset) -> None:
    few, many = (set(sample(dataset, targets=targets)[1].tolist()) for targets in (1, 3))
    assert few < many
    assert set(sample(dataset, targets=1, seed=1)[1].tolist()) != few


def test_the_number_of_lists_is_the_mean_per_user(dataset: Dataset) -> None:
    possible = FOLD.members(dataset.num_users) & ~validation_users(np.arange(dataset.num_users), 0.2, 0)
    count = len(sample(dataset, targets=2)[0])
    assert abs(count - 2 * possible.sum()) < 5 * np.sqrt(2 * possible.sum())  # five standard deviations at most


def test_lists_match_the_requests_that_are_served(dataset: Dataset) -> None:
    """History lengths, gaps and times of validation targets, from which those of the fold's events are far."""

    def facts(users: np.ndarray, places: np.ndarray) -> tuple[float, float, float]:
        gaps = dataset.times[places] - dataset.times[places - 1] >= HOUR
        return (places - dataset.offsets[users]).mean(), gaps.mean(), dataset.times[places].mean() / 86_400

    served = facts(*dataset.val_targets())
    matched, plain = facts(*sample(dataset)), facts(*sample(dataset, match=False))
    for name, bound, wanted, near, far in zip(
        ("length", "begins a session", "day"), (1.5, 0.1, 4), served, matched, plain, strict=True
    ):
        assert abs(near - wanted) < bound, name
        if name == "length":
            assert abs(far - wanted) > 2 * bound, "the property would hold of any sample"


def test_without_a_number_lists_are_as_many_as_match_closely(dataset: Dataset) -> None:
    found = fold_targets(dataset, FOLD, None, 0, True, 0.2, None, 0)
    assert len(found.users) > 300
    noise = 3 / np.sqrt(len(found.users))
    assert all(distance < CLOSE + noise for distance in found.distances.values()), found.distances
    assert len(sample(dataset, match=False, targets=None)[0]) == found.eligible > len(found.users)


def test_a_gap_selects_beginnings_of_sessions(dataset: Dataset) -> None:
    _, places = sample(dataset, gap=HOUR, targets=None)
    assert len(places) > 100
    assert (dataset.times[places] - dataset.times[places - 1] >= HOUR).all()


def test_under_one_split_time_lists_lie_before_it(tmp_path: Path) -> None:
    dataset = sessions(tmp_path, GlobalTime())
    users, places = sample(dataset, targets=None, match=False)
    assert len(users)
    assert (places < dataset.train_ends[users]).all()


def test_raking_meets_all_wanted_shares() -> None:
    rng = np.random.default_rng(0)
    pool = {"a": rng.integers(0, 3, 5_000), "b": rng.integers(0, 2, 5_000)}
    shares = {"a": np.append([0.7, 0.2, 0.1], np.zeros(29)), "b": np.append([0.1, 0.9], np.zeros(30))}
    weights = rake(pool, shares)
    for name, bins in pool.items():
        found = np.bincount(bins, weights, minlength=32) / weights.sum()
        assert np.abs(found - shares[name]).max() < 1e-6, name
    assert not rake({"a": np.zeros(4, dtype=np.int64)}, {"a": np.eye(32)[1]}).any()


@pytest.mark.parametrize("count", [1.0, 3.0, 4.5, 6.0, 100.0])
def test_probabilities_sum_to_the_number_of_lists(count: float) -> None:
    weights = np.array([10.0, 3, 1, 1, 0.5, 0.5, 0])
    found = inclusion(weights, count)
    assert found.max() <= 1
    assert found.sum() == pytest.approx(min(count, 6))
    free = (found < 1) & (weights > 0)
    assert np.allclose(found[free] / weights[free], (found[free] / weights[free])[:1])


# --- the verbs


@pytest.fixture(scope="module")
def folded(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A retriever without a fold of the tiny world's users, its index and its lists."""
    run = Run(tmp_path_factory.mktemp("folded"))
    run.folder.joinpath("data").symlink_to(trained.data)
    run.fit_retriever("--trainer.max_epochs", 1, "--data.init_args.fold", str(FOLD))
    run.export_index("--measured", 0)
    run.mine("--fold", str(FOLD), "--targets", 2)
    return run


def test_lists_of_a_fold_train_the_ranker_beside_its_own(trained: Run, folded: Run) -> None:
    data = Candidates(trained.candidates, folds=[folded.candidates])
    data.setup("fit")
    own = Candidates(trained.candidates)
    own.setup("fit")
    added = data.lists.user[len(own.lists.user) :]
    assert len(added)
    assert FOLD.members(data.dataset.num_users)[added].all()
    assert not np.isin(added, own.lists.user[own.lists.fold == "select"]).any()
    counts = [sum(len(batch.positive) for batch in one.train_dataloader()) for one in (own, data)]
    held = pl.read_parquet(folded.candidates / CANDIDATES)[c.LABEL].sum()
    assert counts[1] - counts[0] == held > 0
    validated = [sum(len(batch.positive) for batch in one.val_dataloader()) for one in (own, data)]
    assert validated[0] == validated[1]


def test_a_fold_s_lists_have_no_states_and_say_how_they_match(folded: Run) -> None:
    manifest = read_manifest(folded.candidates, "candidates", "")
    assert manifest["fold"] == manifest["options"]["fold"] == str(FOLD)
    assert set(manifest["distances"]) == {"history length", "gap", "time"}
    assert not (folded.candidates / STATES).exists()
    assert set(pl.read_parquet(folded.candidates / REQUESTS)[c.FOLD]) == {"train"}


def test_events_of_the_fold_are_neither_trained_on_nor_counted(folded: Run) -> None:
    index = read_manifest(folded.index, "index", "")
    assert index["fold"] == str(FOLD)
    view = without_fold(Dataset(folded.data), FOLD)
    assert np.array_equal(np.load(folded.index / "popularity.npy"), view.train_counts)


def test_a_fold_and_an_index_of_another_are_refused(trained: Run, folded: Run, tmp_path: Path) -> None:
    for run, words, message in (
        (trained, ("--fold", "1/3"), "fold is 1/3, expected a retriever fitted on the users outside fold 1/3"),
        (folded, (), "fold is null, expected a retriever fitted on all users"),
        (folded, ("--fold", "0/3"), r"was fitted on the users outside fold 1/3; set fold to 1/3"),
    ):
        of = ("--data", run.data, "--index", run.index, "--output", tmp_path / "lists", "--k", K)
        with pytest.raises(SystemExit) as end:
            recsys("mine-negatives", *of, *words)
        assert message in str(end.value.code)
        assert not (tmp_path / "lists").exists()


def test_lists_of_a_fold_alone_do_not_make_a_ranker(trained: Run, folded: Run) -> None:
    with pytest.raises(ValueError, match=r"holds lists of fold 1/3 of the users.*as one of data.folds"):
        Candidates(folded.candidates)
    with pytest.raises(ValueError, match=r"is given twice, expected path and folds to differ"):
        Candidates(trained.candidates, folds=[folded.candidates, folded.candidates]).setup("fit")


def test_a_manifest_with_another_kind_of_fold_is_refused(folded: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(folded.candidates, tmp_path / "copy")
    manifest = json.loads((copy / c.MANIFEST).read_text(encoding="utf-8"))
    manifest["options"]["fold"] = [1, 3]
    (copy / c.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has the option fold \[1, 3\], expected a fold such as 0/5, or null"):
        Candidates(copy)


def test_a_fold_starts_from_no_weights_that_saw_it(trained: Run, folded: Run, tmp_path: Path) -> None:
    of = ("--config", trained.folder / "retriever.yaml", "--data.init_args.path", trained.data, "--output", tmp_path)
    other = ("--data.init_args.fold", "0/3")
    for words, message in (
        ((*other, "--model.init_args.start", trained.retriever), "fitted on all users, but this fit leaves out the"),
        ((*other, "--ckpt_path", trained.retriever.parent / "last.ckpt"), "fold of the data is '0/3', but the fit of"),
        (("--ckpt_path", folded.retriever.parent / "last.ckpt"), "fold of the data is None, but the fit of"),
    ):
        with pytest.raises(SystemExit) as end:
            recsys("fit", *of, *words)
        assert message in str(end.value.code)
    assert not list(tmp_path.rglob("*.ckpt"))
    with pytest.raises(ValueError, match=r"fitted with data.fold 1/3, expected a retriever fitted on all users; refit"):
        _ = Histories(folded.data, max_length=20, refit=folded.retriever.parent).epochs
