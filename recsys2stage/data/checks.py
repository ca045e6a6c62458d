"""Validation of raw tables: column rules, fast typed reading, and reports of bad rows with their line numbers.

The fast path reads typed columns and checks aggregates (nulls, minimum, maximum). Only if that fails, the table is read
again as text with line numbers to find the bad rows.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recsys2stage.columns import ITEM_ID, RATING, TIME, USER_ID, YEAR_2100
from recsys2stage.data import bad_rows, ids

OnBadRows = Literal["error", "quarantine"]

FILE, LINE, SURPLUS = "_file", "_line", "_surplus"  # added columns when a table is read as text
FAULT = "_fault"  # column: index of the first rule that a row violates
VALUE = "_value_"  # prefix of a column name: its parsed values
UNPARSED = "_unparsed_"  # prefix of a column name: whether a value could not be parsed
NO_TEXT = (pl.Binary, pl.Object, pl.Struct, pl.List, pl.Array, pl.Duration)  # types that no CSV field can hold
ADVICE = "Correct the file, or move bad rows to rejected.parquet with --on_bad_rows quarantine."
MOST_NAMES = 30  # of columns, in an error
REJECTED_SCHEMA = {"file": pl.String, "line": pl.Int64, "column": pl.String, "reason": pl.String, "row": pl.String}
NOT_UTF8 = "\ufffd"  # replacement character that a lossy decoder writes for invalid bytes


def as_is(raw: pl.Expr) -> pl.Expr:
    return raw


def id_text(raw: pl.Expr) -> pl.Expr:
    """An id as text, unchanged. `ids.cast_id_column` parses the ids of typed columns."""
    return raw


def empty_to_null(raw: pl.Expr) -> pl.Expr:
    """Text, with null for the empty string."""
    return raw.replace("", None)


def parse_int(raw: pl.Expr) -> pl.Expr:
    """Text or number -> Int64, null if it is not an integer. Accepts "978300760.0", which pandas writes."""
    text = raw.cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    return pl.coalesce(
        text.cast(pl.Int64, strict=False),
        pl.when(number == number.floor()).then(number).cast(pl.Int64, strict=False),
    )


def parse_float(raw: pl.Expr) -> pl.Expr:
    """Text or number -> Float64, null if it is not a number or is NaN."""
    return raw.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False).fill_nan(None)


@dataclass(frozen=True)
class Column:
    """Validation rule for one column of a raw table.

    Attributes:
        name: its name in the raw file, for errors.
        what: the expected value, for errors; empty if any value is valid.
        parse: raw values -> parsed values, null where parsing fails.
        dtype: type to read it as on the fast path. Strings are parsed; other types are used as read.
        low: the smallest valid value.
        high: the largest valid value.
        required: whether a missing value is an error.
        lists: whether a typed column may hold lists, which are not parsed.
    """

    name: str
    what: str = "text"
    parse: Callable[[pl.Expr], pl.Expr] = as_is
    dtype: Any = field(default_factory=pl.String)  # a pl.DataType, a hint that beartype refuses
    low: float | int = -math.inf
    high: float | int = math.inf
    required: bool = True
    lists: bool = False

    @property
    def bounded(self) -> bool:
        return self.low > -math.inf or self.high < math.inf


def id_column(name: str) -> Column:
    return Column(name, "an id", id_text)


def rating_column(name: str, low: float | int = -1e30, high: float | int = 1e30) -> Column:
    what = "a number" if high == 1e30 else f"a number within {low:g}..{high:g}"
    return Column(name, what, parse_float, pl.Float32(), low, high)


def time_column(name: str, per_second: int = 1) -> Column:
    unit = {1: "seconds", 1000: "milliseconds"}[per_second]
    return Column(name, f"{unit} from 1970 to 2100", parse_int, pl.Int64(), 0, YEAR_2100 * per_second)


@dataclass(frozen=True)
class Rows:
    """A lazy raw table in two forms: typed, for fast reading, and as text, to locate bad rows.

    Attributes:
        typed: the parsed table, with our column names; of any types if `columns` is empty.
        file: its name, for errors.
        columns: our column name -> its rule. If empty, `default_columns` applies.
        text: the unparsed table with our column names, FILE and LINE; SURPLUS if a line can have too many fields, and
            VALUE columns if parsing needs more than the text.
        unit: unit of LINE: line or row.
        advice: what to do about bad rows, for errors.
    """

    typed: pl.LazyFrame
    file: str
    columns: dict[str, Column] = field(default_factory=dict)
    text: pl.LazyFrame | None = None
    unit: str = "line"
    advice: str = ADVICE


def read(
    rows: Rows, on_bad_rows: OnBadRows = "error", needs: Sequence[str] = (), categorical: Sequence[str] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Collects and validates a table.

    Args:
        needs: required columns, by our names.
        categorical: text columns to read as categorical, 4 bytes per row.

    Returns:
        The good rows in their order, and the bad rows as (file, line, column, reason, row); the latter are empty unless
        on_bad_rows is quarantine.

    Raises:
        ValueError: with file, column, count and the first three bad rows; or if there are no good rows.
    """
    names = rows.typed.collect_schema().names()
    require(needs, names, rows.file)
    rows = with_default_columns(rows)
    columns = rows.columns
    try:
        good = _collect(rows.typed.select(pl.col(list(columns)), pl.col(f"^{UNPARSED}.*$").any()), categorical)
        bad = None if _is_valid(good, columns) else _find_bad_rows(rows, columns)
    except pl.exceptions.PolarsError as error:
        good, bad = None, _find_bad_rows(rows, columns, error)
    if bad is not None:
        if len(bad) and on_bad_rows == "error":
            raise ValueError(_error_message(rows, columns, bad))
        values = [pl.col(VALUE + name).alias(name) for name in columns]
        good = _collect(_find_faults(rows, columns)[0].filter(pl.col(FAULT).is_null()).select(values), categorical)
    assert good is not None
    good = good.select(list(columns))
    if good.is_empty():
        if bad is not None and _useless_column(rows, columns, bad) is not None:
            raise ValueError(_error_message(rows, columns, bad))
        kind = "good rows" if bad is not None and len(bad) else "rows"
        raise ValueError(f"{rows.file} has no {kind}, expected at least one; write it again, or give another table")
    return good, pl.DataFrame(schema=REJECTED_SCHEMA) if bad is None else bad


