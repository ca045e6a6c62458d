"""Frames of a notebook, of polars or pandas or anything else that polars reads, as the files that the verbs read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from recsys2stage import columns as c
from recsys2stage.checks import require, whole_number
from recsys2stage.sources.base import Kind
from recsys2stage.sources.table import iso
from recsys2stage.split import PARTS

TimeUnit = Literal["seconds", "milliseconds", "iso", "order"]
Sides = Mapping[Literal["items", "users"], pl.DataFrame | None]


@dataclass(frozen=True)
class Frames:
    """What the columns of somebody's frames mean; the arguments are those of `TwoStageRecommender`."""

    user: str
    item: str
    time: str | None
    time_unit: TimeUnit | None
    rating: str | None
    action: str | None
    item_features: Mapping[str, Kind] | None
    user_features: Mapping[str, Kind] | None

    def marked(self, events: pl.DataFrame, validation: pl.DataFrame | None) -> pl.DataFrame:
        """The columns of events that count; with validation events, all events with a mark of what they are for."""
        names = [name for name in (self.user, self.item, self.time, self.rating, self.action) if name is not None]
        require(names, events.columns, "the frame of events")
        events = events.select(names)
        if validation is None:
            return events
        require(names, validation.columns, "the frame of validation events")
        later = validation.select(pl.col(name).cast(events.schema[name]) for name in names)
        later = later.join(events, on=self.user, how="semi", maintain_order="left")
        if later.is_empty():
            raise ValueError(
                f"none of the {len(validation):,} validation events is of a user who has other events, so there is "
                "nothing to stop early by; give later events of the same users, or leave validation out"
            )
        if self.time is not None:
            later = later.sort(self._milliseconds(later[self.time]), maintain_order=True)
        first = later.unique(self.user, keep="first", maintain_order=True)
        train, val, _ = PARTS
        marked = [frame.with_columns(pl.lit(part).alias(c.PART)) for frame, part in ((events, train), (first, val))]
        return pl.concat(marked)

    def sides(self, items: Any, users: Any) -> Sides:
        """What is known of items and users, as the tables of them want it."""
        return {"items": self._side(items, "items"), "users": self._side(users, "users")}

    def histories(self, log: pl.DataFrame, features: Sequence[str] = ()) -> pl.DataFrame:
        """Histories as `recsys recommend` reads them, oldest first, with those columns of user features that it has."""
        names = {c.USER_ID: self.user, c.ITEM_ID: self.item, c.RATING: self.rating, c.ACTION: self.action}
        require([self.user, self.item], log.columns, "the frame of histories")
        columns = [pl.col(own).alias(name) for name, own in names.items() if own in log.columns]
        taken = {*names, c.TIME, self.time, *names.values()}
        columns += [pl.col(name) for name in features if name in log.columns and name not in taken]
        if self.time is not None and self.time in log.columns:
            order = self._milliseconds(log[self.time])
            log = log.sort(order, maintain_order=True)
            if self._unit(log[self.time]) != "order":
                columns.append((order // 1000).alias(c.TIME))
        return log.select(columns)

    def write(self, log: pl.DataFrame, sides: Sides, folder: Path) -> dict[str, Any]:
        """Writes marked events and what is known of their items and users.

        Returns:
            The options of `sources.Table` with which it reads them.
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
        table = as_polars(frame)
        require([self._id(name), *self._kinds(table, name)], table.columns, f"the frame of {name}")
        lists = [column for column, dtype in table.schema.items() if dtype.is_nested()]
        for column in lists:
            if getattr(table.schema[column], "inner", pl.String()).is_float():
                raise ValueError(
                    f"the column {column!r} of {name} holds lists of floats, which are no classes; leave it out, and "
                    "where they are vectors of items, name their file in the config: item_vectors in prepare.yaml"
                )
        return table.with_columns(pl.col(column).cast(pl.List(pl.String)) for column in lists)

    def _kinds(self, table: pl.DataFrame, name: Literal["items", "users"]) -> dict[str, Kind]:
        given = self.item_features if name == "items" else self.user_features
        if given is not None:
            return dict(given)
        return {column.name: kind_of(column) for column in table if column.name not in (self._id(name), c.TITLE)}

    def _unit(self, times: pl.Series) -> TimeUnit:
        if times.dtype.is_temporal():
            return "milliseconds"  # a Table turns dates into the unit that it is told
        return self.time_unit or ("iso" if times.dtype == pl.String else "seconds")

    def _milliseconds(self, times: pl.Series) -> pl.Expr:
        """A column of times in milliseconds, or as it is where times are an order."""
        raw = pl.col(times.name)
        if times.dtype.is_temporal():
            return raw.dt.epoch("ms")
        unit = self._unit(times)
        return iso(raw) if unit == "iso" else whole_number(raw) * (1000 if unit == "seconds" else 1)


def as_polars(frame: Any) -> pl.DataFrame:
    """A frame of any kind that polars reads."""
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    return frame if isinstance(frame, pl.DataFrame) else pl.DataFrame(frame)


def kind_of(column: pl.Series) -> Kind:
    """What the type of a column says that it is."""
    if column.dtype.is_nested():
        return "multi"
    return "numeric" if column.dtype.is_numeric() else "categorical"
