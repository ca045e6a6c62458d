"""Prometheus metrics of the service, and its log: a JSON object a line, without ids of users and without histories.

The workers of a server write their metrics to memory-mapped files of one folder, by `share`; whichever worker answers
/metrics gives the sums over all of them. A worker that ended leaves its counts to the next one of the same slot.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # environment variable of the library

logger = logging.getLogger("recsys2stage.serving")
disable_created_metrics()  # type: ignore[no-untyped-call]  # a series of start times beside every counter


def share(folder: Path, slot: str) -> None:
    """Makes the metrics that this process creates from now on part of a folder that several processes write to.

    Args:
        folder: of all processes of the server.
        slot: name of this process's files; no two living processes have the same.
    """
    os.environ[FOLDER] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]  # untyped there


def forget(folder: Path, slot: str) -> None:
    """Removes the gauges of a process that has ended; its counts stay."""
    multiprocess.mark_process_dead(slot, str(folder))  # type: ignore[no-untyped-call]  # untyped there


class Metrics:
    """The metrics of one application; of one of several processes after `share`."""

    def __init__(self) -> None:
        self.shared, self.registry = FOLDER in os.environ, CollectorRegistry()
        self._series: dict[tuple[Any, ...], Any] = {}  # by metric and labels
        named: dict[str, Any] = {"namespace": "recsys", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status", ["method", "route", "status"], **named)
        self.seconds = Histogram(
            "request_seconds", "Time of a request by route", ["route"], unit="", buckets=SECONDS, **named
        )
        self.stages = Histogram(
            "stage_seconds", "Time of a stage of a request: queue, encode, ...", ["stage"], buckets=SECONDS, **named
        )
        self.batches = Histogram("batch_size", "Requests that were computed together", buckets=SIZES, **named)
        self.states = Counter(
            "encoded", "Histories by what a cached state of the user was good for: hit, miss, ...", ["state"], **named
        )
        self.events = Counter("events", "Events accepted", **named)
        self.impressions = Counter("impressions", "Impressions by what became of them", ["outcome"], **named)
        self.reloads = Counter("reloads", "New bundles by what became of them", ["outcome"], **named)
        self.restarts = Counter("worker_restarts", "Workers that ended by themselves and were started again", **named)
        gauge: dict[str, Any] = named | {"multiprocess_mode": "livesum"}
        self.running = Gauge("workers", "Worker processes that answer", **gauge)
        self.gauges = {
            name: Gauge(name, text, **gauge)
            for name, text in {
                "queue_length": "Requests that wait to be computed",
                "cached_users": "Users with new events whose history is in memory",
                "cached_events": "Events of these users",
                "cached_states": "Users with a cached state of the encoder",
                "cached_states_bytes": "Memory of these states",
                "impressions_waiting": "Impressions that wait to be written",
                "resident_bytes": "Memory of the worker processes; shared pages count once for each",
            }.items()
        }
        self._watched: dict[str, Callable[[], float]] = {"resident_bytes": resident_bytes}

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts a request.

        Args:
            route: the route's template, never the path itself.
            seconds: from the first byte to the last of the answer.
        """
        self._labelled(self.requests, method, route, str(status)).inc()
        self._labelled(self.seconds, route).observe(seconds)

    def observe_stages(self, stages: Mapping[str, float]) -> None:
        """Records the seconds of each stage of a request."""
        for stage, seconds in stages.items():
            self._labelled(self.stages, stage).observe(seconds)

    def _labelled(self, metric: Any, *labels: str) -> Any:
        """A series of a metric; the library checks labels at every call of its own."""
        series = self._series.get((metric, *labels))
        if series is None:
            series = self._series[metric, *labels] = metric.labels(*labels)
        return series

    def observe_batch(self, size: int) -> None:
        """Records how many requests were computed together."""
        self.batches.observe(size)

    def observe_states(self, outcomes: Mapping[str, int]) -> None:
        """Counts histories by the outcomes of `retrieval.states.OUTCOMES`."""
        for outcome, count in outcomes.items():
            self.states.labels(outcome).inc(count)

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Takes one of `gauges` from a function, at every scrape and once a second."""
        assert name in self.gauges, name
        self._watched[name] = value

    def sample(self) -> None:
        """Reads what is watched."""
        for name, value in self._watched.items():
            self.gauges[name].set(value())

    def render(self) -> tuple[bytes, str]:
        """The metrics of all workers in Prometheus' text format, and its content type."""
        self.sample()
        if not self.shared:
            return generate_latest(self.registry), CONTENT_TYPE_LATEST
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together)  # type: ignore[no-untyped-call]  # untyped there
        return generate_latest(together), CONTENT_TYPE_LATEST


def resident_bytes() -> float:
    """Physical memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


class JsonLines(logging.Formatter):
    """Formats a record as one JSON object; the fields of `extra={"fields": {...}}` are added to it."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "pid": record.process, "message": record.getMessage()}
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging() -> None:
    """Sends the log of this package and of the HTTP server to stderr, as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("recsys2stage", "uvicorn", "py.warnings"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name == "recsys2stage" else logging.WARNING)
    logging.captureWarnings(True)
