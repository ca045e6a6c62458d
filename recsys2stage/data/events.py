"""Event columns: loading, integer encoding of ids, sorting, deduplication, k-core filtering and cold-item withholding.

E events, U users, V items.
"""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.data import ids as id_rule
from recsys2stage.data.checks import OnBadRows, read
from recsys2stage.data.event_times import check_times, warn_isolated_newest
from recsys2stage.data.hashing import splitmix64
from recsys2stage.data.sources.base import Tables
from recsys2stage.options import Repeats

TieBreak = Literal["file_order", "item_id", "hash"]


@dataclass
class Events:
    """Event columns. Users are numbered from 0 and items from 1, in the order of their sorted raw ids."""

    user: np.ndarray  # (E,) int32
    item: np.ndarray  # (E,) int32
    time: np.ndarray  # (E,) int64
    rating: np.ndarray | None  # (E,) float32
    action: np.ndarray | None  # (E,) int32, 0 = unknown
    user_ids: pl.Series  # (U,)
    item_ids: pl.Series  # (V,)
    action_names: list[str]
    part: np.ndarray | None = None  # (E,) int8, index in PARTS

    def take(self, rows: np.ndarray) -> "Events":
        """Selects rows in place, by indices or a boolean mask."""
        for name in (field.name for field in fields(self)):
            column = getattr(self, name)
            if isinstance(column, np.ndarray):  # one column at a time, to limit peak memory
                setattr(self, name, column[rows])
        return self

    def renumber(self) -> "Events":
        """Renumbers users and items without gaps, after some have lost all their events."""
        self.user, left = factorize(self.user)
        self.user_ids = self.user_ids.gather(left)
        self.item, left = factorize(self.item)
        self.item_ids = self.item_ids.gather(left - 1)
        self.item += 1
        return self


def load_events(
    tables: Tables, min_rating: float | int | None, on_bad_rows: OnBadRows, counts: dict[str, int]
) -> tuple[Events, pl.DataFrame]:
    """Reads and validates events, filters them by rating and encodes their ids. File order is kept.

    Returns:
        The events, and the rejected rows.
    """
    needs = (c.USER_ID, c.ITEM_ID, c.TIME) if tables.has_time else (c.USER_ID, c.ITEM_ID)
    packed = (c.USER_ID, c.ITEM_ID, c.ACTION)
    frame, rejected = read(tables.events, on_bad_rows, needs, packed)
    if tables.has_time and (narrower := check_times(tables.events, frame[c.TIME], tables.ticks)):
        frame, rejected = read(narrower, on_bad_rows, needs, packed)
    if tables.has_time:
        warn_isolated_newest(frame, tables.ticks, tables.events.file)
    counts["events_read"] = len(frame) + len(rejected)
    counts["removed_by_rating"] = 0
    if min_rating is not None:
        if c.RATING not in frame.columns:
            raise ValueError(
                f"min_rating is {min_rating}, but {tables.events.file} has no ratings; name the column of ratings in "
                "the source, or leave min_rating out"
            )
        kept = frame.filter(pl.col(c.RATING) >= min_rating)
        if kept.is_empty():
            raise ValueError(
                f"min_rating is {min_rating}, but no event of {tables.events.file} has a rating of {min_rating} or "
                "more, "
                f"expected at most {float(frame[c.RATING].max()):g}; lower it"  # type: ignore[arg-type]  # a number
            )
        counts["removed_by_rating"] = len(frame) - len(kept)
        frame = kept
    columns = {series.name: series for series in frame.get_columns()}
    del frame  # to free each raw column as soon as it is encoded
    user, user_ids = encode_ids(columns.pop(c.USER_ID), tables.untyped_ids)
    item, item_ids = encode_ids(columns.pop(c.ITEM_ID), tables.untyped_ids)
    item += 1
    for ids in (user_ids, item_ids):
        if ids.dtype == pl.String:
            id_rule.warn_ambiguous_ids(ids, ids.name, tables.events.file)
    action, action_names = None, []
    if c.ACTION in columns:
        actions = columns.pop(c.ACTION).cast(pl.String)
        action_names = actions.drop_nulls().unique().sort().to_list()
        action = encode_categories(actions, action_names)
    rating = columns.pop(c.RATING).cast(pl.Float32).to_numpy() if c.RATING in columns else None
    # without times, the row number in the file
    time = columns.pop(c.TIME).cast(pl.Int64).to_numpy() if c.TIME in columns else np.arange(len(user), dtype=np.int64)
    part = columns.pop(c.PART).to_numpy() if c.PART in columns else None
    return Events(user, item, time, rating, action, user_ids, item_ids, action_names, part), rejected


