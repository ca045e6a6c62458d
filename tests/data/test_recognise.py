"""Columns are recognised by their names and values; what is not recognised becomes a question, never a guess."""

import gzip
import zipfile
from pathlib import Path

import polars as pl
import pytest

from recsys2stage.data.raw_table import RawTable, events_per_user, look_into
from recsys2stage.data.recognise import recognise_events, recognise_feature, recognise_side, time_unit, words

EPOCH = 1_700_000_000


def table(**columns: list[str]) -> RawTable:
    rows = pl.DataFrame(columns)
    return RawTable(Path("events.csv"), rows.columns, rows)


@pytest.mark.parametrize(
    ("header", "user", "item", "time"),
    [
        ("user_id,item_id,timestamp", "user_id", "item_id", "timestamp"),
        ("userId,movieId,rating,timestamp", "userId", "movieId", "timestamp"),
        ("timestamp,visitorid,event,itemid,transactionid", "visitorid", "itemid", "timestamp"),  # RetailRocket
        ("t_dat,customer_id,article_id,price,sales_channel_id", "customer_id", "article_id", "t_dat"),  # H&M
        ("reviewerID,asin,overall,unixReviewTime", "reviewerID", "asin", "unixReviewTime"),  # Amazon
        ("CustomerRef,qty,Product SKU,ordered_at", "CustomerRef", "Product SKU", "ordered_at"),
        ("sku,uid,created_at", "uid", "sku", "created_at"),
        ("event_time,event_type,product_id,category_id,user_id,user_session", "user_id", "product_id", "event_time"),
    ],
)
def test_headers_of_known_logs_are_recognised(header: str, user: str, item: str, time: str) -> None:
    times = {time: [str(EPOCH), str(EPOCH + 1)]}
    found = recognise_events(table(**{name: times.get(name, ["1", "2"]) for name in header.split(",")}))
    assert (found.user, found.item, found.time, found.time_unit) == (user, item, time, "seconds")
    assert found.questions == {}


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([str(EPOCH), "1.0"], "seconds"),
        ([f"{EPOCH}.0", str(EPOCH)], "seconds"),
        ([f"{EPOCH}123", f"{EPOCH}999"], "milliseconds"),
        (["2024-01-31 18:05:00", "2024-01-31T18:05:00Z", "2024-01-31"], "iso"),
        (["1", "2", "3"], "order"),
        (["31.01.2024", "01.02.2024"], None),
        ([f"{EPOCH}000000"], None),  # microseconds
        (["", ""], None),
    ],
)
def test_the_unit_of_times_is_seen_in_their_values(values: list[str], unit: str | None) -> None:
    assert time_unit(pl.Series("at", values)) == unit


def test_typed_times_are_times() -> None:
    times = pl.Series("at", [EPOCH]).cast(pl.Datetime("us"))
    assert time_unit(times) == "milliseconds"
    assert time_unit(times.dt.date()) == "milliseconds"
    assert time_unit(times.dt.time()) is None


def test_a_time_is_recognised_by_its_values_where_only_one_column_has_any() -> None:
    ids = {"user": ["a", "b"], "item": ["x", "y"]}
    one = recognise_events(table(**ids, when=["2024-01-31", "2024-02-01"], n=["1", "2"]))
    assert (one.time, one.time_unit) == ("when", "iso")
    two = recognise_events(table(**ids, first=["2024-01-31"] * 2, then=["2024-02-01"] * 2))
    assert two.time is None
    assert "first, then" in two.questions["time"]


def test_without_times_the_order_of_the_file_counts() -> None:
    found = recognise_events(table(user=["a"], item=["x"], amount=["3"]))
    assert (found.time, found.time_unit, found.questions) == (None, "order", {})
    assert "order of the file" in found.notes["time"]


def test_what_is_not_recognised_is_a_question_with_the_columns() -> None:
    found = recognise_events(table(alpha=["a"], beta=["b"], date=["31.01.2024"]))
    assert (found.user, found.item, found.time) == (None, None, None)
    assert found.questions["user"] == "which column holds the user ids? columns: alpha, beta, date"
    assert found.questions["item"] == "which column holds the item ids? columns: alpha, beta, date"
    assert "date looks like dates ('31.01.2024'), which are not ISO; write them as" in found.questions["time"]
    found = recognise_events(table(user=["a"], item=["x"], date=["soon"]))
    assert "date holds 'soon', which is no ISO time" in found.questions["time"]


@pytest.mark.parametrize(
    "values",
    [
        ["31.12.2024", "1.2.2024"],
        ["12/31/2024 18:05", "01/02/2024 7:00:00 PM"],
        ["2024/12/31", ""],
        ["31-Dec-2024", "1. Januar 2024"],
        ["", "31.12.24, 18:05"],
    ],
    ids=["dots", "slashes", "year-first", "months", "two-digits"],
)
def test_dates_that_are_not_iso_are_a_question(values: list[str]) -> None:
    found = recognise_events(table(user=["a", "b"], item=["x", "y"], bestellt_am=values))
    assert (found.time, found.questions.keys()) == (None, {"time"})
    assert f"bestellt_am looks like dates ({values[0] or values[1]!r})" in found.questions["time"]


def test_what_only_resembles_a_date_is_no_question() -> None:
    ids = {"user": ["a", "b"], "item": ["x", "y"]}
    found = recognise_events(table(**ids, price=["1.50", "12.99"], code=["1-2-3", "4.5"], phone=["030/12/4", "1"]))
    assert found.questions == {}
    found = recognise_events(table(**ids, when=["2024-01-31", "2024-02-01"], birthday=["31.12.2004", "1.2.1990"]))
    assert (found.time, found.questions) == ("when", {})