def with_default_columns(rows: Rows) -> Rows:
    """Adds the default column rules to rows without rules."""
    if rows.columns:
        return rows
    return typed_rows([(rows.typed, rows.file)], default_columns(rows.typed.collect_schema().names()), rows.file)


def typed_rows(shards: Sequence[tuple[pl.LazyFrame, str]], columns: dict[str, Column], name: str) -> Rows:
    """Concatenates typed tables (Parquet, data frames) into one, with values parsed as in a text file.

    Args:
        shards: (frame with the raw columns, its name for errors); column types may differ between shards.
        columns: our column name -> its rule.
        name: of the whole table, for errors.

    Raises:
        ValueError: for missing columns and unsupported column types.
    """
    parsed: list[dict[str, pl.Expr]] = []
    raw_text: list[dict[str, pl.Expr]] = []
    for frame, file in shards:
        schema = frame.collect_schema()
        require((column.name for column in columns.values()), schema.names(), file)
        parsed.append({own: _parse_typed(own, column, schema[column.name], file) for own, column in columns.items()})
        raw_text.append({own: _as_text(pl.col(column.name), schema[column.name]) for own, column in columns.items()})
        for own, column in columns.items():
            if column.parse is id_text and (schema[column.name].is_float() or schema[column.name].is_decimal()):
                columns = columns | {own: replace(column, what=ids.expected_id(schema[column.name]))}
    schemas = [frame.select(**values).collect_schema() for (frame, _), values in zip(shards, parsed, strict=True)]
    dtypes = {own: ids.common_dtype(schema[own] for schema in schemas) for own in columns}
    checked = [own for own, column in columns.items() if column.what and not column.required]
    typed, text = [], []
    for (frame, file), raw, texts in zip(shards, parsed, raw_text, strict=True):
        values = {own: value.cast(dtypes[own]) for own, value in raw.items()}
        unparsed = {UNPARSED + own: values[own].is_null() & (texts[own].str.strip_chars() != "") for own in checked}
        typed.append(frame.select(**values, **unparsed))
        temporary = {VALUE + own: value for own, value in values.items()}
        text.append(frame.select(**texts, **temporary).with_row_index(LINE, 1).with_columns(pl.lit(file).alias(FILE)))
    return Rows(pl.concat(typed), name, columns, pl.concat(text), unit="row")


