"""Export of a service's store: events and impressions as Parquet."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recsys2stage.artifacts import atomic_write, write_manifest
from recsys2stage.serving.store_file import check_schema, connect

ROWS = 50_000  # at once
EVENTS = {
    **dict.fromkeys(("user_id", "item_id"), "string"),
    **{"time": "int64", "rating": "float32", "action": "string", "request_id": "string", "received": "float64"},
}
IMPRESSIONS = {
    **dict.fromkeys(("request_id", "bundle", "user_id"), "string"),
    **{"time": "float64", "item_id": "string", "position": "int32"},
}


def export_log(store: Path, output: Path, remove: bool = False) -> dict[str, int]:
    """Writes events.parquet and impressions.parquet; both are of one moment, also while the service runs.

    Args:
        store: file of a service.
        output: folder to write.
        remove: whether to remove the exported impressions from the store afterwards.

    Returns:
        The numbers of events and of impressions (answered requests).

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if the file is not a store of this version.
    """
    if not store.is_file():
        raise FileNotFoundError(f"{store} does not exist, expected the store of a service; name it with --store")
    try:
        with contextlib.closing(connect(store)) as connection:
            check_schema(connection, store)
            connection.execute("BEGIN")  # one snapshot
            counts, newest = _write(connection, output)
            connection.execute("COMMIT")
            if remove:
                connection.execute("DELETE FROM impressions WHERE id <= ?", (newest,))
    except sqlite3.Error as error:
        raise ValueError(
            f"the store {store} cannot be read ({error}), expected the store of a service; name it with --store"
        ) from error
    return counts


def _write(connection: sqlite3.Connection, output: Path) -> tuple[dict[str, int], int]:
    """Writes the folder; returns the counts and the id of the newest impression."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"string": pa.string(), "int32": pa.int32(), "int64": pa.int64()}
    types |= {"float32": pa.float32(), "float64": pa.float64()}
    counts = {"events": 0, "impressions": 0}
    newest = 0
    with atomic_write(output, "log") as folder:
        folder.mkdir()
        for name, columns in (("events", EVENTS), ("impressions", IMPRESSIONS)):
            schema = pa.schema({column: types[kind] for column, kind in columns.items()})
            with pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd") as writer:
                chunks = _events(connection) if name == "events" else _impressions(connection)
                for count, last, rows in chunks:
                    counts[name] += count
                    newest = last if name == "impressions" else newest
                    table = dict(zip(columns, zip(*rows, strict=True), strict=True))
                    writer.write_table(
                        pa.table({key: pa.array(values, schema.field(key).type) for key, values in table.items()})
                    )
        write_manifest(folder, "log", {}, {}, counts=counts)
    return counts, newest


def _events(connection: sqlite3.Connection) -> Iterator[tuple[int, int, list[tuple[Any, ...]]]]:
    cursor = connection.execute(f"SELECT id, {', '.join(EVENTS)} FROM events ORDER BY id")
    while rows := cursor.fetchmany(ROWS):
        yield len(rows), rows[-1][0], [row[1:] for row in rows]


def _impressions(connection: sqlite3.Connection) -> Iterator[tuple[int, int, list[tuple[Any, ...]]]]:
    """Chunks of impressions, with a row for each item."""
    cursor = connection.execute(
        "SELECT id, request_id, bundle, user_id, time, items, positions FROM impressions ORDER BY id"
    )
    while rows := cursor.fetchmany(ROWS // 10):
        flat = [
            (*row[1:5], item, position)
            for row in rows
            for item, position in zip(json.loads(row[5]), json.loads(row[6]), strict=True)
        ]
        yield len(rows), rows[-1][0], flat
