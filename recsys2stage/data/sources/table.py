"""`Table`: events, items and users in CSV, TSV or Parquet, with a column mapping in YAML."""

import difflib
import glob
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from recsys2stage.columns import ACTION, ITEM_ID, PART, RATING, TIME, TITLE, USER_ID, YEAR_2100
from recsys2stage.data.checks import (
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
from recsys2stage.data.sources.plain import PACKED, Unpacker, original_names, plain_suffix
from recsys2stage.data.sources.questions import OPEN, check_answered
from recsys2stage.data.sources.quotes import AUTO, check_quote
from recsys2stage.data.split import PARTS
from recsys2stage.options import TimeUnit, check_number, check_option

DELIMITED, PARQUET = (".csv", ".tsv", ".tab", ".txt"), (".parquet", ".pq")
ENDINGS = (*DELIMITED, *PARQUET, *(f"{suffix}{PACKED}" for suffix in DELIMITED))
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

    def __post_init__(self) -> None:
        check_option("kind", self.kind, Kind)
        if not isinstance(self.separator, str) or not self.separator:
            raise ValueError(
                f"separator is {self.separator!r}, expected the text between two classes; set separator to '|', for "
                "example"
            )


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

    def __post_init__(self) -> None:
        for name, feature in self.columns.items():
            if not isinstance(feature, Feature):
                raise ValueError(
                    f"column {name!r} is {feature!r}, expected its kind; write {name}: {{kind: categorical}}, or in "
                    "Python Feature('categorical')"
                )


class Table(Source):
    """Events in delimited text (CSV, TSV) or Parquet, read lazily; ids may be numbers or text.

    Args:
        path: a file, a glob, a folder of shards (read in the order of their names), or a zip. Text may be gzipped.
        user: user id column.
        item: item id column.
        time: time column; null only with time_unit order, which is then the file order.
        time_unit: seconds or milliseconds since 1970 (whole numbers; fractions are refused, not rounded), iso text (UTC
            unless it has an offset), or order: numbers that only give the order of events.
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
        time_unit: TimeUnit = "seconds",
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
        check_option("time_unit", time_unit, TimeUnit)
        check_columns({"user": user, "item": item, "time": time, "rating": rating, "action": action, "part": part})
        if rating_range is not None:
            for bound in rating_range:
                check_number("rating_range", bound, example=5)
            if not (len(rating_range) == 2 and rating_range[0] < rating_range[1]):
                raise ValueError(
                    f"rating_range is {list(rating_range)}, expected the smallest and the largest valid rating; set "
                    "rating_range to [1, 5], for example"
                )
        sides = [(side.quote, side.separator or separator) for side in (items, users) if side is not None]
        for one, between in ((quote, separator), *sides):
            if len(between) != 1 or not between.isascii():
                raise ValueError(f"separator is {between!r}, expected one ASCII character; set it to ',', for example")
            check_quote(one, between)
        self.path = Path(path)
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
        events = [self.member] if self.member else [f"*{suffix}" for suffix in ENDINGS]
        globbed = sorted(Path(name) for name in glob.glob(str(self.path))) if not self.path.exists() else []
        if not globbed and not self.path.exists():
            if glob.has_magic(str(self.path)):
                raise FileNotFoundError(
                    f"{self.path} matches no file, expected a pattern of the files of events; correct source.path"
                )
            near = difflib.get_close_matches(self.path.name, _names(self.path.parent), 1)
            raise FileNotFoundError(
                f"{self.path} does not exist{f' (did you mean {near[0]!r}?)' if near else ''}; pass your events with "
                "--source.path PATH (make: RAW=PATH)"
            )
        zipped = self.path.suffix.lower() == ".zip" and self.path.is_file()
        root = self.path if zipped or self.path.is_dir() else (globbed[0] if globbed else self.path).parent
        names: dict[str, str] = {}  # of temporary files, for errors
        with (
            original_names(names),
            unpacked(root, [*events, *sides]) as folder,
            tempfile.TemporaryDirectory(prefix="recsys-") as copies,
        ):
            if zipped:
                names[str(folder)] = str(self.path)
            many = zipped or self.path.is_dir()
            files = _matching(folder, events, exclude=sides) if many else globbed or [self.path]
            if not files:
                inside = _members(self.path) if zipped else [file for file in _names(folder) if file[0] not in "._"]
                raise FileNotFoundError(
                    f"{self.path} has no file {' or '.join(events)}, expected one of events among "
                    f"{', '.join(inside[:10]) or 'its files, and it has none'}; name it as source.member"
                )
            if zipped and len(files) > 1 and not self.member:
                tables = ", ".join(str(file.relative_to(folder)) for file in files)
                raise ValueError(f"{self.path} holds several tables: {tables}; choose the events with member")
            unpack = Unpacker(Path(copies), names)
            item_file, items, item_features = self._side(self.items, ITEM_ID, folder, unpack)
            user_file, users, user_features = self._side(self.users, USER_ID, folder, unpack)
            yield Tables(
                events=self._rows(files, self._columns(), self.quote, unpack),
                items=items,
                users=users,
                item_features=item_features,
                user_features=user_features,
                files=[self.path] if zipped else [*files, *item_file, *user_file],
                folders=[] if zipped or files == [self.path] else sorted({file.parent for file in files}),
                has_time=self.time_unit != "order",
                ticks=TICKS[self.time_unit],
                time_unit=self.time_unit,
                untyped_ids=plain_suffix(files[0]) not in PARQUET,
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
        self, side: SideTable | None, own_id: str, folder: Path, unpack: Unpacker
    ) -> tuple[list[Path], Rows | None, dict[str, Kind]]:
        if side is None:
            return [], None, {}
        found = [Path(side.path)] if Path(side.path).is_absolute() else _matching(folder, [side.path])
        if len(found) != 1 or not found[0].is_file():
            raise FileNotFoundError(
                f"{self.path} has {len(found) or 'no'} files {side.path!r} in it or its folder, expected one; correct "
                f"the path of the table of {own_id.removesuffix('_id')}s"
            )
        columns = {own_id: id_column(side.id)}
        if side.title is not None:
            columns[TITLE] = Column(side.title, "", empty_to_null, required=False)
        for name, feature in side.columns.items():
            if name == own_id:
                raise ValueError(
                    f"a feature has the name {name!r} of the ids, expected another one; rename it, with column: {name}"
                )
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
        return found, self._rows(found, columns, side.quote, unpack, side.separator), kinds

    def _rows(
        self,
        files: Sequence[Path],
        columns: dict[str, Column],
        quote: str | None,
        unpack: Unpacker,
        between: str | None = None,
    ) -> Rows:
        suffixes = {plain_suffix(file) for file in files}
        if suffixes <= set(PARQUET):
            return typed_tables(files, columns, [str(file) for file in files])
        if suffixes & set(PARQUET) or len(suffixes) > 1:
            raise ValueError(
                f"the shards have several file types: {', '.join(sorted(suffixes))}, expected one; select one with a "
                "glob: path/*.csv"
            )
        separator = "\t" if suffixes <= {".tsv", ".tab"} else between or self.separator
        return csv_rows(unpack(files), columns, separator, quote=quote, names=unpack.names)


def check_columns(columns: Mapping[str, object]) -> None:
    """Raises a ValueError for a column name that is no text or empty, or the same for two options.

    Args:
        columns: option -> name of its column; None: no such column.
    """
    given: dict[object, str] = {}
    for option, column in columns.items():
        if column is None and option not in ("user", "item"):
            continue
        if not isinstance(column, str) or not column:
            raise ValueError(
                f"{option} is {column!r}, expected the name of a column; set {option} to the column of the {option}"
            )
        if column == OPEN:  # asked when the source is opened
            continue
        if column in given:
            raise ValueError(
                f"{given[column]} and {option} are both {column!r}, expected different columns; correct one of them"
            )
        given[column] = option


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted; none if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def _members(path: Path) -> list[str]:
    """Names of the files in a zip."""
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


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


def typed_tables(files: Sequence[Path], columns: dict[str, Column], names: Sequence[str]) -> Rows:
    """Parquet files as lazy rows, with values parsed as in a text file.

    Args:
        names: of each file, for errors.
    """
    shards = []
    for file, name in zip(files, names, strict=True):
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty (0 bytes), expected a Parquet file; write it again")
        shard = pl.scan_parquet(file)
        try:
            shard.collect_schema()
        except pl.exceptions.PolarsError as error:
            raise ValueError(
                f"{file} cannot be read as Parquet ({str(error).splitlines()[0]}); expected a complete Parquet file: "
                "write it again, or give it the ending .csv if it is text"
            ) from error
        shards.append((shard, name))
    return typed_rows(shards, columns, names[0] + (f" (and {len(files) - 1} more)" if len(files) > 1 else ""))
