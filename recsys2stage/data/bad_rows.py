"""Errors about bad rows: how many, where, why, and what to do about them."""

from collections.abc import Callable, Mapping

import polars as pl

from recsys2stage.columns import YEAR_2100

MOST_PARTS = 5  # files or columns with bad rows, in an error
MOST_ROWS = 3  # of a file and column, in an error


def error_message(
    bad: pl.DataFrame, unit: str, advice: str, seconds: str | None, of_file: bool, useless: str | None
) -> str:
    """For each file and column: the number of bad rows and the first three; then what to do.

    Args:
        bad: bad rows as (file, line, column, reason, row).
        unit: unit of the line: line or row.
        advice: what to do about bad rows.
        seconds: name of the time column in the raw table if it is read as seconds.
        of_file: whether the table is a file and not a data frame.
        useless: message of `useless_column`, which then replaces the list of rows and the advice.
    """
    hint = _time_hint(bad.filter(pl.col("column") == seconds)["reason"], of_file) if seconds is not None else ""
    if useless is not None:
        return f"{useless}.{hint or ' ' + _conversion(bad)}"
    parts = []
    for (file, column), group in bad.group_by("file", "column", maintain_order=True):
        first = "; ".join(
            f"{unit} {line}: {why}" for line, why in group.select("line", "reason").head(MOST_ROWS).rows()
        )
        more = "; ..." if len(group) > MOST_ROWS else ""
        parts.append(
            f"{file}, column {column!r}: {len(group)} bad {'row' if len(group) == 1 else 'rows'} ({first}{more})"
        )
    if len(parts) > MOST_PARTS:
        parts[MOST_PARTS:] = [f"and {len(parts) - MOST_PARTS} more files or columns"]
    return "; ".join(parts) + "." + hint + " " + advice


def useless_column(
    bad: pl.DataFrame, unit: str, file: str, expected: Mapping[str, str], count: Callable[[], int]
) -> str | None:
    """What is wrong if no row is good, always for the same column and reason; else None.

    Args:
        bad: bad rows as (file, line, column, reason, row).
        unit: unit of the line: line or row.
        file: name of the table.
        expected: raw column -> description of its valid values.
        count: returns the number of all rows, which is read only if needed.
    """
    if len(bad) <= MOST_ROWS or bad["column"].n_unique() > 1:  # few bad rows are listed whole
        return None
    column, reason, line = bad.select("column", "reason", "line").row(0)
    suffix = f" is not {expected.get(column)}"
    if not expected.get(column) or not bad["reason"].str.ends_with(suffix).all() or count() != len(bad):
        return None
    value = reason.removesuffix(suffix)
    return (
        f"{file}, column {column!r}: none of the {len(bad):,} values is {expected[column]}, for example {value!r} "
        f"({unit} {line})"
    )


def _conversion(bad: pl.DataFrame) -> str:
    """The next step if no value of a column is of the expected form."""
    column, reason = bad.select("column", "reason").row(0)
    if " is not an ISO time" in reason:
        return (
            "Convert the column to times such as 2024-01-31 or 2024-01-31T10:15:00; with pandas, dates such as "
            f'31.01.2024: pd.to_datetime(frame[{column!r}], format="%d.%m.%Y")'
        )
    return "Convert the column, or name another one."


def _time_hint(reasons: pl.Series, of_file: bool) -> str:
    """What most probably is wrong with the times of a file or frame: their unit, fractions of a second, or text."""
    if not len(reasons):
        return ""
    late = reasons.filter(reasons.str.contains("is not seconds"))
    fractions = late.str.contains(r"^\d+\.\d*[1-9]\d* is")
    if len(late) and fractions.all():
        return " The times have fractions of a second: round them, or give milliseconds (time_unit)."
    if len(late) and late.str.contains(r"^\d{4}-\d\d").all():
        return " The times look like ISO text: set time_unit: iso."
    times = late.str.extract(r"^(\d+)").cast(pl.Int64, strict=False).drop_nulls()
    for factor, name in ((10**3, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")):
        if len(times) and ((times > YEAR_2100) & (times // factor).is_between(1, YEAR_2100)).all():
            option = f"time_unit: milliseconds{' (of a Table)' if of_file else ''}"
            advice = f"set {option} or divide" if name == "milliseconds" else "divide"
            return f" The times look like {name}: {advice} them by {factor}."
    return ""