def encode_ids(ids: pl.Series, untyped: bool) -> tuple[np.ndarray, pl.Series]:
    """Encodes ids as integers from 0 in sorted order. Returns the codes and the sorted ids.

    Args:
        untyped: the file format has no types (CSV): if every id is a plain integer, ids are integers and sort as such.
    """
    if isinstance(ids.dtype, pl.Categorical):
        values = ids.unique()
        text = values.cast(pl.String)
        if untyped:
            text = id_rule.narrow_ids(text)
        order = text.arg_sort()
        physical = values.to_physical().gather(order).to_numpy()
        table = np.zeros(int(physical.max()) + 1, np.int32)
        table[physical] = np.arange(len(physical), dtype=np.int32)
        return table[ids.to_physical().to_numpy()], text.gather(order).rename(ids.name)
    if ids.dtype in (pl.UInt64, pl.Int128, pl.UInt128):
        ids = id_rule.narrow_ids(ids)
    if ids.dtype.is_integer():
        raw = ids.to_numpy()
        if int(raw.max()) - int(raw.min()) < 4 * len(raw) + 1_000_000:  # the lookup table is small
            codes, raw = factorize(raw)
            return codes, pl.Series(ids.name, raw)
    values = ids.unique().sort()
    codes = values.search_sorted(ids).cast(pl.Int32).to_numpy(writable=True)
    return codes, values if values.dtype == pl.String else id_rule.narrow_ids(values)


def factorize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encodes integers as int32 codes from 0, with a lookup table over their range. Returns codes and sorted values."""
    low = int(values.min())
    present = np.zeros(int(values.max()) - low + 1, bool)
    shifted = subtract_min(values, low)
    present[shifted] = True
    table = np.cumsum(present, dtype=np.int32)
    table -= 1
    distinct = np.flatnonzero(present)
    return table[shifted], distinct.astype(np.uint64) + np.uint64(low) if values.dtype == np.uint64 else distinct + low


def subtract_min(values: np.ndarray, low: int) -> np.ndarray:
    """Returns values - low, in int64 where the values' own type could overflow."""
    if values.dtype == np.uint64:
        return (values - np.uint64(low)).astype(np.int64)
    if low < 0 and values.dtype != np.int64:
        values = values.astype(np.int64)
    return values - low if low else values


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """Stable argsort by several keys, the first key most significant.

    Each key, from last to first, is packed with the row index into one int64 and sorted, which is several times faster
    in numpy than a stable argsort.
    """
    order: np.ndarray | None = None
    row_bits = (len(keys[0]) - 1).bit_length()
    for key in reversed(keys):
        key = key if order is None else key[order]
        low, high = int(key.min()), int(key.max())
        if (high - low).bit_length() + row_bits <= 63:
            packed = subtract_min(key, low).astype(np.int64, copy=low == 0)
            packed <<= row_bits
            packed |= np.arange(len(key))
            packed.sort()
            packed &= (1 << row_bits) - 1
        else:
            packed = np.argsort(key, kind="stable")
        order = packed if order is None else order[packed]
    assert order is not None
    return order


def sort_events(events: Events, tie_break: TieBreak, seed: int) -> Events:
    """Sorts by user and time. Ties in time are ordered by part (train, val, test), then by `tie_break`."""
    keys = [events.user, events.time]
    if events.part is not None:
        keys.append(events.part)
    if tie_break != "file_order":
        keys.append(events.item if tie_break == "item_id" else hash_pairs(events.user, events.item, seed))
    return events.take(stable_order(*keys))


