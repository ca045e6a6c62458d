"""Several targets per user, from the split to the report: datasets whose targets and ranks are known."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import Run, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Table
from recsys2stage.data.split import Baskets, SessionStarts, Split
from recsys2stage.evaluation.evaluate import RankingResult, beyond_accuracy, describe, protocol_line, summarise
from recsys2stage.evaluation.plots import ceiling
from recsys2stage.evaluation.report import as_markdown, interval_text
from recsys2stage.evaluation.targets import Targets, gaps
from recsys2stage.metrics import compute_metrics
from recsys2stage.mining.mine import mine_negatives
from recsys2stage.retrieval.histories import Histories

HOUR, DAY = 3_600, 86_400
A = [0, 60, 2 * DAY, 2 * DAY, 3 * DAY, 3 * DAY + 5, 3 * DAY + 2 * HOUR]  # sessions begin with its events 2, 4 and 6
B = [0, 5 * HOUR, 5 * HOUR]  # and 1
C = [0, 1, 2]  # none


def dataset_of(folder: Path, split: Split, **options: Any) -> Dataset:
    """Users A, B, C with items 1, 2, 3, ... in their order of time."""
    lines = ["user_id,item_id,timestamp"]
    for user, times in zip("ABC", (A, B, C), strict=True):
        lines += [f"{user},{item},{10**9 + time}" for item, time in enumerate(times, start=1)]
    (folder / "events.csv").write_text("\n".join([*lines, ""]))
    prepare(Table(folder / "events.csv"), folder / "data", split=split, **options)
    return Dataset(folder / "data")


def test_session_starts_are_prepared_as_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = dataset_of(tmp_path, SessionStarts(HOUR, test=2, val=1))
    assert [part.tolist() for part in dataset.target_events("test")] == [[0, 0, 1], [4, 6, 8]]
    assert [part.tolist() for part in dataset.target_events("val")] == [[0], [2]]
    assert dataset.train_ends.tolist() == [2, 8, 13]
    assert dataset.val_ends.tolist() == [4, 8, 13]
    assert dataset.users("test").tolist() == [0, 1]
    assert dataset.target_indices("test")[[0, 1]].tolist() == [4, 8]
    users, events = dataset.target_events("test")
    history = dataset.histories(users, events, 10)
    assert [row[row > 0].tolist() for row in history.items] == [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1]]
    assert dataset.targets(users, events).tolist() == [5, 7, 2]
    assert gaps(dataset, Targets.of(dataset, users, events)).tolist() == [DAY, 2 * HOUR - 5, 5 * HOUR]
    counts = dataset.manifest["counts"]
    assert [counts[f"{part}_{what}"] for part in ("val", "test") for what in ("targets", "users")] == [1, 1, 3, 2]
    shown = capsys.readouterr().out
    assert "2 validation (1 targets of 1 users), 5 test (3 targets of 2 users)" in shown
    assert "protocol: SessionStarts split (gap 3,600, test 2, val 1)" in shown
    assert [part.tolist() for part in dataset.val_targets()] == [[0], [2]]
    line = protocol_line(describe(dataset, "none", "test"), 2, dataset.num_items, 3)
    assert "3 test targets of 2 users" in line
    assert "at most 2 of each user test, 1 before them validate" in line


def test_the_split_hash_knows_the_targets(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, SessionStarts(HOUR, test=3, val=1))
    other = tmp_path / "other"
    other.mkdir()
    later = dataset_of(other, SessionStarts(DAY, test=3, val=1))  # events 2 and 4
    assert (later.train_ends == dataset.train_ends).tolist() == [True, False, True]
    assert later.manifest["split_hash"] != dataset.manifest["split_hash"]


def test_a_whole_basket_is_withheld_from_its_targets(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, Baskets())
    users, events = dataset.target_events("test")
    assert list(zip(users.tolist(), events.tolist(), strict=True)) == [(0, 6), (1, 8), (1, 9), (2, 12)]
    assert dataset.ends(users, events).tolist() == [6, 8, 8, 12]
    history = dataset.histories(users, events, 10)
    assert [row[row > 0].tolist() for row in history.items][1:3] == [[1], [1]]
    seen = dataset.filtered_items(users, events)
    assert seen.values[seen.offsets[2] : seen.offsets[3]].tolist() == [1], "the other item of the basket is not seen"
    together = dataset.co_targets(users, events)
    assert together.values[together.rows == 1].tolist() == [2, 3]
    assert dataset.ends(np.array([0]), np.array([3])).tolist() == [2], "the rule holds for any event"
    targets = Targets.of(dataset, users, events)
    assert targets.requests().users.tolist() == [0, 1, 2]
    assert gaps(dataset, targets).tolist() == [2 * HOUR - 5, 5 * HOUR, 5 * HOUR, 1]
    report = summarise(dataset, {"retriever": np.array([1, 2, 30, 4])}, users, events, 50, seed=0)
    assert (report["users"], report["targets"], report["baskets"]) == (3, 4, 3)
    assert report["models"]["retriever"]["recall@10"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert report["models"]["retriever"]["hr@10"]["value"] == 1
    assert list(report["cohorts"]) == ["history_length", "gap_to_request"]
    assert interval_text(report) == "clustered bootstrap over 3 users with 3 baskets of 4 targets"
    found = np.array([1, 9, 2, 9])  # candidates' recall is a mean over baskets, as the ranker's recall that it bounds
    outcome = RankingResult({}, found, {}, np.zeros(4, np.float32), np.zeros(4, dtype=bool))
    recall = beyond_accuracy(dataset, outcome, 8, targets)["candidates"]["recall"]
    assert recall == pytest.approx(0.5)  # (1 + 1 / 2 + 0) / 3
    assert recall == pytest.approx(targets.metrics(np.where(found <= 8, 1, 99))["recall@10"].mean())
    assert ceiling(found, 8, targets.weights())[[0, 1, 7]] == pytest.approx([1 / 3, 0.5, 0.5])


def test_items_bought_twice_at_once_are_one_target(tmp_path: Path) -> None:
    lines = ["user_id,item_id,timestamp", *("A,1,10", "A,2,20", "A,2,20", "A,3,20")]
    (tmp_path / "events.csv").write_text("\n".join([*lines, ""]))
    prepare(Table(tmp_path / "events.csv", time_unit="seconds"), tmp_path / "data", split=Baskets(), repeats="keep")
    dataset = Dataset(tmp_path / "data")
    users, events = dataset.target_events("test")
    assert dataset.targets(users, events).tolist() == [2, 3]


def test_withheld_items_are_no_validation_targets(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(60):
        times = 10**9 + np.cumsum(rng.integers(1, 4_000, 12))
        lines += [f"{user},{item},{time}" for item, time in zip(rng.permutation(20), times, strict=False)]
    (tmp_path / "events.csv").write_text("\n".join([*lines, ""]))
    prepare(Table(tmp_path / "events.csv"), tmp_path / "data", split=SessionStarts(HOUR, 2, 2), cold_items=0.2)
    dataset = Dataset(tmp_path / "data")
    for part, held in (("val", False), ("test", True)):
        users, events = dataset.target_events(part)  # type: ignore[arg-type]
        assert dataset.cold[dataset.targets(users, events)].any() == held
        starts, ends = (
            (dataset.train_ends, dataset.val_ends) if part == "val" else (dataset.val_ends, dataset.offsets[1:])
        )
        assert ((events >= starts[users]) & (events < ends[users])).all()
        assert (np.diff(events) > 0).all()


@pytest.mark.parametrize("damage", [[6, 4, 8], [4, 6, 99], [2, 6, 8], [-1, 6, 8]])
def test_damaged_targets_are_refused(tmp_path: Path, damage: list[int]) -> None:
    dataset = dataset_of(tmp_path, SessionStarts(HOUR, test=2, val=1))
    np.save(dataset.path / "targets.test.npy", np.array(damage))
    with pytest.raises(ValueError, match=r"targets.test.npy has . events outside the test part or is not in order"):
        Dataset(dataset.path)


def test_early_stopping_reads_all_validation_targets(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, SessionStarts(HOUR, test=1, val=2))
    data = Histories(dataset.path, eval_batch_size=2)
    batches = list(data.val_dataloader())
    assert [batch.target.tolist() for batch in batches] == [[3, 5]]
    assert batches[0].users.tolist() == [0, 0]
    assert batches[0].history.lengths.tolist() == [2, 4]


def windows_of(folder: Path, split: Split, changed: int) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """Training windows, mined targets' histories, and training counts where the events from `changed` on are others."""
    folder.mkdir()
    lines = ["user_id,item_id,timestamp", "Z,1,1000000000", *(f"Z,{item},{10**9 + item}" for item in range(2, 20))]
    items = [item if number < changed else 19 - item for number, item in enumerate(range(1, len(A) + 1))]
    lines += [f"A,{item},{10**9 + time}" for item, time in zip(items, A, strict=True)]
    (folder / "events.csv").write_text("\n".join([*lines, ""]))
    prepare(Table(folder / "events.csv"), folder / "data", split=split)
    data = Histories(folder / "data")
    windows = data.read_windows(np.arange(len(data.window_starts))).items.tolist()
    users, events = data.dataset.val_targets()
    return windows, data.dataset.histories(users, events, 10).items.tolist(), data.dataset.train_counts


