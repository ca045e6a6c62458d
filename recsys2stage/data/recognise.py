"""Recognizes the columns of a raw table: user, item, time and its unit, rating, action, and features of items or users.

Names decide first, in the order of the lists below; a time is also recognized by its values.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from recsys2stage.columns import YEAR_2100
from recsys2stage.data.checks import parse_float, parse_int
from recsys2stage.data.event_times import YEAR_1980
from recsys2stage.data.raw_table import RawTable
from recsys2stage.data.sources.base import Kind
from recsys2stage.data.sources.table import iso
from recsys2stage.options import TimeUnit


def _names(text: str) -> list[str]:
    return text.split()


# normalized names, the likeliest first
USERS = _names(
    "userid user uid useridx userkey customerid customer custid clientid client visitorid visitor memberid member "
    "accountid account buyerid buyer shopperid shopper reviewerid reviewer personid profileid subscriberid "
    "playerid deviceid cookieid anonymousid sessionid session"
)
ITEMS = _names(
    "itemid item iid itemidx productid product sku skuid articleid article asin parentasin movieid movie bookid "
    "book isbn trackid track songid song artistid artist videoid video contentid newsid news businessid gmapid "
    "listingid offerid stockcode goodsid materialid gameid game appid recipeid restaurantid poiid venueid "
    "courseid jobid postid pageid page"
)
TIMES = _names(
    "timestamp time ts datetime eventtime eventtimestamp createdat orderdate purchasedate invoicedate tdat date "
    "unixtime unixtimestamp unixreviewtime ratedat viewedat clickedat purchasedat orderedat occurredat playedat "
    "ordertime visittime"
)
RATINGS = _names("rating ratings stars starrating score overall rate userrating")
ACTIONS = _names("action event eventtype actiontype eventname behavior behaviour behaviortype interaction type")
TITLES = _names("title name itemname itemtitle productname producttitle movietitle booktitle label")
# (whose, of what) pairs of words that make an id: customerRef, shop_user_no
OWNERS = {
    "user": set(_names("user customer client visitor member account buyer shopper reviewer subscriber")),
    "item": set(_names("item product article movie book track song video goods sku asin offer")),
}
MARKS = {"id", "ids", "no", "nr", "num", "number", "key", "ref", "code", "uuid", "guid", "hash", "idx", "sku"}
# numbers in columns of these names are classes
CLASSES = {
    "id",
    "code",
    "type",
    "class",
    "category",
    "group",
    "brand",
    "zip",
    "postcode",
}
OWN_TEXT = "nearly every row has its own text"  # why a column is no feature
# 31.12.2024, 12/31/2024, 2024/12/31, 31-Dec-2024, with or without a time: `DATE` does not tell day and month apart
DATE = (
    r"^\s*(\d{1,2}[./-]\d{1,2}[./-](\d{4}|\d{2})|\d{4}[./-]\d{1,2}[./-]\d{1,2}|\d{1,2}[. -]+\p{L}{3,9}\.?[, -]+\d{4})"
    r"([ ,T]+\d{1,2}:\d{2}.*)?\s*$"
)
MOSTLY = 0.9  # share of the values of a column that must be dates


@dataclass
class Events:
    """Columns of an event table; None where none was recognized.

    Attributes:
        questions: column of ours (user, item, time) -> what has to be answered before the table can be read.
        notes: column of ours -> what the reader of the config should know.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    time_unit: TimeUnit = "order"
    rating: str | None = None
    action: str | None = None
    questions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class Side:
    """Columns of an item or user table.

    Attributes:
        id: id column, None where none was recognized.
        features: column -> kind, and the separator of a multi-valued one.
        skipped: column -> why it is no feature.
    """

    id: str | None = None
    title: str | None = None
    features: dict[str, tuple[Kind, str | None]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def words(name: str) -> list[str]:
    """The words of a column name: customerRef, customer-ref and CUSTOMER_REF are customer and ref."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W_]+", spaced.lower())


def by_name(columns: Sequence[str], names: Sequence[str], owner: str = "") -> list[str]:
    """The columns whose names are among `names`, the likeliest first, then those of an id of the owner."""
    joined = {column: "".join(words(column)) for column in columns}
    known = sorted((names.index(joined[column]), column) for column in columns if joined[column] in names)
    found = [column for _, column in known]
    owners = OWNERS.get(owner, set())
    other = [
        column
        for column in columns
        if column not in found
        and set(words(column)) & owners
        and (set(words(column)) & MARKS or len(words(column)) == 1)
    ]
    return found + other


def recognise_events(table: RawTable, items: RawTable | None = None, users: RawTable | None = None) -> Events:
    """Recognizes the columns of an event table.

    Args:
        table: the table.
        items: item table, if any; an id column that no name tells may be the one that both tables have.
        users: user table, likewise.
    """
    events, free = Events(), list(table.columns)
    listed = f"columns: {', '.join(table.columns)}"
    for own, names, what, side in (("user", USERS, "user", users), ("item", ITEMS, "item", items)):
        found = by_name(free, names, own)
        shared = None if found or side is None else shared_id(table, side)
        if shared in free:
            found = [shared]
            events.notes[own] = f"the {what} table has it too, with one row for each value"
        if not found:
            events.questions[own] = f"which column holds the {what} ids? {listed}"
            continue
        setattr(events, own, found[0])
        free.remove(found[0])
        if len(found) > 1:
            events.notes[own] = f"also possible: {', '.join(found[1:])}"
    _recognise_time(table, events, free)
    for column in by_name(free, RATINGS):
        if is_numeric(table.rows[column]):
            events.rating = column
            free.remove(column)
            break
    for column in by_name(free, ACTIONS):
        if table.rows[column].dtype == pl.String and table.rows[column].n_unique() <= 20:
            events.action = column
            break
    return events


def shared_id(events: RawTable, side: RawTable) -> str | None:
    """The column that both tables have if it is the only one, identifies the rows of `side`, and has values of both."""
    both = [column for column in side.columns if column in events.columns]
    if len(both) != 1 or any(table.rows[both[0]].dtype.is_nested() for table in (events, side)):
        return None
    ids, used = (table.rows[both[0]].cast(pl.String, strict=False) for table in (side, events))
    identifies = len(ids) > 0 and not ids.null_count() and ids.n_unique() == len(ids)
    return both[0] if identifies and set(ids) & set(used) else None


def _recognise_time(table: RawTable, events: Events, free: list[str]) -> None:
    named = by_name(free, TIMES) + [
        column for column in free if len(words(column)) > 1 and words(column)[-1] in ("at", "time", "date", "timestamp")
    ]
    units = {column: time_unit(table.rows[column]) for column in free}
    for column in dict.fromkeys(named):
        unit = units[column]
        if unit is not None:
            events.time, events.time_unit = column, unit
            free.remove(column)
            if unit == "order":
                events.notes["time"] = "no seconds since 1970: the numbers only give the order of events"
            return
    dates = [column for column in (named or free) if units[column] is None and looks_like_dates(table.rows[column])]
    by_value = [column for column in free if units[column] in ("iso", "seconds", "milliseconds")]
    if dates and (named or not by_value):
        values = table.rows[dates[0]]
        example = values.filter(values.str.contains(DATE))[0]
        events.questions["time"] = (
            f"{' and '.join(dates)} {'looks' if len(dates) == 1 else 'look'} like dates ({example!r}), which are not "
            "ISO; write them as 2024-01-31 or 2024-01-31 18:05:00, or write null with time_unit: order if the rows are "
            "in chronological order"
        )
        return
    if named:
        value = table.rows[named[0]].drop_nulls().cast(pl.String, strict=False)
        events.questions["time"] = (
            f"{named[0]} holds {value[0] if len(value) else ''!r}, which is no ISO time (2024-01-31 18:05:00), nor "
            "seconds or milliseconds since 1970; convert it, name another column, or write null with time_unit: order "
            "(rows in the order of the file)"
        )
        return
    if len(by_value) == 1:
        events.time, events.time_unit = by_value[0], units[by_value[0]] or "order"
        free.remove(by_value[0])
        events.notes["time"] = "recognized by its values"
    elif by_value:
        events.questions["time"] = f"which column holds the time of an event? columns: {', '.join(by_value)}"
    else:
        events.notes["time"] = (
            f"no column of times among {', '.join(table.columns)}: the rows are taken in the order of the file, "
            "the oldest first"
        )


def time_unit(values: pl.Series) -> TimeUnit | None:
    """The unit of a column of times by its values; None if the values are no times and no whole numbers."""
    values = values.drop_nulls()
    if values.dtype.is_temporal():
        return None if values.dtype in (pl.Time, pl.Duration) else "milliseconds"  # Table converts dates to its unit
    if values.dtype == pl.String:
        values = values.filter(values.str.strip_chars() != "")
    elif not values.dtype.is_numeric():
        return None
    if values.is_empty():
        return None
    name, frame = values.name, values.to_frame()
    whole = frame.select(parse_int(pl.col(name)))[name]
    if not whole.null_count():
        median: Any = whole.median()
        units: tuple[tuple[TimeUnit, int], ...] = (("seconds", 1), ("milliseconds", 1000))
        for unit, ticks in units:
            if YEAR_1980 * ticks <= median <= YEAR_2100 * ticks:
                return unit
        return "order" if 0 <= median < YEAR_1980 else None  # larger numbers: microseconds, nanoseconds
    if values.dtype == pl.String and not frame.select(iso(pl.col(name)))[name].null_count():
        return "iso"
    return None


def looks_like_dates(values: pl.Series) -> bool:
    """Whether text is mostly dates in any usual order of day, month and year."""
    if values.dtype != pl.String:
        return False
    values = values.filter(values.str.strip_chars() != "")
    return bool(len(values)) and float(values.str.contains(DATE).mean() or 0) >= MOSTLY  # type: ignore[arg-type]  # a number


def is_numeric(values: pl.Series) -> bool:
    """Whether all values are numbers or missing, and some are not missing."""
    if values.dtype.is_numeric():
        return True
    if values.dtype != pl.String:
        return False
    text = values.drop_nulls().str.strip_chars()
    text = text.filter(text != "")
    return bool(len(text)) and not text.to_frame().select(parse_float(pl.col(text.name)))[text.name].null_count()


def recognise_side(table: RawTable, own: str, id_column: str | None) -> Side:
    """Recognizes the columns of an item or user table.

    Args:
        table: the table.
        own: item or user.
        id_column: id column of the events, preferred where the table has it.
    """
    found = [column for column in table.columns if column == id_column]
    found += by_name(table.columns, ITEMS if own == "item" else USERS, own)
    found += [column for column in table.columns if words(column) == ["id"]]
    side = Side(id=found[0] if found else None)
    free = [column for column in table.columns if column != side.id]
    titles = [column for column in by_name(free, TITLES) if table.rows[column].dtype == pl.String]
    if own == "item" and titles:
        side.title = titles[0]
        free.remove(titles[0])
    for column in free:
        feature = recognise_feature(table.rows[column])
        if isinstance(feature, str):
            side.skipped[column] = feature
        else:
            side.features[column] = feature
    return side


def recognise_feature(values: pl.Series) -> tuple[Kind, str | None] | str:
    """Kind of a feature column and the separator of its values, or why it is no feature."""
    rows = len(values)
    values = values.drop_nulls()
    if values.dtype == pl.String:
        values = values.filter(values.str.strip_chars() != "")
    if values.is_empty():
        return "no values"
    if values.dtype == pl.List(pl.String):
        return "multi", None
    if values.dtype.is_nested() or values.dtype.is_temporal() or values.dtype in (pl.Binary, pl.Object):
        return f"its type {values.dtype} is no class and no number"
    if values.dtype == pl.Boolean:
        return "categorical", None
    if is_numeric(values):
        return ("categorical" if set(words(values.name)) & CLASSES else "numeric"), None
    if time_unit(values) == "iso":
        return "times are no features"
    text = values.cast(pl.String)
    for separator in "|;,":
        if text.str.contains(separator, literal=True).mean() > 0.1:  # type: ignore[operator]  # of booleans: a number
            parts = text.str.split(separator).explode().str.strip_chars()
            if parts.n_unique() <= max(20, len(text) // 2) and parts.str.len_chars().mean() < 30:  # type: ignore[operator]  # a number
                return "multi", separator
    if text.n_unique() > max(20, rows // 2):
        return OWN_TEXT
    return "categorical", None