def hash_pairs(user: np.ndarray, item: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random 32-bit hash of each (user, item), independent of all other events."""
    pair = (user.astype(np.uint64) << np.uint64(32)) | item.astype(np.uint64)
    return (splitmix64(pair, seed) >> np.uint64(32)).astype(np.int64)


def drop_repeats(events: Events, repeats: Repeats, counts: dict[str, int]) -> Events:
    """Drops repeated (user, item) events as `repeats` says: keep the first, the last or all, or raise an error."""
    pair = events.user.astype(np.int64) * (len(events.item_ids) + 1) + events.item
    ordered = np.sort(pair)
    counts["repeats"] = int((ordered[1:] == ordered[:-1]).sum())
    if not counts["repeats"] or repeats == "keep":
        return events
    if repeats == "error":
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        first = [divmod(int(one), len(events.item_ids) + 1) for one in twice[:3]]
        examples = ", ".join(f"(user {events.user_ids[u]}, item {events.item_ids[i - 1]})" for u, i in first)
        raise ValueError(
            f"{len(twice)} (user, item) pairs have more than one event, {counts['repeats']} extra events; "
            f"first {examples}; choose which to keep: set repeats to first, last or keep"
        )
    order = stable_order(pair)
    ordered = pair[order]
    same = ordered[1:] == ordered[:-1]
    kept = np.ones(len(pair), bool)
    kept[(order[1:] if repeats == "first" else order[:-1])[same]] = False
    return events.take(kept)


def keep_core(events: Events, core: int, counts: dict[str, int]) -> Events:
    """k-core filter: repeatedly drops users and items with fewer than `core` events."""
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
            raise ValueError(
                f"core is {core}, and none of {before:,} events is left, expected users and items with as many events; "
                "lower core"
            )
    counts["removed_by_core"] = before - len(user)
    return events.take(kept) if len(user) < before else events


def compute_offsets(user: np.ndarray, users: int) -> np.ndarray:
    """(U + 1,) int64: user u owns events [offsets[u], offsets[u + 1])."""
    return np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))]).astype(np.int64)


def tie_shares(time: np.ndarray, offsets: np.ndarray) -> dict[str, float]:
    """Share of events tied in time with another event of the same user, and of users with a tied last event."""
    same = time[1:] == time[:-1]
    same[offsets[1:-1] - 1] = False  # not across users
    tied = np.zeros(len(time), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return {"events_share": float(tied.mean()), "last_time_share": float(tied[offsets[1:] - 1].mean())}


def sample_cold(items: int, share: float, seed: int) -> np.ndarray:
    """(V + 1,) bool: cold items, which are withheld from training; sampled independently of their events."""
    cold = np.zeros(items + 1, bool)
    cold[1 + np.random.default_rng(seed).choice(items, round(share * items), replace=False)] = True
    return cold


def withhold_cold_items(
    events: Events,
    offsets: np.ndarray,
    train_end: np.ndarray,
    val_end: np.ndarray,
    targets: tuple[np.ndarray, np.ndarray] | None,
    cold: np.ndarray,
    counts: dict[str, int],
) -> tuple[Events, np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """Removes cold items from the training and validation events and targets, and users without remaining events."""
    counts["cold_items"], counts["cold_events"] = int(cold.sum()), 0
    if not counts["cold_items"]:
        return events, offsets, train_end, val_end, targets
    tests = np.arange(len(events.user)) >= np.repeat(val_end, np.diff(offsets))
    kept = tests | ~cold[events.item]
    counts["cold_events"] = int((~kept).sum())
    before = np.concatenate([[0], np.cumsum(kept)])  # number of events kept before each row
    offsets, train_end, val_end = before[offsets], before[train_end], before[val_end]
    left = np.diff(offsets) > 0
    if targets is not None:
        val, test = (before[own[kept[own]]] for own in targets)
        targets = val, test
    events = events.take(kept)
    events.user, _ = factorize(events.user)
    events.user_ids = events.user_ids.filter(pl.Series(left))
    return events, np.append(offsets[:-1][left], offsets[-1]), train_end[left], val_end[left], targets


def encode_categories(values: pl.Series, names: list[str]) -> np.ndarray:
    """int32 codes: 0 = unknown, else 1 + the index in the sorted names."""
    return (values.cast(pl.Enum(names)).to_physical().cast(pl.Int32) + 1).fill_null(c.UNKNOWN).to_numpy()
