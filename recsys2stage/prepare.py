"""Raw events to a prepared dataset: arrays of events sorted by user and time, features, and a manifest.

E events, U users, V items throughout.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import hash_arrays, read_manifest, whole, write_manifest
from recsys2stage.checks import REJECTED_SCHEMA, OnBadRows, Rows, read
from recsys2stage.hashing import splitmix64
from recsys2stage.sources.base import Kind, Source, Tables
from recsys2stage.sources.vectors import Vectors
from recsys2stage.split import LeaveOneOut, Marked, Split

log = logging.getLogger("recsys2stage")

TieBreak = Literal["file_order", "item_id", "hash"]
Repeats = Literal["first", "last", "keep", "error"]


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
    if not 0 <= cold_items < 1:
        raise ValueError(f"cold_items is {cold_items}, expected a share of the items: at least 0 and below 1")
    item_vectors = item_vectors or {}
    options = {
        **locals(),
        "source": source.describe(),
        "split": split.describe(),
        "item_vectors": {name: asdict(vectors) for name, vectors in item_vectors.items()},
    }
    with whole(output, "dataset") as folder:
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
            events = keep_core(drop_repeats(sort(events, tie_break, seed), repeats, counts), core, counts)
            if counts["removed_by_core"]:
                events.renumber()
            offsets = offsets_of(events.user, len(events.user_ids))
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
            cold = draw_cold(len(events.item_ids), cold_items, seed)
            events, offsets, train_end, val_end = withhold(events, offsets, train_end, val_end, cold, counts)

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
            write_manifest(
                folder,
                "dataset",
                options,
                {str(file): file for file in [*tables.files, *(f for v in item_vectors.values() for f in v.files)]},
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
                split_hash=hash_arrays(offsets, events.item, train_end, val_end),
            )
    return read_manifest(output, "dataset", "recsys prepare-data")


@dataclass
class Events:
    """Columns of events; where `user_ids` and `item_ids` are sorted raw ids, users count from 0 and items from 1."""

    user: np.ndarray  # (E,) int32
    item: np.ndarray  # (E,) int32
    time: np.ndarray  # (E,) int64
    rating: np.ndarray | None  # (E,) float32
    action: np.ndarray | None  # (E,) int32, 0 = unknown
    user_ids: pl.Series  # (U,)
    item_ids: pl.Series  # (V,)
    action_names: list[str]
    part: np.ndarray | None = None  # (E,) int8, the place in PARTS

    def take(self, rows: np.ndarray) -> "Events":
        """The events at these places, or where a mask is true, in that order."""
        for name in (field.name for field in fields(self)):
            column = getattr(self, name)
            if isinstance(column, np.ndarray):  # one at a time, so that only one is twice in memory
                setattr(self, name, column[rows])
        return self

    def renumber(self) -> "Events":
        """Closes the gaps in the numbers of users and items that lost all their events."""
        self.user, left = number(self.user)
        self.user_ids = self.user_ids.gather(left)
        self.item, left = number(self.item)
        self.item_ids = self.item_ids.gather(left - 1)
        self.item += 1
        return self


def load_events(
    tables: Tables, min_rating: float | int | None, on_bad_rows: OnBadRows, counts: dict[str, int]
) -> tuple[Events, pl.DataFrame]:
    """Reads, checks, filters by rating and numbers; the events stay in the order of the file."""
    needs = (c.USER_ID, c.ITEM_ID, c.TIME) if tables.has_time else (c.USER_ID, c.ITEM_ID)
    frame, rejected = read(tables.events, on_bad_rows, needs, categorical=(c.USER_ID, c.ITEM_ID, c.ACTION))
    counts["events_read"] = len(frame) + len(rejected)
    counts["removed_by_rating"] = 0
    if min_rating is not None:
        if c.RATING not in frame.columns:
            raise ValueError(f"min_rating is {min_rating}, but {tables.events.file} has no ratings")
        kept = frame.filter(pl.col(c.RATING) >= min_rating)
        if kept.is_empty():
            raise ValueError(f"no event of {tables.events.file} has a rating of {min_rating} or more")
        counts["removed_by_rating"] = len(frame) - len(kept)
        frame = kept
    columns = {series.name: series for series in frame.get_columns()}
    del frame  # from here on a column goes when its numbers are there
    user, user_ids = number_ids(columns.pop(c.USER_ID), tables.untyped_ids)
    item, item_ids = number_ids(columns.pop(c.ITEM_ID), tables.untyped_ids)
    item += 1
    action, action_names = None, []
    if c.ACTION in columns:
        named = columns.pop(c.ACTION).cast(pl.String)
        action_names = named.drop_nulls().unique().sort().to_list()
        action = codes_of(named, action_names)
    rating = columns.pop(c.RATING).cast(pl.Float32).to_numpy() if c.RATING in columns else None
    # without times, the place in the log
    time = columns.pop(c.TIME).cast(pl.Int64).to_numpy() if c.TIME in columns else np.arange(len(user), dtype=np.int64)
    part = columns.pop(c.PART).to_numpy() if c.PART in columns else None
    return Events(user, item, time, rating, action, user_ids, item_ids, action_names, part), rejected


def number_ids(ids: pl.Series, untyped: bool) -> tuple[np.ndarray, pl.Series]:
    """Numbers from 0 by sorted id, and the sorted ids.

    Args:
        untyped: text is all there is in the file, so where every id is a plain whole number, they are whole numbers.
    """
    if isinstance(ids.dtype, pl.Categorical):
        values = ids.unique()
        text = values.cast(pl.String)
        if untyped and text.str.contains(c.PLAIN_NUMBER).all():
            text = text.cast(pl.Int64)
        order = text.arg_sort()
        physical = values.to_physical().gather(order).to_numpy()
        table = np.zeros(int(physical.max()) + 1, np.int32)
        table[physical] = np.arange(len(physical), dtype=np.int32)
        return table[ids.to_physical().to_numpy()], text.gather(order).rename(ids.name)
    if ids.dtype.is_integer() and int(ids.max()) - int(ids.min()) < 4 * len(ids) + 1_000_000:  # type: ignore[arg-type]
        codes, raw = number(ids.to_numpy())
        return codes, pl.Series(ids.name, raw)
    values = ids.unique().sort()
    return values.search_sorted(ids).cast(pl.Int32).to_numpy(writable=True), values


def number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers from 0, int32, by a table over the range of whole numbers; and the values, sorted."""
    low = int(values.min())
    seen = np.zeros(int(values.max()) - low + 1, bool)
    shifted = values - low if low else values
    seen[shifted] = True
    table = np.cumsum(seen, dtype=np.int32)
    table -= 1
    return table[shifted], np.flatnonzero(seen) + low


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """Places of rows sorted by keys, the first key first; equal rows stay in their order.

    Each key from the last to the first is sorted together with the row's place in one int64, which numpy does several
    times as fast as a stable argsort.
    """
    order: np.ndarray | None = None
    place_bits = (len(keys[0]) - 1).bit_length()
    for key in reversed(keys):
        key = key if order is None else key[order]
        low, high = int(key.min()), int(key.max())
        if (high - low).bit_length() + place_bits <= 63:
            packed = key.astype(np.int64)
            packed -= low
            packed <<= place_bits
            packed |= np.arange(len(key))
            packed.sort()
            packed &= (1 << place_bits) - 1
        else:
            packed = np.argsort(key, kind="stable")
        order = packed if order is None else order[packed]
    assert order is not None
    return order


