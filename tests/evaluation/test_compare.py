"""Two runs compared: the same users and targets, or no comparison at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import Run, recsys

from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.compare import paired_differences
from recsys2stage.metrics import KS, compute_metrics

QUICK = ("--plots", "false", "--resamples", 100)


@pytest.fixture(scope="module")
def report(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was measured of the bundle; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("report")
    recsys("evaluate", "--bundle", trained.bundle, "--output", folder, *QUICK)
    return folder


@pytest.fixture
def other(report: Path, tmp_path: Path) -> Path:
    """A copy, to be made another run's."""
    return shutil.copytree(report, tmp_path / "other")


def edit_protocol(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "report.json").read_text())
    content["protocol"] |= changes
    (folder / "report.json").write_text(json.dumps(content))


def edit_ranks(folder: Path, ranks: pl.DataFrame) -> None:
    ranks.write_parquet(folder / "ranks.parquet")


def against(run: Run, other: Path, output: Path, *words: object) -> dict[str, Any]:
    recsys("evaluate", "--bundle", run.bundle, "--output", output, "--against", other, *QUICK, *words)
    return json.loads((output / "report.json").read_text())["against"]


def refused(message: str, run: Run, other: Path, output: Path, *words: object) -> None:
    with pytest.raises(SystemExit, match=message):
        against(run, other, output, *words)
    assert not output.exists()  # before anything was measured


def test_a_run_is_equal_to_itself(
    trained: Run, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = against(trained, report, tmp_path / "out")
    assert found["folder"] == str(report)
    assert found["differs"] == []
    assert list(found["models"]) == ["retriever", "ranker"]
    for metrics in found["models"].values():
        assert set(metrics) == {f"{name}@{k}" for name in ("hr", "ndcg", "recall") for k in KS} | {"mrr"}
        for value in metrics.values():
            assert [value[key] for key in ("difference", "low", "high", "p", "ratio")] == [0, 0, 0, 1, 1]
    text = (tmp_path / "out" / "report.md").read_text()
    for shown in (capsys.readouterr().out, text):
        assert f"Against {report}, on the same 150 users and targets." in shown
        assert "| ranker − theirs" in shown
        assert "| retriever − theirs" in shown
        assert "Other differences" not in shown


def test_a_comparison_is_of_the_users_differences(trained: Run, other: Path, tmp_path: Path) -> None:
    """Every rank of the other run is twice as large, and its rows stand in another order."""
    ranks = pl.read_parquet(other / "ranks.parquet")
    edit_ranks(other, ranks.with_columns(pl.col("retriever", "ranker") * 2).reverse())
    found = against(trained, other, tmp_path / "out")["models"]
    for name in ("retriever", "ranker"):
        one, two = (compute_metrics(rank.to_numpy()) for rank in (ranks[name], ranks[name] * 2))
        value = found[name]["mrr"]
        assert value["difference"] == pytest.approx((one["mrr"] - two["mrr"]).mean())
        assert value["ratio"] == pytest.approx(2)
        assert 0 < value["low"] < value["difference"] < value["high"]
        assert value["p"] == 1 / 101
        assert found[name]["hr@10"]["difference"] == pytest.approx((one["hr@10"] - two["hr@10"]).mean())


def test_only_what_both_have_is_compared(trained: Run, report: Path, other: Path, tmp_path: Path) -> None:
    edit_ranks(other, pl.read_parquet(other / "ranks.parquet").drop("ranker", "ranker_ids_masked"))
    assert list(against(trained, other, tmp_path / "out")["models"]) == ["retriever"]


def test_what_was_trained_on_and_the_request_time_may_differ_and_are_named(
    trained: Run, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_protocol(other, request_time="target", split_hash="of another training side")
    differs = ["request_time none here, target there", "the events before the targets or the training events differ"]
    assert against(trained, other, tmp_path / "out")["differs"] == differs
    assert f"Other differences between the runs: {'; '.join(differs)}." in capsys.readouterr().out
    assert differs[0] in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [("evaluated", "val"), ("ranking", "sampled: ..."), ("seen_filter", "nothing"), ("repeats", "keep"), ("core", 5)],
)
def test_another_protocol_is_refused(trained: Run, other: Path, tmp_path: Path, name: str, value: Any) -> None:
    edit_protocol(other, **{name: value})
    refused(f"has another evaluation protocol: {name} is .* here and {value!r} there", trained, other, tmp_path / "out")


def test_other_users_are_refused_with_their_counts(trained: Run, other: Path, tmp_path: Path) -> None:
    edit_ranks(other, pl.read_parquet(other / "ranks.parquet").head(140))
    message = "was evaluated on 140 users, this run on 150, and 140 are in both"
    refused(message, trained, other, tmp_path / "out")
    refused("evaluated on 140 users, this run on 20, and", trained, other, tmp_path / "out", "--users", 20)


def test_other_targets_and_another_catalogue_are_refused(trained: Run, other: Path, tmp_path: Path) -> None:
    ranks = pl.read_parquet(other / "ranks.parquet")
    edit_ranks(other, ranks.with_columns(target=pl.col("target") + (pl.col("user") < 7).cast(pl.Int64)))
    refused("7 of 150 users have another target in", trained, other, tmp_path / "out")
    edit_ranks(other, ranks)
    content = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(content | {"items": 119}))
    refused("ranks among 119 items, this run among 120", trained, other, tmp_path / "out")


