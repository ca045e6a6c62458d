"""The supervisor of a service: owns the socket, starts workers, replaces those that end, and changes the bundle.

Workers are forked, so that a new one need not import anything; the supervisor itself computes nothing and has no other
threads. All of them accept connections from one socket, which stays open while any process of the service lives: a
connection that no worker has accepted yet waits for the next one.

A new bundle is first loaded by one worker beside the others. If that worker gets ready, the others are replaced one
after another; else the bundle is refused and everything stays as it was.
"""

import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

from recsys2stage.artifacts import fingerprint, is_alive
from recsys2stage.ranking.bundle import bundle_manifest
from recsys2stage.serving import monitoring
from recsys2stage.serving.settings import Settings
from recsys2stage.serving.store import Store
from recsys2stage.serving.worker import END, FAILED, READY, REPLACE, work

BACKLOG = 1_024  # connections that wait to be accepted
START = 600.0  # seconds that a worker has to get ready
METRICS = "recsys-metrics"  # prefix of a temporary folder
LONGEST_WAIT = 10.0  # seconds between attempts to start a worker that fails

logger = logging.getLogger("recsys2stage.serving")


class Release(NamedTuple):
    """A bundle at one time."""

    path: Path  # without symbolic links
    identity: str | None  # hash of its manifest; None: it is not there
    number: int  # counts the reloads: after one, workers are replaced even if the bundle is the same


@dataclass(eq=False)
class Worker:
    """A worker process, as the supervisor knows it."""

    process: ForkProcess
    reports: Connection
    release: Release
    slot: str
    started: float  # by the monotonic clock
    ready: bool = False
    leaving: bool = False  # told to end
    reason: str = ""  # why it failed


