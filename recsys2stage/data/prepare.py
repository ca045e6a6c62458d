"""Raw events to a prepared dataset: arrays of events sorted by user and time, features, and a manifest.

E events, U users, V items throughout.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write, hash_arrays, read_manifest, write_manifest
from recsys2stage.data.checks import OnBadRows
from recsys2stage.data.events import (
    Repeats,
    TieBreak,
    compute_offsets,
    drop_repeats,
    keep_core,
    load_events,
    sample_cold,
    sort_events,
    tie_shares,
    withhold_cold_items,
)
from recsys2stage.data.options import check_least, check_option
from recsys2stage.data.side_tables import write_side, write_vectors
from recsys2stage.data.sources.base import Source
from recsys2stage.data.sources.vectors import Vectors
from recsys2stage.data.split import LeaveOneOut, Marked, Split

log = logging.getLogger("recsys2stage")


def prepare(
    source: Source,
    output: Path,
    split: Split = LeaveOneOut(),  # noqa: B008  it has no state
    min_rating: float | int | None = None,
    core: int = 0,
    tie_break: TieBreak = "file_order",
    repeats: Repeats = "first",
    cold_items: float = 0.0,
    item_vectors: dict[str, Vectors] | None = None,
    on_bad_rows: OnBadRows = "error",
    seed: int = 0,
) -> dict[str, Any]:
    """Prepare a dataset from raw events: sort, number, split, and write arrays, features and a manifest.

    The defaults keep every event of every user, in the stable order of the file.

    Args:
        source: the raw data.
        output: the folder to write; what is there is replaced when the new one is complete.
        split: which events train, validate and test.
        min_rating: drop events rated lower than this.
        core: drop users and items with fewer events than this, until all left have as many; 0 or 1 drops none.
        tie_break: the order of a user's events of the same time: as in the file, by item id, or at random by the seed.
        repeats: of events with the same user and item keep the first or the last, keep all, or stop with an error.
        cold_items: this share of the items, drawn by the seed, is withheld: only test events may show them.
        item_vectors: item feature name -> vectors made elsewhere, of texts or images, joined by the item id as text.
        on_bad_rows: stop with an error that names the bad rows, or put them aside into rejected.parquet and go on.
        seed: draws the cold items and the random tie break.

    Returns:
        The manifest, as written.

    Raises:
        ValueError: for bad rows or options that do not fit the data; nothing is written then.
        FileNotFoundError: where the raw data are not; the message says what to put where.
    """
    check_option("tie_break", tie_break, TieBreak)
    check_option("repeats", repeats, Repeats)
    check_option("on_bad_rows", on_bad_rows, OnBadRows)
    check_least("core", core, 0)
    if not 0 <= cold_items < 1:
        raise ValueError(f"cold_items is {cold_items}, expected a share of the items: at least 0 and below 1")
    item_vectors = item_vectors or {}
    options = {
        **locals(),
        "source": source.describe(),
        "split": split.describe(),
        "item_vectors": {name: asdict(vectors) for name, vectors in item_vectors.items()},
    }
    with atomic_write(output, "dataset") as folder:
        folder.mkdir()
        with source.open() as tables:
            if split.needs_time and not tables.has_time:
                raise ValueError(
                    f"{type(split).__name__} needs times, and {tables.events.file} has only an order; use LeaveOneOut"
                )
            if taken := sorted(item_vectors.keys() & tables.item_features.keys()):
                raise ValueError(
                    f"item_vectors has the names {taken}, which are of other item features; rename the vectors"
                )
            counts: dict[str, int] = {}
            events, bad_events = load_events(tables, min_rating, on_bad_rows, counts)
            events = keep_core(drop_repeats(sort_events(events, tie_break, seed), repeats, counts), core, counts)
            if counts["removed_by_core"]:
                events.renumber()
            offsets = compute_offsets(events.user, len(events.user_ids))
            ties = tie_shares(events.time, offsets)
            if tables.ticks > 1:
                events.time = events.time // tables.ticks
            if isinstance(split, Marked):
                train_end, val_end = split.ends(events.time, offsets, events.part)
            elif events.part is None:
                train_end, val_end = split.ends(events.time, offsets)
            else:
                raise ValueError(f"{tables.events.file} marks what events are for; use split: Marked, or no part")
            too_short = int((np.diff(offsets) < split.min_events).sum())
            cold = sample_cold(len(events.item_ids), cold_items, seed)
            events, offsets, train_end, val_end = withhold_cold_items(events, offsets, train_end, val_end, cold, counts)

            arrays: dict[str, np.ndarray] = {
                c.EVENT_ITEMS: events.item,
                c.EVENT_TIMES: events.time,
                c.USER_OFFSETS: offsets,
                c.TRAIN_ENDS: train_end,
                c.VAL_ENDS: val_end,
                c.ITEM_COLD: cold,
            }
            if events.rating is not None:
                arrays[c.EVENT_RATINGS] = events.rating
            if events.action is not None:
                arrays[c.EVENT_ACTIONS] = events.action
            for name, array in arrays.items():
                np.save(folder / name, array)

            item_features, bad_items = write_side(
                folder, "item", events.item_ids, tables.items, tables.item_features, on_bad_rows, counts
            )
            item_features += [
                write_vectors(folder, name, events.item_ids, vectors, counts) for name, vectors in item_vectors.items()
            ]
            user_features, bad_users = write_side(
                folder, "user", events.user_ids, tables.users, tables.user_features, on_bad_rows, counts
            )
            rejected = pl.concat([bad_events, bad_items, bad_users])
            if len(rejected):
                rejected.write_parquet(folder / c.REJECTED)

            counts |= {
                "events": len(events.item),
                "users": len(events.user_ids),
                "items": len(events.item_ids),
                "users_too_short": too_short,
                "rejected": len(rejected),
                "train_events": int((train_end - offsets[:-1]).sum()),
                "val_events": int((val_end - train_end).sum()),
                "test_events": int((offsets[1:] - val_end).sum()),
                "val_users": int((train_end < val_end).sum()),
                "test_users": int((val_end < offsets[1:]).sum()),
            }
            warn(counts, repeats)
            inputs = [*tables.files, *(file for vectors in item_vectors.values() for file in vectors.files)]
            write_manifest(
                folder,
                "dataset",
                options,
                {str(file): file for file in inputs},
                inputs=[str(path) for path in [*inputs, *tables.folders]],  # make looks whether one is newer
                counts=counts,
                ties=ties,
                protocol={
                    **split.describe(),
                    "tie_break": tie_break,
                    "min_rating": min_rating,
                    "core": core,
                    "repeats": repeats,
                    "time": "seconds" if tables.has_time else "order",
                    "cold_items": cold_items,
                    "seed": seed,
                    "candidates": "all rated items",
                },
                has={
                    "time": tables.has_time,
                    "rating": events.rating is not None,
                    "action": events.action is not None,
                },
                features={"items": item_features, "users": user_features},
                actions=events.action_names,
                max_history=int(np.diff(offsets).max()),
                split_hash=split_hash(offsets, events.item, train_end, val_end, events.user_ids, events.item_ids),
            )
    return read_manifest(output, "dataset", "recsys prepare-data")


def split_hash(
    offsets: np.ndarray,
    items: np.ndarray,
    train_ends: np.ndarray,
    val_ends: np.ndarray,
    user_ids: pl.Series,
    item_ids: pl.Series,
) -> str:
    """SHA-256 of who did what in which order, where training and validation end, and what the numbers stand for."""
    ids = [np.frombuffer("\0".join(column.cast(pl.String)).encode(), np.uint8) for column in (user_ids, item_ids)]
    return hash_arrays(offsets, items, train_ends, val_ends, *ids)


def warn(counts: dict[str, int], repeats: Repeats) -> None:
    """What is ordinary in a log, and yet worth a word."""
    done = {"first": "the first of each is kept", "last": "the last of each is kept", "keep": "all are kept"}
    for name, words in {
        "repeats": f"events repeat a user's item ({done.get(repeats)}: repeats={repeats})",
        "items_without_metadata": "items are not in the item table; their features are unknown",
        "users_without_metadata": "users are not in the user table; their features are unknown",
        "users_too_short": "users have too few events to be evaluated; they only train",
        "rejected": f"bad rows are put aside in {c.REJECTED}",
    }.items():
        if counts[name]:
            log.warning("%s %s", f"{counts[name]:,}", words)
