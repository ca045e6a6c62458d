"""Side information: item and user tables, feature arrays and item vectors of a prepared dataset."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.data import ids as ids_rule
from recsys2stage.data.checks import REJECTED_SCHEMA, OnBadRows, Rows, read
from recsys2stage.data.dataset import Dataset, feature_specs, feature_stem
from recsys2stage.data.events import encode_categories
from recsys2stage.data.sources.base import Kind
from recsys2stage.data.sources.vectors import Vectors
from recsys2stage.options import check_option

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
    """Writes the side table and feature arrays of the items or users that have events.

    Args:
        ids: raw ids, in the order of the encoded ids.
        rows: the source's side table, if any.
        kinds: feature name -> kind.

    Returns:
        Feature specs for the manifest, and the rejected rows.
    """
    raw_id, padding = f"{owner}_id", 1 if owner == "item" else 0  # item 0 is padding
    encoded = np.arange(padding, padding + len(ids), dtype=np.int32)
    table = pl.DataFrame({owner: encoded, raw_id: ids})
    counts[f"{owner}s_without_metadata"] = 0
    bad = pl.DataFrame(schema=REJECTED_SCHEMA)
    if rows is not None:
        metadata, bad = read(rows, on_bad_rows, needs=(raw_id, *kinds))
        # joined as text, since one file may hold the ids as numbers and the other as text
        metadata = metadata.with_columns(pl.col(raw_id).cast(pl.String))
        once = metadata.unique(raw_id, keep="first", maintain_order=True)
        if len(once) < len(metadata):
            log.warning(
                "%s: %d rows repeat a %s; the first row of each is used", rows.file, len(metadata) - len(once), raw_id
            )
        ids_rule.warn_ambiguous_ids(once[raw_id], raw_id, rows.file)
        text_ids = table.select(owner, pl.col(raw_id).cast(pl.String))
        counts[f"{owner}s_without_metadata"] = text_ids.join(once, on=raw_id, how="anti").height
        if counts[f"{owner}s_without_metadata"] == len(ids):
            raise ValueError(
                f"{rows.file} has none of the {len(ids):,} {owner}s of the events: its ids look like "
                f"{once[raw_id][0]!r}, those of the events like {text_ids[raw_id][0]!r}; expected the same ids as "
                "text: correct the id column"
            )
        joined = text_ids.join(once, on=raw_id, how="left", maintain_order="left").drop(owner, raw_id)
        table = pl.concat([table, joined], how="horizontal")
    table.write_parquet(folder / (c.ITEM_TABLE if owner == "item" else c.USER_TABLE))
    return [
        write_feature(folder, feature_stem(f"{owner}s", name), table[name], kind, padding)
        for name, kind in kinds.items()
    ], bad


def write_feature(folder: Path, stem: str, column: pl.Series, kind: Kind, padding: int) -> dict[str, Any]:
    """Writes the arrays of one feature, with `padding` empty rows first. Returns its spec for the manifest."""
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
    """The classes of each row of a multi-valued column: stripped, without empty or repeated ones."""
    stripped = pl.element().str.strip_chars().replace("", None).drop_nulls()
    return column.cast(pl.List(pl.String)).list.eval(stripped).list.unique(maintain_order=True)


def classes(column: pl.Series, kind: Kind) -> list[str]:
    """The classes of a categorical or multi-valued column, sorted; class codes start at 1."""
    text = column.cast(pl.String) if kind == "categorical" else class_lists(column).explode()
    return text.drop_nulls().unique().sort().to_list()


def user_specs(dataset: Dataset) -> list[dict[str, Any]]:
    """User feature specs for a manifest; they suffice to encode features without the dataset.

    Each is {"name", "kind", "size", "values", "classes"}. Class n of a categorical or multi-valued feature is
    classes[n - 1]; 0 is unknown. For numeric features, classes is None.
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
    """Writes item vectors as (V + 1, P) float32, with NaN for items without a vector. Returns the feature spec."""
    raw_ids, values = vectors.read()
    rows = pl.DataFrame({c.ITEM_ID: raw_ids, "row": np.arange(len(raw_ids))})
    wanted = pl.DataFrame({c.ITEM_ID: item_ids.cast(pl.String)})
    row = wanted.join(rows, on=c.ITEM_ID, how="left", maintain_order="left")["row"]
    has_vector = row.is_not_null().to_numpy()
    if not has_vector.any():
        raise ValueError(
            f"{vectors.path} has vectors of none of the {len(item_ids):,} items: its ids look like {raw_ids[0]!r}, "
            f"those of the events like {str(item_ids[0])!r}; expected the same ids as text: correct the ids"
        )
    table = np.full((1 + len(item_ids), values.shape[1]), np.nan, np.float32)  # row 0 is padding
    table[1:][has_vector] = values[row.drop_nulls().to_numpy()]
    np.save(folder / f"{feature_stem('items', name)}.values.npy", table)
    counts[f"items_without_{name}_vector"] = missing = int((~has_vector).sum())
    if missing:
        log.warning("%s items have no vector in %s; theirs is unknown", f"{missing:,}", vectors.path)
    return {"name": name, "kind": "vector", "size": values.shape[1]}
