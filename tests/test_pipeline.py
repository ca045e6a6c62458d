"""The whole pipeline on a world whose order is worth learning."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from pipeline_fixtures import Run, recsys

ROOT = Path(__file__).parent.parent
USERS = 800


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages, at a size at which they learn what there is to learn."""
    from recsys2stage.data.simulate import simulate

    made = Run(tmp_path_factory.mktemp("pipeline"))
    simulate(made.folder / "raw", users=USERS, items=400, events=34_000)
    made.prepare(made.folder / "raw")
    size = ("--model.dim", 32, "--data.max_length", 50, "--model.optimizer.lr", 5e-3)
    made.fit_retriever(*size, "--trainer.max_epochs", 10)
    made.export_index()
    made.mine("--k", 100)
    made.fit_ranker("--trainer.max_epochs", 5, "--model.optimizer.lr", 1e-3, "--data.batch_size", 64)
    made.export_bundle("--candidates", 100)
    recsys("evaluate", "--bundle", made.bundle, "--output", made.folder)
    recsys("recommend", "--bundle", made.bundle, "--output", made.folder / "recommendations.parquet")
    return made


@pytest.fixture(scope="module")
def ndcg(run: Run) -> dict[str, dict[str, float]]:
    report = json.loads((run.folder / "report.json").read_text())
    assert report["users"] == USERS
    return {name: metrics["ndcg@10"] for name, metrics in report["models"].items()}


def test_the_retriever_has_three_times_the_ndcg_of_popularity(ndcg: dict[str, dict[str, float]]) -> None:
    assert ndcg["retriever"]["value"] >= 3 * ndcg["popularity"]["value"]
    assert ndcg["retriever"]["low"] > 2 * ndcg["popularity"]["high"]


def test_the_ranker_is_not_worse_than_the_retriever(run: Run, ndcg: dict[str, dict[str, float]]) -> None:
    assert ndcg["ranker"]["value"] >= 0.98 * ndcg["retriever"]["value"]
    assert ndcg["ranker_ids_masked"]["value"] < ndcg["ranker"]["value"]  # ids say what features cannot
    comparison = json.loads((run.folder / "report.json").read_text())["comparison"]["ndcg@10"]
    assert comparison["difference"] == pytest.approx(ndcg["ranker"]["value"] - ndcg["retriever"]["value"])


def test_everybody_is_recommended_something_new(run: Run) -> None:
    recommended = pl.read_parquet(run.folder / "recommendations.parquet")
    assert recommended.group_by("user_id").len()["len"].to_list() == [10] * USERS
    rated = pl.read_csv(run.folder / "raw" / "ratings.csv").select(user_id="userId", item_id="movieId")
    assert len(recommended.join(rated, on=["user_id", "item_id"])) == 0
    assert recommended["item_id"].n_unique() > 100  # not the same for all


@pytest.mark.slow
def test_make_demo_prints_its_table_and_changing_one_config_redoes_only_what_depends_on_it(tmp_path: Path) -> None:
    names = ("Makefile", "pyproject.toml", "constraints.txt", "configs")
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)

    def make(*words: str) -> str:
        command = ["make", "--assume-old=.venv/ready", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    shown = make("demo")
    report = json.loads((tmp_path / "runs/demo/report.json").read_text())
    models = report["models"]
    assert models["retriever"]["ndcg@10"]["value"] >= 3 * models["popularity"]["ndcg@10"]["value"]
    assert models["ranker"]["ndcg@10"]["value"] >= models["retriever"]["ndcg@10"]["value"] * 0.98
    lines = shown.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("| model"))
    assert any(line.startswith("protocol:") for line in lines[:head])
    assert [line.split("|")[1].strip() for line in lines[head + 2 : head + 7]] == [
        *("popularity", "markov", "transition graph", "retriever", "ranker", "ranker, ids masked")
    ]
    assert any("runs/demo/report.json" in line for line in lines[head + 7 :])

    figures = ("cohorts.png", "ceiling.png", "learning.png", "calibration.png")
    assert all(f"  runs/demo/{name}" in lines for name in figures)
    assert len([line for line in lines if "newest events last: " in line]) == 3
    assert lines[-1].startswith("next: ")
    assert len(lines) < 100
    assert not any(word in shown for word in ("GPU", "TPU", "Tip", "--config", "trap "))
    for path in (tmp_path / "configs/demo").iterdir():
        path.touch()
    assert "] train" not in make("demo", "--dry-run"), "nothing is left to do"
    with (tmp_path / "configs/demo/ranker.yaml").open("a") as file:
        file.write("# changed")
    again = make("demo", "--dry-run")
    assert "runs/demo/ranker" in again
    assert "retriever.yaml" not in again
    assert "mine-negatives" not in again