def _parse_typed(own: str, column: Column, dtype: Any, file: str) -> pl.Expr:
    """Parses a typed column; null where the value is missing or invalid."""
    raw, where = pl.col(column.name), f"{file}, column {column.name!r}:"
    if column.parse is id_text:
        return ids.cast_id_column(raw, dtype, where)
    if column.parse is as_is:
        return raw
    if own == TIME and dtype in (pl.Date, pl.Datetime):
        if not column.bounded:  # time_unit: order
            return raw.to_physical().cast(pl.Int64)
        return raw.dt.epoch("ms") * round(column.high / YEAR_2100) // 1000
    if column.lists and dtype in (pl.List, pl.Array):
        if dtype.inner.is_float() or dtype.inner in NO_TEXT:
            raise ValueError(
                f"{where} {dtype} holds no classes; leave out the column; if it holds item vectors, give their "
                "file as item_vectors in prepare.yaml"
            )
        return raw.cast(pl.List(pl.String))
    if dtype in NO_TEXT:
        raise ValueError(f"{where} the type {dtype} is not {column.what or 'a text or number'}; convert the column")
    if column.parse is parse_int and dtype.is_float():
        whole = (raw == raw.floor()) & (raw.abs() <= ids.WHOLE[dtype.base_type()])
        return pl.when(whole).then(raw).cast(pl.Int64, strict=False)
    if column.parse is parse_int and dtype.is_integer():
        return raw.cast(pl.Int64, strict=False)
    if column.parse is parse_float and dtype.is_numeric():
        return raw.cast(pl.Float64).fill_nan(None)
    return column.parse(_as_text(raw, dtype))


def _as_text(raw: pl.Expr, dtype: Any) -> pl.Expr:
    """A typed value as text, as a CSV would hold it; null if it is missing."""
    if dtype in NO_TEXT:
        return pl.when(raw.is_not_null()).then(pl.lit(f"a {dtype}"))
    return (raw.fill_nan(None) if dtype.is_float() else raw).cast(pl.String)


def default_columns(names: Iterable[str]) -> dict[str, Column]:
    """Rules for ids, times in seconds and ratings by our column names; other columns may hold anything."""
    rules = {USER_ID: id_column(USER_ID), ITEM_ID: id_column(ITEM_ID), TIME: time_column(TIME)}
    rules[RATING] = rating_column(RATING)
    return {name: rules.get(name, Column(name, "", required=False)) for name in names}


def require(
    wanted: Iterable[str], present: Sequence[str], file: str | Path, next_step: str = "name one of these"
) -> None:
    """Raises a ValueError for missing columns, with the existing columns, the closest match and the next step."""
    missing = []
    for name in dict.fromkeys(wanted):
        if name not in present:
            folded = {other.strip().lower().replace("_", ""): other for other in present}
            guess = difflib.get_close_matches(name.lower().replace("_", ""), list(folded), 1, cutoff=0.5)
            missing.append(f"{name!r}" + (f" (did you mean {folded[guess[0]]!r}?)" if guess else ""))
        elif list(present).count(name) > 1:
            raise ValueError(
                f"{file} has {list(present).count(name)} columns named {name!r}, expected one; remove all but one"
            )
    if missing:
        shown = ", ".join(map(repr, present[:MOST_NAMES])) + (", ..." if len(present) > MOST_NAMES else "")
        raise ValueError(f"{file} has no column {', '.join(missing)}; its columns are: {shown}; {next_step}")


def _collect(frame: pl.LazyFrame, categorical: Sequence[str]) -> pl.DataFrame:
    schema = frame.collect_schema()
    texts = [name for name in categorical if schema.get(name) == pl.String]
    # a separate category dictionary per column, freed with the column
    packed = [pl.col(name).cast(pl.Categorical(pl.Categories.random())) for name in texts]
    return frame.with_columns(packed).collect(engine="streaming")


def _is_valid(frame: pl.DataFrame, columns: dict[str, Column]) -> bool:
    if any(frame[name].any() for name in frame.columns if name.startswith(UNPARSED)):
        return False
    for name, column in columns.items():
        values = frame[name]
        if column.required and values.null_count():
            return False
        if values.dtype.is_float() and column.required and values.is_nan().any():
            return False
        if isinstance(values.dtype, (pl.String, pl.Categorical)) and column.required:
            text = values if values.dtype == pl.String else values.unique().cast(pl.String)
            if (text.str.strip_chars() == "").any():
                return False
            if column.parse is id_text and text.str.contains(ids.NUL, literal=True).any():
                return False
        if column.bounded and values.len() > values.null_count():
            low, high = values.min(), values.max()
            if not (column.low <= low and high <= column.high):  # type: ignore[operator]  # numbers
                return False
    return True


