"""Training with several processes: shares of the data, and real fits of two processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_fixtures import RETRIEVER

from recsys2stage import estimator
from recsys2stage.retrieval import histories as histories_module
from recsys2stage.retrieval.histories import Histories, balance_batches, shuffled
from recsys2stage.retrieval.retriever import Retriever

TIMEOUT = 400  # seconds, also on a busy machine: processes that wait for each other fail the test, not the suite


def shares(dataset: Path, processes: int, epoch: int = 0, **options: Any) -> list[Histories]:
    """The data module of each process."""
    parts = [Histories(dataset, **options) for _ in range(processes)]
    for rank, part in enumerate(parts):
        part.trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank, world_size=processes)
    return parts


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_an_epoch_in_equal_steps_and_leave_no_window_out(ragged: Path, processes: int) -> None:
    windows = len(Histories(ragged, max_length=8).window_starts)
    orders = []
    for epoch in range(2):
        of_all = shares(ragged, processes, epoch, max_length=8, batch_size=4)
        parts = [part.train_dataloader().plan() for part in of_all]
        assert len({len(part) for part in parts}) == 1, "each process takes as many steps"
        flat = np.concatenate([batch for part in parts for batch in part])
        assert sorted(flat.tolist()) == list(range(windows)), "together they take the epoch of one process"
        assert max(len(batch) for part in parts for batch in part) <= 4
        orders.append(flat.tolist())
    assert orders[0] != orders[1]


def test_the_largest_batches_are_split() -> None:
    batches = shuffled(np.arange(22), 4, 0)  # 4, 4, 4, 4, 4 and 2, in some order
    shared = balance_batches(batches, 4)
    assert sorted(map(len, shared)) == [2, 2, 2, 2, 2, 4, 4, 4]
    assert np.concatenate(shared).tolist() == np.concatenate(batches).tolist(), "in the order of one process"


def test_fewer_training_batches_than_processes_are_refused(cycle: Path) -> None:
    with pytest.raises(ValueError, match=r"4 processes share 3 training batches.* set trainer.devices to at most 3"):
        shares(cycle, 4, batch_size=50)[0].train_dataloader()
    with pytest.raises(ValueError, match=r"3 training batches of one row .* batch_size to at least 2"):
        balance_batches([np.array([number]) for number in range(3)], 2)


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 50), (2, 256), (2, 50), (3, 7), (7, 1), (7, 31), (120, 256)])
def test_each_target_is_measured_once(cycle: Path, processes: int, batch_size: int) -> None:
    parts = [part.val_dataloader().plan() for part in shares(cycle, processes, eval_batch_size=batch_size)]
    users = Histories(cycle).dataset.users("val")
    assert {len(part) for part in parts} == {max(1, len(parts[0]))}, "no process is without a batch"
    assert sorted(np.concatenate([batch for part in parts for batch in part]).tolist()) == users.tolist()
    assert max(len(batch) for part in parts for batch in part) <= max(batch_size, 2)


def test_fewer_users_than_processes_are_refused(cycle: Path) -> None:
    with pytest.raises(ValueError, match=r"121 processes share 120 evaluation targets.*trainer.devices to at most 120"):
        shares(cycle, 121)[0].val_dataloader()


def test_of_processes_that_start_together_one_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "prepare.yaml"
    config.write_text("source: {class_path: Table, init_args: {path: events.csv}}\noutput: elsewhere\n")
    (tmp_path / "events.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{user},{item},{item}\n" for user in range(3) for item in range(1, 6))
    )
    monkeypatch.chdir(tmp_path)
    prepare, made = histories_module.prepare_dataset, []

    def slow(config: Path, output: Path) -> None:
        made.append(output)
        time.sleep(0.2)
        prepare(config, output)

    monkeypatch.setattr(histories_module, "prepare_dataset", slow)
    threads = [threading.Thread(target=Histories, args=(tmp_path / "data", config)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert made == [tmp_path / "data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "events.csv", "prepare.yaml"]


def test_the_estimator_trains_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many GPUs there are: Lightning's further processes would run the script that calls it."""
    given: list[str] = []
    monkeypatch.setattr(estimator.training, "train", lambda verb, options: given.extend(options))
    estimator.TwoStageRecommender()._train("retriever", tmp_path / "data", tmp_path / "retriever")
    assert given[-1] == "--trainer.devices=1"


# --- two processes


def fit_by_two(config: str, output: Path, *words: object) -> dict[str, Any]:
    """`recsys fit` with two processes on this machine; gives the manifest."""
    path = output.with_suffix(".yaml")
    path.write_text(config)
    command = [sys.executable, "-m", "recsys2stage.cli.main", "fit", "--config", path, "--output", output]
    command += ["--trainer.devices", 2, "--trainer.strategy", "ddp", *words]
    alone = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    process = subprocess.Popen(
        list(map(str, command)),
        env=alone | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    assert "sync_dist" not in said, said
    (log,) = (output / "log").iterdir()
    assert (log / "config.yaml").is_file()
    assert sorted(file.name for file in output.iterdir()) == ["best.ckpt", "last.ckpt", "log", "manifest.json"]
    return json.loads((output / "manifest.json").read_text())


def test_two_processes_fit_a_retriever(cycle: Path, tmp_path: Path) -> None:
    """All validation targets are one batch, fewer than processes; a step's batches are accumulated."""
    words = ("--data.init_args.path", cycle, "--trainer.max_epochs", 2, "--trainer.accumulate_grad_batches", 2)
    manifest = fit_by_two(RETRIEVER, tmp_path / "retriever", *words, "--last.every_n_train_steps", 1)
    data = Histories(cycle, max_length=20, batch_size=32)
    assert (len(data.train_dataloader()), len(data.val_dataloader())) == (4, 1)
    assert (manifest["epochs"], manifest["steps"]) == (2, 2), "each process took half of the 4 batches, as one step"
    model = Retriever.load_from_checkpoint(tmp_path / "retriever/best.ckpt", weights_only=True, map_location="cpu")
    with torch.no_grad():
        (batch,) = data.val_dataloader()
        model.eval().validation_step(batch, 0)
    assert model.val_metrics.users == 120
    assert manifest["best"] == pytest.approx(float(model.val_metrics.compute()["ndcg@10"]), abs=1e-6)
