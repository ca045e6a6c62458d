"""Load on `recsys serve`: saturation, latency at open-loop rates, CPU time by stage, memory.

    python benchmarks/serve.py --bundle runs/ml-1m/bundle --data data/ml-1m --output runs/serve.json
    python benchmarks/serve.py --bundle runs/ml-1m/bundle --data data/ml-1m --returning --users 500
    python benchmarks/serve.py --bundle runs/ml-1m/bundle --data data/ml-1m --memory 100000

The service runs as processes of its own and this process sends the load; all of them share --cores. A request is the
history of a user of the prepared data before the test target (items and times), k = 10, through both stages. With
--returning it names a user of the prepared data instead, whose history the service has; every user has come before.

saturation  Closed loop: each of n connections sends its next request when it has the answer. The best n counts.
open loop   Requests leave at random times (Poisson) of a given rate, whether or not earlier ones are answered; the
            latency counts from the time a request was due.
CPU         Of the workers, from /proc, per request. `stages` are the service's own times (/metrics), one thread each;
            what is left is HTTP, JSON, the log and the store. `added`: mean latency of a closed loop of one connection
            beyond the stages, that of this client included.
memory      Proportional set size of the workers and their supervisor (pages that they share count once).

With --memory N: N requests of new users' events, known users and raw histories; memory every tenth of them.
Run it on an idle machine.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tables import commit

from recsys2stage import columns as c
from recsys2stage.data.dataset import Dataset

TICK = os.sysconf("SC_CLK_TCK")
COLUMNS = (
    "load",
    "requests/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "CPU ms",
    "client",
    "batch",
    "stages, ms",
    "added, ms",
    "errors",
)


@dataclass
class Measured:
    """What one load gave."""

    load: str
    seconds: float
    latencies: list[float] = field(repr=False)  # seconds, of requests with status 200
    errors: dict[int, int]  # status -> count
    cpu_ms: float  # of the workers, per request
    client_cpu: float  # share of one core that this process took
    stages_ms: dict[str, float]  # mean per request
    batch: float  # mean number of requests computed together
    added_ms: float | None  # mean latency beyond the stages; None: not measured, for requests wait for others

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds."""
        return float(np.percentile(self.latencies, share)) * 1e3 if self.latencies else float("nan")


class Client:
    """Sends requests over kept connections, with no more work than that: HTTP libraries take more time than the server.

    Args:
        host: of the service.
        port: of the service.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.free: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = deque()

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Sends a request; returns the status and the body."""
        # in turn: the newest would always lead to the same worker
        reader, writer = self.free.popleft() if self.free else await asyncio.open_connection(self.host, self.port)
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        body = await reader.readexactly(int(length or 0))
        if b"connection: close" in head.lower():
            writer.close()
        else:
            self.free.append((reader, writer))
        return int(head[9:12]), body

    def close(self) -> None:
        while self.free:
            self.free.pop()[1].close()


class Service:
    """`recsys serve` on a free port, with a new store."""

    def __init__(self, options: argparse.Namespace, store: Path) -> None:
        command = [sys.executable, "-m", "recsys2stage.cli.main", "serve", "--bundle", str(options.bundle)]
        command += ["--store", str(store), "--port", "0", "--workers", str(options.workers), "--log_requests", "false"]
        command += ["--torch_threads", str(options.torch_threads), "--queue", "1000"]
        command += ["--keep_alive", "3600"]  # connections that wait for a higher rate stay open
        command += ["--data", str(options.data)]
        if options.memory:
            command += ["--cached_events", "100000"]  # 3,000 of the 20,000 users: full after a tenth of the requests
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.startswith("http://"):
            raise SystemExit(f"the service did not start: {line}; see its message above")
        self.host, port = line.split()[0].removeprefix("http://").rstrip("/").rsplit(":", 1)
        self.port = int(port)

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]

    def cpu_seconds(self) -> float:
        """CPU time of the workers."""
        total = 0
        for pid in self.workers():
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total / TICK

    def memory(self) -> float:
        """Proportional set size of all processes, MiB."""
        total = 0
        for pid in (self.process.pid, *self.workers()):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
            total += int(rollup.partition("\nPss:")[2].split()[0])
        return total / 1024

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        assert self.process.stdout
        self.process.stdout.close()


def encode(path: str, body: dict[str, Any]) -> bytes:
    """A POST request."""
    content = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


