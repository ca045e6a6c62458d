"""Items of a trained model by number, id and title, and the names of its action types."""

import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.data.ids import as_text

logger = logging.getLogger("recsys2stage")


class Catalogue:
    """Maps raw ids to item numbers, and item numbers to ids and titles.

    Args:
        items: columns item (1..V), item_id and optionally title.
        actions: names of the action types, numbered from 1.
    """

    def __init__(self, items: pl.DataFrame, actions: Sequence[str] = ()) -> None:
        self.items, self.actions = items.sort(c.ITEM), list(actions)

    def numbers(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Item numbers of raw item ids, 0 for unknown items, (n,) int64; ids are compared as text (`ids.as_text`)."""
        return np.array([self._number.get(as_text(item) or "", 0) for item in item_ids], dtype=np.int64)

    def action_numbers(self, names: Sequence[str | None], where: str | Path) -> np.ndarray:
        """Numbers of action types by name, 0 for None and, with a warning, for unknown names, (n,) int64.

        Args:
            where: source of the names, for the warning.
        """
        number = {None: c.UNKNOWN} | {name: action for action, name in enumerate(self.actions, start=1)}
        if unknown := [name for name in names if name not in number]:
            logger.warning(
                "%s: %s of %s events have action types that the model does not know, for example %r; it knows %s",
                *(where, f"{len(unknown):,}", f"{len(names):,}", unknown[0], ", ".join(self.actions)),
            )
        return np.array([number.get(name, c.UNKNOWN) for name in names], dtype=np.int64)

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return dict(zip(self.items[c.ITEM_ID].cast(pl.String), self.items[c.ITEM], strict=True))

    @functools.cached_property
    def _shown(self) -> tuple[list[Any], list[Any] | None]:
        """Ids and titles by row, None without titles. Made once: the whole catalogue takes longer than a request."""
        titles = self.items[c.TITLE].to_list() if c.TITLE in self.items.columns else None
        return self.items[c.ITEM_ID].to_list(), titles

    def rows(self, ranking: Iterable[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Recommendations as dictionaries, one list per request; retriever_score is None for a list by popularity."""
        ids, titles = self._shown
        return [
            [
                {"item_id": ids[item - 1]}
                | ({"title": titles[item - 1]} if titles else {})
                | {
                    "score": float(score),
                    "rank": rank,
                    "retriever_score": None if np.isnan(retriever_score) else float(retriever_score),
                }
                for rank, (item, score, retriever_score) in enumerate(zip(*row, strict=True), start=1)
                if item > 0
            ]
            for row in zip(*ranking, strict=True)
        ]


def read_catalogue(path: Path, count: int) -> pl.DataFrame:
    """Reads the items of an index or bundle: item, item_id and optionally title.

    Args:
        path: Parquet file.
        count: V; the number of rows is checked before they are read.
    """
    try:
        table = pl.scan_parquet(path)
        names, rows = table.collect_schema().names(), table.select(pl.len()).collect().item()
        if rows != count or not {c.ITEM, c.ITEM_ID} <= set(names):
            raise ValueError(
                f"{path} has {rows:,} rows with the columns {', '.join(names)}, expected {count:,} with {c.ITEM} and "
                f"{c.ITEM_ID}; make its folder again"
            )
        items = table.select(name for name in (c.ITEM, c.ITEM_ID, c.TITLE) if name in names).collect().sort(c.ITEM)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); make it again") from error
    if not np.array_equal(items[c.ITEM].to_numpy(), np.arange(1, count + 1)):
        raise ValueError(f"{path} does not number its items from 1 to {count:,}; make its folder again")
    return items