def test_a_folder_without_a_report_or_of_an_older_version_is_refused(trained: Run, other: Path, tmp_path: Path) -> None:
    refused(
        "report.json does not exist; to create the baseline run: recsys evaluate", trained, tmp_path, tmp_path / "out"
    )
    words = ("--protocol", "sampled-30")
    refused(r"report-sampled-30.json does not exist.*--protocol sampled-30", trained, other, tmp_path / "out", *words)
    edit_ranks(other, pl.read_parquet(other / "ranks.parquet").drop("target"))
    refused(
        "by an older version and lacks targets or catalogue size; run: recsys evaluate",
        trained,
        other,
        tmp_path / "out",
    )


def test_samples_are_compared_where_their_draws_are_the_same(trained: Run, tmp_path: Path) -> None:
    words = ("--protocol", "sampled-30", *QUICK)
    for seed in (0, 1):
        of = ("--bundle", trained.bundle, "--output", tmp_path / str(seed), "--seed", seed)
        recsys("evaluate", *of, *words)
    of = ("--bundle", trained.bundle, "--output", tmp_path / "out", *words, "--against")
    recsys("evaluate", *of, tmp_path / "0")
    content = json.loads((tmp_path / "out" / "report-sampled-30.json").read_text())
    assert content["against"]["models"]["ranker"]["mrr"]["difference"] == 0
    with pytest.raises(SystemExit, match="negatives_seed is 0 here and 1 there"):
        recsys("evaluate", *of, tmp_path / "1")


def test_a_run_with_other_training_events_but_the_same_targets_is_comparable(trained: Run, tmp_path: Path) -> None:
    """Its users train on an event fewer; as a dataset it has another split hash."""
    run = Run(tmp_path)
    shutil.copytree(trained.data, run.data)
    ends = np.load(run.data / "users.train_end.npy")
    np.save(run.data / "users.train_end.npy", ends - 1)
    bundle = shutil.copytree(trained.bundle, run.bundle)
    for manifest in (run.data / "manifest.json", bundle / "manifest.json"):
        content = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(content | {"split_hash": "another"}))
    recsys("evaluate", "--bundle", bundle, "--data", run.data, "--output", tmp_path / "one", *QUICK)
    found = against(trained, tmp_path / "one", tmp_path / "out")
    assert found["differs"] == ["the events before the targets or the training events differ"]
    assert found["models"]["retriever"]["mrr"]["difference"] == 0
    assert Dataset(run.data).train_counts.sum() < Dataset(trained.data).train_counts.sum()


def test_a_gain_of_every_user_is_certain_and_none_is_not(rng: np.random.Generator) -> None:
    ranks = rng.choice([2, 40, 160], 300)
    gain = paired_differences(compute_metrics(ranks - 1), compute_metrics(ranks), resamples=200, seed=0)["mrr"]
    assert gain["p"] == 1 / 201
    assert gain["share_of_resamples_above_zero"] == 1
    shuffled = compute_metrics(rng.permutation(ranks))
    luck = paired_differences(shuffled, compute_metrics(ranks), resamples=200, seed=0)["mrr"]
    assert luck["difference"] == pytest.approx(0, abs=1e-12)  # the same ranks, of other users
    assert luck["p"] > 0.9
    assert luck["low"] is not None
    assert luck["low"] < 0