GET_METRICS = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def returning(data: Path, count: int, longest: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Requests that name random users of the data.

    Args:
        data: prepared dataset.
        count: number of users.
        longest: most events that a user may have; None: no limit.
        seed: of the choice.
    """
    dataset = Dataset(data)
    lengths = np.diff(dataset.offsets)
    users = np.flatnonzero((lengths > 0) & (lengths <= (lengths.max() if longest is None else longest)))
    ids = pl.read_parquet(dataset.path / c.USER_TABLE).sort(c.USER)[c.USER_ID].cast(pl.String).to_list()
    chosen = np.random.default_rng(seed).choice(users, min(count, len(users)), replace=False)
    return [{"user_id": ids[user], "k": 10} for user in chosen.tolist()]


def histories(data: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Requests with the histories of random users before their test targets."""
    dataset, rng = Dataset(data), np.random.default_rng(seed)
    ids = pl.read_parquet(dataset.path / c.ITEM_TABLE).sort(c.ITEM)[c.ITEM_ID].cast(pl.String).to_list()
    users = dataset.users("test")
    requests = []
    for user in rng.choice(users, min(count, len(users)), replace=False):
        part = slice(int(dataset.offsets[user]), int(dataset.val_ends[user]))
        history: dict[str, Any] = {"items": [ids[item - 1] for item in dataset.items[part]]}
        if dataset.has_time:
            history["times"] = [int(moment) for moment in dataset.times[part]]
        requests.append({"history": history, "k": 10})
    return requests


def sums(text: bytes) -> dict[str, float]:
    """The series of Prometheus' text format."""
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def measure(load: str, service: Service, client: Client, run: Any, alone: bool = False) -> Measured:
    """Measures a coroutine function that sends requests and returns their (status, seconds).

    Args:
        load: its name.
        alone: whether a request is sent when the last one is answered, so that none waits.
    """
    before, cpu = sums((await client.send(GET_METRICS))[1]), service.cpu_seconds()
    own = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    results: list[tuple[int, float]] = await run()
    seconds = time.perf_counter() - start
    mine = resource.getrusage(resource.RUSAGE_SELF)
    cpu = service.cpu_seconds() - cpu
    after = sums((await client.send(GET_METRICS))[1])
    change = {name: value - before.get(name, 0.0) for name, value in after.items()}
    count = max(1, len(results))
    prefix = 'recsys_stage_seconds_sum{stage="'
    batches = max(1.0, change.get("recsys_batch_size_count", 0.0))
    errors: dict[int, int] = {}
    for status, _ in results:
        if status != 200:
            errors[status] = errors.get(status, 0) + 1
    latencies = [latency for status, latency in results if status == 200]
    stages = {name[len(prefix) : -2]: 1e3 * value / count for name, value in change.items() if name.startswith(prefix)}
    return Measured(
        load,
        seconds,
        latencies,
        errors,
        cpu / count * 1e3,
        (mine.ru_utime + mine.ru_stime - own.ru_utime - own.ru_stime) / seconds,
        stages,
        change.get("recsys_batch_size_sum", 0.0) / batches,
        1e3 * float(np.mean(latencies)) - sum(stages.values()) if alone and latencies else None,
    )


async def closed_loop(client: Client, requests: list[bytes], connections: int, seconds: float) -> list[Any]:
    results: list[tuple[int, float]] = []
    end = time.perf_counter() + seconds

    async def loop(number: int) -> None:
        rng = random.Random(number)
        while (start := time.perf_counter()) < end:
            status, _ = await client.send(rng.choice(requests))
            results.append((status, time.perf_counter() - start))

    await asyncio.gather(*(loop(number) for number in range(connections)))
    return results


async def open_loop(client: Client, requests: list[bytes], rate: float, seconds: float) -> list[Any]:
    rng, results = random.Random(0), list[tuple[int, float]]()

    async def one(due: float) -> None:
        status, _ = await client.send(rng.choice(requests))
        results.append((status, time.perf_counter() - due))

    due, tasks, end = time.perf_counter(), [], time.perf_counter() + seconds
    while (due := due + rng.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    return results


async def loads(options: argparse.Namespace, service: Service) -> list[Measured]:
    if options.returning:
        bodies = returning(options.data, options.users, options.longest)
    else:
        bodies = histories(options.data, options.users)
    requests = [encode("/v1/recommend", body) for body in bodies]
    client = Client(service.host, service.port)
    await closed_loop(client, requests, 4, options.seconds / 4)  # warm
    if options.returning:
        for _ in range(4 * options.workers):  # the kernel chooses the worker: most users have met every one
            for request in requests:
                await client.send(request)
                client.close()
    measured = []
    for connections in options.connections:
        run = partial(closed_loop, client, requests, connections, options.seconds)
        measured.append(await measure(f"{connections} connections", service, client, run, connections == 1))
        report(measured[-1])
    for rate in options.rates:
        run = partial(open_loop, client, requests, rate, options.seconds)
        measured.append(await measure(f"{rate:g}/s", service, client, run))
        report(measured[-1])
    client.close()
    return measured


def report(one: Measured) -> None:
    stages = ", ".join(f"{name} {value:.2f}" for name, value in one.stages_ms.items())
    added = "" if one.added_ms is None else f"{one.added_ms:.2f}"
    print(
        f"| {one.load} | {one.rate:.0f} | {one.percentile(50):.1f} | {one.percentile(95):.1f} | "
        f"{one.percentile(99):.1f} | {one.cpu_ms:.1f} | {one.client_cpu:.0%} | {one.batch:.1f} | {stages} | {added} | "
        f"{one.errors or ''} |",
        flush=True,
    )


async def fill(options: argparse.Namespace, service: Service) -> list[tuple[int, float]]:
    """Sends the mix of --memory; returns the number of requests and MiB after each tenth."""
    bodies, rng = histories(options.data, 2_000), random.Random(0)
    raw, items = [encode("/v1/recommend", body) for body in bodies], bodies[0]["history"]["items"]
    client, points, sent = Client(service.host, service.port), list[tuple[int, float]](), 0

    async def loop() -> None:
        nonlocal sent
        while sent < options.memory:
            user = f"new-{rng.randrange(20_000)}"
            event = {"user_id": user, "item_id": rng.choice(items)}
            mix = (encode("/v1/events", {"events": [event]}), encode("/v1/recommend", {"user_id": user}))
            for request in (*mix, rng.choice(raw)):
                status, body = await client.send(request)
                if status not in (200, 202):
                    raise SystemExit(f"status {status}: {body.decode()}")
                sent += 1
                if sent % max(1, options.memory // 10) == 0:
                    points.append((sent, service.memory()))
                    print(f"| {sent:,} | {points[-1][1]:.0f} |", flush=True)

    await asyncio.gather(*(loop() for _ in range(8)))
    client.close()
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of both stages")
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset of the bundle's split")
    parser.add_argument("--returning", action="store_true", help="name users of the data instead of sending histories")
    parser.add_argument("--users", type=int, default=2_000, help="number of users who ask")
    parser.add_argument("--longest", type=int, help="with --returning: most events of a user")
    parser.add_argument("--workers", type=int, default=1, help="worker processes")
    parser.add_argument("--torch_threads", type=int, default=1, help="threads of each worker's computation")
    parser.add_argument("--cores", type=int, default=2, help="cores that the service and this process share")
    parser.add_argument("--seconds", type=float, default=30, help="of each load")
    parser.add_argument("--connections", type=int, nargs="*", default=[1, 4, 16, 64], help="of the closed loops")
    parser.add_argument("--rates", type=float, nargs="*", default=[50, 100, 150], help="requests per second")
    parser.add_argument("--memory", type=int, default=0, help="number of requests; measures memory only")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.cores]))
    facts: dict[str, Any] = {"commit": commit(), "machine": platform.machine(), "cores": options.cores}
    facts |= {"returning": options.returning, "users": options.users, "longest": options.longest}
    facts |= {"workers": options.workers, "torch_threads": options.torch_threads, "bundle": options.bundle.name}
    with tempfile.TemporaryDirectory() as folder:
        service = Service(options, Path(folder) / "store.sqlite")
        try:
            facts["memory_mib_before"] = service.memory()
            if options.memory:
                print("| requests | memory, MiB |\n|---|---|")
                facts["memory_mib"] = asyncio.run(fill(options, service))
            else:
                print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
                measured = asyncio.run(loads(options, service))
                best = max((one.rate for one in measured if one.load.endswith("connections")), default=float("nan"))
                facts["memory_mib_after"] = service.memory()
                print(f"saturation {best:.0f} requests/s; memory {facts['memory_mib_after']:.0f} MiB")
                facts["saturation"] = best
                facts["loads"] = [summary(one) for one in measured]
        finally:
            service.end()
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def summary(one: Measured) -> dict[str, Any]:
    latencies = {f"p{share}_ms": one.percentile(share) for share in (50, 95, 99)}
    plain = {name: value for name, value in asdict(one).items() if name != "latencies"}
    return plain | {"rate": one.rate, "answers": len(one.latencies)} | latencies


if __name__ == "__main__":
    main()