def test_the_only_column_of_both_tables_is_the_id() -> None:
    events = {"wer": ["a", "b"], "artikel_nr": ["A1", "A2"], "menge": ["1", "1"]}
    items = {"artikel_nr": ["A1", "A2", "A3"], "gruppe": ["g", "g", "h"]}
    found = recognise_events(table(**events), items=table(**items))
    assert (found.item, found.questions.keys()) == ("artikel_nr", {"user"})
    assert recognise_side(table(**items), "item", found.item).id == "artikel_nr"
    found = recognise_events(table(**events), users=table(wer=["a", "b"], alter=["40", "50"]))
    assert (found.user, found.questions.keys()) == ("wer", {"item"})


@pytest.mark.parametrize(
    "items",
    [
        {"artikel_nr": ["A1", "A1", "A2"]},
        {"artikel_nr": ["B1", "B2", "B3"]},
        {"artikel_nr": ["A1", "A2", "A3"], "menge": ["1", "2", "3"]},
        {"nummer": ["A1", "A2", "A3"]},
    ],
    ids=["not-unique", "no-common-value", "two-columns", "no-column"],
)
def test_a_column_that_may_not_be_the_id_stays_a_question(items: dict[str, list[str]]) -> None:
    events = table(user=["a", "b"], artikel_nr=["A1", "A2"], menge=["1", "1"])
    found = recognise_events(events, items=table(**items))
    assert (found.item, found.questions.keys()) == (None, {"item"})


def test_several_candidates_are_named() -> None:
    found = recognise_events(table(customer=["a"], user_id=["b"], sku=["x"]))
    assert found.user == "user_id"
    assert found.notes["user"] == "also possible: customer"


def test_ratings_are_numbers_and_actions_few_words() -> None:
    ids = {"user": ["a", "b"], "item": ["x", "y"]}
    found = recognise_events(table(**ids, stars=["4.5", ""], type=["view", "buy"]))
    assert (found.rating, found.action) == ("stars", "type")
    found = recognise_events(table(**ids, rating=["good", "bad"]))
    assert (found.rating, found.action) == (None, None)


def test_words_of_a_name() -> None:
    assert [words(name) for name in ("customerRef", "CUSTOMER_REF", "customer-ref", "SKU")] == [
        *[["customer", "ref"]] * 3,
        ["sku"],
    ]


def test_features_of_items() -> None:
    count = 40
    rows = pl.DataFrame(
        {
            "sku": [f"s{number}" for number in range(count)],
            "name": [f"Thing {number}" for number in range(count)],
            "brand": ["a", "b"] * (count // 2),
            "category_id": ["1", "2"] * (count // 2),
            "price": [str(number / 2) for number in range(count)],
            "tags": ["red|small", "blue"] * (count // 2),
            "text": [f"Its own words, {number}" for number in range(count)],
            "added": ["2024-01-01"] * count,
            "nothing": [""] * count,
        }
    )
    side = recognise_side(RawTable(Path("items.csv"), rows.columns, rows), "item", "sku")
    assert (side.id, side.title) == ("sku", "name")
    assert side.features == {
        "brand": ("categorical", None),
        "category_id": ("categorical", None),
        "price": ("numeric", None),
        "tags": ("multi", "|"),
    }
    assert side.skipped.keys() == {"text", "added", "nothing"}


def test_typed_features() -> None:
    assert recognise_feature(pl.Series("tags", [["a", "b"], ["a"]])) == ("multi", None)
    assert recognise_feature(pl.Series("new", [True, False])) == ("categorical", None)
    assert "is no class and no number" in str(recognise_feature(pl.Series("vector", [[0.1, 0.2]])))


# reading


TEXT = "user;item;at\na;x;1\na;y;2\nb;x;1\n"


def test_separators_compression_and_archives(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(TEXT)
    (tmp_path / "log.tsv").write_text(TEXT.replace(";", "\t"))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(TEXT.encode()))
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("inside/log.csv", TEXT)
        archive.writestr("inside/README", "about")
    pl.read_csv(tmp_path / "log.csv", separator=";").write_parquet(tmp_path / "log.parquet")
    for name, separator in (("csv", ";"), ("tsv", "\t"), ("csv.gz", ";"), ("zip", ";"), ("parquet", ",")):
        seen = look_into(tmp_path / f"log.{name}")
        assert (seen.columns, seen.separator, seen.rows.height) == (["user", "item", "at"], separator, 3)
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / f"shards/{number}.csv").write_text(TEXT)
    for path in (tmp_path / "shards", tmp_path / "shards/*.csv"):
        assert look_into(path).columns == ["user", "item", "at"]


def test_events_of_a_user_are_counted(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(TEXT + "b;y;3\nb;z;4\n")
    assert events_per_user(look_into(tmp_path / "log.csv"), "user") == 2.5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "does not exist, expected a CSV, TSV or Parquet file"),
        ("log.xlsx", b"x", "has the type '.xlsx', expected a CSV"),
        ("log.csv", b"", r"is empty \(0 bytes\)|first line .* is empty"),
        ("log.csv", b"user\na\n", "has one column, 'user', expected at least a user and an item"),
        ("log.csv", b"1,2,3\n1,3,4\n", "first line .* is '1,2,3', expected the names of the columns"),
        ("log.parquet", b"PAR1", "cannot be read as Parquet|file"),
        ("log.zip", b"PK", "is not a complete zip file"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        look_into(tmp_path / name)
    assert len(str(error.value).splitlines()) == 1


def test_a_zip_of_several_tables_names_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        for name in ("a.csv", "b.csv"):
            archive.writestr(name, TEXT)
    with pytest.raises(ValueError, match=r"several tables \(a.csv, b.csv\), expected one; unpack it"):
        look_into(tmp_path / "log.zip")
