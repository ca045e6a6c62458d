"""`recsys serve` as a process of its own, and its workers."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

START = 120  # seconds


class Service:
    """A running service.

    Args:
        words: options of the command.
        log: file for its log.
    """

    def __init__(self, *words: object, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "recsys2stage.cli.main", "serve", "--port", "0", *map(str, words)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        assert self.process.stdout
        readable, _, _ = select.select([self.process.stdout], [], [], START)
        line = self.process.stdout.readline().decode() if readable else ""
        assert line.startswith("http://"), log.read_text()
        self.url = line.split()[0]

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)  # type: ignore[arg-type]

    def workers(self) -> list[int]:
        """Process ids of the workers, oldest first."""
        return children(self.process.pid)

    def wait_for_workers(self, count: int) -> None:
        """Waits until this many answer, by the metrics."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError), self.client() as client:
                lines = client.get("/metrics").text.splitlines()
                if f"recsys_workers {count}.0" in lines and len(self.workers()) == count:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def metric(self, name: str) -> float:
        for _ in range(20):
            with contextlib.suppress(httpx.TransportError), self.client() as client:  # a worker may just be killed
                lines = client.get("/metrics").text.splitlines()
                return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        """Kills all processes at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ends the service; returns its exit status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout=60)
        assert self.process.stdout
        self.process.stdout.close()
        return status


def children(pid: int) -> list[int]:
    """Process ids of the living children of a process, oldest first."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return sorted(map(int, found))


@contextlib.contextmanager
def running(*words: object, log: Path) -> Iterator[Service]:
    """A service that is killed at the end, if it has not ended."""
    service = Service(*words, log=log)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.kill()
