"""Plausibility checks of event times: wrong unit, future times, zeros and isolated newest events."""

import logging
import time
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import polars as pl

from recsys2stage.columns import ITEM_ID, TIME, USER_ID, YEAR_2100
from recsys2stage.data.checks import Column, Rows, with_default_columns

logger = logging.getLogger("recsys2stage")

YEAR_1980 = 315_532_800  # seconds since 1970; an earlier median suggests a wrong unit
DAY, YEAR = 86_400, 31_557_600
TAIL = 0.001  # largest share of events that can be isolated newest events


def check_times(rows: Rows, times: pl.Series, ticks: int) -> Rows | None:
    """Checks for times of a wrong unit and times in the future.

    Args:
        rows: the events.
        times: the times of all events, without nulls.
        ticks: time units per second.

    Returns:
        The rows with narrower bounds on the time column if some times violate them, else None.

    Raises:
        ValueError: if most times are of a wrong unit.
    """
    rows = with_default_columns(rows)
    column = rows.columns[TIME]
    median, low, high = float(times.median()), 0, (int(time.time()) + DAY) * ticks  # type: ignore[arg-type]  # a number
    if median < YEAR_1980 * ticks:
        if ticks > 1 and YEAR_1980 <= median <= YEAR_2100:
            raise ValueError(
                f"{rows.file}, column {column.name!r}: the times look like seconds read as milliseconds: their "
                f"median {median:.0f} is {_date(median / ticks)}, in seconds {_date(median)}; set time_unit: seconds, "
                "or correct the dates"
            )
        logger.warning(
            "%s, column %r: the median of the times, %.0f, is %s; if not %s since 1970, set time_unit; if they "
            "only give the order of events, set time_unit: order",
            *(rows.file, column.name, median, _date(median / ticks), "seconds" if ticks == 1 else "milliseconds"),
        )
    else:
        if ticks > 1 and times.is_between(YEAR_1980, YEAR_2100).any():  # seconds among milliseconds
            low = YEAR_2100 + 1
        if zeros := int((times == 0).sum()):
            logger.warning(
                "%s, column %r: %s times are 0, which is 1970; if the time is missing, leave the field empty",
                *(rows.file, column.name, f"{zeros:,}"),
            )
    if low <= times.min() and times.max() <= high:  # type: ignore[operator]  # numbers
        return None
    what = f"{'seconds' if ticks == 1 else 'a time'} from {_date(low / ticks)} to {_date(high / ticks)}, a day from now"
    what += "; most are in milliseconds" if low else ""
    bounded: Column = replace(column, low=low, high=min(high, column.high), what=what)
    return replace(rows, columns=rows.columns | {TIME: bounded})


def warn_isolated_newest(frame: pl.DataFrame, ticks: int, file: str) -> None:
    """Warns if a few events are more than a year newer than all others; the newest is the default request time."""
    times = frame[TIME].to_numpy()
    tail = max(1, int(TAIL * len(times)))
    if len(times) <= tail:
        return
    newest = np.sort(np.partition(times, len(times) - tail - 1)[-tail - 1 :])
    gaps = np.flatnonzero(np.diff(newest) > YEAR * ticks)
    if not len(gaps):
        return
    before, after = newest[gaps[0]], newest[gaps[0] + 1]
    row = frame.row(int(np.argmax(times)), named=True)
    logger.warning(
        "%s: %d of %s events are from %s on, years after all others (until %s); the newest, of user %s and item %s at "
        "%s, is the default request time; remove them if they are wrong",
        *(file, len(newest) - 1 - gaps[0], f"{len(times):,}", _date(after / ticks), _date(before / ticks)),
        *(row[USER_ID], row[ITEM_ID], _date(newest[-1] / ticks)),
    )


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d")
