"""A CSV and a Parquet file of the same values give the same dataset or the same refusal, whatever type a column has."""

import re
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys2stage import columns as c
from recsys2stage.data.checks import Rows, read
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, SideTable, Table
from recsys2stage.data.split import Marked

NOW = 1_600_000_000
MOMENTS = [datetime(2020, 9, 13, 12, 26, 40, 250_000) + timedelta(seconds=step) for step in (3, 0, 1, 2)]
SECONDS = [NOW + step for step in (3, 0, 1, 2)]
BERLIN = timezone(timedelta(hours=2))


def series(values: list[Any], dtype: Any = None) -> pl.Series:
    numbers = all(type(value) is int for value in values)
    if numbers and dtype in (pl.String, pl.Categorical):
        values = [str(value) for value in values]
    return pl.Series("x", values, dtype=dtype)


WHOLE = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.Int128]
TIMES: list[tuple[str, pl.Series]] = [
    *(("seconds", series(SECONDS, dtype)) for dtype in (pl.Int32, pl.Int64, pl.UInt32, pl.UInt64, pl.Int128)),
    ("seconds", series(SECONDS, pl.Float64)),
    ("seconds", series([one + 0.5 for one in SECONDS])),
    ("seconds", series([Decimal(one) for one in SECONDS], pl.Decimal(20, 2))),
    ("seconds", series([str(one) for one in SECONDS])),
    ("seconds", series([str(one) for one in SECONDS], pl.Categorical)),
    ("seconds", series([-1, *SECONDS[1:]])),
    ("seconds", series([None, *SECONDS[1:]], pl.Float64)),
    ("seconds", series([one * 1000 for one in SECONDS])),
    ("seconds", series([True, False, True, True])),
    *(("milliseconds", series([one * 1000 + 7 for one in SECONDS], dtype)) for dtype in (pl.Int64, pl.Float64)),
    ("milliseconds", series([one * 1000 + 0.25 for one in SECONDS])),
    ("milliseconds", series(SECONDS)),
    *(("iso", series(MOMENTS, pl.Datetime(unit))) for unit in ("ms", "us", "ns")),
    (
        "iso",
        series(
            [moment.replace(tzinfo=UTC).astimezone(BERLIN) for moment in MOMENTS], pl.Datetime("us", "Europe/Berlin")
        ),
    ),
    ("iso", series([moment.replace(tzinfo=UTC) for moment in MOMENTS], pl.Datetime("us", "UTC"))),
    ("iso", series([moment.date() for moment in MOMENTS])),
    ("iso", series([moment.isoformat() for moment in MOMENTS])),
    ("iso", series([moment.isoformat() for moment in MOMENTS], pl.Categorical)),
    ("iso", series([date(1969, 1, 1), *(moment.date() for moment in MOMENTS[1:])])),
    *(("iso", series(SECONDS, dtype)) for dtype in (pl.Int64, pl.Float64)),
    *(("order", series([3, 0, 1, 2], dtype)) for dtype in (*WHOLE, pl.Float32, pl.Float64, pl.String)),
    ("order", series([-3, 0, 1, 2])),
    ("order", series([0.5, 0.0, 1.0, 2.0])),
    ("order", series([True, False, True, False])),
]
RATINGS = [
    *(series([5, 1, 4, 3], dtype) for dtype in (*WHOLE, pl.Float32, pl.Float64, pl.String, pl.Categorical)),
    series([Decimal("4.5"), Decimal("1.0"), Decimal("0.5"), Decimal("3.0")], pl.Decimal(5, 1)),
    series([True, False, True, True]),
    series([9, 1, 4, 3]),
    series([None, 1.0, 4.0, 3.0]),
    series([float("inf"), 1.0, 4.0, 3.0]),
    series(["good", "1", "4", "3"]),
    series([date(2020, 1, 1)] * 4),
]
CLASSES = [
    *(series([5, 1, 5, 3], dtype) for dtype in (*WHOLE, pl.Float32, pl.Float64, pl.String, pl.Categorical)),
    series([Decimal("4.5"), Decimal("1.0"), Decimal("0.5"), None], pl.Decimal(5, 1)),
    series([True, False, None, True]),
    series(["a", "", None, " a"]),
    series(["NULL", "NaN", "\\N", "null"]),
    series([date(2020, 1, 1), None, date(2020, 1, 1), date(2020, 1, 2)]),
    series(MOMENTS),
    series(["a", "b", "a", None], pl.Enum(["b", "a"])),
    series([None] * 4, pl.Null),
]
PARTS = [
    series(["test", "train", "val", "train"]),
    series(["test", "train", "val", "train"], pl.Categorical),
    series(["test", "train", "val", "train"], pl.Enum(["test", "train", "val"])),
    series([1, 2, 3, 1]),
    series([0, 1, 2, 0], pl.Int8),
    series([0.0, 1.0, 2.0, 0.0]),
    series([True, False, True, False]),
    series(["test", "train", None, "train"]),
]
IDS = [
    *(series([7, 100, 9, 7], dtype) for dtype in WHOLE),
    series([2**63 + 7, 2**63 + 100, 9, 2**63 + 7], pl.UInt64),
    series([-(2**62), 2**62, 3, -(2**62)]),
    series(["b", "a", " a", "b"]),
    series(["b", "a", "", "b"]),
    series(["b", "a", None, "b"]),
    series(["b", "a", "  ", "b"]),
    series(["NULL", "NaN", "\\N", "NULL"]),
    series(["007", "1e3", "+5", "1,000"]),
    series(["b", "a", "c", "b"], pl.Categorical),
    series(["b", "a", "c", "b"], pl.Enum(["c", "b", "a"])),
    series(["b", "a", "\x00", "b"]),
]
NUMBERS = [
    *(series([5, 1, 5, 3], dtype) for dtype in (*WHOLE, pl.Float32, pl.Float64, pl.String, pl.Categorical)),
    series([Decimal("4.5"), Decimal("1.0"), Decimal("0.5"), None], pl.Decimal(5, 1)),
    series([1.0, None, float("nan"), 2.0]),
    series([1.0, None, float("inf"), 2.0]),
    series(["1", "", None, "cheap"]),
    series([True, False, None, True]),
    series([date(2020, 1, 1)] * 4),
]


