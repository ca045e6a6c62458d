"""Data frames as input (polars, pandas or any frame that polars reads), for `TwoStageRecommender`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recsys2stage import columns as c
from recsys2stage.data import ids
from recsys2stage.data.checks import Column, Rows, parse_int, require
from recsys2stage.data.sources.base import Kind
from recsys2stage.data.sources.plain import Unpacker
from recsys2stage.data.sources.table import Table, check_columns, iso, typed_tables
from recsys2stage.data.split import PARTS
from recsys2stage.options import TimeUnit, check_integer, check_option, check_seed

FRAMES = {"events": "the frame of events", "items": "the frame of items", "users": "the frame of users"}
ADVICE = "Correct these rows of the frame, or leave them out."
Refit = Literal["all", "production"]  # on all events before the test targets, or on all events
Sides = Mapping[Literal["items", "users"], pl.DataFrame | None]


class FrameTable(Table):
    """A `Table` of the Parquet files that `FrameColumns.write` makes. Its errors name the data frames."""

    def _rows(
        self,
        files: Sequence[Path],
        columns: dict[str, Column],
        quote: str | None,
        unpack: Unpacker,
        between: str | None = None,
    ) -> Rows:
        rows = typed_tables(files, columns, [FRAMES[file.stem] for file in files])
        return replace(rows, advice=ADVICE)


@dataclass(frozen=True)
class FrameColumns:
    """Column mapping of the user's data frames; the fields are arguments of `TwoStageRecommender`."""

    user: str
    item: str
    time: str | None
    time_unit: TimeUnit | None
    rating: str | None
    action: str | None
    item_features: Mapping[str, Kind] | None
    user_features: Mapping[str, Kind] | None

    def __post_init__(self) -> None:
        check_columns(
            {"user": self.user, "item": self.item, "time": self.time, "rating": self.rating, "action": self.action}
        )
        if self.time_unit is not None:
            check_option("time_unit", self.time_unit, TimeUnit)
        for option, features in (("item_features", self.item_features), ("user_features", self.user_features)):
            if not isinstance(features, Mapping | None):
                raise ValueError(
                    f"{option} is {features!r}, expected a mapping of columns to kinds; set it to "
                    "{'genre': 'categorical'}, for example"
                )
            for column, kind in (features or {}).items():
                check_option(f"{option}[{column!r}]", kind, Kind)

    def mark_parts(self, events: Any, validation: Any) -> pl.DataFrame:
        """Selects the event columns; with validation events, appends the first of each user and adds a part column."""
        events = as_polars(events, (self.user, self.item), FRAMES["events"])
        given = {"user": self.user, "item": self.item, "time": self.time, "rating": self.rating, "action": self.action}
        names = list(filter(None, given.values()))
        options = ", ".join(f"{option}=..." for option, name in given.items() if name and name not in events.columns)
        require(names, events.columns, FRAMES["events"], f"name one of these in TwoStageRecommender({options})")
        if not len(events):
            raise ValueError("the frame of events has no rows, expected one for each event; pass a frame with events")
        events = events.select(names)
        if validation is None:
            return events
        validation = as_polars(validation, (self.user, self.item), "the frame of validation events")
        require(names, validation.columns, "the frame of validation events")
        for own in (self.user, self.item):  # common id type
            dtype = ids.common_dtype([events.schema[own], validation.schema[own]])
            events = events.with_columns(events[own].cast(dtype))
        later = validation.select(pl.col(name).cast(events.schema[name]) for name in names)
        later = later.join(events, on=self.user, how="semi", maintain_order="left")
        if later.is_empty():
            raise ValueError(
                f"none of the {len(validation):,} validation events is of a user with training events, so early "
                "stopping is impossible; pass later events of the same users, or leave validation out"
            )
        if self.time is not None:
            later = later.sort(self._milliseconds(later[self.time]), maintain_order=True)
        first = later.unique(self.user, keep="first", maintain_order=True)
        train, val, _ = PARTS
        parts = [frame.with_columns(pl.lit(part).alias(c.PART)) for frame, part in ((events, train), (first, val))]
        return pl.concat(parts)

    def sides(self, items: Any, users: Any) -> Sides:
        """Item and user frames, checked and converted for `sources.SideTable`."""
        return {"items": self._side(items, "items"), "users": self._side(users, "users")}

    def histories(self, frame: Any, features: Sequence[str] = ()) -> pl.DataFrame:
        """Histories in the input format of `recsys recommend`, oldest event first, with any user feature columns."""
        log = as_polars(frame, (self.user, self.item), "the frame of histories")
        names = {c.USER_ID: self.user, c.ITEM_ID: self.item, c.RATING: self.rating, c.ACTION: self.action}
        require([self.user, self.item], log.columns, "the frame of histories")
        columns = [pl.col(own).alias(name) for name, own in names.items() if own in log.columns]
        taken = {*names, c.TIME, self.time, *names.values()}
        columns += [pl.col(name) for name in features if name in log.columns and name not in taken]
        if self.time is not None and self.time in log.columns:
            order = self._milliseconds(log[self.time])
            log = log.sort(order, maintain_order=True)
            if self._unit(log[self.time]) != "order":
                columns.append(order.cast(pl.Datetime("ms")).alias(c.TIME))  # a type that needs no unit
        return log.select(columns)

    def write(self, log: pl.DataFrame, sides: Sides, folder: Path) -> dict[str, Any]:
        """Writes events and side tables as Parquet files.

        Args:
            log: as `mark_parts` returns it.

        Returns:
            The options of a `sources.Table` that reads them.
        """
        folder.mkdir(exist_ok=True)
        log.write_parquet(folder / "events.parquet")
        options: dict[str, Any] = {
            "path": str(folder / "events.parquet"),
            "user": self.user,
            "item": self.item,
            "time": self.time,
            "time_unit": "order" if self.time is None else self._unit(log[self.time]),
            "rating": self.rating,
            "action": self.action,
        }
        if c.PART in log.columns:
            options["part"] = c.PART
        for name, table in sides.items():
            if table is not None:
                table.write_parquet(folder / f"{name}.parquet")
                kinds = self._kinds(table, name)
                options[name] = {
                    "path": str(folder / f"{name}.parquet"),
                    "id": self._id(name),
                    "columns": {column: {"kind": kind} for column, kind in kinds.items()},
                    "title": c.TITLE if c.TITLE in table.columns else None,
                }
        return options

    def _id(self, name: Literal["items", "users"]) -> str:
        return self.item if name == "items" else self.user

    def _side(self, frame: Any, name: Literal["items", "users"]) -> pl.DataFrame | None:
        if frame is None:
            return None
        table = as_polars(frame, (self._id(name),), FRAMES[name])
        require([self._id(name), *self._kinds(table, name)], table.columns, f"the frame of {name}")
        if table.is_empty():
            raise ValueError(
                f"the frame of {name} has no rows, expected at least one; give a table with rows, or leave {name} out"
            )
        lists = [column for column, dtype in table.schema.items() if dtype.is_nested()]
        for column in lists:
            if getattr(table.schema[column], "inner", pl.String()).is_float():
                raise ValueError(
                    f"the column {column!r} of {name} holds lists of floats, which are no classes; leave it out; if "
                    "they are item vectors, give their file as item_vectors in prepare.yaml"
                )
        return table.with_columns(pl.col(column).cast(pl.List(pl.String)) for column in lists)

    def _kinds(self, table: pl.DataFrame, name: Literal["items", "users"]) -> dict[str, Kind]:
        given = self.item_features if name == "items" else self.user_features
        if given is not None:
            return dict(given)
        return {column.name: infer_kind(column) for column in table if column.name not in (self._id(name), c.TITLE)}

    def _unit(self, times: pl.Series) -> TimeUnit:
        if times.dtype.is_temporal():
            return "milliseconds"  # Table converts dates to its time unit
        return self.time_unit or ("iso" if times.dtype == pl.String else "seconds")

    def _milliseconds(self, times: pl.Series) -> pl.Expr:
        """Times in milliseconds; unchanged if time_unit is order."""
        raw = pl.col(times.name)
        if times.dtype.is_temporal():
            return raw.dt.epoch("ms")
        unit = self._unit(times)
        return iso(raw) if unit == "iso" else parse_int(raw) * (1000 if unit == "seconds" else 1)


