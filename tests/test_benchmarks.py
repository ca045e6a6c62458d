"""The training benchmark counts what it says it counts; how fast anything is, is not tested."""

import argparse
import csv
import importlib
import itertools
import json
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from closeness import same_ranks
from pipeline_fixtures import RANKER, Run, recsys
from torch.utils.flop_counter import FlopCounterMode

from recsys2stage import columns as c
from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.evaluate import rank_users
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval import encoders
from recsys2stage.retrieval.encoders import BERT4Rec, SASRec, Transformer
from recsys2stage.retrieval.histories import Histories

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(folder)


@pytest.fixture
def clock() -> ModuleType:
    return importlib.import_module("clock")


@pytest.fixture
def ours() -> ModuleType:
    return importlib.import_module("ours")


@pytest.fixture
def train() -> ModuleType:
    return importlib.import_module("train")


@pytest.fixture
def exchange() -> ModuleType:
    return importlib.import_module("exchange")


@pytest.fixture
def accuracy() -> ModuleType:
    return importlib.import_module("accuracy_vs_peers")


def job(clock: ModuleType, **options: Any) -> Any:
    sizes = {"width": 16, "heads": 2, "layers": 1, "length": 8, "batch": 4, "dropout": 0.1, "threads": 1}
    return clock.Job(**{"data": "", "seconds": 0.0, "warmup": 1, "loss": "FullSoftmax", **sizes, **options})


