"""The service as processes: kills, reloads, ends, memory."""

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from pipeline_fixtures import Run
from processes import running
from worlds import seal

from recsys2stage.artifacts import fingerprint
from recsys2stage.serving.monitoring import JsonLines
from recsys2stage.serving.store import Store


def events_of(client: httpx.Client, user: str) -> list[str]:
    """Items of a user's new events, oldest first."""
    answer = client.get(f"/v1/users/{user}", params={"limit": 1_000})
    assert answer.status_code == 200, answer.text
    return [event["item_id"] for event in answer.json()["events"] if event["source"] == "store"][::-1]


def test_what_was_accepted_before_a_kill_is_known_after_it(trained: Run, tmp_path: Path) -> None:
    """kill -9 of all processes right after the 202."""
    options = ("--bundle", trained.bundle, "--store", tmp_path / "store.sqlite")
    with running(*options, log=tmp_path / "log") as service, service.client() as client:
        one = client.post("/v1/recommend", json={"user_id": "1"}, headers={"X-Request-ID": "before"}).json()
        item = one["items"][0]["item_id"]
        event = {"user_id": "1", "item_id": item, "request_id": "before"}
        assert client.post("/v1/events", json={"events": [event]}).status_code == 202
        service.kill()
    with running(*options, log=tmp_path / "log") as service, service.client() as client:
        assert events_of(client, "1") == [item]
        two = client.post("/v1/recommend", json={"user_id": "1"}).json()
        assert two["known_events"] == one["known_events"] + 1
        assert item not in [row["item_id"] for row in two["items"]], "it has been seen"
        assert service.end() == 0
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"/v1/recommend", "/v1/users/{user_id:path}"} <= {line.get("route") for line in lines}
    with Store(tmp_path / "store.sqlite") as store:
        kept = store._read("SELECT request_id, user_id FROM impressions", ())
    assert ("1",) in {row[1:] for row in kept}, "those that wait are written at the end"


# --- 2,000 requests through 20 reloads and 5 kills

RELOADS, KILLS, REQUESTS = 20, 5, 2_000
PATIENCE = 300  # seconds for a reload, also on a busy machine


class Load:
    """Threads that send requests and check every answer.

    Args:
        url: of the service.
        expected: identity of a bundle -> user -> items of the answer.
    """

    def __init__(self, url: str, expected: dict[str, dict[str, list[str]]]) -> None:
        self.url, self.expected = url, expected
        self.kills: list[float] = []
        self.broken: list[tuple[float, float, str]] = []  # requests whose connection broke: start, end, error
        self.wrong: list[str] = []
        self.accepted: dict[str, list[str]] = {}
        self.sent, self.bundles = 0, set[str]()
        self.lock, self.stop = threading.Lock(), threading.Event()

    def send(self, client: httpx.Client, method: str, path: str, **more: Any) -> httpx.Response:
        """Sends a request until it is answered, as clients do whose connection broke."""
        for _ in range(100):
            start = time.monotonic()
            try:
                answer = client.request(method, path, **more)
            except httpx.TransportError as error:
                with self.lock:
                    self.broken.append((start, time.monotonic(), repr(error)))
                time.sleep(0.05)
                continue
            with self.lock:
                self.sent += 1
                if answer.status_code >= 300:
                    self.wrong.append(answer.text)
            return answer
        raise AssertionError(self.broken[-1])

    def run(self, number: int) -> None:
        rng = random.Random(number)
        users = sorted(next(iter(self.expected.values())))
        own = f"new-{number}"
        self.accepted[own] = []
        with httpx.Client(base_url=self.url, timeout=60, trust_env=False) as client:
            while not self.stop.is_set():
                user = rng.choice(users)
                answer = self.send(client, "POST", "/v1/recommend", json={"user_id": user}).json()
                given = [row["item_id"] for row in answer.get("items", [])]
                self.bundles.add(answer.get("bundle", ""))
                if given != self.expected.get(answer.get("bundle", ""), {}).get(user):
                    self.wrong.append(f"{user}: {answer}")
                item = str(len(self.accepted[own]))
                event = {"user_id": own, "item_id": item}
                if self.send(client, "POST", "/v1/events", json={"events": [event]}).status_code == 202:
                    self.accepted[own].append(item)
                    known = self.send(client, "GET", f"/v1/users/{own}", params={"limit": 1_000}).json()
                    kept = [event["item_id"] for event in known["events"]]
                    if item not in kept[:3]:
                        self.wrong.append(f"{own} has {kept[:5]} right after {item}")


