"""Reads raw tables fast; where one is not what it should be, finds the rows and says which.

The fast way reads typed columns and looks at aggregates (nulls, extremes). Only when it fails are the rows read again,
as text with line numbers, to find the bad ones.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recsys2stage.columns import ITEM_ID, RATING, TIME, USER_ID
from recsys2stage.data import ids

OnBadRows = Literal["error", "quarantine"]

FILE, LINE, SURPLUS = "_file", "_line", "_surplus"  # columns of the text reading, beside the table's own
FAULT, VALUE = "_fault", "_value_"  # what is bad in a row; and before the name of a column: its parsed values
LOST = "_lost_"  # before the name of a column: whether there is a value that could not be parsed
YEAR_2100 = 4_102_444_800  # seconds since 1970
NO_TEXT = (pl.Binary, pl.Object, pl.Struct, pl.List, pl.Array, pl.Duration)  # types without a text as in a CSV
REJECTED_SCHEMA = {"file": pl.String, "line": pl.Int64, "column": pl.String, "reason": pl.String, "row": pl.String}
NOT_UTF8 = "\ufffd"  # what a lossy decoder puts where bytes are not UTF-8


def as_is(raw: pl.Expr) -> pl.Expr:
    return raw


def id_text(raw: pl.Expr) -> pl.Expr:
    """An id as the text that it is; of typed columns `ids.of_column` says what their ids are."""
    return raw


def empty_to_null(raw: pl.Expr) -> pl.Expr:
    """Text, null where it is empty."""
    return raw.replace("", None)


def parse_int(raw: pl.Expr) -> pl.Expr:
    """Text or number -> whole number, null where it is none; "978300760.0", as pandas likes to write it, is one."""
    text = raw.cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    return pl.coalesce(
        text.cast(pl.Int64, strict=False),
        pl.when(number == number.floor()).then(number).cast(pl.Int64, strict=False),
    )


def parse_float(raw: pl.Expr) -> pl.Expr:
    """Text or number -> Float64, null where it is none; nan is none."""
    return raw.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False).fill_nan(None)


@dataclass(frozen=True)
class Column:
    """What one column of a raw table must hold.

    Attributes:
        name: its name in the raw file, for errors.
        what: what a value must be, for errors; empty where anything will do.
        parse: raw values -> values, null where that cannot be done.
        dtype: the type to read it as in the fast way; text is parsed, any other type is taken as it comes.
        low: the least value allowed.
        high: the greatest value allowed.
        required: whether a missing value is an error.
        lists: whether a typed column may hold lists, which are taken as they are.
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
    """A raw table, lazily: typed, to be read fast, and as text, to find out what is wrong with it.

    Attributes:
        typed: the table in our column names, parsed; where there are no columns, of any types.
        file: its name, for errors.
        columns: our column name -> what it must hold; where empty, ids, times in seconds and ratings go by their names.
        text: the table in our column names, unparsed, with FILE and LINE, SURPLUS where a line has too many fields, and
            the parsed VALUEs where the text alone does not give them.
        unit: what LINE counts: line or row.
    """

    typed: pl.LazyFrame
    file: str
    columns: dict[str, Column] = field(default_factory=dict)
    text: pl.LazyFrame | None = None
    unit: str = "line"