@dataclass(frozen=True)
class Fault:
    """One way in which a row can be invalid: raw column, test, and reason (an expression, may include the value)."""

    column: str
    test: pl.Expr
    reason: pl.Expr


def _faults(columns: dict[str, Column], raw: pl.LazyFrame) -> list[Fault]:
    faults, schema = [], raw.collect_schema()
    if SURPLUS in schema:
        faults.append(Fault("(all)", pl.col(SURPLUS).is_not_null(), pl.lit("the line has more fields than columns")))
    for name, column in columns.items():
        text, value = pl.col(name), pl.col(VALUE + name)
        blank = text.is_null() | (text.str.strip_chars() == "")
        is_not = pl.format(f"{{}} is not {column.what}", text)
        if column.required:
            faults.append(Fault(column.name, blank, pl.lit("missing")))
        if column.what:
            not_utf8 = text.str.contains(NOT_UTF8, literal=True)
            faults.append(Fault(column.name, not_utf8, pl.format("{} is not UTF-8", text)))
            faults.append(Fault(column.name, ~blank & value.is_null(), is_not))
        if column.parse is id_text:
            has_nul = text.str.contains(ids.NUL, literal=True)
            faults.append(Fault(column.name, has_nul, pl.lit("holds a NUL byte: the file may be damaged")))
        if column.bounded:
            inside = value.is_between(column.low, column.high) & ~value.cast(pl.Float64).is_nan()
            faults.append(Fault(column.name, ~inside, is_not))
    return faults


def _find_faults(rows: Rows, columns: dict[str, Column]) -> tuple[pl.LazyFrame, list[Fault]]:
    """The unparsed table with VALUE columns and FAULT (index of the first fault, null in good rows); and the faults."""
    assert rows.text is not None
    raw, schema = rows.text, rows.text.collect_schema()
    faults = _faults(columns, raw)
    first_fault = pl.coalesce(pl.when(fault.test).then(index) for index, fault in enumerate(faults))
    values = [
        column.parse(pl.col(name)).alias(VALUE + name) for name, column in columns.items() if VALUE + name not in schema
    ]
    return raw.with_columns(values).with_columns(first_fault.alias(FAULT)), faults


def _find_bad_rows(rows: Rows, columns: dict[str, Column], error: Exception | None = None) -> pl.DataFrame:
    try:
        checked_rows, faults = _find_faults(rows, columns)
        bad = checked_rows.filter(pl.col(FAULT).is_not_null()).collect(engine="streaming")
    except pl.exceptions.PolarsError as reread_error:  # the file itself is unreadable
        raise ValueError(f"{rows.file} cannot be read: {str(error or reread_error).splitlines()[0]}") from reread_error
    is_fault = [pl.when(pl.col(FAULT) == index) for index in range(len(faults))]
    return bad.select(
        pl.col(FILE).alias("file"),
        pl.col(LINE).cast(pl.Int64).alias("line"),
        pl.coalesce(when.then(pl.lit(fault.column)) for when, fault in zip(is_fault, faults, strict=True)).alias(
            "column"
        ),
        pl.coalesce(when.then(fault.reason) for when, fault in zip(is_fault, faults, strict=True)).alias("reason"),
        pl.struct(list(columns)).struct.json_encode().alias("row"),
    )


def _useless_column(rows: Rows, columns: dict[str, Column], bad: pl.DataFrame) -> str | None:
    """What is wrong if no row is good for one and the same reason; else None."""
    text = rows.text
    assert text is not None
    expected = {column.name: column.what for column in columns.values()}
    return bad_rows.useless_column(
        bad, rows.unit, rows.file, expected, lambda: text.select(pl.len()).collect(engine="streaming").item()
    )


def _error_message(rows: Rows, columns: dict[str, Column], bad: pl.DataFrame) -> str:
    useless = _useless_column(rows, columns, bad)
    seconds = columns[TIME].name if TIME in columns and columns[TIME].high == YEAR_2100 else None
    return bad_rows.error_message(bad, rows.unit, rows.advice, seconds, rows.advice == ADVICE, useless)