def as_polars(frame: Any, id_columns: Sequence[str] = (), name: str = "the frame") -> pl.DataFrame:
    """Converts any frame that polars reads, or a mapping of columns, to polars, with ids as in `data.ids`.

    Args:
        frame: the frame.
        id_columns: its columns of ids.
        name: what it is, for errors.

    Raises:
        ValueError: for invalid ids, such as fractions and booleans, and for what is no frame.
    """
    if frame is None or isinstance(frame, (str, bytes, int, float, Path)):
        raise ValueError(
            f"{name} is {frame!r}, expected a polars or pandas frame; read a file first, for example with pl.read_csv"
        )
    if isinstance(frame, pl.LazyFrame):
        frame = frame.collect()
    if not isinstance(frame, pl.DataFrame):  # polars rejects columns of Python objects, or guesses their type
        names = list(frame) if isinstance(frame, Mapping) else list(getattr(frame, "columns", ()))
        if twice := next((column for column in names if names.count(column) > 1), None):
            raise ValueError(f"{name} has {names.count(twice)} columns named {twice!r}, expected one; drop all but one")
        objects = {
            column: ids.ids_from_objects(column, frame[column])
            for column in id_columns
            if column in names and _holds_objects(frame[column])
        }
        if objects and not isinstance(frame, Mapping):
            rest = pl.DataFrame(frame.drop(columns=list(objects)))
            frame = {column: objects[column] if column in objects else rest[column] for column in names}
        try:
            frame = pl.DataFrame({**frame, **objects} if isinstance(frame, Mapping) else frame)
        except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} is a {type(frame).__name__} that polars cannot read ({str(error).splitlines()[0]}), expected "
                "a polars or pandas frame; pass one"
            ) from error
    for own in dict.fromkeys(id_columns):
        if own in frame.columns:
            column = frame[own]
            is_object = column.dtype == pl.Object
            frame = frame.with_columns(ids.ids_from_objects(own, column) if is_object else ids.parse_ids(column, name))
    return frame


def check_arguments(params: Mapping[str, Any]) -> None:
    """Raises a ValueError for invalid arguments of `TwoStageRecommender`, apart from the columns.

    Args:
        params: argument -> value, as `get_params` returns them.
    """
    check_integer("max_epochs", params["max_epochs"], other="None for the number in the config", example=20)
    patience = params["early_stopping"]
    if not isinstance(patience, bool):
        check_integer("early_stopping", patience, example=5)
    if params["refit"] is not None:
        check_option("refit", params["refit"], Refit)
    check_seed("seed", params["seed"])
    if isinstance(params["overlays"], str | Path):
        overlay = str(params["overlays"])
        raise ValueError(f"overlays is {overlay!r}, expected a list of overlays; write [{overlay!r}]")


def _holds_objects(column: Any) -> bool:
    """Whether a column holds Python objects: a list, or an array of dtype object."""
    return str(getattr(column, "dtype", "object")).lower() == "object"


def infer_kind(column: pl.Series) -> Kind:
    """Infers the feature kind from the dtype of a column."""
    if column.dtype.is_nested():
        return "multi"
    return "numeric" if column.dtype.is_numeric() else "categorical"