@pytest.mark.parametrize(("split", "tests_from"), [(SessionStarts(HOUR, 2, 1), 4), (Baskets(2), 6)])
def test_training_and_lists_do_not_know_the_test_part(tmp_path: Path, split: Split, tests_from: int) -> None:
    whole, other, earlier = (windows_of(tmp_path / str(n), split, n) for n in (99, tests_from, tests_from - 3))
    assert whole[0] == other[0]
    assert whole[1] == other[1]
    assert np.array_equal(whole[2], other[2])
    assert whole[0] != earlier[0] or whole[1] != earlier[1], "they do know what comes before"


# from end to end


def as_if_trained_on(folder: Path, raw: Path, trained: Run, *split: object) -> Run:
    """The trained index and bundle, as if trained on another split."""
    run = Run(folder)
    run.prepare(raw, *split)
    for source, copy in ((trained.index, run.index), (trained.bundle, run.bundle)):
        shutil.copytree(source, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["split_hash"] = read_manifest(run.data, "dataset", "")["split_hash"]
        (copy / "manifest.json").write_text(json.dumps(manifest))
    return run


@pytest.fixture(scope="module")
def sessions(raw: Path, trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Up to three test targets of a user, and a report of them."""
    split = ("--split", "SessionStarts", "--split.gap", 3600, "--split.test", 3, "--split.val", 2)
    run = as_if_trained_on(tmp_path_factory.mktemp("sessions"), raw, trained, *split)
    words = ("--bundle", run.bundle, "--data", run.data, "--plots", "false", "--resamples", 100)
    recsys("evaluate", *words, "--output", run.folder / "one")
    return run


def test_a_report_has_a_row_for_each_target_and_clusters_them(sessions: Run) -> None:
    dataset, folder = Dataset(sessions.data), sessions.folder / "one"
    report, ranks = json.loads((folder / "report.json").read_text()), pl.read_parquet(folder / "ranks.parquet")
    users, events = dataset.target_events("test")
    assert (report["users"], report["targets"]) == (len(np.unique(users)), len(users))
    assert report["users"] < report["targets"]
    assert (ranks["user"].to_list(), ranks["place"].to_list()) == (users.tolist(), events.tolist())
    assert ranks["gap"].min() >= 3600  # type: ignore[operator]
    value = compute_metrics(ranks["ranker"].to_numpy())["ndcg@10"].mean()
    assert report["models"]["ranker"]["ndcg@10"]["value"] == pytest.approx(value)
    text = (folder / "report.md").read_text()
    assert f"clustered bootstrap over {report['users']:,} users with {report['targets']:,} targets" in text
    assert "| time since the event before" in text
    assert "protocol: SessionStarts split (events 3,600 s or more after the one before" in text
    groups = report["by_gap"]
    assert groups["an hour or more"]["targets"] == report["targets"]
    every, all_of_them = groups["an hour or more"]["comparison"]["ndcg@10"], report["comparison"]["ndcg@10"]
    assert {**every, "p": 0} == pytest.approx({**all_of_them, "p": 0}), "the same resamples"


def test_runs_are_paired_by_user_and_target(sessions: Run, tmp_path: Path) -> None:
    words = ("--bundle", sessions.bundle, "--data", sessions.data, "--plots", "false", "--resamples", 20)
    recsys("evaluate", *words, "--output", tmp_path / "out", "--against", sessions.folder / "one")
    against = json.loads((tmp_path / "out" / "report.json").read_text())["against"]["models"]["ranker"]
    assert against["ndcg@10"]["difference"] == against["mrr"]["low"] == 0
    ranks = pl.read_parquet(tmp_path / "out" / "ranks.parquet")
    ranks.with_columns(pl.col("place") + (pl.col("place") == ranks["place"][-1]).cast(pl.Int64)).write_parquet(
        tmp_path / "out" / "ranks.parquet"
    )
    with pytest.raises(SystemExit, match="they are not the same events; prepare both with the same split"):
        recsys("evaluate", *words, "--output", tmp_path / "third", "--against", tmp_path / "out")


def test_lists_are_mined_for_the_validation_session_starts(sessions: Run, tmp_path: Path) -> None:
    mine_negatives(sessions.data, sessions.index, tmp_path / "lists", k=20, select=0.3)
    requests = pl.read_parquet(tmp_path / "lists" / "requests.parquet")
    users, events = Dataset(sessions.data).target_events("val")
    assert (requests["user"].to_list(), requests["place"].to_list()) == (users.tolist(), events.tolist())


def test_baskets_are_ranked_as_sets(raw: Path, trained: Run, tmp_path: Path) -> None:
    run = as_if_trained_on(tmp_path, raw, trained, "--split", "Baskets", "--repeats", "keep")
    words = ("--bundle", run.bundle, "--data", run.data, "--plots", "false", "--resamples", 20)
    recsys("evaluate", *words, "--output", tmp_path / "one")
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    ranks = pl.read_parquet(tmp_path / "one" / "ranks.parquet")
    assert report["models"]["ranker"]["recall@10"]["value"] <= report["candidates"]["recall"] + 1e-9
    assert "| Recall@10" in (tmp_path / "one" / "report.md").read_text(), "no repetition of HR@10"
    expected = ranks.group_by("basket").agg((pl.col("ranker") <= 50).mean())["ranker"].mean()
    assert report["models"]["ranker"]["recall@50"]["value"] == pytest.approx(expected)
    assert report["baskets"] == ranks["basket"].n_unique() <= report["targets"] == len(ranks)
    assert report["calibration"]["users"] == report["baskets"], "a basket has one list"
    recsys("evaluate", *words, "--output", tmp_path / "two", "--against", tmp_path / "one")
    with pytest.raises(SystemExit, match=r"protocol is sampled-20, but the targets of .* are baskets"):
        recsys("evaluate", *words, "--output", tmp_path / "three", "--protocol", "sampled-20")
    assert not (tmp_path / "three").exists()
    mine_negatives(run.data, run.index, tmp_path / "lists", k=20, select=0.3)
    requests, dataset = pl.read_parquet(tmp_path / "lists" / "requests.parquet"), Dataset(run.data)
    rows = pl.read_parquet(tmp_path / "lists" / "candidates.parquet").filter(fold="train")
    users, events = requests["user"].to_numpy(), requests["place"].to_numpy()
    together = dataset.co_targets(users, events)
    basket = pl.DataFrame({"request": together.rows, "item": together.values}).cast(pl.Int32)
    assert rows.join(basket, on=["request", "item"])["label"].min() == 1, (
        "no item of a basket is a negative of another one"
    )


def test_groups_by_gap_have_their_own_means_and_intervals(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, SessionStarts(HOUR, test=2, val=1))
    users, events = dataset.target_events("test")
    ranks = {"retriever": np.array([3, 1, 12]), "ranker": np.array([1, 1, 3])}
    groups = summarise(dataset, ranks, users, events, 200, seed=0)["by_gap"]
    assert list(groups) == ["an hour to a day", "a day or more", "an hour or more"]
    assert [group["targets"] for group in groups.values()] == [2, 1, 3]
    first = groups["an hour to a day"]
    assert first["models"]["retriever"]["ndcg@10"]["value"] == pytest.approx(0.5, abs=1e-6)  # logarithms in float32
    assert first["models"]["ranker"]["ndcg@10"]["value"] == pytest.approx(0.75, abs=1e-6)
    paired = first["comparison"]["ndcg@10"]
    assert (paired["difference"], paired["ratio"]) == (0.25, 1.5)
    assert (paired["low"], paired["high"]) == (0, 0.5)
    assert paired["ratio_low"] is None, "some resamples have the user with rank 12 only, whose NDCG@10 is 0"
    every = groups["a day or more"]["comparison"]["ndcg@10"]
    assert (every["ratio_low"], every["ratio_high"]) == (2, 2)
    report = summarise(dataset, ranks, users, events, 20, seed=0)
    line = "| a day or more                | 1 "
    report |= {"candidates": {"recall": 1.0, "k": 9}}
    assert line.split("  ")[0] in as_markdown(report, "protocol: x")
