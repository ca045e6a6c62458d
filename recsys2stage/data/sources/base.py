"""The `Source` interface (raw format -> lazy tables of events, items and users), zip extraction and CSV scanning."""

import csv
import fnmatch
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import polars as pl

from recsys2stage.data.checks import FILE, LINE, SURPLUS, Column, Rows, require
from recsys2stage.data.sources.quotes import AUTO, detect_layout
from recsys2stage.options import TimeUnit
from recsys2stage.trust import class_name

LARGE = 1 << 30  # bytes: smaller archives are not checked for their compression ratio
MOST_GROWTH = 200  # largest accepted compression ratio; text logs compress 10 to 20 times

Kind = Literal["categorical", "multi", "numeric"]


@dataclass(frozen=True)
class Tables:
    """The tables of a source.

    Attributes:
        events: columns user_id, item_id, time, optionally rating, action and part (int8: index in train, val, test);
            one row per event, in log order.
        items: column item_id, optionally title, and feature columns.
        users: column user_id, and feature columns.
        item_features: feature column -> categorical (any type), multi (a list of text) or numeric.
        user_features: user feature column -> kind.
        files: the raw files; the manifest records their hashes.
        folders: folders of shards: a file added there would be read too.
        has_time: False if `time` only gives the order of events.
        ticks: units of `time` per second.
        time_unit: how the source writes times: seconds or milliseconds since 1970, iso text, or order.
        untyped_ids: the file format has no types (CSV), so ids are integers if all of them are plain integers.
    """

    events: Rows
    items: Rows | None = None
    users: Rows | None = None
    item_features: dict[str, Kind] = field(default_factory=dict)
    user_features: dict[str, Kind] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    has_time: bool = True
    ticks: int = 1
    time_unit: TimeUnit = "seconds"
    untyped_ids: bool = False


class Source(ABC):
    """Reader of a raw format. Constructor arguments are plain values, stored as attributes of the same names."""

    @abstractmethod
    def open(self) -> AbstractContextManager[Tables]:
        """Context manager that yields the tables; extracted files are removed when it exits."""

    def describe(self) -> dict[str, Any]:
        """Class path and options, for the manifest."""
        kind = type(self)
        options = {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in vars(self).items()
            if not name.startswith("_")
        }
        return {"class_path": class_name(kind), "init_args": options}


