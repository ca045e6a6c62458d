"""What is known of items and users: their tables, and an array or two for each declared feature."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.data import ids as ids_rule
from recsys2stage.data.checks import REJECTED_SCHEMA, OnBadRows, Rows, read
from recsys2stage.data.dataset import Dataset, feature_specs
from recsys2stage.data.events import encode_categories
from recsys2stage.data.options import check_option
from recsys2stage.data.sources.base import Kind
from recsys2stage.data.sources.vectors import Vectors

log = logging.getLogger("recsys2stage")


def write_side(
    folder: Path,
    owner: Literal["item", "user"],
    ids: pl.Series,
    rows: Rows | None,
    kinds: Mapping[str, Kind],
    on_bad_rows: OnBadRows,
    counts: dict[str, int],
) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """Writes the table and the feature arrays of the items or users that have events.

    Args:
        ids: their raw ids, in the order of their numbers.
        rows: what the source knows of them.

    Returns:
        The features for the manifest, and the bad rows of the source's table.
    """
    raw_id, padding = f"{owner}_id", 1 if owner == "item" else 0  # item 0 is padding
    numbers = np.arange(padding, padding + len(ids), dtype=np.int32)
    table = pl.DataFrame({owner: numbers, raw_id: ids})
    counts[f"{owner}s_without_metadata"] = 0
    bad = pl.DataFrame(schema=REJECTED_SCHEMA)
    if rows is not None:
        known, bad = read(rows, on_bad_rows, needs=(raw_id, *kinds))
        # joined as text, since one file may hold the ids as numbers and the other as text
        known = known.with_columns(pl.col(raw_id).cast(pl.String))
        once = known.unique(raw_id, keep="first", maintain_order=True)
        if len(once) < len(known):
            log.warning("%s: %d rows repeat a %s; the first of each counts", rows.file, len(known) - len(once), raw_id)
        ids_rule.warn_ambiguous_ids(once[raw_id], raw_id, rows.file)
        text_ids = table.select(owner, pl.col(raw_id).cast(pl.String))
        counts[f"{owner}s_without_metadata"] = text_ids.join(once, on=raw_id, how="anti").height
        if counts[f"{owner}s_without_metadata"] == len(ids):
            raise ValueError(
                f"{rows.file} has none of the {len(ids):,} {owner}s of the events: its ids are such as "
                f"{once[raw_id][0]!r}, those of the events such as {text_ids[raw_id][0]!r}; they must be the same text"
            )
        facts = text_ids.join(once, on=raw_id, how="left", maintain_order="left").drop(owner, raw_id)
        table = pl.concat([table, facts], how="horizontal")
    table.write_parquet(folder / (c.ITEM_TABLE if owner == "item" else c.USER_TABLE))
    return [write_feature(folder, f"{owner}s.{name}", table[name], kind, padding) for name, kind in kinds.items()], bad


def write_feature(folder: Path, stem: str, column: pl.Series, kind: Kind, padding: int) -> dict[str, Any]:
    """Writes the one or two arrays of a feature, with `padding` rows of nothing in front."""
    check_option("kind", kind, Kind)
    size = 1
    if kind == "numeric":
        values = column.cast(pl.Float32).fill_null(np.nan).to_numpy()
        np.save(folder / f"{stem}.values.npy", np.concatenate([np.full(padding, np.nan, np.float32), values]))
    elif kind == "categorical":
        names = classes(column, kind)
        codes = encode_categories(column.cast(pl.String), names)
        np.save(folder / f"{stem}.codes.npy", np.concatenate([np.zeros(padding, np.int32), codes]))
        size += len(names)
    else:
        lists, names = class_lists(column), classes(column, kind)
        lengths = np.concatenate([np.zeros(1 + padding, np.int64), lists.list.len().fill_null(0).to_numpy()])
        np.save(folder / f"{stem}.codes.npy", encode_categories(lists.explode().drop_nulls(), names))
        np.save(folder / f"{stem}.offsets.npy", np.cumsum(lengths, dtype=np.int64))
        size += len(names)
    return {"name": column.name, "kind": kind, "size": size}


def class_lists(column: pl.Series) -> pl.Series:
    """The classes of each row of a multi-valued column: stripped, none empty and none twice."""
    stripped = pl.element().str.strip_chars().replace("", None).drop_nulls()
    return column.cast(pl.List(pl.String)).list.eval(stripped).list.unique(maintain_order=True)


def classes(column: pl.Series, kind: Kind) -> list[str]:
    """The classes of a categorical or multi-valued column in the order of their numbers, which begin with 1."""
    text = column.cast(pl.String) if kind == "categorical" else class_lists(column).explode()
    return text.drop_nulls().unique().sort().to_list()


def user_specs(dataset: Dataset) -> list[dict[str, Any]]:
    """What encodes the declared user features without the data, for a manifest.

    Each is {"name", "kind", "size", "values", "classes"}: class n of a categorical or multi-valued feature is
    classes[n - 1], and 0 is unknown; classes are None for numbers.
    """
    specs = feature_specs(dataset.user_features)
    if not specs:
        return []
    table = pl.read_parquet(dataset.path / c.USER_TABLE)
    return [
        {**spec, "classes": None if spec["kind"] == "numeric" else classes(table[spec["name"]], spec["kind"])}
        for spec in specs
    ]


def write_vectors(
    folder: Path, name: str, item_ids: pl.Series, vectors: Vectors, counts: dict[str, int]
) -> dict[str, Any]:
    """Writes the vectors of the items that have events, (V + 1, P) with NaN where there is none."""
    raw_ids, values = vectors.read()
    rows = pl.DataFrame({c.ITEM_ID: raw_ids, "row": np.arange(len(raw_ids))})
    wanted = pl.DataFrame({c.ITEM_ID: item_ids.cast(pl.String)})
    row = wanted.join(rows, on=c.ITEM_ID, how="left", maintain_order="left")["row"]
    known = row.is_not_null().to_numpy()
    if not known.any():
        raise ValueError(
            f"{vectors.path} has vectors of none of the {len(item_ids):,} items: its ids are such as {raw_ids[0]!r}, "
            f"those of the events such as {str(item_ids[0])!r}; they must be the same text"
        )
    table = np.full((1 + len(item_ids), values.shape[1]), np.nan, np.float32)  # row 0 is padding
    table[1:][known] = values[row.drop_nulls().to_numpy()]
    np.save(folder / f"items.{name}.values.npy", table)
    counts[f"items_without_{name}_vector"] = missing = int((~known).sum())
    if missing:
        log.warning("%s items have no vector in %s; it is unknown", f"{missing:,}", vectors.path)
    return {"name": name, "kind": "vector", "size": values.shape[1]}
