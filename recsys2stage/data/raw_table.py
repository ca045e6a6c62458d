"""A look into a raw table: its columns and first rows, before there is a config that says how to read it."""

import glob
import gzip
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recsys2stage.data.sources.base import read_header, unpacked
from recsys2stage.data.sources.quotes import AUTO, detect_layout
from recsys2stage.data.sources.table import DELIMITED, PARQUET

ROWS = 1_000  # rows read to look at values
COUNTED = 5_000_000  # rows read to count the events of each user
SEPARATORS = ",;\t|"


@dataclass(frozen=True)
class RawTable:
    """A look into a raw table.

    Attributes:
        path: path as given.
        columns: column names.
        rows: the first rows; of delimited text every column is text.
        separator: column separator of delimited text.
    """

    path: Path
    columns: list[str]
    rows: pl.DataFrame
    separator: str = ","


@contextmanager
def table_file(path: Path) -> Iterator[Path]:
    """Yields the first file of a table given as a file, glob, folder of shards, or a zip that holds one table.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a zip holds several, or the type of the file is unknown.
    """
    kinds = [f"*{suffix}" for suffix in (*DELIMITED, *(f"{suffix}.gz" for suffix in DELIMITED), *PARQUET)]
    expected = "a CSV, TSV or Parquet file, a folder or glob of such files, or a zip with one of them"
    if not path.exists():
        found = sorted(Path(name) for name in glob.glob(str(path)))
        if not found:
            raise FileNotFoundError(f"{path} does not exist, expected {expected}; check the path")
        yield found[0]
        return
    if not path.is_dir() and path.suffix != ".zip":
        if not any(path.match(kind) for kind in kinds):
            raise ValueError(f"{path} has the type {path.suffix or 'of no suffix'!r}, expected {expected}; convert it")
        yield path
        return
    with unpacked(path, kinds) as folder:
        found = sorted(file for file in folder.rglob("*") if any(file.match(kind) for kind in kinds))
        if not found:
            raise ValueError(f"{path} holds no table, expected {expected}; name the file itself")
        if path.suffix == ".zip" and len(found) > 1:
            names = ", ".join(file.relative_to(folder).as_posix() for file in found)
            raise ValueError(f"{path} holds several tables ({names}), expected one; unpack it and name the file")
        yield found[0]


def look_into(path: Path) -> RawTable:
    """Reads the column names and the first rows of a table.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a table with a header.
    """
    with table_file(path) as file:
        if file.suffix in PARQUET:
            try:
                rows = pl.read_parquet(file, n_rows=ROWS)
            except pl.exceptions.PolarsError as error:
                raise ValueError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
            return RawTable(path, rows.columns, rows)
        if file.suffix == ".gz":
            with gzip.open(file, "rb") as packed:
                separator, names, quote = _layout(path, packed.readline())
        else:
            separator, names, quote = _layout(path, _first_line(file))
            quote = detect_layout(file, separator, AUTO).quote if quote else None
            names = read_header(file, separator, quote)
        if len(names) < 2:
            raise ValueError(
                f"{path} has one column, {names[0] if names else ''!r}, expected at least a user and an item; separate "
                "the columns by a comma, semicolon, tab or bar"
            )
        if all(re.fullmatch(r"[\d.:+-]*", name.strip()) for name in names):
            raise ValueError(
                f"the first line of {path} is {separator.join(names)!r}, expected the names of the columns; add a "
                "line such as user_id,item_id,timestamp"
            )
        rows = pl.read_csv(
            file,
            separator=separator,
            quote_char=quote,
            infer_schema=False,
            n_rows=ROWS,
            truncate_ragged_lines=True,
            encoding="utf8-lossy",
        )
    return RawTable(path, names, rows.rename(dict(zip(rows.columns, names, strict=False))), separator)


def _first_line(file: Path) -> bytes:
    with file.open("rb") as lines:
        return lines.readline()


def _layout(path: Path, line: bytes) -> tuple[str, list[str], str | None]:
    """Separator, column names and quote character by the first line of a text file."""
    text = line.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not text:
        raise ValueError(f"the first line of {path} is empty, expected the names of the columns; remove blank lines")
    tabs = {".tsv", ".tab"} & set(path.suffixes)  # which `Table` reads with tabs only
    separator = "\t" if tabs else max(SEPARATORS, key=text.count)
    return separator, [name.strip('"') for name in text.split(separator)], '"'


def events_per_user(table: RawTable, user: str) -> float | None:
    """Median number of events of a user, counted in at most COUNTED rows; None for shards and zips."""
    if not table.path.is_file() or table.path.suffix == ".zip":
        return None
    if table.path.suffix in PARQUET:
        log = pl.scan_parquet(table.path)
    else:
        log = pl.scan_csv(
            table.path,
            separator=table.separator,
            infer_schema=False,
            truncate_ragged_lines=True,
            encoding="utf8-lossy",
            ignore_errors=True,
        )
    try:
        counts = log.select(pl.col(user)).head(COUNTED).group_by(user).len().collect()["len"]
    except pl.exceptions.PolarsError:  # prepare-data names the bad rows
        return None
    median: Any = counts.median()
    return None if median is None else float(median)