@contextmanager
def unpacked(path: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yields the folder itself, or a temporary folder with the members of a zip that match one of the patterns."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="recsys-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                chosen = [
                    member for member in members if any(matches(member.filename, pattern) for pattern in patterns)
                ]
                _check_members(path, chosen, free=shutil.disk_usage(folder).free)
                for member in chosen:
                    archive.extract(member, folder)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # a disk error, not a damaged archive
                raise
            raise ValueError(
                f"{path} is not a complete zip file ({error}), {path.stat().st_size:,} bytes: "
                "it may be truncated; remove it and download it again"
            ) from error
        except ValueError:
            raise
        except Exception as error:  # zlib.error, lzma.LZMAError: a member is damaged
            raise ValueError(f"{path} is damaged ({error}); remove it and download it again") from error
        yield Path(folder)


def _check_members(path: Path, members: Sequence[zipfile.ZipInfo], free: int) -> None:
    """Rejects zip members that would be extracted outside the folder or fill the disk (zip bombs)."""
    for member in members:
        parts = PurePosixPath(member.filename.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise ValueError(
                f"{path} has a member {member.filename!r}, expected paths inside the archive; do not use it"
            )
    packed, unpacked = sum(m.compress_size for m in members), sum(m.file_size for m in members)
    if unpacked > free or (unpacked > LARGE and unpacked > MOST_GROWTH * packed):
        raise ValueError(
            f"{path} unpacks from {packed:,} to {unpacked:,} bytes, expected at most {MOST_GROWTH} times its size and "
            f"the {free:,} bytes of free space; unpack it yourself and pass the folder"
        )


def matches(member: str, pattern: str) -> bool:
    """Whether a path within a folder or zip matches the pattern, as a whole or in its last parts."""
    return not member.endswith("/") and (fnmatch.fnmatch(member, pattern) or fnmatch.fnmatch(member, f"*/{pattern}"))


def csv_rows(
    files: Sequence[Path],
    columns: dict[str, Column],
    separator: str = ",",
    header: list[str] | None = None,
    quote: str | None = AUTO,
    names: Mapping[str, str] | None = None,
) -> Rows:
    """Delimited text files as lazy rows.

    Args:
        files: shards of one table; column order may differ.
        columns: our column name -> its rule; several can be parsed from one raw column.
        header: column names, for files without a header line.
        quote: quote character, None or auto, as in `quotes.detect_layout`.
        names: path of a file -> its name for errors and rejected rows; by default the path.
    """
    typed, text = [], []
    shown = {file: (names or {}).get(str(file), str(file)) for file in files}
    for file in files:
        layout = detect_layout(file, separator, quote, header is None)
        header_names = header or read_header(file, separator, layout.quote)
        _check_separator(header_names, columns, separator, shown[file])
        require((column.name for column in columns.values()), header_names, shown[file])
        header_names = [  # as polars renames duplicate columns
            f"{name}_duplicated_{header_names[:index].count(name) - 1}" if name in header_names[:index] else name
            for index, name in enumerate(header_names)
        ]
        dtypes = dict.fromkeys(header_names, pl.String()) | {column.name: column.dtype for column in columns.values()}
        chosen = [
            (column.parse(pl.col(column.name)) if column.dtype == pl.String else pl.col(column.name)).alias(name)
            for name, column in columns.items()
        ]
        options: dict[str, Any] = {"separator": separator, "has_header": header is None, "quote_char": layout.quote}
        typed.append(pl.scan_csv(file, schema=dtypes, **options).select(chosen))
        raw = pl.scan_csv(
            file,
            schema=dict.fromkeys([*header_names, SURPLUS], pl.String()),
            missing_columns="insert" if header is None else "raise",
            encoding="utf8-lossy",
            row_index_name=LINE,
            **options,
        ).with_columns(layout.line_of(pl.col(LINE).cast(pl.Int64), 1 if header else 2))
        own = [pl.col(column.name).alias(name) for name, column in columns.items()]
        blank = pl.all_horizontal(
            pl.all().exclude(LINE).is_null()
        )  # blank lines, as editors leave at the end of a file
        text.append(raw.filter(~blank).select(*own, LINE, SURPLUS, pl.lit(shown[file]).alias(FILE)))
    name = shown[files[0]] + (f" (and {len(files) - 1} more)" if len(files) > 1 else "")
    return Rows(pl.concat(typed), name, columns, pl.concat(text))


def _check_separator(header: Sequence[str], columns: dict[str, Column], separator: str, file: str) -> None:
    """Raises a ValueError if the columns are those of another separator."""
    if len(header) > 1 or header[:1] == [next(iter(columns.values())).name]:
        return
    wanted = {column.name for column in columns.values()}
    for other in ",;\t|":
        if header and other != separator and wanted & set(header[0].split(other)):
            raise ValueError(
                f"{file} has one column {header[0]!r}, expected columns separated by {separator!r}; set separator to "
                f"{other!r}"
            )


def read_header(file: Path, separator: str, quote: str | None = '"') -> list[str]:
    """Column names in the first line of a delimited text file."""
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes), expected a line of column names and rows; write it again")
    try:
        with file.open("rb") as lines:  # bytes: later lines need not be valid UTF-8
            first = lines.readline().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text ({error}); convert it: iconv -f ITS-ENCODING -t utf-8 {file.name} > new.csv"
        ) from error
    if "\r" in first.rstrip("\r\n"):
        raise ValueError(
            f"{file} ends its lines with a carriage return alone, expected a line feed; convert it: tr '\\r' '\\n' < "
            f"{file.name} > new.csv"
        )
    quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if quote is None else {"quotechar": quote}
    return next(csv.reader([first.rstrip("\r\n")], delimiter=separator, **quoting), [])
