"""The store of a running service: new events and impressions, in one SQLite file that several processes share.

Events are written by one thread of each process. It commits everything that waits in one transaction and synchronizes
the file (WAL, synchronous=FULL) before any of the callers returns: an accepted event survives kill -9 and power loss.
Impressions are written behind: they wait at most `FLUSH` seconds in a bounded queue, and a killed process loses those.
"""

import contextlib
import functools
import hashlib
import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from recsys2stage.serving.deliveries import Delivery
from recsys2stage.serving.store_file import open_store

FLUSH = 0.2  # seconds that impressions wait for company
NEWEST_USERS = 10_000
ENCODER = json.JSONEncoder(separators=(",", ":"))


class StoreError(RuntimeError):
    """The store cannot be written or read, for example because the disk is full. Nothing was accepted."""


class Event(NamedTuple):
    """An event as it is kept."""

    user_id: str
    item_id: str
    time: int  # seconds since 1970
    rating: float | None = None
    action: str | None = None
    request_id: str | None = None  # the request whose recommendations it follows


class Stored(NamedTuple):
    """An event as it is read, in the order of arrival."""

    id: int
    item_id: str
    time: int
    rating: float | None
    action: str | None


class Version(NamedTuple):
    """Changes with every change of a user's events, and never returns to an earlier value."""

    newest: int  # id of the user's newest event, 0 without events
    erased: float  # when the user was erased, in seconds since 1970; 0: never


class Impression(NamedTuple):
    request_id: str
    bundle: str
    user_id: str | None
    time: float
    items: str
    positions: str


Job = tuple[Callable[[sqlite3.Connection], None], "Future[None]"]


