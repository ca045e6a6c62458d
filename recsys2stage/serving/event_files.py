"""Files of events for requests: CSV, TSV, JSON lines and Parquet, with our column names or the log's own."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from recsys2stage import columns as c
from recsys2stage.data import ids
from recsys2stage.data.checks import NO_TEXT, parse_int
from recsys2stage.data.event_times import YEAR_1980
from recsys2stage.data.manifest import EVENT_COLUMNS, SourceLog
from recsys2stage.data.request_inputs import as_seconds
from recsys2stage.data.sources.plain import PACKED, Unpacker, original_names, plain_suffix
from recsys2stage.data.sources.quotes import detect_layout
from recsys2stage.data.sources.table import iso

OWN = SourceLog({}, "seconds")  # only our own column names
SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet", ".pq")
EXPECTED = "one of .csv, .tsv, .jsonl, .ndjson (also with .gz), .parquet and .pq"
ORDER = "_order"  # column: times at the resolution of the file, to sort by


def read_log(path: Path, text: Sequence[str] = (), source: SourceLog = OWN) -> pl.DataFrame:
    """The columns of a file of events, with our names: see `read_events`."""
    return read_events(path, text, source)[0]


def read_events(path: Path, text: Sequence[str] = (), source: SourceLog = OWN) -> tuple[pl.DataFrame, bool]:
    """Reads a file of events and gives its columns our names. Ids in text files stay text: item 0012 is not item 12.

    Columns may have our own names (user_id, item_id, time, rating, action) or those of the source that the data were
    prepared from. A file with the source's columns of users and items is taken to be in the source's format: its names
    come first then, else ours do.

    Args:
        path: the file; its format is that of its ending.
        text: further columns to read as text.
        source: columns of the source.

    Returns:
        All columns of the file, and whether its times are in the source's column and so in the source's unit.

    Raises:
        ValueError: for another ending, or a file that cannot be read.
    """
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a file with a row for each event; give its path")
    try:
        if suffix in PARQUET:
            log = pl.read_parquet(path)
        else:
            with _plain(path) as file:
                log = _read_text(file, path, suffix, [*text, *_text_columns(source)])
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}{_bad_line(path, suffix)}") from error
    repeated = [name for name in log.columns if f"{name}_duplicated_0" in log.columns]  # polars' name of the second
    if repeated:
        raise ValueError(f"{path} has more than one column {repeated[0]!r}; remove all but one")
    chosen = _choose(log.columns, source)
    in_unit = c.TIME in chosen and chosen[c.TIME] == source.columns.get(c.TIME)
    log = _rename(log, chosen)
    if suffix in SEPARATORS and c.USER_ID in log.columns:
        log = log.with_columns(ids.narrow_ids(log[c.USER_ID]))
    return log, in_unit


def _suffix(path: Path) -> str:
    """The ending that tells the format, in lower case and without .gz."""
    suffix, packed = plain_suffix(path), path.name.lower().endswith(PACKED)
    if suffix not in (*SEPARATORS, *JSON_LINES, *PARQUET) or (packed and suffix in PARQUET):
        raise ValueError(f"{path} has the ending {path.suffix!r}, expected {EXPECTED}; convert or rename it")
    return suffix


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The text file itself, or a temporary copy without .gz; errors name the file."""
    names: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="recsys-") as folder, original_names(names):
        yield Unpacker(Path(folder), names)([path])[0]


def _text_columns(source: SourceLog) -> list[str]:
    """Columns to read as text, by all names that they may have."""
    texts = [c.USER_ID, c.ITEM_ID, c.ACTION]
    named = [source.columns[name] for name in texts if name in source.columns]
    return [*texts, *(name for name in named if name != source.columns.get(c.RATING))]


def _read_text(file: Path, path: Path, suffix: str, text: Sequence[str]) -> pl.DataFrame:
    if suffix in JSON_LINES:
        if not file.stat().st_size:
            raise ValueError(f"{path} is empty, expected a JSON object with an event on each line")
        return pl.read_ndjson(file, infer_schema_length=None)
    separator = SEPARATORS[suffix]
    layout = detect_layout(file, separator)
    return pl.read_csv(
        file,
        separator=separator,
        schema_overrides=dict.fromkeys(text, pl.String),
        infer_schema_length=None,
        quote_char=layout.quote,
    )


def _bad_line(path: Path, suffix: str) -> str:
    """The first line of a JSON lines file that is not a JSON object, as the end of a message."""
    if suffix not in JSON_LINES:
        return ""
    with _plain(path) as file, file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fits = not line.strip() or isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                fits = False
            if not fits:
                return f"; line {number} is {line[:40]!r}, expected a JSON object with one event"
    return "; expected the same type in each field of all lines"


def _rename(log: pl.DataFrame, chosen: Mapping[str, str]) -> pl.DataFrame:
    """Gives the chosen columns our names; other columns of these names are dropped."""
    columns = {name: pl.col(column) for name, column in chosen.items()}
    if c.ACTION in chosen and chosen[c.ACTION] == chosen.get(c.RATING):  # an action that is a rating: "4.0"
        columns[c.ACTION] = columns[c.RATING].cast(pl.Float32, strict=False).cast(pl.String)
    selected: list[pl.Expr] = []
    for column in log.columns:  # in the order of the file
        names = [name for name, of in chosen.items() if of == column]
        selected += [columns[name].alias(name) for name in names]
        if not names and column not in EVENT_COLUMNS:
            selected.append(pl.col(column))
    return log.select(selected)


