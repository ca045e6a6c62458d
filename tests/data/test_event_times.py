"""Times of another unit, of the future, and far after all others are refused or spoken of."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys2stage import columns as c
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Table

NOW = 1_600_000_000
DAY, YEAR = 86_400, 31_557_600
GOOD = [NOW + step for step in range(8)]


def table(tmp_path: Path, times: list[Any], form: str = "csv", **options: Any) -> Table:
    frame = pl.DataFrame(
        {"user_id": [place % 3 for place in range(len(times))], "item_id": range(len(times)), "timestamp": times}
    )
    file = tmp_path / f"e.{form}"
    frame.write_csv(file) if form == "csv" else frame.write_parquet(file)
    return Table(file, **options)


def said(source: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        prepare(source, tmp_path / "data")
    return caplog.text


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_seconds_taken_for_milliseconds_are_refused(tmp_path: Path, form: str) -> None:
    source = table(tmp_path, GOOD, form, time_unit="milliseconds")
    with pytest.raises(
        ValueError, match=r"look like seconds.*1600000004 is 1970-01-19, in seconds 2020-09-13; set time_unit: seconds"
    ):
        prepare(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_dates_made_of_seconds_as_milliseconds_are_refused(tmp_path: Path) -> None:
    dates = pl.Series(GOOD).cast(pl.Datetime("ms")).to_list()
    with pytest.raises(ValueError, match="look like seconds read as milliseconds"):
        prepare(table(tmp_path, dates, "parquet", time_unit="milliseconds"), tmp_path / "data")


@pytest.mark.parametrize(("factor", "name"), [(1000, "milliseconds"), (10**6, "microseconds"), (10**9, "nanoseconds")])
def test_finer_units_taken_for_seconds_are_refused(tmp_path: Path, factor: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"none of the 8 values is seconds .* The times look like {name}"):
        prepare(table(tmp_path, [one * factor for one in GOOD]), tmp_path / "data")


def test_a_few_seconds_among_milliseconds_are_bad_rows(tmp_path: Path) -> None:
    times = [one * 1000 for one in GOOD]
    times[2] = NOW
    source = table(tmp_path, times, time_unit="milliseconds")
    with pytest.raises(
        ValueError, match=r"1 bad row \(line 4: 1600000000 is not a time from .*; most are in milliseconds"
    ):
        prepare(source, tmp_path / "data")
    counts = prepare(source, tmp_path / "data", on_bad_rows="quarantine")["counts"]
    assert (counts["events"], counts["rejected"]) == (7, 1)


def test_a_few_milliseconds_among_seconds_are_bad_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 bad row \(line 4: 1600000002000 is not seconds"):
        prepare(table(tmp_path, [*GOOD[:2], GOOD[2] * 1000, *GOOD[3:]]), tmp_path / "data")


@pytest.mark.parametrize("unit", ["seconds", "milliseconds", "iso"])
def test_events_to_come_are_bad_rows(tmp_path: Path, unit: Any) -> None:
    far = 4_070_908_800  # 2099
    times: list[Any] = [*GOOD[:3], far, *GOOD[3:]]
    if unit == "milliseconds":
        times = [one * 1000 for one in times]
    if unit == "iso":
        times = [time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(one)) for one in times]
    source = table(tmp_path, times, time_unit=unit)
    with pytest.raises(ValueError, match=rf"1 bad row \(line 5: {times[3]} is not .* a day from now\)"):
        prepare(source, tmp_path / "data")
    counts = prepare(source, tmp_path / "data", on_bad_rows="quarantine")["counts"]
    assert (counts["events"], counts["rejected"]) == (8, 1)
    assert np.load(tmp_path / "data" / c.EVENT_TIMES).max() == GOOD[-1]


def test_clocks_may_differ_by_a_day(tmp_path: Path) -> None:
    prepare(table(tmp_path, [*GOOD, int(time.time()) + DAY - 60]), tmp_path / "data")
    with pytest.raises(ValueError, match="a day from now"):
        prepare(table(tmp_path, [*GOOD, int(time.time()) + DAY + 600]), tmp_path / "data")


def test_an_order_knows_no_now(tmp_path: Path) -> None:
    assert prepare(table(tmp_path, [10**15, *GOOD], time_unit="order"), tmp_path / "data")["counts"]["events"] == 9


def test_a_newest_event_years_after_all_others_is_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = said(table(tmp_path, [*GOOD[:4], NOW + 3 * YEAR, *GOOD[4:]]), tmp_path, caplog)
    assert "1 of 9 events are from 2023-09-14 on, years after all others (until 2020-09-13)" in told
    assert "of user 1 and item 4 at 2023-09-14, is the default request time" in told
    for times in (GOOD, [*GOOD, NOW + 200 * DAY], [NOW - 20 * YEAR, *GOOD]):
        assert "years after" not in said(table(tmp_path, times), tmp_path, caplog)


def test_a_few_newest_of_many_are_spoken_of_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    times = [NOW - step for step in range(5000)]
    told = said(table(tmp_path, [*times, NOW + 2 * YEAR, NOW + 2 * YEAR + 9]), tmp_path, caplog)
    assert "2 of 5,002 events are from 2022" in told


@pytest.mark.parametrize(("unit", "times"), [("seconds", [1, 2, 3, 4]), ("milliseconds", [9900, 9100, 9500, 1])])
def test_times_before_1980_are_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, unit: Any, times: list[int]
) -> None:
    assert "is 1970-01-01; if not" in said(table(tmp_path, times, time_unit=unit), tmp_path, caplog)
    assert "1970" not in said(table(tmp_path, times, time_unit="order"), tmp_path, caplog)
    assert "1970" not in said(table(tmp_path, GOOD), tmp_path, caplog)


def test_times_of_0_are_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "2 times are 0, which is 1970" in said(table(tmp_path, [0, 0, *GOOD]), tmp_path, caplog)


@pytest.mark.parametrize("value", ["-1", "nan", "1e400", "1600000000.5", "", "0x10", "1_600_000_000"])
def test_what_is_no_time_is_a_bad_row(tmp_path: Path, value: str) -> None:
    with pytest.raises(ValueError, match=r"e.csv, column 'timestamp': 1 bad row \(line 10: "):
        prepare(table(tmp_path, [*map(str, GOOD), value]), tmp_path / "data")