def read(
    rows: Rows, on_bad_rows: OnBadRows = "error", needs: Sequence[str] = (), categorical: Sequence[str] = ()
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Collects a table and checks it.

    Args:
        needs: columns, by our names, that must be there.
        categorical: columns that shall take 4 bytes a row where they are text.

    Returns:
        The good rows in their order, and the bad ones as (file, line, column, reason, row); the latter is empty unless
        quarantined.

    Raises:
        ValueError: naming file, column, count and the first three bad rows, or that there are no rows at all.
    """
    names = rows.typed.collect_schema().names()
    require(needs, names, rows.file)
    rows = with_default_columns(rows)
    columns = rows.columns
    try:
        good = _collect(rows.typed.select(pl.col(list(columns)), pl.col(f"^{LOST}.*$").any()), categorical)
        bad = None if _sound(good, columns) else _find(rows, columns)
    except pl.exceptions.PolarsError as error:
        good, bad = None, _find(rows, columns, error)
    if bad is not None:
        if len(bad) and on_bad_rows == "error":
            raise ValueError(_complaint(rows, columns, bad))
        values = [pl.col(VALUE + name).alias(name) for name in columns]
        good = _collect(_judged(rows, columns)[0].filter(pl.col(FAULT).is_null()).select(values), categorical)
    assert good is not None
    good = good.select(list(columns))
    if good.is_empty():
        raise ValueError(f"{rows.file} has no {'good ' if bad is not None and len(bad) else ''}rows")
    return good, pl.DataFrame(schema=REJECTED_SCHEMA) if bad is None else bad


def with_default_columns(rows: Rows) -> Rows:
    """The same rows, held to the rules by our column names where a source states none."""
    if rows.columns:
        return rows
    return typed_rows([(rows.typed, rows.file)], default_columns(rows.typed.collect_schema().names()), rows.file)


def typed_rows(shards: Sequence[tuple[pl.LazyFrame, str]], columns: dict[str, Column], name: str) -> Rows:
    """Tables whose columns have types of their own (Parquet, frames) as the rows of one, parsed as their text would be.

    Args:
        shards: frames with the raw columns and their names, for errors; types may differ from one to the next.
        columns: our name -> what the column must hold.
        name: of all, for errors.

    Raises:
        ValueError: for columns that are missing, or of a type that the parse cannot take.
    """
    parsed: list[dict[str, pl.Expr]] = []
    shown: list[dict[str, pl.Expr]] = []
    for frame, file in shards:
        schema = frame.collect_schema()
        require((column.name for column in columns.values()), schema.names(), file)
        parsed.append({own: _parsed(own, column, schema[column.name], file) for own, column in columns.items()})
        shown.append({own: _shown(pl.col(column.name), schema[column.name]) for own, column in columns.items()})
        for own, column in columns.items():
            if column.parse is id_text and (schema[column.name].is_float() or schema[column.name].is_decimal()):
                columns = columns | {own: replace(column, what=ids.expected_id(schema[column.name]))}
    schemas = [frame.select(**values).collect_schema() for (frame, _), values in zip(shards, parsed, strict=True)]
    dtypes = {own: ids.common_dtype(schema[own] for schema in schemas) for own in columns}
    checked = [own for own, column in columns.items() if column.what and not column.required]
    typed, text = [], []
    for (frame, file), raw, texts in zip(shards, parsed, shown, strict=True):
        values = {own: value.cast(dtypes[own]) for own, value in raw.items()}
        lost = {LOST + own: values[own].is_null() & (texts[own].str.strip_chars() != "") for own in checked}
        typed.append(frame.select(**values, **lost))
        temporary = {VALUE + own: value for own, value in values.items()}
        text.append(frame.select(**texts, **temporary).with_row_index(LINE, 1).with_columns(pl.lit(file).alias(FILE)))
    return Rows(pl.concat(typed), name, columns, pl.concat(text), unit="row")


def _parsed(own: str, column: Column, dtype: Any, file: str) -> pl.Expr:
    """The values of a typed column, null where its text would have none."""
    raw, where = pl.col(column.name), f"{file}, column {column.name!r}:"
    if column.parse is id_text:
        return ids.cast_id_column(raw, dtype, where)
    if column.parse is as_is:
        return raw
    if own == TIME and dtype in (pl.Date, pl.Datetime):
        if not column.bounded:  # an order
            return raw.to_physical().cast(pl.Int64)
        return raw.dt.epoch("ms") * round(column.high / YEAR_2100) // 1000
    if column.lists and dtype in (pl.List, pl.Array):
        if dtype.inner.is_float() or dtype.inner in NO_TEXT:
            raise ValueError(
                f"{where} {dtype} holds no classes; leave the column out, and where it holds vectors of items, name "
                "their file in the config: item_vectors in prepare.yaml"
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
    return column.parse(_shown(raw, dtype))


def _shown(raw: pl.Expr, dtype: Any) -> pl.Expr:
    """A typed value as a text file has it, null where it is missing."""
    if dtype in NO_TEXT:
        return pl.when(raw.is_not_null()).then(pl.lit(f"a {dtype}"))
    return (raw.fill_nan(None) if dtype.is_float() else raw).cast(pl.String)


def default_columns(names: Iterable[str]) -> dict[str, Column]:
    """The rules by our column names, for a source that states none."""
    rules = {USER_ID: id_column(USER_ID), ITEM_ID: id_column(ITEM_ID), TIME: time_column(TIME)}
    rules[RATING] = rating_column(RATING)
    return {name: rules.get(name, Column(name, "", required=False)) for name in names}


def require(wanted: Iterable[str], present: Sequence[str], file: str | Path) -> None:
    """Raises a ValueError that says which columns are missing, what is there, and the nearest guess."""
    missing = []
    for name in dict.fromkeys(wanted):
        if name not in present:
            folded = {other.strip().lower().replace("_", ""): other for other in present}
            guess = difflib.get_close_matches(name.lower().replace("_", ""), list(folded), 1, cutoff=0.5)
            missing.append(f"{name!r}" + (f" (did you mean {folded[guess[0]]!r}?)" if guess else ""))
        elif list(present).count(name) > 1:
            raise ValueError(f"{file} has {list(present).count(name)} columns named {name!r}; one must go")
    if missing:
        raise ValueError(f"{file} has no column {', '.join(missing)}; its columns are: {', '.join(map(repr, present))}")


def _collect(frame: pl.LazyFrame, categorical: Sequence[str]) -> pl.DataFrame:
    schema = frame.collect_schema()
    texts = [name for name in categorical if schema.get(name) == pl.String]
    # a dictionary of its own for each column, freed with it
    packed = [pl.col(name).cast(pl.Categorical(pl.Categories.random())) for name in texts]
    return frame.with_columns(packed).collect(engine="streaming")


def _sound(frame: pl.DataFrame, columns: dict[str, Column]) -> bool:
    if any(frame[name].any() for name in frame.columns if name.startswith(LOST)):
        return False
    for name, column in columns.items():
        values = frame[name]
        if column.required and values.null_count():
            return False
        if values.dtype.is_float() and column.required and values.is_nan().any():
            return False
        if isinstance(values.dtype, (pl.String, pl.Categorical)) and column.required:
            words = values if values.dtype == pl.String else values.unique().cast(pl.String)
            if (words.str.strip_chars() == "").any():
                return False
            if column.parse is id_text and words.str.contains(ids.NUL, literal=True).any():
                return False
        if column.bounded and values.len() > values.null_count():
            low, high = values.min(), values.max()
            if not (column.low <= low and high <= column.high):  # type: ignore[operator]
                return False
    return True


@dataclass(frozen=True)
class Fault:
    """A way in which a row can be bad: where, when, and the words for it (an expression that may show the value)."""

    column: str
    test: pl.Expr
    words: pl.Expr


def _faults(columns: dict[str, Column], raw: pl.LazyFrame) -> list[Fault]:
    faults, schema = [], raw.collect_schema()
    if SURPLUS in schema:
        faults.append(Fault("(all)", pl.col(SURPLUS).is_not_null(), pl.lit("the line has more fields than columns")))
    for name, column in columns.items():
        given, value = pl.col(name), pl.col(VALUE + name)
        blank = given.is_null() | (given.str.strip_chars() == "")
        is_not = pl.format(f"{{}} is not {column.what}", given)
        if column.required:
            faults.append(Fault(column.name, blank, pl.lit("missing")))
        if column.what:
            not_utf8 = given.str.contains(NOT_UTF8, literal=True)
            faults.append(Fault(column.name, not_utf8, pl.format("{} is not UTF-8", given)))
            faults.append(Fault(column.name, ~blank & value.is_null(), is_not))
        if column.parse is id_text:
            has_nul = given.str.contains(ids.NUL, literal=True)
            faults.append(Fault(column.name, has_nul, pl.lit("holds a NUL byte: the file may be damaged")))
        if column.bounded:
            inside = value.is_between(column.low, column.high) & ~value.cast(pl.Float64).is_nan()
            faults.append(Fault(column.name, ~inside, is_not))
    return faults


def _judged(rows: Rows, columns: dict[str, Column]) -> tuple[pl.LazyFrame, list[Fault]]:
    """The unparsed table with FILE, LINE, VALUEs and the place of a FAULT, null where a row is good; and the faults."""
    assert rows.text is not None
    raw, given = rows.text, rows.text.collect_schema()
    faults = _faults(columns, raw)
    verdict = pl.coalesce(pl.when(fault.test).then(place) for place, fault in enumerate(faults))
    values = [
        column.parse(pl.col(name)).alias(VALUE + name) for name, column in columns.items() if VALUE + name not in given
    ]
    return raw.with_columns(values).with_columns(verdict.alias(FAULT)), faults


def _find(rows: Rows, columns: dict[str, Column], error: Exception | None = None) -> pl.DataFrame:
    try:
        judged, faults = _judged(rows, columns)
        bad = judged.filter(pl.col(FAULT).is_not_null()).collect(engine="streaming")
    except pl.exceptions.PolarsError as again:  # not the values but the file itself
        raise ValueError(f"{rows.file} cannot be read: {str(error or again).splitlines()[0]}") from again
    is_fault = [pl.when(pl.col(FAULT) == place) for place in range(len(faults))]
    return bad.select(
        pl.col(FILE).alias("file"),
        pl.col(LINE).cast(pl.Int64).alias("line"),
        pl.coalesce(when.then(pl.lit(fault.column)) for when, fault in zip(is_fault, faults, strict=True)).alias(
            "column"
        ),
        pl.coalesce(when.then(fault.words) for when, fault in zip(is_fault, faults, strict=True)).alias("reason"),
        pl.struct(list(columns)).struct.json_encode().alias("row"),
    )


def _complaint(rows: Rows, columns: dict[str, Column], bad: pl.DataFrame) -> str:
    """One message: for each file and column the count and the first three rows."""
    parts = []
    for (file, column), group in bad.group_by("file", "column", maintain_order=True):
        first = "; ".join(f"{rows.unit} {line}: {why}" for line, why in group.select("line", "reason").head(3).rows())
        more = "; ..." if len(group) > 3 else ""
        parts.append(
            f"{file}, column {column!r}: {len(group)} bad {'row' if len(group) == 1 else 'rows'} ({first}{more})"
        )
    hint = ""
    if TIME in columns and columns[TIME].high == YEAR_2100:
        late = bad.filter((pl.col("column") == columns[TIME].name) & pl.col("reason").str.contains("is not seconds"))
        times = late["reason"].str.extract(r"^(\d+)").cast(pl.Int64, strict=False).drop_nulls()
        for factor, unit in ((10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")):
            if len(times) and ((times > YEAR_2100) & (times // factor).is_between(1, YEAR_2100)).all():
                advice = "say time_unit: milliseconds (a Table) or divide" if unit == "milliseconds" else "divide"
                hint = f" The times look like {unit}: {advice} them by {factor}."
                break
    return (
        "; ".join(parts)
        + "."
        + hint
        + " Correct the file, or put bad rows aside into rejected.parquet with --on_bad_rows quarantine."
    )