class Supervisor:
    """Keeps the workers of a service running.

    Args:
        settings: how to serve.
        listener: the bound socket.
        metrics: folder of the metrics of all processes.
    """

    def __init__(self, settings: Settings, listener: socket.socket, metrics: Path) -> None:
        self.settings, self.listener, self.folder = settings, listener, metrics
        monitoring.share(metrics, "supervisor")
        self.metrics = monitoring.Metrics()
        self.number = 0
        self.current = self._release()
        self.candidate: Release | None = None  # is being tried
        self.link = self.current.path
        self.workers: list[Worker] = []
        self.ends = self.reload = self.kills = False  # asked for by signals
        self.failures, self.not_before = 0, 0.0  # workers that failed in a row; when the next may start
        self.served, self.first_error = False, ""

    # --- what goes on

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT.

        Raises:
            ValueError: if the first worker cannot load the bundle.
        """
        with self._signals() as wakes:
            while not self.ends and not self.first_error:
                self.step(wakes)
            self._stop(wakes)
        if self.first_error:
            raise ValueError(self.first_error)

    def step(self, wakes: socket.socket) -> None:
        """Starts and ends what is to be started and ended, then waits for what happens, at most a second.

        Args:
            wakes: gets readable when a signal arrives.
        """
        if self.reload or self._link_changed():
            self.reload = False
            self._try(self._release())
        self._balance()
        self._listen(wakes)

    def _announce(self) -> None:
        host, port = self.listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        count = f"{self.settings.workers} worker{'s' if self.settings.workers > 1 else ''}"
        print(f"http://{shown}:{port}/ serves {self.settings.bundle} ({count}); Ctrl-C ends it", flush=True)

    def _release(self) -> Release:
        """The bundle as it is now."""
        self.number += 1
        real = Path(os.path.realpath(self.settings.bundle))
        return Release(real, fingerprint(real), self.number)

    def _link_changed(self) -> bool:
        """Whether the bundle is named by a symbolic link, and that leads elsewhere since the last look."""
        target = Path(os.path.realpath(self.settings.bundle))
        changed, self.link = target != self.link, target
        return changed

    def _try(self, release: Release) -> None:
        """Begins to change to another bundle."""
        if self.candidate is not None:  # the newest wins
            self._abandon()
        try:
            bundle_manifest(release.path)
        except (ValueError, OSError) as error:
            self._refuse(release, str(error))
            return
        logger.info("loading a new bundle", extra={"fields": _named(release)})
        self.candidate, self.not_before = release, 0.0

    def _refuse(self, release: Release, reason: str) -> None:
        self.metrics.reloads.labels("refused").inc()
        logger.error("a new bundle was refused, the old one stays", extra={"fields": _named(release, reason=reason)})

    def _abandon(self) -> None:
        for worker in self.workers:
            if worker.release == self.candidate and not worker.leaving:
                self._tell(worker, END)
        self.candidate = None

    def _accept(self, release: Release) -> None:
        self.current, self.candidate = release, None
        self.metrics.reloads.labels("accepted").inc()
        logger.info("a new bundle takes over", extra={"fields": _named(release)})

    def _balance(self) -> None:
        """Starts and ends workers, a step at a time, until all wanted ones serve the current bundle."""
        staying = [worker for worker in self.workers if not worker.leaving]
        if self.candidate is not None:
            if not any(worker.release == self.candidate for worker in staying):
                self._start(self.candidate)
            staying = [worker for worker in staying if worker.release != self.candidate]
        fresh = [worker for worker in staying if worker.release == self.current]
        old = [worker for worker in staying if worker.release != self.current]
        ready = sum(worker.ready for worker in fresh)
        for worker in old[: max(0, ready + len(old) - self.settings.workers)]:
            self._tell(worker, REPLACE)
        if len(fresh) < self.settings.workers and (not old or ready == len(fresh)):
            if time.monotonic() < self.not_before:
                return
            if fingerprint(self.current.path) == self.current.identity:
                self._start(self.current)
            elif self.candidate is None:  # replaced in place
                self._try(self._release())
                if self.candidate is None:
                    self._wait_longer()

    def _start(self, release: Release) -> None:
        if time.monotonic() < self.not_before:
            return
        taken = {worker.slot for worker in self.workers}
        slot = next(name for number in range(len(taken) + 1) if (name := f"worker{number}") not in taken)
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (self.settings, release.path, self.listener, slot, self.folder, theirs)
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 counts the idle threads of BLAS
            process.start()
        theirs.close()
        self.workers.append(Worker(process, ours, release, slot, time.monotonic()))

    def _tell(self, worker: Worker, sign: signal.Signals) -> None:
        """Tells a worker to end; one that is not ready yet is killed, as it has nothing to finish."""
        worker.leaving = True
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid or 0, sign if worker.ready else signal.SIGKILL)

    # --- what is reported

    def _listen(self, wakes: socket.socket) -> None:
        """Waits for a report, an end or a signal, at most a second."""
        waiting: list[Connection | socket.socket | int] = [wakes]
        for worker in self.workers:
            waiting += [worker.process.sentinel, worker.reports]
        pause = self.not_before - time.monotonic()
        seen = wait(waiting, timeout=min(1.0, pause) if pause > 0 else 1.0)
        if wakes in seen:
            with contextlib.suppress(BlockingIOError):
                wakes.recv(4_096)
        for worker in list(self.workers):
            self._hear(worker)
            if not worker.process.is_alive():
                self._bury(worker)
            elif not worker.ready and not worker.leaving and time.monotonic() - worker.started > START:
                worker.reason = f"it did not get ready in {START:g} seconds"
                worker.process.kill()

    def _hear(self, worker: Worker) -> None:
        with contextlib.suppress(EOFError, OSError):
            while worker.reports.poll():
                kind, text = worker.reports.recv()
                if kind == FAILED:
                    worker.reason = text
                elif kind == READY and text != worker.release.identity:
                    worker.reason = f"{worker.release.path} was replaced while it was loaded"
                    worker.process.kill()
                elif kind == READY:
                    worker.ready, self.failures = True, 0
                    if not self.served:
                        self.served = True
                        self._announce()
                    logger.info("a worker is ready", extra={"fields": _about(worker)})
                    if worker.release == self.candidate:
                        self._accept(worker.release)

    def _bury(self, worker: Worker) -> None:
        """Takes note of a worker that has ended."""
        self._hear(worker)
        worker.process.join()
        worker.reports.close()
        monitoring.forget(self.folder, worker.slot)
        self.workers.remove(worker)
        if worker.leaving or self.ends:
            return
        reason = worker.reason or f"it ended with status {worker.process.exitcode}"
        if worker.ready:
            self.metrics.restarts.inc()
            logger.error("a worker ended and is started again", extra={"fields": _about(worker, reason=reason)})
            return
        if worker.release == self.candidate:
            self.candidate = None
            self._refuse(worker.release, reason)
        elif not self.served:
            self.first_error = reason
        else:
            logger.error("a worker did not get ready", extra={"fields": _about(worker, reason=reason)})
        self._wait_longer()

    def _wait_longer(self) -> None:
        self.failures += 1
        self.not_before = time.monotonic() + min(LONGEST_WAIT, 0.1 * 2**self.failures)

    # --- signals and the end

    @contextlib.contextmanager
    def _signals(self) -> Iterator[socket.socket]:
        """Takes note of signals; yields a socket that gets readable with each."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)

        def note(number: int, frame: object) -> None:
            if number == signal.SIGHUP:
                self.reload = True
            else:
                self.kills = self.ends and number == signal.SIGINT  # the second Ctrl-C
                self.ends = True

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield ours
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            ours.close()
            theirs.close()

    def _stop(self, wakes: socket.socket) -> None:
        """Ends all workers: they finish their requests, or are killed after `shutdown_timeout`."""
        self.ends = True
        self.listener.close()
        for worker in self.workers:
            self._tell(worker, END)
        deadline = time.monotonic() + self.settings.shutdown_timeout + 5
        while self.workers:
            if self.kills or time.monotonic() > deadline:
                for worker in self.workers:
                    worker.process.kill()
            self._listen(wakes)


def _named(release: Release, **fields: str) -> dict[str, str]:
    return {"bundle": str(release.path), "identity": (release.identity or "none")[:12]} | fields


def _about(worker: Worker, **fields: str) -> dict[str, str]:
    return _named(worker.release, worker=str(worker.process.pid)) | fields


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: if the address is taken or is none of this machine.
    """
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror or error}), expected a free port of this machine; choose "
            "another with --port"
        ) from error
    return listener


def metrics_folder() -> Path:
    """Makes a temporary folder; removes those of services that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{METRICS}-*-*"):
        pid = left.name.split("-")[-2]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{METRICS}-{os.getpid()}-"))


def run(settings: Settings) -> None:
    """Serves a bundle until SIGTERM or SIGINT; SIGHUP reloads the bundle.

    Raises:
        ValueError: if the address is taken, the store is another file, or the bundle cannot be loaded.
    """
    bundle_manifest(settings.bundle)
    Store(settings.store_path).close()
    listener = bind(settings.host, settings.port)
    monitoring.configure_logging()
    folder = metrics_folder()
    gc.collect()
    gc.freeze()  # what was imported stays shared with the workers
    try:
        Supervisor(settings, listener, folder).run()
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