def _choose(columns: Sequence[str], source: SourceLog) -> dict[str, str]:
    """Our name of each event column -> its column in the file; those that the file lacks are left out."""
    theirs = source.columns
    in_format = all(theirs.get(name) in columns for name in (c.USER_ID, c.ITEM_ID))
    chosen = {}
    for name in EVENT_COLUMNS:
        own, their = [name], [theirs[name]] if name in theirs else []
        if in_format and name in theirs.values():  # it is another column of the source
            own = []
        found = [column for column in (their + own if in_format else own + their) if column in columns]
        if found:
            chosen[name] = found[0]
    return chosen


def read_times(times: pl.Series, unit: str, path: Path, newest: int | None) -> tuple[pl.Series, pl.Series]:
    """Times of a file as whole seconds since 1970, and at the file's resolution, to sort by; both Int64.

    Dates and ISO text are read whatever the unit. Fractions of a second are dropped where the data were prepared with
    milliseconds or ISO times, as in preparation; numbers of seconds must be whole.

    Args:
        times: (n,) without nulls.
        unit: of numbers: seconds, milliseconds, iso (then seconds) or order (any whole numbers).
        path: the file, for errors.
        newest: seconds of the newest training event; None: unknown.

    Raises:
        ValueError: with the first row that holds no such time.
    """
    expected = {"milliseconds": "whole milliseconds since 1970", "order": "whole numbers"}.get(
        unit, "whole seconds since 1970, or ISO text as in 2024-05-31T18:00:00Z"
    )
    if times.dtype in (pl.Date, pl.Datetime):
        ticks = times.dt.epoch("ms")
        return ticks // 1000, ticks
    if times.dtype in NO_TEXT or times.dtype == pl.Boolean:
        _refuse_nulls(pl.Series([None] * len(times)), times, path, expected)
    frame = times.to_frame("time").lazy()
    whole = frame.select(parse_int(pl.col("time"))).collect()["time"]
    if times.dtype == pl.String and unit != "order" and (whole.null_count() or unit == "iso"):
        ticks = frame.select(iso(pl.col("time"))).collect()["time"]
        _refuse_nulls(ticks, times, path, expected)
        return ticks // 1000, ticks
    _refuse_nulls(whole, times, path, expected)
    latest, recent = int(whole.max() or 0), newest is not None and newest >= YEAR_1980  # type: ignore[arg-type]  # whole
    if unit == "iso" and recent and latest < YEAR_1980:  # 20240531, perhaps
        raise ValueError(
            f"{path}, column time, holds {latest}, expected ISO text as in 2024-05-31, or seconds; convert the times"
        )
    if unit != "milliseconds":
        return whole, whole
    if recent and YEAR_1980 <= latest <= c.YEAR_2100:
        raise ValueError(
            f"{path}, column time, holds {latest}, expected milliseconds since 1970, as the data were prepared; "
            "it looks like seconds: multiply by 1000"
        )
    return whole // 1000, whole


def _refuse_nulls(parsed: pl.Series, times: pl.Series, path: Path, expected: str) -> None:
    bad = parsed.is_null()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise ValueError(
            f"{path} has the time {_shown(times[row])} in row {row + 1}, expected {expected}; convert or round it"
        )


def _shown(value: object) -> str:
    text = repr(value.to_list() if isinstance(value, pl.Series) else value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def sort_by_time(log: pl.DataFrame, source: SourceLog, in_unit: bool, path: Path, newest: int | None) -> pl.DataFrame:
    """Replaces times by whole seconds and sorts by the times as they were, equal ones in file order.

    Args:
        log: with the column time, without nulls.
        source: the source's time unit.
        in_unit: whether the times are in that unit, or in seconds.
        path: the file, for errors.
        newest: seconds of the newest training event, as in `read_times`.
    """
    unit = source.time_unit if in_unit or source.time_unit == "order" else "seconds"
    seconds, ticks = read_times(log[c.TIME], unit, path, newest)
    if unit != "order":
        as_seconds(seconds.to_numpy(), f"{path}, column time,", newest)
    log = log.with_columns(seconds.alias(c.TIME), ticks.alias(ORDER))
    return log.sort(ORDER, maintain_order=True).drop(ORDER)


def require(log: pl.DataFrame, names: Sequence[str], path: Path, source: SourceLog = OWN) -> None:
    """Raises a ValueError that names the missing columns, by our names and those of the source."""
    if missing := [name for name in names if name not in log.columns]:
        others = [f"{source.columns[name]!r} for {name}" for name in missing if source.columns.get(name, name) != name]
        advice = "rename or add them" + (f", or use the source's names: {', '.join(others)}" if others else "")
        raise ValueError(f"{path} lacks the columns {missing}; it has {log.columns}; {advice}")
