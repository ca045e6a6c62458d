"""Reads raw tables fast; where one is not what it should be, finds the rows and says which.

The fast way reads typed columns and looks at aggregates (nulls, extremes). Only when it fails are the rows read again,
as text with line numbers, to find the bad ones.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recsys2stage.columns import ITEM_ID, RATING, TIME, USER_ID

OnBadRows = Literal["error", "quarantine"]

FILE, LINE, SURPLUS = "_file", "_line", "_surplus"  # columns of the text reading, beside the table's own
FAULT, VALUE = "_fault", "_value_"  # what is bad in a row; and before the name of a column: its parsed values
YEAR_2100 = 4_102_444_800  # seconds since 1970
REJECTED_SCHEMA = {"file": pl.String, "line": pl.Int64, "column": pl.String, "reason": pl.String, "row": pl.String}
NOT_UTF8 = "\ufffd"  # what a lossy decoder puts where bytes are not UTF-8


def as_is(raw: pl.Expr) -> pl.Expr:
    return raw


def whole_number(raw: pl.Expr) -> pl.Expr:
    """Text or number -> whole number, null where it is none; "978300760.0", as pandas likes to write it, is one."""
    text = raw.cast(pl.String).str.strip_chars()
    number = text.cast(pl.Float64, strict=False)
    return pl.coalesce(
        text.cast(pl.Int64, strict=False),
        pl.when(number == number.floor()).then(number).cast(pl.Int64, strict=False),
    )


def real(raw: pl.Expr) -> pl.Expr:
    """Text or number -> Float64, null where it is none."""
    return raw.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)


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
    """

    name: str
    what: str = "text"
    parse: Callable[[pl.Expr], pl.Expr] = as_is
    dtype: Any = field(default_factory=pl.String)  # a pl.DataType, a hint that beartype refuses
    low: float | int = -math.inf
    high: float | int = math.inf
    required: bool = True

    @property
    def bounded(self) -> bool:
        return self.low > -math.inf or self.high < math.inf


def id_column(name: str) -> Column:
    return Column(name, "an id")


def rating_column(name: str, low: float | int = -1e30, high: float | int = 1e30) -> Column:
    what = "a number" if high == 1e30 else f"a number within {low:g}..{high:g}"
    return Column(name, what, real, pl.Float32(), low, high)


def time_column(name: str, per_second: int = 1) -> Column:
    unit = {1: "seconds", 1000: "milliseconds"}[per_second]
    return Column(name, f"{unit} from 1970 to 2100", whole_number, pl.Int64(), 0, YEAR_2100 * per_second)


