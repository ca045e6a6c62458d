"""The training benchmark counts what it says it counts; how fast anything is, is not tested."""

import importlib
import itertools
import subprocess
import time
import venv
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys2stage import encoders
from recsys2stage.data import Histories
from recsys2stage.encoders import BERT4Rec, SASRec, Transformer

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


def job(clock: ModuleType, **options: Any) -> Any:
    sizes = {"width": 16, "heads": 2, "layers": 1, "length": 8, "batch": 4, "dropout": 0.1, "threads": 1}
    return clock.Job(**{"data": "", "seconds": 0.0, "warmup": 1, "loss": "FullSoftmax", **sizes, **options})


def test_warmup_is_not_counted_and_the_last_step_is_whole(clock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def step(seconds: float) -> Any:
        nonlocal now
        now += seconds
        return clock.Work(events=10, places=40, flops=2e12)

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
    assert (work.events, work.places) == (5, 6)
    assert work.flops - encoder == 6 * 5 * 3 * 16  # items 1, 2 and 3


def test_every_encoder_of_the_package_trains_on_the_same_events(
    ours: ModuleType, clock: ModuleType, ragged: Path
) -> None:
    assert next(iter(ours.known())) == "Transformer"
    assert {"SASRec", "BERT4Rec"} <= set(ours.known()) <= set(vars(encoders))
    found = ours.compare(job(clock, data=str(ragged)), names=[])["encoders"]
    assert [one["encoder"] for one in found] == list(ours.known())
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
