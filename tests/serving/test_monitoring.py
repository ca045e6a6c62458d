"""Metrics of several processes: sums over the living and the dead, gauges of the living."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recsys2stage.serving.monitoring import FOLDER, Metrics, forget, resident_bytes

PROCESS = """
import sys
from pathlib import Path
from recsys2stage.serving import monitoring
monitoring.share(Path(sys.argv[1]), sys.argv[2])
metrics = monitoring.Metrics()
for _ in range(int(sys.argv[3])):
    metrics.observe_request("POST", "/v1/recommend", 200, 0.004)
metrics.observe_stages({"rank": 0.5})
metrics.running.set(1)
metrics.watch("cached_users", lambda: 7.0)
metrics.sample()
"""


def series(text: bytes) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_workers_add_up_and_a_successor_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for slot, count in (("worker0", 3), ("worker1", 4), ("worker0", 5)):  # the third takes the place of the first
        forget(tmp_path, slot)
        subprocess.run([sys.executable, "-c", PROCESS, tmp_path, slot, str(count)], check=True)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{kind}_worker{n}.db" for kind in ("counter", "histogram", "gauge_livesum") for n in (0, 1)}
    monkeypatch.setenv(FOLDER, str(tmp_path))
    metrics = Metrics.__new__(Metrics)  # reads the files only
    metrics.shared, metrics._watched = True, {}
    seen = series(metrics.render()[0])
    assert seen['recsys_requests_total{method="POST",route="/v1/recommend",status="200"}'] == 12
    assert seen['recsys_request_seconds_bucket{le="0.0025",route="/v1/recommend"}'] == 0
    assert seen['recsys_request_seconds_bucket{le="0.005",route="/v1/recommend"}'] == 12
    assert seen['recsys_stage_seconds_sum{stage="rank"}'] == pytest.approx(1.5)
    assert (seen["recsys_workers"], seen["recsys_cached_users"]) == (2, 14)
    forget(tmp_path, "worker1")
    seen = series(metrics.render()[0])
    assert (seen["recsys_workers"], seen["recsys_cached_users"]) == (1, 7)
    assert seen['recsys_requests_total{method="POST",route="/v1/recommend",status="200"}'] == 12


def test_metrics_of_one_process() -> None:
    assert FOLDER not in os.environ
    metrics = Metrics()
    waiting = [3.0, 5.0]
    metrics.watch("queue_length", lambda: waiting.pop(0))
    metrics.observe_batch(4)
    metrics.reloads.labels("refused").inc()
    first, second = series(metrics.render()[0]), series(metrics.render()[0])
    assert (first["recsys_queue_length"], second["recsys_queue_length"]) == (3, 5)
    assert first['recsys_batch_size_bucket{le="2.0"}'] == 0
    assert first['recsys_batch_size_bucket{le="4.0"}'] == 1
    assert first['recsys_reloads_total{outcome="refused"}'] == 1
    assert first["recsys_resident_bytes"] == pytest.approx(resident_bytes(), rel=0.5)
    assert first["recsys_resident_bytes"] > 1e7
