"""`Table`: events, items and users in CSV, TSV or Parquet, with a column mapping in YAML."""

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from recsys2stage.columns import ACTION, ITEM_ID, PART, RATING, TIME, TITLE, USER_ID
from recsys2stage.data.checks import (
    YEAR_2100,
    Column,
    Rows,
    empty_to_null,
    id_column,
    parse_float,
    parse_int,
    rating_column,
    time_column,
    typed_rows,
)
from recsys2stage.data.sources.base import Kind, Source, Tables, csv_rows, matches, unpacked
from recsys2stage.data.sources.questions import check_answered
from recsys2stage.data.sources.quotes import AUTO, check_quote
from recsys2stage.data.split import PARTS

DELIMITED, PARQUET = (".csv", ".tsv", ".tab", ".txt"), (".parquet", ".pq")
MAX_FLOAT32 = 3.4e38  # numeric features are stored as float32
TICKS = {"seconds": 1, "milliseconds": 1000, "iso": 1000, "order": 1}


@dataclass
class Feature:
    """A column of an item or user table.

    Args:
        kind: categorical (any value is a class), multi (several classes in one text, or a list) or numeric.
        separator: separator of the classes in a multi column of text.
        column: its name in the file, if different from the feature name.
    """

    kind: Kind
    separator: str = "|"
    column: str | None = None


@dataclass
class SideTable:
    """Side information: a table of item or user features.

    Args:
        path: the file, relative to the folder or zip of the events, or an absolute path.
        id: the id column; ids must match those of the events as text.
        columns: feature name -> feature column.
        title: column with the display title.
        quote: quote character of this file, as in `Table`.
        separator: column separator of this file; None: that of the events.
    """

    path: str
    id: str
    columns: dict[str, Feature] = field(default_factory=dict)
    title: str | None = None
    quote: str | None = AUTO
    separator: str | None = None


class Table(Source):
    """Events in delimited text (CSV, TSV) or Parquet, read lazily; ids may be numbers or text.

    Args:
        path: a file, a glob, a folder of shards (read in the order of their names), or a zip.
        user: user id column.
        item: item id column.
        time: time column; null only with time_unit order, which is then the file order.
        time_unit: seconds or milliseconds since 1970, iso text (UTC unless it has an offset), or order: numbers that
            only give the order of events.
        rating: rating column, if any.
        action: action type column (click, buy, ...), if any.
        items: item table, if any.
        users: user table, if any.
        rating_range: smallest and largest valid rating; by default any finite number is valid.
        member: name or pattern of the event files in a folder or zip that holds other files too.
        separator: column separator of .csv and .txt; .tsv and .tab use tabs.
        part: column with train, val or test for each event, for split: Marked.
        quote: quote character of delimited text; null or none: no quoting; auto: `"`, unless it only occurs within
            fields. An unclosed quote is always an error.
    """

    def __init__(
        self,
        path: Path,
        user: str = "user_id",
        item: str = "item_id",
        time: str | None = "timestamp",
        time_unit: Literal["seconds", "milliseconds", "iso", "order"] = "seconds",
        rating: str | None = None,
        action: str | None = None,
        items: SideTable | None = None,
        users: SideTable | None = None,
        rating_range: tuple[float | int, float | int] | None = None,
        member: str | None = None,
        separator: str = ",",
        part: str | None = None,
        quote: str | None = AUTO,
    ):
        if time is None and time_unit != "order":
            raise ValueError(f"time_unit is {time_unit!r} but time is null; without times set time_unit: order")
        sides = [(side.quote, side.separator or separator) for side in (items, users) if side is not None]
        for one, between in ((quote, separator), *sides):
            if len(between) != 1 or not between.isascii():
                raise ValueError(f"separator is {between!r}, expected one ASCII character")
            check_quote(one, between)
        self.path = path
        self.user = user
        self.item = item
        self.time = time
        self.time_unit = time_unit
        self.rating = rating
        self.action = action
        self.items = items
        self.users = users
        self.rating_range = rating_range
        self.member = member
        self.separator = separator
        self.part = part
        self.quote = quote

    @contextmanager
    def open(self) -> Iterator[Tables]:
        options = {"path": self.path, "user": self.user, "item": self.item, "time": self.time}
        ids = {f"{name}.id": side.id for name, side in (("items", self.items), ("users", self.users)) if side}
        check_answered(options | ids, self.path, self.separator)
        sides = [side.path for side in (self.items, self.users) if side is not None]
        events = [self.member] if self.member else [f"*{suffix}" for suffix in DELIMITED + PARQUET]
        globbed = sorted(Path(name) for name in glob.glob(str(self.path))) if not self.path.exists() else []
        if not globbed and not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} does not exist; pass your events with --source.path PATH (make: RAW=PATH)"
            )
        zipped = self.path.suffix == ".zip"
        root = self.path if zipped or self.path.is_dir() else (globbed[0] if globbed else self.path).parent
        with unpacked(root, [*events, *sides]) as folder:
            many = zipped or self.path.is_dir()
            files = _matching(folder, events, exclude=sides) if many else globbed or [self.path]
            if not files:
                raise FileNotFoundError(f"{self.path} has no file {' or '.join(events)} of events")
            if zipped and len(files) > 1 and not self.member:
                inside = ", ".join(str(file.relative_to(folder)) for file in files)
                raise ValueError(f"{self.path} holds several tables: {inside}; choose the events with member")
            item_file, items, item_features = self._side(self.items, ITEM_ID, folder)
            user_file, users, user_features = self._side(self.users, USER_ID, folder)
            yield Tables(
                events=self._rows(files, self._columns(), self.quote),
                items=items,
                users=users,
                item_features=item_features,
                user_features=user_features,
                files=[self.path] if zipped else [*files, *item_file, *user_file],
                folders=[] if zipped or files == [self.path] else sorted({file.parent for file in files}),
                has_time=self.time_unit != "order",
                ticks=TICKS[self.time_unit],
                untyped_ids=files[0].suffix not in PARQUET,
            )

    def _columns(self) -> dict[str, Column]:
        columns = {USER_ID: id_column(self.user), ITEM_ID: id_column(self.item)}
        if self.time is not None:
            if self.time_unit == "iso":
                columns[TIME] = Column(
                    self.time, "an ISO time from 1970 to 2100", iso, low=0, high=YEAR_2100 * TICKS["iso"]
                )
            elif self.time_unit == "order":
                columns[TIME] = Column(self.time, "a whole number", parse_int, pl.Int64())
            else:
                columns[TIME] = time_column(self.time, TICKS[self.time_unit])
        if self.rating is not None:
            columns[RATING] = rating_column(self.rating, *(self.rating_range or ()))
        if self.action is not None:
            columns[ACTION] = Column(self.action, "", empty_to_null, required=False)
        if self.part is not None:
            columns[PART] = Column(self.part, " or ".join(PARTS), part_number)
        return columns

    def _side(
        self, side: SideTable | None, own_id: str, folder: Path
    ) -> tuple[list[Path], Rows | None, dict[str, Kind]]:
        if side is None:
            return [], None, {}
        found = [Path(side.path)] if Path(side.path).is_absolute() else _matching(folder, [side.path])
        if len(found) != 1 or not found[0].is_file():
            raise FileNotFoundError(
                f"{self.path} has {len(found) or 'no'} files {side.path!r} in it or its folder, expected one"
            )
        columns = {own_id: id_column(side.id)}
        if side.title is not None:
            columns[TITLE] = Column(side.title, "", empty_to_null, required=False)
        for name, feature in side.columns.items():
            raw = feature.column or name
            if feature.kind == "numeric":
                columns[name] = Column(
                    raw, "a number", parse_float, pl.Float64(), -MAX_FLOAT32, MAX_FLOAT32, required=False
                )
            elif feature.kind == "multi":
                columns[name] = Column(raw, "", _splitter(feature.separator), required=False, lists=True)
            else:
                columns[name] = Column(raw, "", empty_to_null, required=False)
        kinds = {name: feature.kind for name, feature in side.columns.items()}
        return found, self._rows(found, columns, side.quote, side.separator), kinds

    def _rows(
        self, files: Sequence[Path], columns: dict[str, Column], quote: str | None, between: str | None = None
    ) -> Rows:
        suffixes = {file.suffix for file in files}
        if suffixes <= set(PARQUET):
            return parquet_rows(files, columns)
        if suffixes & set(PARQUET) or len(suffixes) > 1:
            raise ValueError(
                f"the shards have several file types: {', '.join(sorted(suffixes))}; select one with a glob: path/*.csv"
            )
        separator = "\t" if suffixes <= {".tsv", ".tab"} else between or self.separator
        return csv_rows(files, columns, separator, quote=quote)