def test_warmup_is_not_counted_and_the_last_step_is_whole(clock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def step(seconds: float) -> Any:
        nonlocal now
        now += seconds
        return clock.Work(events=10, positions=40, flops=2e12)

    epoch = [100.0, 50.0, 2.0]  # epochs follow each other: 100 50 | 2 100
    found = clock.timed(lambda: epoch, step, job(clock, seconds=3.0, warmup=2))
    assert found == {
        "steps": 2, "events": 20, "seconds": 102.0, "rate": 20 / 102, "real": 0.25, "tflops": 4 / 102
    }  # fmt: skip


def test_some_steps_are_measured_however_long_they_take(clock: ModuleType) -> None:
    found = clock.timed(lambda: [0], lambda batch: clock.Work(1, 1), job(clock, warmup=2, steps=5))
    assert found["steps"] == 5


def test_an_epoch_is_whole_and_its_beginning_holds_all_lengths(ours: ModuleType, ragged: Path) -> None:
    histories = Histories(ragged, max_length=30, batch_size=1)
    lengths = [int(window.lengths) for window in ours.spread(histories)]
    spans = histories.window_ends - histories.window_starts
    assert sorted(lengths) == sorted(spans)
    for count in (5, 10, 20):
        # of so many batches one is among the shortest, one among the next, ...
        bounds = [sorted(spans)[len(spans) * part // 5 - (part == 5)] for part in range(6)]
        for low, high in itertools.pairwise(bounds):
            assert any(low <= length <= high for length in lengths[:count])


@pytest.mark.parametrize("name", ["Transformer", "SASRec", "LiGR"])
def test_arithmetic_is_what_torch_counts(name: str, ours: ModuleType, clock: ModuleType) -> None:
    """At length 1, where nothing is hidden from attention, so that nothing is computed in vain."""
    size = job(clock, width=32, layers=2, length=1)
    training = ours.Training(size, ours.factory(name, size), num_items=50)
    window = ours.full(rows=6, length=1, num_items=50)
    with FlopCounterMode(display=False) as counter:
        work = training.step(window)
    assert work.events == 6
    assert counter.get_total_flops() == pytest.approx(work.flops, rel=0.02)


@pytest.mark.parametrize(("kind", "pairs"), [(SASRec, 3 + 6 + 1), (BERT4Rec, 4 + 9 + 1)])
def test_attention_counts_the_pairs_that_see_each_other(kind: Any, pairs: int, ours: ModuleType) -> None:
    encoder = kind(8, 5, layers=3, heads=2)
    weights = sum(part.weight.numel() for part in encoder.modules() if isinstance(part, torch.nn.Linear))
    found = ours.encoder_flops(encoder, torch.tensor([2, 3, 0, 1]), dim=8)
    assert found == 6 * 6 * weights + 3 * (6 * 2 * 8) * pairs


def test_in_batch_negatives_make_a_column_for_each_distinct_answer(ours: ModuleType, clock: ModuleType) -> None:
    size = job(clock, loss="InfoNCE")
    training = ours.Training(size, ours.factory("Transformer", size), num_items=50)
    window = ours.full(rows=2, length=3, num_items=50)._replace(items=torch.tensor([[9, 1, 2, 2], [8, 1, 3, 0]]))
    window = window._replace(lengths=torch.tensor([4, 3]))
    work = training.work(window)
    encoder = ours.encoder_flops(training.retriever.towers.encoder, torch.tensor([3, 2]), 16)
    assert (work.events, work.positions) == (5, 6)
    assert work.flops - encoder == 6 * 5 * 3 * 16  # items 1, 2 and 3


def test_every_encoder_of_the_package_trains_on_the_same_events(
    ours: ModuleType, clock: ModuleType, ragged: Path
) -> None:
    assert next(iter(ours.all_encoders())) == "Transformer"
    assert {"SASRec", "BERT4Rec"} <= set(ours.all_encoders()) <= set(vars(encoders))
    found = ours.compare(job(clock, data=str(ragged)), names=[])["encoders"]
    assert [one["encoder"] for one in found] == list(ours.all_encoders())
    assert len({one["events"] for one in found}) == 1
    assert found[0]["events"] > 0
    assert found[0]["parameters"] == sum(p.numel() for p in Transformer(16, 8, layers=1, heads=2).parameters())


def test_validation_asks_every_user(ours: ModuleType, clock: ModuleType, ragged: Path) -> None:
    users = Histories(ragged).dataset.users("val")
    assert ours.validate(job(clock, data=str(ragged)))["users"] == len(users)


def test_made_up_histories_are_full_and_in_order(ours: ModuleType) -> None:
    window = ours.full(rows=3, length=7, num_items=20)
    assert window.items.shape == window.times.shape == window.request.shape == (3, 8)
    assert (window.lengths == 8).all()
    assert window.items.min() >= 1
    assert window.items.max() <= 20
    assert (window.times.diff(dim=1) > 0).all()
    assert (window.request[:, :-1] == window.times[:, 1:]).all()


def test_an_unknown_encoder_is_named(ours: ModuleType, clock: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no encoder 'Transfomer'; there are Transformer, "):
        ours.factory("Transfomer", job(clock))


def test_ratios_are_of_the_same_round(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"ours.py": [10.0, 30.0, 40.0], "rectools_sasrec.py": [5.0, 10.0, 40.0]}
    rounds = {script: iter(found) for script, found in rates.items()}
    order = []

    def run(self: Any, script: str, *words: str, **options: Any) -> dict[str, float]:
        order.append((script, *words, options["width"]))
        return {"rate": next(rounds[script]), "real": 0.5, "peak_mb": 7.0, "tflops": 1.0, "matrix_tflops": 4.0}

    monkeypatch.setattr(train.Report, "run", run)
    contestants = {"ours": ("ours.py", {}), "it": ("rectools_sasrec.py", {})}
    monkeypatch.setattr(train, "CONTESTANTS", contestants)
    monkeypatch.setattr(train, "OURS", "ours")
    train.peers(train.Report(train.argparse.Namespace(widths=[64], rounds=3)))
    assert order == [("ours.py", "peers", 64), ("rectools_sasrec.py", 64)] * 3
    table = capsys.readouterr().out
    assert "| ours | 30 | 10 to 40 | 1.00 | 50 % | 7 | 25 % |" in table
    assert "| it | 10 | 5 to 40 | 2.00 |" in table  # of 2, 3 and 1, not 30 / 10


def test_the_peers_get_the_torch_that_is_here(
    train: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []
    monkeypatch.setattr(venv, "create", lambda folder, with_pip: commands.append((folder, with_pip)))
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    train.install(tmp_path)
    (made, pip) = commands
    assert made == (tmp_path, True)
    assert f"torch=={version('torch')}" in pip


def test_a_peer_is_given_what_came_before_and_nothing_else(exchange: ModuleType, ragged: Path) -> None:
    dataset = Dataset(ragged)
    found = exchange.export(dataset)
    train, history, request = [], [], []
    tested = set(dataset.users("test").tolist())
    assert 0 < len(tested) < dataset.num_users  # the shortest histories have no test target
    for user in range(dataset.num_users):
        start, val, test = dataset.offsets[user], dataset.train_ends[user], dataset.val_ends[user]
        events = [(user, int(dataset.items[place]), int(dataset.times[place])) for place in range(start, test)]
        train += [(*event, start + number >= val) for number, event in enumerate(events)]
        if user in tested:
            history += events
            request.append((user, int(dataset.times[test])))

    def rows(name: str, *columns: str) -> list[tuple[int, ...]]:
        return list(zip(*(found[f"{name}_{column}"].tolist() for column in columns), strict=True))

    assert rows("train", "user", "item", "time", "held") == train
    assert rows("history", "user", "item", "time") == history
    assert rows("request", "user", "time") == request


def test_a_peer_cannot_see_test_targets(exchange: ModuleType, ragged: Path, tmp_path: Path) -> None:
    shutil.copytree(ragged, tmp_path / "changed")
    items = np.load(ragged / c.EVENT_ITEMS)
    dataset = Dataset(ragged)
    targets = dataset.val_ends[dataset.users("test")]
    items[targets] = items[targets] % dataset.num_items + 1
    np.save(tmp_path / "changed" / c.EVENT_ITEMS, items)
    before, after = exchange.export(dataset), exchange.export(Dataset(tmp_path / "changed"))
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])


def test_only_the_first_of_several_validation_events_is_held(
    exchange: ModuleType, ragged: Path, tmp_path: Path
) -> None:
    shutil.copytree(ragged, tmp_path / "more")
    dataset = Dataset(ragged)
    users = dataset.users("test")
    long = users[dataset.train_ends[users] - dataset.offsets[users] > 1]
    ends = np.array(dataset.train_ends)
    ends[long] -= 1  # two events of these validate
    np.save(tmp_path / "more" / c.TRAIN_ENDS, ends)
    found = exchange.export(Dataset(tmp_path / "more"))
    assert len(long) > 5
    assert np.bincount(found["train_user"][found["train_held"]]).max() == 1
    last = np.flatnonzero(found["train_held"] & np.isin(found["train_user"], long))
    np.testing.assert_array_equal(found["train_item"][last], dataset.items[ends[long]])


def test_a_peer_is_ranked_by_our_definition(exchange: ModuleType, ragged: Path, rng: np.random.Generator) -> None:
    """Against a loop: ties count against the target, known items do not compete, what is not known comes last."""
    dataset = Dataset(ragged)
    users = dataset.users("test")
    targets = dataset.targets(users, "test")
    served, items = users[1:], np.delete(np.arange(1, dataset.num_items + 1), targets[2] - 1)
    vectors = {
        "users": rng.permutation(served),
        "user_vectors": rng.integers(-1, 2, (len(served), 2)).astype(np.float32),  # few values, so many ties
        "items": rng.permutation(items),
        "item_vectors": rng.integers(-1, 2, (len(items), 2)).astype(np.float32),
    }
    expected = []
    for user, target in zip(users.tolist(), targets.tolist(), strict=True):
        scores = dict.fromkeys(range(1, dataset.num_items + 1), -np.inf)
        if user in served:
            own = vectors["user_vectors"][vectors["users"].tolist().index(user)]
            known = dataset.items[dataset.offsets[user] : dataset.val_ends[user]].tolist()
            for item, vector in zip(vectors["items"].tolist(), vectors["item_vectors"], strict=True):
                scores[item] = -np.inf if item in known else float(own @ vector)
        expected.append(sum(score >= scores[target] for score in scores.values()))
    assert expected[0] == dataset.num_items  # nobody's
    assert targets[2] not in items
    assert expected[2] == dataset.num_items  # nobody knows the item
    assert len(set(expected)) > 3
    assert exchange.ranks(dataset, vectors, batch_size=7).tolist() == expected


def test_our_own_vectors_rank_as_in_our_evaluation(exchange: ModuleType, trained: Run) -> None:
    dataset, recommender = Dataset(trained.data), Recommender.load(trained.index)
    users = dataset.users("test")
    history = dataset.histories(users, "test", recommender.towers.max_length)
    vectors = {
        "users": users,
        "user_vectors": recommender.queries(history, dataset.request_times(users, "test"), None),
        "items": np.arange(1, dataset.num_items + 1),
        "item_vectors": recommender.towers.all_item_vectors().detach().numpy(),
    }
    ours = rank_users(dataset, recommender, users, "test").ranks["retriever"]
    same_ranks(exchange.ranks(dataset, vectors), ours)


def test_accuracy_goes_on_with_the_rows_that_are_missing(
    accuracy: ModuleType, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def of(label: str, dataset: Dataset, folder: Path, options: Any) -> dict[str, Any]:
        measured.append((label, options.minutes, options.seed))
        if label == "RecTools HSTU":
            raise RuntimeError("it fails")
        return {"told": "request time: none"}

    monkeypatch.setattr(accuracy, "measure_peer", of)
    monkeypatch.setattr(accuracy, "measure_ours", of)
    monkeypatch.setattr(accuracy.tables, "ROOT", tmp_path)
    rows = tmp_path / "rows.jsonl"

    def run(*words: str) -> list[str]:
        measured.clear()
        monkeypatch.setattr(sys, "argv", ["it", "--data", str(trained.data), "--rows", str(rows), *words])
        accuracy.main()
        return [label for label, _, _ in measured]

    assert run("--only", "ours", "RecTools SASRec") == ["ours", "RecTools SASRec"]
    assert run("--only", "RecTools SASRec") == []
    assert run("--show") == []
    with pytest.raises(SystemExit, match="not measured: RecTools HSTU"):
        run("--only", "ours", "RecTools HSTU")
    assert measured == [("RecTools HSTU", 30.0, 0)]
    assert run("--only", "ours", "--minutes", "2") == ["ours"]
    assert run("--only", "ours", "--seed", "1") == ["ours"]
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["label"], row["minutes"], row["seed"]) for row in kept] == [
        ("ours", 30.0, 0), ("RecTools SASRec", 30.0, 0), ("ours", 2.0, 0), ("ours", 30.0, 1)
    ]  # fmt: skip


def test_a_run_on_other_targets_is_not_shown_beside(accuracy: ModuleType, ragged: Path, tmp_path: Path) -> None:
    dataset = Dataset(ragged)
    values = {metric: {"value": 0.5} for metric in accuracy.METRICS}
    own = {"split_hash": dataset.manifest["split_hash"], "evaluated": "test", "ranking": "full, over all"}
    report = {"protocol": {**own, "request_time": "none"}, "models": {"markov": values, "retriever": values}}
    file = tmp_path / "report.json"
    with pytest.raises(FileNotFoundError, match="recsys evaluate"):
        accuracy.trained_before(tmp_path, dataset)
    file.write_text(json.dumps(report))
    (row,) = accuracy.trained_before(tmp_path, dataset)
    assert (row["label"], row["test_ndcg@10"]) == (f"ours, {tmp_path}: retriever", 0.5)
    for other, message in (({"split_hash": "x"}, "test targets"), ({"evaluated": "val"}, "test targets"),
                           ({"ranking": "sampled: 1"}, "protocol: full")):  # fmt: skip
        file.write_text(json.dumps({**report, "protocol": report["protocol"] | other}))
        with pytest.raises(ValueError, match=message):
            accuracy.trained_before(tmp_path, dataset)


# --- ablation.py


@pytest.fixture
def ablation() -> ModuleType:
    return importlib.import_module("ablation")


def test_an_ablation_measures_what_selected_the_ranker(ablation: ModuleType, informed: Run) -> None:
    """NDCG@10 of the best checkpoint's lists is the best that its fit has logged, of both stages."""
    data = Candidates(informed.candidates, batch_size=16, recent=20)
    data.setup("validate")
    ranker, retriever = ablation.ndcgs(informed.ranker, data)
    (log,) = informed.ranker.parent.rglob("metrics.csv")
    with log.open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["val/ndcg@10"]]
    assert ranker.mean() == pytest.approx(max(float(row["val/ndcg@10"]) for row in logged), abs=1e-6)
    assert retriever.mean() == pytest.approx(float(logged[0]["val/retriever_ndcg@10"]), abs=1e-6)


def test_an_ablation_leaves_each_signal_out(ablation: ModuleType, informed: Run) -> None:
    rows = ablation.changes(informed.candidates)
    assert rows["everything"] == ablation.Change()
    assert rows["Transitions"].removed == ("Transitions",)
    apart = {*rows} - {*ablation.ALTERNATIVES, *ablation.PARTS, "everything", "all signals and sources"}
    assert set(rows["all signals and sources"].removed) == apart
    assert "source" in apart


@pytest.mark.parametrize("label", ["DIN, shown vectors and 20 newest events", "LambdaRank", "Transitions"])
def test_a_row_of_an_ablation_is_a_fit_with_its_change(
    ablation: ModuleType, informed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    words: list[str] = []

    def fit(*given: str, log: Path) -> None:
        words.extend(given)
        recsys(*given, "--trainer.max_epochs", 1)

    monkeypatch.setattr(ablation, "recsys", fit)
    config = yaml.safe_load(RANKER)
    config["model"]["init_args"]["without"] = ["vectors", "recent", "rank"]
    (tmp_path / "ranker.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "candidates").symlink_to(informed.candidates)
    options = argparse.Namespace(run=tmp_path, config=tmp_path / "ranker.yaml", seed=0)
    rows = ablation.changes(informed.candidates)
    everything = ablation.measure("everything", rows["everything"], options)
    assert (everything["difference"], everything["standard_error"]) == (0, 0)
    first, words[:] = list(words), []
    row = ablation.measure(label, rows[label], options)
    assert row["lists"] == everything["lists"]
    changed = {word.partition("=")[0] for word in set(words) ^ set(first)} - {"--output"}
    assert (
        changed
        == {
            "DIN, shown vectors and 20 newest events": {"--model.init_args.scorer", "--model.init_args.without"},
            "LambdaRank": {"--model.init_args.loss"},
            "Transitions": {"--model.init_args.without"},
        }[label]
    )


def test_the_error_of_an_ablation_counts_users(ablation: ModuleType, tmp_path: Path) -> None:
    """Five copies of a user's list say no more than one."""
    rng = np.random.default_rng(0)
    before, gain, users = rng.random(200), rng.normal(0.1, 0.3, 200), np.arange(200)
    for name, times in (("once", 1), ("often", 5)):
        np.savez(tmp_path / f"{name}.npz", ranker=before.repeat(times), users=users.repeat(times))
    once = ablation.against(tmp_path / "once.npz", before + gain)
    often = ablation.against(tmp_path / "often.npz", (before + gain).repeat(5))
    assert once == often
    assert once["difference"] == pytest.approx(gain.mean(), abs=1e-5)
    assert once["standard_error"] == pytest.approx(gain.std() / 200**0.5, abs=1e-5)


def test_results_by_gap_are_of_the_means_over_the_runs(tmp_path: Path) -> None:
    """Two runs of three users; user 0 has two targets."""
    keys = {"user": [0, 0, 1, 2], "place": [3, 5, 9, 12], "target": [1, 2, 3, 4], "gap": [0, 7_200, 10_000, -1]}
    for run, ranks in (("a", [1, 1, 3, 1]), ("b", [3, 1, 1, 1])):
        (tmp_path / run).mkdir()
        pl.DataFrame(keys | {"retriever": [3, 3, 3, 3], "ranker": ranks}).write_parquet(
            tmp_path / run / "ranks.parquet"
        )
    found = importlib.import_module("results").by_gap([tmp_path / "a", tmp_path / "b"], resamples=50)
    assert {label: group["targets"] for label, group in found.items()} == {
        **{"all": 4, "the same second": 1, "an hour to a day": 2, "an hour or more": 2}
    }
    same = found["the same second"]
    assert same["models"]["ranker"]["ndcg@10"]["value"] == pytest.approx(0.75, abs=1e-6)
    assert same["comparison"]["ndcg@10"]["ratio"] == 1.5
    assert found["an hour to a day"]["models"]["ranker"]["ndcg@10"]["value"] == (1 + 0.75) / 2
    assert found["an hour to a day"]["users"] == 2
    pl.DataFrame(keys | {"place": [3, 5, 9, 13], "retriever": [3, 3, 3, 3]}).write_parquet(
        tmp_path / "b" / "ranks.parquet"
    )
    with pytest.raises(SystemExit, match="has other targets than"):
        importlib.import_module("results").by_gap([tmp_path / "a", tmp_path / "b"])


def test_figures_with_and_without_targets_of_unknown_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four users, of whom the one of raw id 30 has a target whose time is status 3."""
    rows = [(10, 7, 0), (10, 9, 0), (20, 7, 1), (20, 9, 2), (30, 9, 0), (30, 7, 3), (40, 7, 3), (40, 9, 0)]
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "".join(f"{user}::{item}::3::1\n" for user, item, _ in rows))
        with archive.open("ml-1m/ratings_ts_status.npy", "w") as file:
            np.save(file, np.array([status for *_, status in rows], dtype=np.uint8))
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    pl.DataFrame({"user": range(4), "user_id": [10, 20, 30, 40]}).write_parquet(tmp_path / "data" / c.USER_TABLE)
    pl.DataFrame({"item": [1, 2], "item_id": [7, 9]}).write_parquet(tmp_path / "data" / c.ITEM_TABLE)
    ranks = pl.DataFrame({"user": [3, 2, 1, 0], "target": [2, 1, 2, 2], "retriever": [11, 1, 12, 1]})
    ranks.write_parquet(tmp_path / "run" / "ranks.parquet")
    words = [tmp_path / "raw.zip", tmp_path / "run", "--data", tmp_path / "data", "--json", tmp_path / "figures.json"]
    monkeypatch.setattr(sys, "argv", ["estimated_times.py", *map(str, words)])
    importlib.import_module("estimated_times").main()
    assert "status 3 (1)" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())[str(tmp_path / "run")]["retriever"]
    assert {label: group["hr@10"] for label, group in figures.items()} == {
        "all": 0.5,
        "time known or bounded": pytest.approx(1 / 3),
        "status 3": 1.0,
    }


def test_a_recorded_run_has_its_report_and_the_manifest_of_every_ancestor(tmp_path: Path, trained: Run) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text('{"users": 3}')
    (run / "bundle").symlink_to(trained.bundle)
    (folder,) = importlib.import_module("record").record("world", [run], tmp_path)
    assert folder == tmp_path / "docs/measured/world/run"
    assert json.loads((folder / "report.json").read_text()) == {"users": 3}
    content = (folder / "manifests.json").read_text()
    kinds = [manifest["kind"] for manifest in json.loads(content)["artifacts"].values()]
    assert kinds[0] == "dataset"
    assert kinds[-1] == "bundle"
    assert {"retriever", "index", "candidates", "ranker"} < set(kinds)
    assert str(tmp_path.parent) not in content
    (run / "refit-all").symlink_to(run)
    (folder,) = importlib.import_module("record").record("world-refit", [run / "refit-all"], tmp_path)
    assert folder == tmp_path / "docs/measured/world-refit/run", "the name of the run, of which there are several"
    with pytest.raises(SystemExit, match="no report"):
        importlib.import_module("record").record("world", [tmp_path], tmp_path)


def test_baselines_alone_have_the_metrics_of_a_report(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--split", "test", "--json", str(tmp_path / "rows.jsonl"), "--baselines"]
    named = json.dumps([{"class_path": "Markov"}, {"class_path": "EASE", "init_args": {"items": 50}}])
    monkeypatch.setattr(sys, "argv", ["baselines.py", str(trained.data), *words, named])
    importlib.import_module("baselines").main()
    assert "| markov" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["baseline"]["init_args"] for row in rows] == [{}, {"ridge": 3.0, "items": 50}]
    dataset = Dataset(trained.data)
    ranks = rank_users(dataset, Recommender.load(trained.bundle), dataset.users("test"), "test").ranks["markov"]
    assert rows[0]["hr@10"]["value"] == pytest.approx((ranks <= 10).mean(), abs=1e-5)
    assert rows[0]["evaluated"] == "test"


def test_rankers_are_not_measured_on_the_first_of_several_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    rankers = importlib.import_module("rankers")
    several = SimpleNamespace(path="data", listed_targets={}, protocol={"split": "Baskets"})
    monkeypatch.setattr(rankers, "Dataset", lambda path: several)
    monkeypatch.setattr(rankers, "Candidates", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="data has the split Baskets with several targets per user, expected one"):
        rankers.measure(SimpleNamespace(run=Path("run"), data=Path("data"), validation=False))