class Store:
    """New events and impressions. Threads and processes may share the file; each process opens its own Store.

    Args:
        path: SQLite file; made where it is missing, readable by its owner only.
        waiting: maximum number of impressions that wait to be written; further ones are dropped and counted.

    Raises:
        ValueError: for a file that is something else, or of another version.
    """

    def __init__(self, path: str | Path, waiting: int = 10_000) -> None:
        self.path, self.waiting = Path(path), waiting
        self.dropped = 0  # impressions
        self._reader, self._writer, self._salt = open_store(self.path)
        self._reading, self._wake = threading.Lock(), threading.Condition()
        self._jobs: list[Job] = []
        self._impressions: deque[Impression] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._write, name="store", daemon=True)
        self._thread.start()

    def submit(self, events: Sequence[Event], delivery: Delivery | None = None) -> "Future[None]":
        """Queues events; the future is done once they are committed, all or none.

        Args:
            events: new events.
            delivery: its key, if it has one: unless that is new, no event is kept.

        Raises:
            ValueError: for text that is not valid Unicode, and numbers beyond 64 bits.
        """
        received = time.time()
        for event in events:
            for text in (event.user_id, event.item_id, event.action, event.request_id):
                _check_text(text)
            if not -(1 << 63) <= event.time < 1 << 63:
                raise ValueError(f"an event has the time {event.time}, expected seconds that fit in 64 bits")
        rows = [(*event, received) for event in events]
        users = [(user,) for user in dict.fromkeys(event.user_id for event in events)]

        def insert(connection: sqlite3.Connection) -> None:
            if delivery is not None and not delivery.claim(connection, self._salt):
                return
            connection.executemany(
                "INSERT INTO events (user_id, item_id, time, rating, action, request_id, received) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            connection.executemany("INSERT OR IGNORE INTO users (user_id) VALUES (?)", users)

        return self._submit(insert)

    def append(self, events: Sequence[Event]) -> None:
        """Keeps events: they are on disk when this returns.

        Raises:
            ValueError: as `submit`.
            StoreError: if they could not be written; then none of them is kept.
        """
        self.submit(events).result()

    def log_impression(
        self,
        request_id: str,
        bundle: str,
        user_id: str | None,
        item_ids: Sequence[str],
        positions: Sequence[int],
        time: float,
    ) -> bool:
        """Queues the items that a request was answered with; returns at once.

        Args:
            request_id: of the request.
            bundle: identity of the bundle.
            user_id: of a known user; None for a history in the request.
            item_ids: the items.
            positions: their ranks, from 1.
            time: of the request, in seconds since 1970.

        Returns:
            Whether it will be written; False: too many wait, and it was dropped.
        """
        try:
            _check_text(user_id)
        except ValueError:
            return False
        items, places = ENCODER.encode(list(item_ids)), ENCODER.encode(list(positions))
        with self._wake:
            if len(self._impressions) >= self.waiting or self._closing:
                self.dropped += 1
                return False
            self._impressions.append(Impression(request_id, bundle, user_id, time, items, places))
            if len(self._impressions) == 1:
                self._wake.notify()
        return True

    def delete(self, user_id: str, in_data: bool = False) -> None:
        """Erases a user's events and impressions, and remembers a salted hash of the id, so that the user stays hidden.

        Args:
            user_id: of the user; need not have events here.
            in_data: whether the prepared data know the user.
        """
        _check_text(user_id)

        def erase(connection: sqlite3.Connection) -> None:
            for table in ("events", "impressions", "users"):
                connection.execute(f"DELETE FROM {table} WHERE user_id = ?", (user_id,))
            connection.execute(
                "INSERT INTO erased VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET time = max(time + 1e-6, excluded.time), "
                "in_data = max(in_data, excluded.in_data)",
                (self._hash(user_id), time.time(), in_data),
            )

        self._submit(erase).result()
        self._submit(_truncate_log, own=True).result()  # the erased rows leave the log, too

    def version(self, user_id: str) -> Version:
        """The version of a user's events."""
        if not _is_text(user_id):
            return Version(0, 0.0)
        row = self._read(
            "SELECT (SELECT max(id) FROM events WHERE user_id = ?), (SELECT time FROM erased WHERE user_hash = ?)",
            (user_id, self._hash(user_id)),
        )[0]
        return Version(row[0] or 0, row[1] or 0.0)

    def events(self, user_id: str, after: int = 0) -> list[Stored]:
        """A user's events in the order of arrival.

        Args:
            user_id: of the user.
            after: only events with a larger id.
        """
        if not _is_text(user_id):
            return []
        rows = self._read(
            "SELECT id, item_id, time, rating, action FROM events WHERE user_id = ? AND id > ? ORDER BY id",
            (user_id, after),
        )
        return [Stored(*row) for row in rows]

    def newest_users(self) -> list[str]:
        """The users with events here whose first event came last, at most `NEWEST_USERS`, newest first."""
        return [row[0] for row in self._read("SELECT user_id FROM users ORDER BY number DESC LIMIT ?", (NEWEST_USERS,))]

    def erased_in_data(self) -> int:
        """The number of erased users that the prepared data knew."""
        return int(self._read("SELECT count(*) FROM erased WHERE in_data", ())[0][0])

    def counts(self) -> dict[str, int]:
        """Numbers of events and impressions, approximate after an erasure."""
        row = self._read(
            "SELECT (SELECT seq FROM sqlite_sequence WHERE name = 'events'), "
            "(SELECT seq FROM sqlite_sequence WHERE name = 'impressions')",
            (),
        )[0]
        return {"events": row[0] or 0, "impressions": row[1] or 0}

    @property
    def pending(self) -> int:
        """Impressions that wait to be written."""
        return len(self._impressions)

    def flush(self) -> None:
        """Writes all impressions that wait."""
        self._submit(lambda connection: None).result()

    def close(self) -> None:
        """Writes what waits, and closes the file."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        with self._reading:
            self._reader.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _hash(self, user_id: str) -> bytes:
        return hashlib.blake2b(user_id.encode(), key=self._salt, digest_size=16).digest()

    def _read(self, query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        try:
            with self._reading:
                return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"the store {self.path} cannot be read ({error}); see that its disk is there") from error

    def _submit(self, work: Callable[[sqlite3.Connection], None], own: bool = False) -> "Future[None]":
        """Queues work for the writing thread.

        Args:
            work: called with the connection, inside a transaction.
            own: outside of any transaction instead.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        work = _Alone(work) if own else work
        with self._wake:
            if self._closing:
                raise StoreError(f"the store {self.path} is closed; send the request again")
            self._jobs.append((work, future))
            self._wake.notify()
        return future

    def _write(self) -> None:
        """Commits what waits until the store is closed; the body of the writing thread."""
        while True:
            with self._wake:
                while not self._jobs and not self._closing:
                    if self._impressions:
                        if not self._wake.wait(FLUSH):
                            break
                    else:
                        self._wake.wait()
                jobs, self._jobs = self._jobs, []
                impressions = list(self._impressions)
                self._impressions.clear()
                done = self._closing and not jobs and not impressions
            if done:
                self._writer.close()
                return
            self._commit([job for job in jobs if not isinstance(job[0], _Alone)], impressions)
            for work, future in jobs:
                if isinstance(work, _Alone):
                    _finish(future, self._attempt(functools.partial(work, self._writer)))

    def _commit(self, jobs: list[Job], impressions: list[Impression]) -> None:
        """Commits jobs and impressions in one transaction."""
        if not jobs and not impressions:
            return

        def transaction() -> None:
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._insert(impressions)  # first, so that an erasure that came later removes them
                for work, _ in jobs:
                    work(connection)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

        error = self._attempt(transaction)
        if error is not None:
            self.dropped += len(impressions)
        for _, future in jobs:
            _finish(future, error)

    def _attempt(self, work: Callable[[], None]) -> StoreError | None:
        try:
            work()
        except Exception as error:  # whatever it is, the thread goes on, and the callers are told
            return StoreError(f"the store {self.path} cannot be written ({error}); nothing was kept, free its disk")
        return None

    def _insert(self, impressions: list[Impression]) -> None:
        """Inserts impressions, except those of users who were erased since the request."""
        kept = []
        for impression in impressions:
            if impression.user_id is not None:
                row = self._writer.execute(
                    "SELECT time FROM erased WHERE user_hash = ?", (self._hash(impression.user_id),)
                ).fetchone()
                if row is not None and row[0] >= impression.time:
                    continue
            kept.append(impression)
        self._writer.executemany(
            "INSERT INTO impressions (request_id, bundle, user_id, time, items, positions) VALUES (?, ?, ?, ?, ?, ?)",
            kept,
        )


class _Alone:
    """Work that runs outside of a transaction."""

    def __init__(self, work: Callable[[sqlite3.Connection], None]) -> None:
        self.work = work

    def __call__(self, connection: sqlite3.Connection) -> None:
        self.work(connection)


def _finish(future: "Future[None]", error: StoreError | None) -> None:
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _truncate_log(connection: sqlite3.Connection) -> None:
    """Moves the write-ahead log into the file and empties it; waits a second for readers of other processes."""
    for _ in range(20):
        if not connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            return
        time.sleep(0.05)


def _check_text(text: str | None) -> None:
    if not _is_text(text):
        raise ValueError(f"{text!r} is not valid Unicode: it has half of a surrogate pair; send UTF-8 text")


def _is_text(text: str | None) -> bool:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True