@pytest.mark.slow
def test_reloads_and_kills_lose_nothing(trained: Run, tmp_path: Path) -> None:
    shutil.copytree(trained.bundle, tmp_path / "a")
    shutil.copytree(trained.bundle, tmp_path / "b")
    seal(tmp_path / "b", candidates=30)
    expected = {}
    users = [str(user) for user in range(1, 151, 3)]
    for name in ("a", "b"):
        with running("--bundle", tmp_path / name, "--store", tmp_path / f"{name}.sqlite", log=tmp_path / "log") as one:
            with one.client() as client:
                bodies = {"requests": [{"user_id": user} for user in users]}
                answers = client.post("/v1/recommend/batch", json=bodies).json()["responses"]
            identity = str(fingerprint(tmp_path / name))[:12]
            assert {answer["bundle"] for answer in answers} == {identity}
            expected[identity] = {
                user: [row["item_id"] for row in answer["items"]] for user, answer in zip(users, answers, strict=True)
            }
            assert one.end() == 0
    link = tmp_path / "current"
    link.symlink_to("a")
    options = ("--bundle", link, "--workers", 2, "--keep_alive", 1, "--log_requests", "false")
    with running(*options, log=tmp_path / "log") as service:
        service.wait_for_workers(2)
        load = Load(service.url, expected)
        threads = [threading.Thread(target=load.run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        try:
            for reload in range(RELOADS):
                if reload % 2:
                    service.process.send_signal(signal.SIGHUP)
                else:
                    (tmp_path / "next").symlink_to("b" if os.readlink(link) == "a" else "a")
                    os.replace(tmp_path / "next", link)
                deadline = time.monotonic() + PATIENCE
                while service.metric("recsys_reloads_total") <= reload:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.2)
                if reload % (RELOADS // KILLS) == 1:  # while workers are being replaced
                    victim = random.Random(reload).choice(service.workers())
                    load.kills.append(time.monotonic())
                    os.kill(victim, signal.SIGKILL)
            deadline = time.monotonic() + PATIENCE
            while load.sent < REQUESTS and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            load.stop.set()
            for thread in threads:
                thread.join(timeout=60)
        service.wait_for_workers(2)
        assert service.metric('recsys_reloads_total{outcome="accepted"}') == RELOADS
        assert service.metric('recsys_reloads_total{outcome="refused"}') == 0
        assert service.end() == 0
    assert load.wrong == []
    assert load.bundles == set(expected), "both bundles answered"
    assert load.sent >= REQUESTS
    unexplained = [one for one in load.broken if not any(one[0] - 0.5 <= kill <= one[1] for kill in load.kills)]
    assert unexplained == [], f"only requests in the hands of a killed worker may break; kills at {load.kills}"
    assert len(load.broken) <= KILLS * len(threads)
    with Store(tmp_path / "store.sqlite") as store:
        for user, items in load.accepted.items():
            assert items
            assert set(items) <= {event.item_id for event in store.events(user)}, "no accepted event is lost"


# --- ends


@pytest.mark.slow
def test_a_service_that_ends_answers_what_it_has(trained: Run, tmp_path: Path) -> None:
    """Requests in flight at SIGTERM are answered, then the port is closed."""
    options = ("--bundle", trained.bundle, "--store", tmp_path / "store.sqlite", "--queue", 1_000)
    with running(*options, log=tmp_path / "log") as service:
        answers: list[int] = []
        body = {"requests": [{"user_id": str(1 + user), "k": 100, "explain": True} for user in range(100)]}

        def send() -> None:
            with service.client() as client:
                answers.append(client.post("/v1/recommend/batch", json=body).status_code)

        threads = [threading.Thread(target=send) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert service.end(signal.SIGINT) == 0
        for thread in threads:
            thread.join()
        assert answers == [200] * 3
        with pytest.raises(httpx.ConnectError), service.client() as client:
            client.get("/healthz")
    with Store(tmp_path / "store.sqlite") as store:
        assert store.counts()["impressions"] == 300


@pytest.mark.slow
def test_workers_end_when_the_supervisor_is_killed(trained: Run, tmp_path: Path) -> None:
    options = ("--bundle", trained.bundle, "--store", tmp_path / "store.sqlite")
    with running(*options, log=tmp_path / "log") as service:
        (worker,) = service.workers()
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{worker}").exists()
        assert service.process.stdout
        service.process.stdout.close()


@pytest.mark.slow
def test_a_damaged_bundle_is_refused_while_the_old_one_serves(trained: Run, tmp_path: Path) -> None:
    for name in ("good", "bad"):
        shutil.copytree(trained.bundle, tmp_path / name)
    (tmp_path / "bad/towers.pt").write_bytes(b"damaged")
    link = tmp_path / "current"
    link.symlink_to("good")
    with running("--bundle", link, "--store", tmp_path / "store.sqlite", log=tmp_path / "log") as service:
        (worker,) = service.workers()
        link.unlink()
        link.symlink_to("bad")
        deadline = time.monotonic() + 60
        while service.metric('recsys_reloads_total{outcome="refused"}') < 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert service.workers() == [worker]
        assert service.end() == 0
    refused = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if "refused" in line]
    assert "its checksum differs" in refused[0]["reason"]


# --- silence and memory


@pytest.mark.slow
def test_connections_that_send_nothing_are_closed(trained: Run, tmp_path: Path) -> None:
    import socket

    options = ("--bundle", trained.bundle, "--store", tmp_path / "store.sqlite", "--timeout", 1)
    with running(*options, log=tmp_path / "log") as service:
        host, port = service.url.removeprefix("http://").rstrip("/").split(":")
        for sent in (b"", b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nX-Slow: "):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(sent)
                start = time.monotonic()
                assert connection.recv(1) == b""
                assert 0.9 < time.monotonic() - start < 5


@pytest.mark.slow
def test_memory_does_not_grow_once_the_caches_are_full(trained: Run, tmp_path: Path) -> None:
    items = pl.read_parquet(trained.bundle / "items.parquet")["item_id"].cast(pl.String).to_list()
    options = ("--bundle", trained.bundle, "--store", tmp_path / "store.sqlite", "--cached_events", 5_000)
    rng = random.Random(0)
    with running(*options, "--log_requests", "false", log=tmp_path / "log") as service, service.client() as client:

        def send(count: int) -> None:
            for number in range(count):
                user = f"u{rng.randrange(3_000)}"
                event = {"user_id": user, "item_id": rng.choice(items)}
                assert client.post("/v1/events", json={"events": [event]}).status_code == 202
                assert client.post("/v1/recommend", json={"user_id": user}).status_code == 200
                history = {"items": rng.sample(items, 1 + number % 50)}
                assert client.post("/v1/recommend", json={"history": history, "k": 50}).status_code == 200

        send(600)
        before = service.metric("recsys_resident_bytes")
        send(1_000)
        assert service.metric("recsys_resident_bytes") - before < 10 << 20


def test_a_line_of_the_log_is_json() -> None:
    import logging

    record = logging.LogRecord("x", logging.ERROR, "f", 1, "a %s", ("b",), None)
    record.fields = {"path": Path("p")}
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["level"], line["path"]) == ("a b", "error", "p")
