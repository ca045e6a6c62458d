"""The SQLite file of a store: its tables, its version, and how it is opened."""

import contextlib
import os
import secrets
import sqlite3
from pathlib import Path

from recsys2stage.serving import deliveries

SCHEMA = 1  # increase it when older versions of the package cannot use the file
APPLICATION = 0x72325373  # marks the SQLite file as ours
BUSY = 30.0  # seconds to wait for another process's transaction

TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- never given twice, so it serves as a user's version
    user_id TEXT NOT NULL, item_id TEXT NOT NULL, time INTEGER NOT NULL, rating REAL, action TEXT, request_id TEXT,
    received REAL NOT NULL
);
CREATE INDEX events_user ON events (user_id);
CREATE TABLE users (number INTEGER PRIMARY KEY, user_id TEXT NOT NULL UNIQUE);
CREATE TABLE impressions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL, bundle TEXT NOT NULL, user_id TEXT, time REAL NOT NULL,
    items TEXT NOT NULL, positions TEXT NOT NULL -- JSON lists of equal length
);
CREATE INDEX impressions_user ON impressions (user_id) WHERE user_id IS NOT NULL;
CREATE TABLE erased (user_hash BLOB PRIMARY KEY, time REAL NOT NULL, in_data INTEGER NOT NULL) WITHOUT ROWID;
"""


def connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    """Opens the file without looking into it; transactions are begun by hand."""
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    if read_only:
        connection.execute("PRAGMA query_only = ON")
    return connection


def open_store(path: Path) -> tuple[sqlite3.Connection, sqlite3.Connection, bytes]:
    """A connection to read, one to write, and the salt of the hashes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        writer = connect(path)
        try:
            _prepare(writer, path)
            salt = writer.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()[0]
        except BaseException:
            writer.close()
            raise
        return connect(path, read_only=True), writer, salt
    except (sqlite3.Error, OSError) as error:
        raise ValueError(
            f"the store {path} cannot be opened ({error}), expected a file of this service or a new name in a folder "
            "that can be written; name another with --store"
        ) from error


def _prepare(writer: sqlite3.Connection, path: Path) -> None:
    """Makes the tables of a new file; checks those of an old one."""
    check_schema(writer, path, may_be_new=True)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA synchronous = FULL")
    writer.execute("PRAGMA secure_delete = ON")  # erased rows are overwritten
    writer.execute("PRAGMA journal_size_limit = 16777216")
    writer.execute("BEGIN IMMEDIATE")  # of processes that start together one makes the tables
    try:
        if not writer.execute("PRAGMA user_version").fetchone()[0]:
            for statement in TABLES.split(";"):
                writer.execute(statement)
            writer.execute("INSERT INTO meta VALUES ('salt', ?)", (secrets.token_bytes(16),))
            writer.execute(f"PRAGMA application_id = {APPLICATION}")
            writer.execute(f"PRAGMA user_version = {SCHEMA}")
        for statement in deliveries.TABLES:
            writer.execute(statement)
        writer.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            writer.execute("ROLLBACK")
        raise


def check_schema(connection: sqlite3.Connection, path: Path, may_be_new: bool = False) -> None:
    """Raises a ValueError unless a file is a store of this version, or empty where it may be new."""
    connection.execute("BEGIN")  # one view of the file, which another process may be making
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    finally:
        connection.execute("ROLLBACK")
    if may_be_new and not tables and not version and not application:
        return
    if application != APPLICATION:
        raise ValueError(
            f"{path} is {'a SQLite file of something else' if tables else 'empty'}, expected a store of recsys serve; "
            "name another with --store"
        )
    if version != SCHEMA:
        raise ValueError(
            f"{path} is a store of version {version}, expected {SCHEMA}; use the version of recsys2stage that wrote it "
            "to export its log (recsys export-log), or name another with --store"
        )
