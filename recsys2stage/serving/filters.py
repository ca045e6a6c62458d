"""The catalogue of a bundle as the service reads it: filters on declared item features, and the search of items."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import take
from recsys2stage.ranking.bundle import bundle_manifest
from recsys2stage.serving.problems import Problem, nearest, shorten, wrong
from recsys2stage.serving.schemas import Filter

KINDS = ("categorical", "multi", "numeric")  # of features that filters read
LISTED = 200  # most classes of a feature that /v1/info lists


class Classes:
    """A categorical or multi-valued feature: its classes, and the items of each.

    Args:
        column: values of the items 1..V: text, or lists of text.
    """

    def __init__(self, column: pl.Series) -> None:
        lists = column if column.dtype.is_nested() else column.cast(pl.String).reshape((-1, 1))
        lists = lists.cast(pl.List(pl.String))
        pairs = (
            pl.DataFrame({"item": np.arange(1, len(column) + 1), "name": lists})
            .explode("name")
            .with_columns(pl.col("name").str.strip_chars())
            .filter(pl.col("name").is_not_null() & (pl.col("name") != ""))
            .unique()
            .sort("name", "item")
        )
        counts = pairs.group_by("name", maintain_order=True).len()
        self.names: list[str] = counts["name"].to_list()
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.items = pairs["item"].to_numpy().astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(counts["len"].to_numpy())]).astype(np.int64)

    def of(self, name: str) -> np.ndarray:
        """The items of a class, ascending."""
        number = self.numbers[name]
        return self.items[self.offsets[number] : self.offsets[number + 1]]


class ItemFeatures:
    """Items with their declared features.

    Args:
        table: columns item, item_id, optionally title, and the features, as in the prepared data.
        kinds: kind of each feature that filters read: categorical, multi or numeric.
        popularity: training events of each item, (V + 1,).
    """

    def __init__(self, table: pl.DataFrame, kinds: Mapping[str, str], popularity: np.ndarray) -> None:
        self.kinds, self.popularity, self.count = dict(kinds), popularity, len(table)
        self.table = table.sort(c.ITEM)
        self.ids: list[str] = self.table[c.ITEM_ID].cast(pl.String).to_list()
        self.titles: list[str | None] = (
            self.table[c.TITLE].cast(pl.String).to_list() if c.TITLE in table.columns else [None] * self.count
        )
        self.classes = {name: Classes(self.table[name]) for name, kind in kinds.items() if kind != "numeric"}
        self.numeric = {
            name: self.table[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
            for name, kind in kinds.items()
            if kind == "numeric"
        }
        self.order = np.argsort(-popularity[1:], kind="stable")  # rows, the most popular first
        words = [title if title is not None else item_id for title, item_id in zip(self.titles, self.ids, strict=True)]
        self._words = pl.Series(words, dtype=pl.String).str.to_lowercase()

    @classmethod
    def load(cls, bundle: Path, popularity: np.ndarray) -> "ItemFeatures":
        """Reads the items of a bundle or index whose checksums have been verified."""
        manifest = bundle_manifest(bundle)
        declared = manifest.get("item_features")
        if declared is None:  # exported before they were recorded
            declared = take(manifest, "reranker", dict, bundle)["features"] if "reranker" in manifest else []
        table, kinds = pl.read_parquet(bundle / c.ITEM_TABLE), dict[str, str]()
        for feature in declared if isinstance(declared, list) else [declared]:
            name, kind = (feature.get("name"), feature.get("kind")) if isinstance(feature, dict) else (None, None)
            if not (isinstance(name, str) and isinstance(kind, str)):
                raise ValueError(
                    f"{bundle / c.MANIFEST} has the item feature {shorten(feature)}, expected a name and a kind; make "
                    "it again"
                )
            if kind in KINDS and name in table.columns:
                kinds[name] = kind
        return cls(table, kinds, popularity)

    def describe(self) -> list[dict[str, Any]]:
        """Name, kind, and the classes or bounds of each feature."""
        described: list[dict[str, Any]] = []
        for name, kind in self.kinds.items():
            if kind == "numeric":
                known = self.numeric[name][np.isfinite(self.numeric[name])]
                low, high = (float(known.min()), float(known.max())) if len(known) else (None, None)
                described.append({"name": name, "kind": kind, "min": low, "max": high})
            else:
                names = self.classes[name].names
                described.append({"name": name, "kind": kind, "values": names[:LISTED], "count": len(names)})
        return described

    def mask(self, filters: Mapping[str, Filter]) -> np.ndarray | None:
        """Which items pass all filters, (V,) bool; None without filters.

        Raises:
            Problem: for a feature or class that is not declared, and a condition that the feature's kind does not have.
        """
        if not filters:
            return None
        passing = np.ones(self.count, dtype=bool)
        for name, condition in filters.items():
            passing &= self._passing(name, condition)
        return passing

    def _passing(self, name: str, condition: Filter) -> np.ndarray:
        field = f"filters.{name}"
        self.require(name, field)
        numbers = condition.min is not None or condition.max is not None
        lists: dict[str, list[str]] = condition.model_dump(include={"any", "all", "none"}, exclude_none=True)
        if self.kinds[name] == "numeric":
            if lists:
                raise wrong(
                    field, next(iter(lists)), f"{name} is numeric, expected min or max; leave out {', '.join(lists)}"
                )
            values = self.numeric[name]
            low = -np.inf if condition.min is None else condition.min
            high = np.inf if condition.max is None else condition.max
            return (values >= low) & (values <= high)  # False where it is not known
        if numbers:
            bound = condition.min if condition.min is not None else condition.max
            raise wrong(
                field,
                bound,
                f"{name} has classes, expected any, all or none with a list of them; leave out min and max",
            )
        passing = np.ones(self.count, dtype=bool)
        for kind, names in lists.items():
            masks = [self._mask(name, one, f"{field}.{kind}") for one in names]
            if kind == "all":
                for mask in masks:
                    passing &= mask
            else:
                union = np.zeros(self.count, dtype=bool)
                for mask in masks:
                    union |= mask
                passing &= union if kind == "any" else ~union
        return passing

    def require(self, name: str, field: str) -> None:
        """Raises a Problem unless a feature is declared."""
        if name not in self.kinds:
            raise wrong(
                field,
                name,
                f"there is no item feature {shorten(name)}; {nearest(name, self.kinds, '/v1/info lists them')}",
            )

    def _mask(self, feature: str, name: str, field: str) -> np.ndarray:
        classes = self.classes[feature]
        if name not in classes.numbers:
            raise wrong(
                field,
                name,
                f"{feature} has no class {shorten(name)}; {nearest(name, classes.names, '/v1/info lists them')}",
            )
        mask = np.zeros(self.count, dtype=bool)
        mask[classes.of(name) - 1] = True
        return mask

    def search(
        self,
        text: str,
        conditions: Mapping[str, Filter],
        limit: int,
        offset: int,
        among: np.ndarray | None = None,
    ) -> tuple[int, list[dict[str, Any]]]:
        """A page of the items whose title (or id, without a title) contains every word, the most popular first.

        Args:
            text: words, in any case.
            conditions: filters on features.
            limit: most items of the page.
            offset: number of items to skip.
            among: numbers of the items to search, 1..V, others are skipped; None: all.

        Returns:
            The number of all such items, and the page.
        """
        found = self.mask(conditions)
        found = np.ones(self.count, dtype=bool) if found is None else found
        if among is not None:
            named = np.zeros(self.count + 1, dtype=bool)
            named[among] = True
            found &= named[1:]
        for word in text.lower().split():
            found &= self._words.str.contains(word, literal=True).to_numpy()
        rows = self.order[found[self.order]]
        return len(rows), [self.row(int(row)) for row in rows[offset : offset + limit]]

    def row(self, row: int) -> dict[str, Any]:
        """An item, as /v1/items gives it."""
        features: dict[str, Any] = {}
        for name in self.kinds:
            value = self.table[name][row]
            if isinstance(value, pl.Series):
                value = value.to_list()
            features[name] = value if value is None or isinstance(value, bool | int | float | list) else str(value)
            if isinstance(value, float) and not np.isfinite(value):
                features[name] = None
        return {
            "item_id": self.ids[row],
            "title": self.titles[row],
            "features": features,
            "popularity": int(self.popularity[row + 1]),
        }

    def condition(self, name: str, values: list[str]) -> Filter:
        """The filter of a query parameter: a class, or a number or a range such as 1990..1999."""
        self.require(name, name)
        if self.kinds[name] != "numeric":
            return Filter(all=values)
        low, separator, high = values[-1].partition("..")
        try:
            bounds = [float(bound) if bound else None for bound in (low, high if separator else low)]
        except ValueError:
            bounds = []
        if (
            not bounds
            or not any(bound is not None for bound in bounds)
            or not np.isfinite([b or 0 for b in bounds]).all()
        ):
            raise wrong(name, values[-1], f"{name} is {shorten(values[-1])}, expected a number or a range; try 10..20")
        if None not in bounds and bounds[0] > bounds[1]:  # type: ignore[operator]
            raise wrong(
                name, values[-1], f"{name} is {shorten(values[-1])}, expected a range that ascends; swap its ends"
            )
        return Filter(min=bounds[0], max=bounds[1])


def unknown_item(item_id: str, example: str) -> Problem:
    """The problem of an item that the model does not know."""
    return Problem(
        404,
        "unknown-item",
        f"the model does not know the item {shorten(item_id)}, expected an id such as {example!r}; search /v1/items",
        "item_id",
        item_id,
    )
