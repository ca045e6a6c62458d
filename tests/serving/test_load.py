"""benchmarks/serve.py: what it sends and what it measures."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from pipeline_fixtures import Run

from recsys2stage.data.dataset import Dataset

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import serve

    return serve


class Slow:
    """A service that answers one request at a time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.lock = seconds, asyncio.Lock()
        self.open = 0
        self.met: list[int] = []  # requests that were open once each was sent

    async def send(self, request: bytes) -> tuple[int, bytes]:
        self.open += 1
        self.met.append(self.open)
        async with self.lock:
            await asyncio.sleep(self.seconds)
        self.open -= 1
        return 200, b""


def test_requests_are_the_histories_before_the_test_target(load: ModuleType, cycle: Path) -> None:
    """In this world item i is followed by i + 1."""
    requests, dataset = load.histories(cycle, 1_000), Dataset(cycle)
    assert len(requests) == len(dataset.users("test"))
    ids = pl.read_parquet(cycle / "items.parquet").sort("item")["item_id"].cast(pl.String).to_list()
    targets = {ids[item - 1] for item in dataset.targets(dataset.users("test"), "test")}
    for request in requests:
        history = request["history"]
        assert len(history["items"]) == len(history["times"]) == 11
        assert str(int(history["items"][-1]) % 40 + 1) in targets


def test_returning_users_are_named(load: ModuleType, cycle: Path) -> None:
    dataset = Dataset(cycle)
    ids = set(pl.read_parquet(cycle / "users.parquet")["user_id"].cast(pl.String))
    requests = load.returning(cycle, 1_000)
    assert {request["user_id"] for request in requests} == ids
    assert len(requests) == len(ids)
    longest = int((dataset.offsets[1:] - dataset.offsets[:-1]).max())
    assert load.returning(cycle, 1_000, longest) == requests
    assert load.returning(cycle, 1_000, 0) == []


def test_an_open_loop_counts_the_time_that_requests_wait(load: ModuleType) -> None:
    """At twice the rate that the service can take, the last request waits for half of the time."""
    start = time.perf_counter()
    results = asyncio.run(load.open_loop(Slow(0.02), [b""], rate=100, seconds=1))
    assert 60 < len(results) < 140
    assert time.perf_counter() - start > 0.02 * len(results)
    assert max(latency for _, latency in results) > 0.2


def test_a_closed_loop_sends_when_it_is_answered(load: ModuleType) -> None:
    service = Slow(0.02)
    results = asyncio.run(load.closed_loop(service, [b""], connections=2, seconds=0.5))
    assert 2 < len(results) <= 27, "at most one in 0.02 seconds, and fewer where the machine is busy"
    assert service.met == [1, *[2] * (len(results) - 1)], "each connection has one open, and sends the next at once"
    assert all(latency >= 0.02 for _, latency in results)


@pytest.mark.slow
@pytest.mark.parametrize("users", [[], ["--returning", "--users", "20"]], ids=["histories", "returning"])
def test_the_whole_benchmark(trained: Run, tmp_path: Path, users: list[str]) -> None:
    words = ("--bundle", trained.bundle, "--data", trained.data, "--seconds", "1", "--connections", "1", *users)
    command = [sys.executable, BENCHMARKS / "serve.py", *words, "--rates", "20", "--output", tmp_path / "out.json"]
    subprocess.run([str(word) for word in command], check=True, env={"PYTHONPATH": str(BENCHMARKS.parent)})
    facts = json.loads((tmp_path / "out.json").read_text())
    assert [load["load"] for load in facts["loads"]] == ["1 connections", "20/s"]
    assert facts["saturation"] > 0
    assert facts["loads"][0]["added_ms"] > 0
    assert facts["loads"][1]["added_ms"] is None
    for one in facts["loads"]:
        assert one["errors"] == {}
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
        assert {"queue", "encode", "search", "rank"} <= set(one["stages_ms"])
