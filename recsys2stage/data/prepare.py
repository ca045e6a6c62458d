"""The `prepare-data` verb: turns raw events into a prepared dataset (sorted event arrays, split, features, manifest).

E events, U users, V items.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write, hash_arrays, read_manifest, write_manifest
from recsys2stage.data.checks import OnBadRows, with_default_columns
from recsys2stage.data.events import (
    Events,
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
from recsys2stage.data.locks import locked
from recsys2stage.data.manifest import EVENT_COLUMNS
from recsys2stage.data.side_tables import write_side, write_vectors
from recsys2stage.data.sources.base import Source
from recsys2stage.data.sources.vectors import Vectors
from recsys2stage.data.split import LeaveOneOut, Marked, Split, basket_starts
from recsys2stage.data.summary import dataset_summary
from recsys2stage.options import Repeats, check_integer, check_number, check_option, check_seed

log = logging.getLogger("recsys2stage")


def prepare(
    source: Source,
    output: Path,
    split: Split | None = None,
    min_rating: float | int | None = None,
    core: int = 0,
    tie_break: TieBreak = "file_order",
    repeats: Repeats = "first",
    cold_items: float = 0.0,
    item_vectors: dict[str, Vectors] | None = None,
    on_bad_rows: OnBadRows = "error",
    seed: int = 0,
) -> dict[str, Any]:
    """Prepare a dataset from raw events: sort, encode ids, split, and write arrays, features and a manifest.

    By default all users are kept, and events of equal time stay in file order.

    Args:
        source: reader of the raw data.
        output: the folder to write. An existing folder is replaced once the new one is complete.
        split: assigns events to training, validation and test. None: LeaveOneOut, which withholds each user's last two
            events.
        min_rating: drop events rated lower than this.
        core: k-core filter: repeatedly drop users and items with fewer events than this; 0 or 1 drops none.
        tie_break: order of a user's events of equal time: as in the file, by item id, or by a seeded hash.
        repeats: of events with the same user and item, keep the first, the last or all, or stop with an error.
        cold_items: share of the items, sampled with the seed, to withhold: they occur in test events only.
        item_vectors: feature name -> precomputed item embeddings (text, images), joined by item id as text.
        on_bad_rows: stop with an error that names the bad rows, or write them to rejected.parquet and continue.
        seed: of the cold items and the hash tie break.

    Returns:
        The manifest, as written.

    Raises:
        ValueError: for bad rows, or options that do not fit the data. Nothing is written in that case.
        FileNotFoundError: if the raw data are missing. The message says which files to put where.
    """
    check_option("tie_break", tie_break, TieBreak)
    check_option("repeats", repeats, Repeats)
    check_option("on_bad_rows", on_bad_rows, OnBadRows)
    other = "null for all ratings"
    check_number("min_rating", min_rating, other=other, example=4)
    check_integer("core", core, 0, example=5)
    check_number("cold_items", cold_items, low=0, below=1, example=0.05, what="a share of the items")
    check_seed("seed", seed)
    # no default instance: on the command line its options would pass to another class that has options of their names
    split = split or LeaveOneOut()
    item_vectors = item_vectors or {}
    options = {
        **locals(),
        "source": source.describe(),
        "split": split.describe(),
        "item_vectors": {name: asdict(vectors) for name, vectors in item_vectors.items()},
    }
    with locked(output), atomic_write(output, "dataset") as folder:
        folder.mkdir()
        with source.open() as tables:
            if split.needs_time and not tables.has_time:
                raise ValueError(
                    f"{type(split).__name__} needs times, but {tables.events.file} has only an order; use LeaveOneOut"
                )
            if taken := sorted(item_vectors.keys() & tables.item_features.keys()):
                raise ValueError(
                    f"item_vectors uses the names {taken}, which other item features have, expected new ones; rename "
                    "the vectors"
                )
            counts: dict[str, int] = {}
            named = with_default_columns(tables.events).columns
            events, bad_events = load_events(tables, min_rating, on_bad_rows, counts)
            logged = len(events.user)
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
                raise ValueError(f"{tables.events.file} has a part column; use split: Marked, or leave out part")
            too_short = int((np.diff(offsets) < split.min_events).sum())
            cold = sample_cold(len(events.item_ids), cold_items, seed)
            targets = split.targets(events.time, offsets)
            if targets is not None and split.baskets:
                targets = drop_repeated_targets(targets, events, offsets)
            events, offsets, train_end, val_end, targets = withhold_cold_items(
                events, offsets, train_end, val_end, targets, cold, counts
            )

            arrays: dict[str, np.ndarray] = {
                c.EVENT_ITEMS: events.item,
                c.EVENT_TIMES: events.time,
                c.USER_OFFSETS: offsets,
                c.TRAIN_ENDS: train_end,
                c.VAL_ENDS: val_end,
                c.ITEM_COLD: cold,
            }
            if targets is not None:
                arrays |= dict(zip((c.VAL_TARGETS, c.TEST_TARGETS), targets, strict=True))
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
            if targets is not None:
                for part, own in zip(("val", "test"), targets, strict=True):
                    counts[f"{part}_targets"] = len(own)
                    counts[f"{part}_users"] = len(np.unique(np.searchsorted(offsets, own, side="right")))
            warn(counts, repeats, logged)
            inputs = [*tables.files, *(file for vectors in item_vectors.values() for file in vectors.files)]
            write_manifest(
                folder,
                "dataset",
                options,
                {str(file): file for file in inputs},
                inputs=[str(path) for path in [*inputs, *tables.folders]],  # make notes their hashes
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
                log={
                    "columns": {name: column.name for name, column in named.items() if name in EVENT_COLUMNS},
                    "time_unit": tables.time_unit if tables.has_time else "order",
                },
                actions=events.action_names,
                max_history=int(np.diff(offsets).max()),
                **({} if targets is None else {"targets": {"baskets": split.baskets}}),
                split_hash=split_hash(
                    offsets, events.item, train_end, val_end, events.user_ids, events.item_ids, targets
                ),
            )
    manifest = read_manifest(output, "dataset", "recsys prepare-data")
    dataset_summary(output, manifest)
    return manifest


def split_hash(
    offsets: np.ndarray,
    items: np.ndarray,
    train_ends: np.ndarray,
    val_ends: np.ndarray,
    user_ids: pl.Series,
    item_ids: pl.Series,
    targets: tuple[np.ndarray, np.ndarray] | None = None,
) -> str:
    """SHA-256 of the event sequences, the ends of training and validation, the raw ids, and the targets if listed."""
    ids = [np.frombuffer("\0".join(column.cast(pl.String)).encode(), np.uint8) for column in (user_ids, item_ids)]
    return hash_arrays(offsets, items, train_ends, val_ends, *ids, *(targets or ()))


def drop_repeated_targets(
    targets: tuple[np.ndarray, np.ndarray], events: Events, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keeps one target per item of a basket: a user may have bought an item several times at once."""
    start = basket_starts(events.time, offsets)
    kept = []
    for own in targets:
        _, first = np.unique(start[own] * (len(events.item_ids) + 1) + events.item[own], return_index=True)
        kept.append(own[np.sort(first)])
    return kept[0], kept[1]