@dataclass(frozen=True)
class Rows:
    """A raw table, lazily: typed, to be read fast, and as text, to find out what is wrong with it.

    Attributes:
        typed: the table in our column names, parsed.
        file: its name, for errors.
        columns: our column name -> what it must hold; where empty, ids, times in seconds and ratings go by their names.
        text: the table in our column names, unparsed, with FILE and LINE, and SURPLUS where a line has too many fields;
            where there is none, rows are counted in `typed`.
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
    columns = rows.columns or default_columns(names)
    try:
        good = _collect(rows.typed.select(list(columns)), categorical)
        bad = None if _sound(good, columns) else _find(rows, columns)
    except pl.exceptions.PolarsError as error:
        good, bad = None, _find(rows, columns, error)
    if bad is not None:
        if len(bad) and on_bad_rows == "error":
            raise ValueError(_complaint(rows, columns, bad))
        values = [pl.col(VALUE + name).alias(name) for name in columns]
        good = _collect(_judged(rows, columns)[0].filter(pl.col(FAULT).is_null()).select(values), categorical)
    assert good is not None
    if good.is_empty():
        raise ValueError(f"{rows.file} has no {'good ' if bad is not None and len(bad) else ''}rows")
    return good, pl.DataFrame(schema=REJECTED_SCHEMA) if bad is None else bad


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
    for name, column in columns.items():
        values = frame[name]
        if column.required and values.null_count():
            return False
        if values.dtype.is_float() and column.required and values.is_nan().any():
            return False
        if values.dtype == pl.String and column.required and (values.str.strip_chars() == "").any():
            return False
        if isinstance(values.dtype, pl.Categorical) and column.required:
            words = values.unique().cast(pl.String)
            if (words.str.strip_chars() == "").any():
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
        is_text = schema[name] == pl.String
        blank = given.is_null() | (given.str.strip_chars() == "") if is_text else given.is_null()
        shown = pl.lit("a list") if schema[name].is_nested() else given.cast(pl.String)
        is_not = pl.format(f"{{}} is not {column.what}", shown)
        if column.required:
            faults.append(Fault(column.name, blank, pl.lit("missing")))
        if column.what and is_text:
            not_utf8 = given.str.contains(NOT_UTF8, literal=True)
            faults.append(Fault(column.name, not_utf8, pl.format("{} is not UTF-8", shown)))
        if column.what:
            faults.append(Fault(column.name, ~blank & value.is_null(), is_not))
        if column.required and schema[name].is_float():
            faults.append(Fault(column.name, given.is_nan(), is_not))
        if column.bounded:
            inside = value.is_between(column.low, column.high) & ~value.cast(pl.Float64).is_nan()
            faults.append(Fault(column.name, ~inside, is_not))
    return faults


def _judged(rows: Rows, columns: dict[str, Column]) -> tuple[pl.LazyFrame, list[Fault]]:
    """The unparsed table with FILE, LINE, VALUEs and the place of a FAULT, null where a row is good; and the faults."""
    raw = rows.text
    if raw is None:
        raw = rows.typed.with_row_index(LINE, 1).with_columns(pl.lit(rows.file).alias(FILE))
    faults = _faults(columns, raw)
    verdict = pl.coalesce(pl.when(fault.test).then(place) for place, fault in enumerate(faults))
    values = [column.parse(pl.col(name)).alias(VALUE + name) for name, column in columns.items()]
    return raw.with_columns(values).with_columns(verdict.alias(FAULT)), faults


def _find(rows: Rows, columns: dict[str, Column], error: Exception | None = None) -> pl.DataFrame:
    try:
        judged, faults = _judged(rows, columns)
        bad = judged.filter(pl.col(FAULT).is_not_null()).collect(engine="streaming")
    except pl.exceptions.PolarsError as again:  # not the values but the file itself
        raise ValueError(f"{rows.file} cannot be read: {str(error or again).splitlines()[0]}") from again
    is_fault = [pl.when(pl.col(FAULT) == place) for place in range(len(faults))]
    shown = [name for name in columns if not bad.schema[name].is_nested()]
    return bad.select(
        pl.col(FILE).alias("file"),
        pl.col(LINE).cast(pl.Int64).alias("line"),
        pl.coalesce(when.then(pl.lit(fault.column)) for when, fault in zip(is_fault, faults, strict=True)).alias(
            "column"
        ),
        pl.coalesce(when.then(fault.words) for when, fault in zip(is_fault, faults, strict=True)).alias("reason"),
        pl.struct(shown).struct.json_encode().alias("row"),
    )


def _complaint(rows: Rows, columns: dict[str, Column], bad: pl.DataFrame) -> str:
    """One message: for each file and column the count and the first three rows."""
    parts, unit = [], "row" if rows.text is None else rows.unit
    for (file, column), group in bad.group_by("file", "column", maintain_order=True):
        first = "; ".join(f"{unit} {line}: {why}" for line, why in group.select("line", "reason").head(3).rows())
        more = "; ..." if len(group) > 3 else ""
        parts.append(
            f"{file}, column {column!r}: {len(group)} bad {'row' if len(group) == 1 else 'rows'} ({first}{more})"
        )
    hint = ""
    if TIME in columns and columns[TIME].high == YEAR_2100:
        late = bad.filter((pl.col("column") == columns[TIME].name) & pl.col("reason").str.contains("is not seconds"))
        times = late["reason"].str.extract(r"^(\d+)").cast(pl.Int64, strict=False).drop_nulls()
        if len(times) and ((times > YEAR_2100) & (times // 1000 <= YEAR_2100)).all():
            hint = " The times look like milliseconds: say time_unit: milliseconds (a Table) or divide them by 1000."
    return (
        "; ".join(parts)
        + "."
        + hint
        + " Correct the file, or put bad rows aside into rejected.parquet with --on_bad_rows quarantine."
    )
