"""The supervisor, with workers that only report: what it starts, replaces, refuses and ends."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from recsys2stage.artifacts import fingerprint
from recsys2stage.serving import server as module
from recsys2stage.serving.monitoring import FOLDER
from recsys2stage.serving.server import Supervisor, Worker, bind
from recsys2stage.serving.settings import Settings
from recsys2stage.serving.worker import END, FAILED, READY, REPLACE


def bundle(folder: Path, does: str = "ready", name: str = "") -> Path:
    """A folder with a manifest; `does` says what a worker does with it."""
    folder.mkdir(exist_ok=True)
    data = {"path": "data", "hash": None}
    manifest = {"kind": "bundle", "format": 1, "parents": {"data": data}, "does": does, "name": name}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def pretend(settings: Settings, bundle: Path, listener: object, slot: str, metrics: Path, reports: Connection) -> None:
    """A worker that does what the manifest says, and writes to a file what ended it."""
    signal.set_wakeup_fd(-1)

    def note(number: int, frame: object) -> None:
        (metrics / f"{os.getpid()}.ended").write_text(signal.Signals(number).name)
        os._exit(0)

    for number in (END, REPLACE):
        signal.signal(number, note)
    does = json.loads((bundle / "manifest.json").read_text())["does"]
    if does == "fail":
        reports.send((FAILED, "it is damaged; make it again"))
    if does == "other":
        reports.send((READY, "another identity"))
    if does == "ready":
        reports.send((READY, str(fingerprint(bundle))))
    if does in ("fail", "die"):
        os._exit(3)
    time.sleep(600)


class Driver:
    """A supervisor that is driven step by step."""

    def __init__(self, path: Path, folder: Path, workers: int = 2) -> None:
        self.folder = folder
        self.listener = bind("127.0.0.1", 0)
        self.wakes, self.other = socket.socketpair()
        self.wakes.setblocking(False)
        self.supervisor = Supervisor(Settings(path, workers=workers), self.listener, folder)

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.workers
            self.supervisor.step(self.wakes)

    @property
    def workers(self) -> list[Worker]:
        return self.supervisor.workers

    def serving(self, name: str) -> bool:
        """Whether all workers are ready with the bundle of this name, and no other is left."""
        names = [json.loads((one.release.path / "manifest.json").read_text())["name"] for one in self.workers]
        wanted = [name] * self.supervisor.settings.workers
        return names == wanted and all(worker.ready and not worker.leaving for worker in self.workers)

    def ends(self) -> list[str]:
        """The signals that ended workers, sorted."""
        return sorted(path.read_text() for path in self.folder.glob("*.ended"))

    def count(self, outcome: str) -> float:
        return self.supervisor.metrics.reloads.labels(outcome)._value.get()

    def close(self) -> None:
        self.supervisor._stop(self.wakes)
        self.wakes.close()
        self.other.close()


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Driver]]:
    monkeypatch.setattr(module, "work", pretend)
    monkeypatch.setattr("prometheus_client.values.ValueClass", None)  # set by each, put back at the end
    monkeypatch.setenv(FOLDER, "")
    made: list[Driver] = []

    def start(path: Path, **options: int) -> Driver:
        folder = tmp_path / "metrics"
        folder.mkdir()
        made.append(Driver(path, folder, **options))
        return made[0]

    yield start
    for driver in made:
        driver.close()
        assert driver.workers == []


def test_a_worker_that_is_killed_is_started_again(drive: Callable[..., Driver], tmp_path: Path) -> None:
    driver = drive(bundle(tmp_path / "bundle", name="one"))
    driver.until(lambda: driver.serving("one"))
    first, second = (worker.process.pid for worker in driver.workers)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    driver.until(lambda: first not in {worker.process.pid for worker in driver.workers})
    driver.until(lambda: driver.serving("one"))
    assert second in {worker.process.pid for worker in driver.workers}, "the other one goes on"
    assert driver.supervisor.metrics.restarts._value.get() == 1
    assert {worker.slot for worker in driver.workers} == {"worker0", "worker1"}


def test_workers_that_keep_failing_are_started_less_and_less_often(
    drive: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = drive(bundle(tmp_path / "bundle", name="one"), workers=1)
    driver.until(lambda: driver.serving("one"))
    driver.supervisor.failures = 5
    driver.supervisor._wait_longer()
    before = driver.supervisor.not_before - time.monotonic()
    assert 6 < before < 7
    driver.supervisor.failures = 50
    driver.supervisor._wait_longer()
    assert driver.supervisor.not_before - time.monotonic() <= module.LONGEST_WAIT


def test_a_reload_replaces_one_worker_after_another(drive: Callable[..., Driver], tmp_path: Path) -> None:
    driver = drive(bundle(tmp_path / "bundle", name="one"))
    driver.until(lambda: driver.serving("one"))
    before = {worker.process.pid for worker in driver.workers}
    driver.supervisor.reload = True
    lowest = 2

    def done() -> bool:
        nonlocal lowest
        lowest = min(lowest, sum(worker.ready and not worker.leaving for worker in driver.workers))
        return driver.count("accepted") == 1 and driver.serving("one")

    driver.until(done)
    assert lowest == 2, "as many as wanted answer at any time"
    assert not before & {worker.process.pid for worker in driver.workers}
    assert driver.ends() == ["SIGUSR1"] * 2, "they answer what they have"


def test_a_link_that_changes_changes_the_bundle(drive: Callable[..., Driver], tmp_path: Path) -> None:
    for name in ("one", "two"):
        bundle(tmp_path / name, name=name)
    link = tmp_path / "current"
    link.symlink_to("one")
    driver = drive(link)
    driver.until(lambda: driver.serving("one"))
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", link)
    driver.until(lambda: driver.serving("two"))
    assert (driver.count("accepted"), driver.count("refused")) == (1, 0)


@pytest.mark.parametrize("does", ["fail", "die", "other"])
def test_a_bundle_that_cannot_be_loaded_is_refused_and_the_old_one_stays(
    drive: Callable[..., Driver], tmp_path: Path, does: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle(tmp_path / "one", name="one")
    bundle(tmp_path / "two", does, "two")
    link = tmp_path / "current"
    link.symlink_to("one")
    driver = drive(link)
    driver.until(lambda: driver.serving("one"))
    before = {worker.process.pid for worker in driver.workers}
    link.unlink()
    link.symlink_to("two")
    driver.until(lambda: driver.count("refused") == 1)
    driver.until(lambda: driver.serving("one"))
    assert {worker.process.pid for worker in driver.workers} == before
    assert driver.count("accepted") == 0
    worker = driver.workers[0].process
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)  # a worker that is started again gets the old one
    driver.until(lambda: worker.pid not in {one.process.pid for one in driver.workers})
    driver.until(lambda: driver.serving("one"))


def test_a_link_to_nothing_is_refused(drive: Callable[..., Driver], tmp_path: Path) -> None:
    bundle(tmp_path / "one", name="one")
    link = tmp_path / "current"
    link.symlink_to("one")
    driver = drive(link, workers=1)
    driver.until(lambda: driver.serving("one"))
    link.unlink()
    link.symlink_to("gone")
    driver.until(lambda: driver.count("refused") == 1)
    assert driver.serving("one")
    link.unlink()
    driver.until(lambda: driver.count("refused") == 2)
    assert driver.serving("one")


def test_of_two_reloads_the_newest_counts(drive: Callable[..., Driver], tmp_path: Path) -> None:
    bundle(tmp_path / "one", name="one")
    bundle(tmp_path / "two", "hang", "two")
    bundle(tmp_path / "three", name="three")
    link = tmp_path / "current"
    link.symlink_to("one")
    driver = drive(link)
    driver.until(lambda: driver.serving("one"))
    for name in ("two", "three"):
        link.unlink()
        link.symlink_to(name)
        driver.supervisor.step(driver.wakes)
    driver.until(lambda: driver.serving("three"))
    assert driver.count("accepted") == 1


def test_a_worker_that_dies_while_a_bundle_loads_is_started_again(drive: Callable[..., Driver], tmp_path: Path) -> None:
    bundle(tmp_path / "one", name="one")
    bundle(tmp_path / "two", "hang", "two")
    link = tmp_path / "current"
    link.symlink_to("one")
    driver = drive(link, workers=1)
    driver.until(lambda: driver.serving("one"))
    link.unlink()
    link.symlink_to("two")
    driver.until(lambda: len(driver.workers) == 2)
    victim = driver.workers[0].process.pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    driver.until(lambda: victim not in {worker.process.pid for worker in driver.workers})
    driver.until(lambda: sum(worker.ready for worker in driver.workers) == 1)
    assert driver.supervisor.candidate is not None


def test_a_bundle_replaced_in_place_is_taken_when_a_worker_has_to_start(
    drive: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = drive(bundle(tmp_path / "bundle", name="one"))
    driver.until(lambda: driver.serving("one"))
    bundle(tmp_path / "bundle", name="two")
    victim = driver.workers[0].process.pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    driver.until(lambda: driver.count("accepted") == 1 and driver.serving("two"))


def test_a_bundle_that_cannot_be_served_ends_the_start(drive: Callable[..., Driver], tmp_path: Path) -> None:
    driver = drive(bundle(tmp_path / "bundle", "fail"))
    with pytest.raises(ValueError, match="it is damaged; make it again"):
        driver.supervisor.run()
    assert driver.workers == []


def test_signals_end_the_service(
    drive: Callable[..., Driver], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = drive(bundle(tmp_path / "bundle", name="one"), workers=1)
    driver.until(lambda: driver.serving("one"))
    handler = signal.getsignal(signal.SIGTERM)
    step = driver.supervisor.step

    def interrupted(wakes: socket.socket) -> None:
        step(wakes)
        os.kill(os.getpid(), signal.SIGTERM)

    driver.supervisor.step = interrupted  # type: ignore[method-assign]
    driver.supervisor.run()
    assert driver.ends() == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_taken_port_is_refused_in_a_sentence() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on 127.0.0.1:{port} .*--port"):
            bind("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"cannot listen on 203.0.113.7:1 "):
        bind("203.0.113.7", 1)
