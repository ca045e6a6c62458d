"""Open questions: options that a config of `recsys init` leaves to the user."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from recsys2stage.data.sources.base import read_header

OPEN = "???"  # value of an option that is not answered yet
QUESTIONS = {
    "path": "where are the events?",
    "user": "which column holds the user ids?",
    "item": "which column holds the item ids?",
    "time": "which column holds the time of an event?",
    "items.id": "which column of the item table holds the item ids?",
    "users.id": "which column of the user table holds the user ids?",
}


def check_answered(options: Mapping[str, object], path: Path, separator: str = ",") -> None:
    """Raises a ValueError that asks the first open question.

    Args:
        options: name of an option of `Table` -> value, in the order of QUESTIONS.
        path: the events, for the names of their columns.
        separator: their column separator.
    """
    for name, value in options.items():
        if str(value) == OPEN:
            columns = [] if name in ("path", "items.id", "users.id") else _columns(path, separator)
            expected = _expected(name, path, columns)
            hint = ", or null with time_unit: order if there are no times" if name == "time" else ""
            raise ValueError(
                f"source.{name} is {OPEN!r}, an open question, expected {expected}: {QUESTIONS[name]} Write it into "
                f"prepare.yaml, or give --source.{name}{hint}"
            )


def _expected(name: str, path: Path, columns: list[str]) -> str:
    if name == "path":
        return "a file, folder, glob or zip"
    return f"a column of {path} ({', '.join(columns)})" if columns else "the name of a column"


def _columns(path: Path, separator: str) -> list[str]:
    """Column names of a CSV, TSV or Parquet file; none if it is not one."""
    try:
        if path.suffix in (".parquet", ".pq"):
            return pl.scan_parquet(path).collect_schema().names()
        if path.suffix in (".csv", ".tsv", ".tab", ".txt"):
            return read_header(path, "\t" if path.suffix in (".tsv", ".tab") else separator)
    except (ValueError, OSError, pl.exceptions.PolarsError):  # without an answer it cannot be read anyway
        pass
    return []