def sort(events: Events, tie_break: TieBreak, seed: int) -> Events:
    """By user and time; equal times by what events are marked for, then by the tie break."""
    keys = [events.user, events.time]
    if events.part is not None:
        keys.append(events.part)
    if tie_break != "file_order":
        keys.append(events.item if tie_break == "item_id" else mix(events.user, events.item, seed))
    return events.take(stable_order(*keys))


def mix(user: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random 32-bit number for each (user, item), whatever the other events are."""
    pair = (user.astype(np.uint64) << np.uint64(32)) | item.astype(np.uint64)
    return (splitmix64(pair, seed) >> np.uint64(32)).astype(np.int64)


def drop_repeats(events: Events, repeats: Repeats, counts: dict[str, int]) -> Events:
    """Events whose user had the same item before (or after), by `repeats`."""
    pair = events.user.astype(np.int64) * (len(events.item_ids) + 1) + events.item
    ordered = np.sort(pair)
    counts["repeats"] = int((ordered[1:] == ordered[:-1]).sum())
    if not counts["repeats"] or repeats == "keep":
        return events
    if repeats == "error":
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        first = [divmod(int(one), len(events.item_ids) + 1) for one in twice[:3]]
        shown = ", ".join(f"(user {events.user_ids[u]}, item {events.item_ids[i - 1]})" for u, i in first)
        raise ValueError(
            f"{len(twice)} pairs of user and item have more than one event, {counts['repeats']} events too many; "
            f"first {shown}; choose which to keep with --repeats first, last or keep"
        )
    order = stable_order(pair)
    ordered = pair[order]
    same = ordered[1:] == ordered[:-1]
    kept = np.ones(len(pair), bool)
    kept[(order[1:] if repeats == "first" else order[:-1])[same]] = False
    return events.take(kept)


def keep_core(events: Events, core: int, counts: dict[str, int]) -> Events:
    """Drops users and items with fewer than `core` events, again and again until all left have as many."""
    before = len(events.user)
    kept = np.ones(before, bool)
    user, item = events.user, events.item
    while core > 1:
        enough = (np.bincount(user)[user] >= core) & (np.bincount(item)[item] >= core)
        if enough.all():
            break
        kept[kept] = enough
        user, item = user[enough], item[enough]
        if not len(user):
            raise ValueError(f"core is {core}, and no events are left of {before:,}: choose a smaller core")
    counts["removed_by_core"] = before - len(user)
    return events.take(kept) if len(user) < before else events


def offsets_of(user: np.ndarray, users: int) -> np.ndarray:
    """(U + 1,) int64: user u owns events [offsets[u], offsets[u + 1])."""
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))]).astype(np.int64)


def tie_shares(time: np.ndarray, offsets: np.ndarray) -> dict[str, float]:
    """The share of events that share user and time with another, and of users whose last event does."""
    same = time[1:] == time[:-1]
    same[offsets[1:-1] - 1] = False  # not across users
    tied = np.zeros(len(time), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return {"events_share": float(tied.mean()), "last_time_share": float(tied[offsets[1:] - 1].mean())}


def draw_cold(items: int, share: float, seed: int) -> np.ndarray:
    """(V + 1,) bool: the items withheld from training, drawn without a look at their events."""
    cold = np.zeros(items + 1, bool)
    cold[1 + np.random.default_rng(seed).choice(items, round(share * items), replace=False)] = True
    return cold


def withhold(
    events: Events,
    offsets: np.ndarray,
    train_end: np.ndarray,
    val_end: np.ndarray,
    cold: np.ndarray,
    counts: dict[str, int],
) -> tuple[Events, np.ndarray, np.ndarray, np.ndarray]:
    """Removes cold items from all that trains or validates; users who have no events left are gone."""
    counts["cold_items"], counts["cold_events"] = int(cold.sum()), 0
    if not counts["cold_items"]:
        return events, offsets, train_end, val_end
    tests = np.arange(len(events.user)) >= np.repeat(val_end, np.diff(offsets))
    kept = tests | ~cold[events.item]
    counts["cold_events"] = int((~kept).sum())
    before = np.concatenate([[0], np.cumsum(kept)])  # events kept before each place
    offsets, train_end, val_end = before[offsets], before[train_end], before[val_end]
    left = np.diff(offsets) > 0
    events = events.take(kept)
    events.user, _ = number(events.user)
    events.user_ids = events.user_ids.filter(pl.Series(left))
    return events, np.append(offsets[:-1][left], offsets[-1]), train_end[left], val_end[left]


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
        text_ids = table.select(owner, pl.col(raw_id).cast(pl.String))
        counts[f"{owner}s_without_metadata"] = text_ids.join(once, on=raw_id, how="anti").height
        facts = text_ids.join(once, on=raw_id, how="left", maintain_order="left").drop(owner, raw_id)
        table = pl.concat([table, facts], how="horizontal")
    table.write_parquet(folder / (c.ITEM_TABLE if owner == "item" else c.USER_TABLE))
    return [write_feature(folder, f"{owner}s.{name}", table[name], kind, padding) for name, kind in kinds.items()], bad


def write_feature(folder: Path, stem: str, column: pl.Series, kind: Kind, padding: int) -> dict[str, Any]:
    """Writes the one or two arrays of a feature, with `padding` rows of nothing in front."""
    size = 1
    if kind == "numeric":
        values = column.cast(pl.Float32).fill_null(np.nan).to_numpy()
        np.save(folder / f"{stem}.values.npy", np.concatenate([np.full(padding, np.nan, np.float32), values]))
    elif kind == "categorical":
        text = column.cast(pl.String)
        names = text.drop_nulls().unique().sort().to_list()
        np.save(folder / f"{stem}.codes.npy", np.concatenate([np.zeros(padding, np.int32), codes_of(text, names)]))
        size += len(names)
    else:
        stripped = pl.element().str.strip_chars().replace("", None).drop_nulls()
        lists = column.list.eval(stripped).list.unique(maintain_order=True)
        flat = lists.explode().drop_nulls()
        names = flat.unique().sort().to_list()
        lengths = np.concatenate([np.zeros(1 + padding, np.int64), lists.list.len().fill_null(0).to_numpy()])
        np.save(folder / f"{stem}.codes.npy", codes_of(flat, names))
        np.save(folder / f"{stem}.offsets.npy", np.cumsum(lengths, dtype=np.int64))
        size += len(names)
    return {"name": column.name, "kind": kind, "size": size}


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


def codes_of(values: pl.Series, names: list[str]) -> np.ndarray:
    """int32: 0 = unknown, else 1 + the place in the sorted names."""
    return (values.cast(pl.Enum(names)).to_physical().cast(pl.Int32) + 1).fill_null(c.UNKNOWN).to_numpy()


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