def outcome(source: Table, folder: Path, **options: Any) -> Any:
    """The arrays and tables of a dataset, or what is said of bad rows without the file and the unit of its places."""
    try:
        prepare(source, folder, **options)
    except ValueError as error:
        message = str(error)
        for words in (str(source.path), str(source.path.with_name("items" + source.path.suffix))):
            message = message.replace(words, "FILE")
        return re.sub(r"(?:line|row) (\d+)", lambda place: f"row {int(place[1]) - (place[0][0] == 'l')}", message)
    arrays = {file.name: np.load(file).tolist() for file in sorted(folder.glob("*.npy"))}
    tables = [pl.read_parquet(folder / name) for name in (c.ITEM_TABLE, c.USER_TABLE)]
    # NaN is not equal to itself
    return repr(arrays), [table.select(pl.col("^.*_id$").cast(pl.String)).to_dicts() for table in tables]


def same(tmp_path: Path, events: pl.DataFrame, items: pl.DataFrame | None = None, **options: Any) -> Any:
    split = {"split": Marked()} if "part" in options else {}
    found, raw = [], tmp_path / "raw"
    raw.mkdir(exist_ok=True)
    for form in ("csv", "parquet"):
        for name, frame in (("events", events), ("items", items)):
            if frame is not None:
                file = raw / f"{name}.{form}"
                frame.write_csv(file) if form == "csv" else frame.write_parquet(file)
        side = None
        if items is not None:
            kinds: Any = {"multi": "multi", "number": "numeric", "class": "categorical"}
            features = {name: Feature(kinds[name]) for name in items.columns if name != "item_id"}
            side = SideTable(f"items.{form}", "item_id", features)
        table = Table(raw / f"events.{form}", items=side, rating_range=(0, 5), **options)
        found.append(outcome(table, tmp_path / form, **split))
    assert found[0] == found[1]
    return found[0]


