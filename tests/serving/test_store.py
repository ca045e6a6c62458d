"""The store: accepted events are kept, across kills, threads and processes; erased users leave nothing behind."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys2stage.serving import deliveries
from recsys2stage.serving.deliveries import Delivery
from recsys2stage.serving.store import Event, Store, StoreError
from recsys2stage.serving.store_file import SCHEMA

WRITER = """
import sys
from recsys2stage.serving import deliveries
from recsys2stage.serving.deliveries import Delivery
from recsys2stage.serving.store import Event, Store
store = Store(sys.argv[1])
for number in range(10**6):
    store.append([Event(sys.argv[2], f"{number}-{part}", number) for part in range(3)])
    print(number, flush=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as store:
        yield store


def event(user: str, item: str, time: int = 1, **more: object) -> Event:
    return Event(user, item, time, **more)


def items(store: Store, user: str) -> list[str]:
    return [stored.item_id for stored in store.events(user)]


def test_a_user_s_events_come_back_in_the_order_of_arrival(store: Store) -> None:
    store.append([event("u", "b", 5, rating=4.5, action="buy", request_id="r1"), event("v", "x")])
    store.append([event("u", "a", 3)])
    first, second = store.events("u")
    assert (first.item_id, first.time, first.rating, first.action) == ("b", 5, 4.5, "buy")
    assert (second.item_id, second.time, second.rating, second.action) == ("a", 3, None, None)
    assert [stored.item_id for stored in store.events("u", after=first.id)] == ["a"]
    assert items(store, "v") == ["x"]
    assert items(store, "nobody") == []


def test_the_version_changes_with_every_change_and_never_returns(store: Store) -> None:
    seen = [store.version("u")]
    changes = [
        lambda: store.append([event("u", "a")]),
        lambda: store.append([event("u", "a")]),
        lambda: store.delete("u"),
        lambda: store.append([event("u", "a")]),
        lambda: store.delete("u"),
        lambda: store.delete("u"),
    ]
    for change in changes:
        other = store.version("v")
        change()
        assert store.version("v") == other
        seen.append(store.version("u"))
    assert len(set(seen)) == len(changes) + 1


def test_another_store_of_the_same_file_knows_at_once(store: Store) -> None:
    with Store(store.path) as other:
        store.append([event("u", "a")])
        assert items(other, "u") == ["a"]
        assert other.version("u") == store.version("u")
        other.append([event("u", "b")])
        assert items(store, "u") == ["a", "b"]


def test_threads_share_a_store(store: Store) -> None:
    def write(name: str) -> None:
        for number in range(30):
            store.append([event(name, str(number))])
            assert items(store, name)[-1] == str(number)

    threads = [threading.Thread(target=write, args=(f"u{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [items(store, f"u{number}") for number in range(6)] == [[str(number) for number in range(30)]] * 6


def test_accepted_events_survive_the_kill_of_two_processes_that_write(tmp_path: Path) -> None:
    """A batch is kept whole or not at all, and all that were accepted are kept."""
    path, rng = tmp_path / "store.sqlite", random.Random(1)
    for attempt in range(3):
        users = [f"{attempt}-{number}" for number in range(2)]
        processes = [
            subprocess.Popen([sys.executable, "-c", WRITER, path, user], stdout=subprocess.PIPE, text=True)
            for user in users
        ]
        first = []
        for process in processes:
            assert process.stdout
            first.append(process.stdout.readline())  # it writes
        time.sleep(0.2 * rng.random())
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        said = [line + process.communicate()[0] for line, process in zip(first, processes, strict=True)]
        accepted = [int(lines.split()[-1]) for lines in said]
        with Store(path) as store:
            for user, newest in zip(users, accepted, strict=True):
                kept = items(store, user)
                assert kept == [f"{number}-{part}" for number in range(len(kept) // 3) for part in range(3)]
                assert len(kept) // 3 in (newest + 1, newest + 2), "one may have been committed and not yet reported"


def test_impressions_do_not_wait_for_the_disk_and_are_written_soon(store: Store) -> None:
    with sqlite3.connect(store.path) as blocker:
        blocker.execute("BEGIN IMMEDIATE")  # who waited for the disk would do so until this ends
        for number in range(200):
            assert store.log_impression(f"r{number}", "bundle", "u", ["a", "b"], [1, 2], 1.5)
        assert store.counts()["impressions"] == 0
        blocker.rollback()
    deadline = time.monotonic() + 5
    while store.counts()["impressions"] < 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert store.counts()["impressions"] == 200


def test_closing_writes_the_impressions_that_wait(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.log_impression("r", "bundle", None, ["a"], [1], 1.5)
    with sqlite3.connect(tmp_path / "store.sqlite") as connection:
        assert connection.execute("SELECT request_id, items, positions FROM impressions").fetchall() == [
            ("r", '["a"]', "[1]")
        ]


def test_more_impressions_than_may_wait_are_dropped_and_counted(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite", waiting=10) as store, sqlite3.connect(store.path) as blocker:
        blocker.execute("BEGIN IMMEDIATE")  # the writer has to wait
        store.submit([event("u", "a")])
        time.sleep(0.1)
        written = [store.log_impression(f"r{number}", "bundle", None, ["a"], [1], 1.5) for number in range(15)]
        assert (written.count(True), store.dropped) == (10, 5)
        blocker.rollback()
        store.flush()
        assert store.counts() == {"events": 1, "impressions": 10}


def test_an_erased_user_leaves_no_trace_in_the_files(store: Store) -> None:
    store.append([event("erase-me", "secret-item", request_id="r-secret"), event("other", "a")])
    store.log_impression("r", "bundle", "erase-me", ["shown-item"], [1], 1.5)
    store.log_impression("r2", "bundle", "other", ["a"], [1], 1.5)
    store.flush()
    store.delete("erase-me")
    assert items(store, "erase-me") == []
    assert items(store, "other") == ["a"]
    assert store.newest_users() == ["other"]
    held = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    for secret in (b"erase-me", b"secret-item", b"r-secret", b"shown-item"):
        assert secret not in held


def test_an_impression_of_a_request_before_the_erasure_is_not_written_after_it(store: Store) -> None:
    before = time.time()
    store.delete("u")
    store.log_impression("late", "bundle", "u", ["a"], [1], before)
    store.flush()
    assert store.counts()["impressions"] == 0
    store.append([event("u", "a")])  # who comes back is a new user
    store.log_impression("new", "bundle", "u", ["a"], [1], time.time() + 1)
    store.flush()
    assert store.counts()["impressions"] == 1


@pytest.mark.parametrize(
    "bad",
    [Event("\ud800", "a", 1), Event("u", "a\udc00", 1), Event("u", "a", 1 << 63), Event("u", "a", 1, None, "\ud800")],
)
def test_what_sqlite_cannot_hold_is_refused_and_nothing_is_kept(store: Store, bad: Event) -> None:
    with pytest.raises(ValueError, match=r"Unicode|64 bits"):
        store.append([event("u", "fine"), bad])
    assert store.counts()["events"] == 0
    assert store.events("\ud800") == []
    assert store.version("\ud800").newest == 0
    assert not store.log_impression("r", "bundle", "\ud800", ["a"], [1], 1.0)


def test_an_error_of_the_disk_reaches_the_caller_and_the_store_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._writer.execute("PRAGMA max_page_count = 1")  # a disk without room
    with pytest.raises(StoreError, match=r"cannot be written .*full.* nothing was kept"):
        store.append([event("u", "x" * 3_000) for _ in range(1_000)])
    assert store.events("u") == []
    store._writer.execute("PRAGMA max_page_count = 1000000")
    store.append([event("u", "a")])
    assert items(store, "u") == ["a"]


def test_a_closed_store_refuses(store: Store) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.append([event("u", "a")])
    assert not store.log_impression("r", "bundle", None, ["a"], [1], 1.5)


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to have a header of one hundred bytes" * 3)
    with pytest.raises(ValueError, match=r"notes.txt cannot be opened .* --store"):
        Store(text)
    assert text.read_text().startswith("not a database")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE orders (id)")
    with pytest.raises(ValueError, match=r"other.sqlite is a SQLite file of something else.* --store"):
        Store(other)
    newer = tmp_path / "newer.sqlite"
    Store(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(ValueError, match=rf"version {SCHEMA + 1}, expected {SCHEMA}.*export-log.*--store"):
        Store(newer)
    with pytest.raises(ValueError, match="cannot be opened"):
        Store(tmp_path)


def test_the_file_is_for_its_owner_only(store: Store) -> None:
    store.append([event("u", "a")])
    assert {path.stat().st_mode & 0o777 for path in store.path.parent.iterdir()} == {0o600}


def test_stores_that_are_made_together_make_one(tmp_path: Path) -> None:
    made: list[Store] = []
    threads = [threading.Thread(target=lambda: made.append(Store(tmp_path / "store.sqlite"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, store in enumerate(made):
        store.append([event("u", str(number))])
    assert items(made[0], "u") == ["0", "1", "2", "3", "4"]
    for store in made:
        store.close()


def deliver(store: Store, key: str, *events: Event, content: str = "") -> str:
    """What became of a delivery."""
    delivery = Delivery(key, content or repr(events))
    store.submit(events, delivery).result()
    return delivery.outcome


def test_a_delivery_that_comes_again_is_kept_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deliver(store, "k", event("u", "a"), event("v", "b")) == "new"
    with Store(store.path) as other:  # another worker, and one after a restart
        assert deliver(other, "k", event("u", "a"), event("v", "b")) == "repeated"
        assert deliver(other, "k", event("u", "c")) == "other"
        assert deliver(other, "l", event("u", "a"), event("v", "b")) == "new"  # another key is another delivery
    assert deliver(store, "k", event("u", "a"), event("v", "b")) == "repeated"
    assert items(store, "u") == ["a", "a"]
    assert items(store, "v") == ["b", "b"]
    monkeypatch.setattr(deliveries, "KEPT", -1.0)  # a day later
    assert deliver(store, "k", event("u", "c")) == "new"
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM deliveries").fetchone() == (1,)


def test_of_deliveries_at_once_one_is_kept(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def worker() -> None:
        with Store(tmp_path / "store.sqlite") as own:
            outcomes.extend(deliver(own, f"key {number}", event("u", str(number))) for number in range(20))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["new"] * 20 + ["repeated"] * 60
    with Store(tmp_path / "store.sqlite") as store:
        assert sorted(items(store, "u"), key=int) == [str(number) for number in range(20)]


def test_a_delivery_that_cannot_be_written_may_come_again(store: Store) -> None:
    with pytest.raises(StoreError):
        store.submit([Event("u", "a", 1, rating=object())], Delivery("k", "x")).result()  # type: ignore[arg-type]
    assert deliver(store, "k", event("u", "a"), content="x") == "new"


def test_keys_and_contents_are_kept_as_hashes(store: Store) -> None:
    deliver(store, "key of ann", event("ann", "a"))
    store.delete("ann")
    store.close()
    for path in store.path.parent.iterdir():
        assert b"ann" not in path.read_bytes()


def test_a_store_of_an_earlier_version_gets_the_table_of_deliveries(tmp_path: Path) -> None:
    with Store(tmp_path / "store.sqlite") as store:
        store.append([event("u", "a")])
    with sqlite3.connect(tmp_path / "store.sqlite") as connection:
        connection.execute("DROP TABLE deliveries")
    with Store(tmp_path / "store.sqlite") as store:
        assert deliver(store, "k", event("u", "b")) == "new"
        assert items(store, "u") == ["a", "b"]