def warn(counts: dict[str, int], repeats: Repeats, logged: int) -> None:
    """Logs repeats, missing metadata, short histories and rejected rows.

    Args:
        counts: the counts of the manifest.
        repeats: what was done with repeated events.
        logged: number of events before repeats were dropped.
    """
    if counts["repeats"]:
        kept = {"first": "the first of each is kept", "last": "the last of each is kept", "keep": "all are kept"}
        advice = "" if repeats == "keep" else "; to keep them and recommend seen items again: --repeats keep"
        log.warning(
            "%s of %s events (%s) %s a (user, item) pair (%s: repeats=%s)%s",
            *(f"{counts['repeats']:,}", f"{logged:,}", _percent(counts["repeats"] / logged)),
            "repeats" if counts["repeats"] == 1 else "repeat",
            *(kept.get(repeats), repeats, advice),
        )
    for name, (one, many, message) in {
        "items_without_metadata": ("item is", "items are", "not in the item table: unknown features"),
        "users_without_metadata": ("user is", "users are", "not in the user table: unknown features"),
        "users_too_short": ("user has", "users have", "too few events for evaluation: used for training only"),
        "rejected": ("bad row is", "bad rows are", f"in {c.REJECTED}"),
    }.items():
        if counts[name]:
            log.warning("%s %s %s", f"{counts[name]:,}", one if counts[name] == 1 else many, message)


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else "under 1 %"