def part_number(raw: pl.Expr) -> pl.Expr:
    """train, val, test -> 0, 1, 2 (Int8), else null."""
    return raw.cast(pl.String).replace_strict(PARTS, range(len(PARTS)), default=None, return_dtype=pl.Int8)


def iso(raw: pl.Expr) -> pl.Expr:
    """ISO 8601 text -> milliseconds since 1970, null if it does not parse. UTC unless it has an offset."""
    text = raw.str.strip_chars().str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
    zoned = [text.str.to_datetime(f"%Y-%m-%d %H:%M{rest}%:z", time_unit="ms", strict=False) for rest in (":%S%.f", "")]
    plain = [text.str.to_datetime(f"%Y-%m-%d %H:%M{rest}", time_unit="ms", strict=False) for rest in (":%S%.f", "")]
    day = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("ms"))
    zoned = [time.dt.replace_time_zone(None) for time in zoned]
    return pl.coalesce(*zoned, *plain, day).dt.timestamp("ms")


def _splitter(separator: str) -> Callable[[pl.Expr], pl.Expr]:
    return lambda raw: raw.str.split(separator)


def _matching(folder: Path, patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "_")))
    names = {file: file.relative_to(folder).as_posix() for file in files}
    wanted = [file for file in files if any(matches(names[file], pattern) for pattern in patterns)]
    return [file for file in wanted if not any(matches(names[file], pattern) for pattern in exclude)]


def parquet_rows(files: Sequence[Path], columns: dict[str, Column]) -> Rows:
    """Parquet files as lazy rows, with values parsed as in a text file."""
    shards = []
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty (0 bytes)")
        shard = pl.scan_parquet(file)
        try:
            shard.collect_schema()
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{file} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
        shards.append((shard, str(file)))
    name = str(files[0]) + (f" (and {len(files) - 1} more)" if len(files) > 1 else "")
    return typed_rows(shards, columns, name)