def log(**columns: pl.Series) -> pl.DataFrame:
    plain = {"user_id": series([1, 1, 1, 2]), "item_id": series([10, 20, 30, 10]), "timestamp": series(SECONDS)}
    return pl.DataFrame({**plain, **columns})


def named(cases: list[Any]) -> list[Any]:
    return [pytest.param(case, id=f"{place}-{case.dtype}") for place, case in enumerate(cases)]


@pytest.mark.parametrize(("unit", "times"), [pytest.param(*one, id=f"{one[0]}-{one[1].dtype}") for one in TIMES])
def test_times(tmp_path: Path, unit: Any, times: pl.Series) -> None:
    found = same(tmp_path, log(timestamp=times), time_unit=unit)
    assert isinstance(found, str) or unit == "order" or "1600000003" in found[0] or times.dtype == pl.Date


@pytest.mark.parametrize("unit", ["seconds", "milliseconds", "iso"])
@pytest.mark.parametrize("dtype", [pl.Datetime("ms"), pl.Datetime("ns"), pl.Datetime("us", "Asia/Tokyo"), pl.Date])
def test_dates_of_a_type_need_no_unit(tmp_path: Path, unit: Any, dtype: Any) -> None:
    times = series([moment.date() for moment in MOMENTS]) if dtype == pl.Date else series(MOMENTS)
    if dtype == pl.Datetime("us", "Asia/Tokyo"):
        times = times.dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo")
    log(timestamp=times.cast(dtype)).write_parquet(tmp_path / "e.parquet")
    prepare(Table(tmp_path / "e.parquet", time_unit=unit), tmp_path / "data")
    wanted = [NOW // 86_400 * 86_400] * 4 if dtype == pl.Date else [NOW, NOW + 1, NOW + 3, NOW + 2]
    assert np.load(tmp_path / "data" / c.EVENT_TIMES).tolist() == wanted


def test_dates_may_be_an_order(tmp_path: Path) -> None:
    log(timestamp=series(MOMENTS)).write_parquet(tmp_path / "e.parquet")
    prepare(Table(tmp_path / "e.parquet", time_unit="order"), tmp_path / "data")
    assert np.load(tmp_path / "data" / c.EVENT_ITEMS).tolist() == [2, 3, 1, 1]


def test_a_float_of_32_bits_holds_no_seconds(tmp_path: Path) -> None:
    """It would round them to 128."""
    log(timestamp=series(SECONDS, pl.Float32)).write_parquet(tmp_path / "e.parquet")
    with pytest.raises(
        ValueError, match=r"column 'timestamp': none of the 4 values is seconds .* '1600000000.0' \(row 1\)"
    ):
        prepare(Table(tmp_path / "e.parquet"), tmp_path / "data")


@pytest.mark.parametrize("ratings", named(RATINGS))
def test_ratings(tmp_path: Path, ratings: pl.Series) -> None:
    same(tmp_path, log(rating=ratings), rating="rating")


@pytest.mark.parametrize("actions", named(CLASSES))
def test_actions(tmp_path: Path, actions: pl.Series) -> None:
    assert not isinstance(same(tmp_path, log(action=actions), action="action"), str)


@pytest.mark.parametrize("parts", named(PARTS))
def test_parts(tmp_path: Path, parts: pl.Series) -> None:
    found = same(tmp_path, log(part=parts), part="part")
    assert isinstance(found, str) == (parts[0] != "test" or bool(parts.null_count()))


@pytest.mark.parametrize("ids", named(IDS))
def test_ids(tmp_path: Path, ids: pl.Series) -> None:
    same(tmp_path, log(user_id=ids))
    same(tmp_path, log(item_id=ids))


@pytest.mark.parametrize("classes", named(CLASSES))
def test_categorical_features(tmp_path: Path, classes: pl.Series) -> None:
    items = pl.DataFrame({"item_id": [10, 20, 30, 40], "class": classes})
    assert not isinstance(same(tmp_path, log(), items), str)


@pytest.mark.parametrize("classes", named(CLASSES))
def test_multi_features_of_one_class(tmp_path: Path, classes: pl.Series) -> None:
    items = pl.DataFrame({"item_id": [10, 20, 30, 40], "multi": classes})
    assert not isinstance(same(tmp_path, log(), items), str)


@pytest.mark.parametrize("values", named(NUMBERS))
def test_numeric_features(tmp_path: Path, values: pl.Series) -> None:
    same(tmp_path, log(), pl.DataFrame({"item_id": [10, 20, 30, 40], "number": values}))


@pytest.mark.parametrize("dtype", [pl.String, pl.Int32, pl.Categorical, pl.Boolean])
def test_lists_are_the_classes_that_a_text_of_them_names(tmp_path: Path, dtype: Any) -> None:
    lists = [["1", "0", "1"], [], None] if dtype != pl.Boolean else [[True, False, True], [], None]
    items = pl.DataFrame({"item_id": [10, 20, 30], "multi": lists})
    if dtype not in (pl.String, pl.Boolean):
        items = items.with_columns(pl.col("multi").cast(pl.List(dtype)))
    raw = tmp_path / "raw"
    raw.mkdir()
    items.write_parquet(raw / "items.parquet")
    log().write_parquet(raw / "events.parquet")
    items.with_columns(pl.col("multi").cast(pl.List(pl.String)).list.join("|")).write_csv(raw / "items.csv")
    log().write_csv(raw / "events.csv")
    found = []
    for form in ("csv", "parquet"):
        side = SideTable(f"items.{form}", "item_id", {"multi": Feature("multi")})
        found.append(outcome(Table(raw / f"events.{form}", items=side), tmp_path / form))
    assert found[0] == found[1]
    assert not isinstance(found[0], str)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("multi", series([[0.5], [1.0], [2.0]]), r"List\(Float64\) holds no classes.*item_vectors"),
        ("class", series([["a"], ["b"], ["c"]]), r"the type List\(String\) is not a text or number"),
        ("number", series([[1], [2], [3]]), r"the type List\(Int64\) is not a number"),
        ("class", series([b"a", b"b", b"c"]), "the type Binary is not a text or number"),
        ("class", series([{"a": 1}] * 3), r"the type Struct.* is not a text or number"),
        ("number", series([timedelta(1)] * 3), "the type Duration.* is not a number"),
    ],
)
def test_types_without_a_text_are_refused(tmp_path: Path, name: str, values: pl.Series, message: str) -> None:
    log().write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"item_id": [10, 20, 30], name: values}).write_parquet(tmp_path / "items.parquet")
    kinds: Any = {"multi": "multi", "number": "numeric", "class": "categorical"}
    side = SideTable("items.parquet", "item_id", {name: Feature(kinds[name])})
    with pytest.raises(ValueError, match=f"items.parquet, column '{name}': {message}"):
        prepare(Table(tmp_path / "events.parquet", items=side), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_shards_may_have_columns_of_unlike_types(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    log()[:1].write_parquet(raw / "a.parquet")
    log(timestamp=series(MOMENTS))[1:2].write_parquet(raw / "b.parquet")
    log(timestamp=series([str(one) for one in SECONDS]))[2:].write_parquet(raw / "c.parquet")
    prepare(Table(raw), tmp_path / "data")
    assert np.load(tmp_path / "data" / c.EVENT_TIMES).tolist() == [NOW, NOW + 1, NOW + 3, NOW + 2]
    log(timestamp=series(["soon"] * 4))[2:].write_parquet(raw / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet, column 'timestamp': 2 bad rows \(row 1: soon is not seconds"):
        prepare(Table(raw), tmp_path / "data")


def test_a_source_without_rules_is_parsed_by_those_of_events() -> None:
    frame = pl.DataFrame(
        {"user_id": [1.0, 2.0], "item_id": ["a", "b"], "time": [str(NOW), f"{NOW}.0"], "rating": ["3", "4.5"]}
    )
    found = read(Rows(frame.lazy(), "plays"))[0]
    assert found.rows() == [(1, "a", NOW, 3.0), (2, "b", NOW, 4.5)]
    with pytest.raises(ValueError, match=r"plays, column 'user_id': 1 bad row \(row 2: 2\.5 is not an id"):
        read(Rows(frame.with_columns(user_id=pl.Series([1.0, 2.5])).lazy(), "plays"))
