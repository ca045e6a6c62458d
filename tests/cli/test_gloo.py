"""Two processes on the CPU train as one process on the same global batch, stop together and go on together."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_fixtures import Run
from two_processes import PARTS, RANKERS, RETRIEVERS, fit_ranker, fit_retriever, retriever

from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.losses import InfoNCE

SCRIPT = Path(__file__).parent.parent / "two_processes.py"
TIMEOUT = 400  # seconds, also on a busy machine: processes that wait for each other fail the test, not the suite


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gloo")


@pytest.fixture(scope="module")
def by_two(folder: Path, cycle: Path, trained: Run) -> list[dict[str, Any]]:
    """Results of all jobs, of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "PL_GLOBAL_SEED")}
    alone |= {"OMP_NUM_THREADS": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, SCRIPT, folder, cycle, trained.candidates]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            list(map(str, words)), env=alone, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, [path.read_text()[-3000:] for path in folder.glob("said*")]
    return [torch.load(folder / f"results{rank}.pt", weights_only=False) for rank in range(2)]


def agree(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert len(two["gradients"]) == len(one["gradients"]) == len(PARTS)
    for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert all(gradient.any() for name, gradient in one["gradients"][-1].items() if "bias" not in name)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert two["values"].keys() == one["values"].keys() != set()
    for name, value in one["values"].items():
        torch.testing.assert_close(two["values"][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [name for name in RETRIEVERS if name != "local negatives"])
def test_two_processes_have_the_gradients_of_one(name: str, by_two: list[dict[str, Any]], cycle: Path) -> None:
    """With the logged loss and the validation metrics; the parts of the global batch are uneven."""
    assert len({sum(map(len, step)) for step in PARTS}) > 1
    one = fit_retriever(name, cycle, 1)
    assert set(one["values"]) >= {"train/loss", "val/ndcg@10"}
    for own in by_two:
        agree(own[name], one)


@pytest.mark.parametrize("name", RANKERS)
def test_two_rankers_have_the_gradients_of_one(name: str, by_two: list[dict[str, Any]], trained: Run) -> None:
    one = fit_ranker(name, trained.candidates, 1)
    for own in by_two:
        agree(own[name], one)


def test_local_negatives_are_those_of_the_own_process(by_two: list[dict[str, Any]], cycle: Path) -> None:
    """The gradient is the mean over targets of what each process has alone."""
    data = Histories(cycle, max_length=10)
    model, total = retriever(data, loss=InfoNCE()), 0
    model.load_item_tables(data.dataset)
    for part in PARTS[0]:
        window = data.read_windows(np.array(part))
        targets = int((window.lengths - 1).sum())
        total += targets
        (model.losses(window)["loss"] * targets).backward()
    gathered = by_two[0]["in-batch negatives"]["gradients"][0]
    for name, gradient in by_two[0]["local negatives"]["gradients"][0].items():
        own = model.get_parameter(name).grad
        assert own is not None
        torch.testing.assert_close(gradient, own / total, rtol=1e-4, atol=1e-5, msg=name)
    name = "towers.items.table.weight"
    assert not torch.allclose(gathered[name], by_two[0]["local negatives"]["gradients"][0][name], atol=1e-4)


def test_item_tables_begin_as_those_of_the_first_process(by_two: list[dict[str, Any]]) -> None:
    first, second = by_two[0]["different starts"]
    assert first == second


def test_a_fit_of_two_processes_goes_on_where_it_stopped(by_two: list[dict[str, Any]], folder: Path) -> None:
    for own in by_two:
        straight, resumed = own["resumed"]
        assert straight == resumed
        assert (straight["epochs"], straight["steps"]) == (3, 3 * 4)  # 8 batches an epoch, 4 of each process
    straight, resumed = (torch.load(folder / name / "last.ckpt", weights_only=True) for name in ("straight", "resumed"))
    for name, weight in straight["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][name], weight, rtol=0, atol=0, msg=name)


def test_early_stopping_ends_both_processes(by_two: list[dict[str, Any]], folder: Path) -> None:
    """Also a fit that is resumed after it has been ended by early stopping, which has nothing left to do."""
    for own in by_two:
        early, again = own["early"]
        assert (early["epochs"], early["steps"]) == (2, 2 * 4)
        assert again["steps"] == early["steps"]
    assert (folder / "early/manifest.json").is_file()


def test_a_ranker_is_fitted_by_both(by_two: list[dict[str, Any]], folder: Path, trained: Run) -> None:
    """`recsys fit` within two processes, as torchrun starts it; validation is that of one process on all lists."""
    assert "sync_dist" not in "".join((folder / f"said{rank}").read_text() for rank in range(2))
    output = folder / "ranker"
    assert sorted(file.name for file in output.iterdir()) == ["best.ckpt", "last.ckpt", "log", "manifest.json"]
    (log,) = (output / "log").iterdir()
    assert (log / "config.yaml").is_file()
    manifest = json.loads((output / "manifest.json").read_text())
    model = Ranker.load_from_checkpoint(output / "best.ckpt", weights_only=True, map_location="cpu").eval()
    candidates = Candidates(trained.candidates, batch_size=16)
    candidates.setup("fit")
    with torch.no_grad():
        for lists in candidates.val_dataloader():
            model.validation_step(lists, 0)
    assert manifest["best"] == pytest.approx(float(model.metrics.compute()["ndcg@10"]), abs=1e-6)
    assert manifest["steps"] == 2 * -(-len(candidates.train_dataloader()) // 2)
