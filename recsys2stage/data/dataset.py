"""A prepared dataset as memory-mapped arrays; each read is one vectorized gather over many users."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recsys2stage import columns as c
from recsys2stage.artifacts import read_array, read_manifest
from recsys2stage.data.batches import Padded, Ragged, left_aligned, padded_indices, spans
from recsys2stage.data.manifest import check_dataset_manifest
from recsys2stage.data.split import basket_starts
from recsys2stage.options import Part, RequestTime, Seen, Until, check_integer, check_option

At = Part | Literal["all"] | np.ndarray  # the val or test target, after the last event, or (B,) indices of targets


def no_items(rows: int) -> Ragged:
    """Rows without items."""
    return Ragged(np.zeros(0, dtype=np.int64), np.zeros(rows + 1, dtype=np.int64))


class Dataset:
    """A dataset written by `recsys prepare-data`. U users are 0..U-1, V items are 1..V.

    Args:
        path: folder of the prepared dataset.
        until: each user's training events are those before the validation targets (`val`), those before the test
            targets (`test`), or all (`end`). All but `val` are for a refit, when validation has chosen everything.
    """

    fold: str | None = None  # users whose training events are left out, see `without_fold`

    def __init__(self, path: str | Path, until: Until = "val") -> None:
        check_option("until", until, Until)
        self.path = Path(path)
        self.manifest = read_manifest(path, "dataset", f"recsys prepare-data --config CONFIG --output {path}")
        check_dataset_manifest(self.manifest, self.path / c.MANIFEST)
        read_array(self.path / c.ITEM_COLD, np.bool_, (self.num_items + 1,))  # so that the count of items is true
        self.items = self._load(c.EVENT_ITEMS)
        self.times = self._load(c.EVENT_TIMES)
        self.offsets = self._load(c.USER_OFFSETS)
        self.val_starts = self._load(c.TRAIN_ENDS)
        self.val_ends = self._load(c.VAL_ENDS)
        self.listed_targets = self._load_targets()
        self.until = until
        self.train_ends = {"val": self.val_starts, "test": self.val_ends, "end": self.offsets[1:]}[until]
        self.ratings = self._load(c.EVENT_RATINGS) if self.manifest["has"]["rating"] else None
        self.actions = self._load(c.EVENT_ACTIONS) if self.manifest["has"]["action"] else None

    def _load(self, name: str) -> np.ndarray:
        return read_array(self.path / name)

    def _load_targets(self) -> dict[str, np.ndarray] | None:
        """Validation and test targets of a split with several per user, checked; None: one per user."""
        if "targets" not in self.manifest:
            return None
        bounds = {"val": (self.val_starts, self.val_ends), "test": (self.val_ends, self.offsets[1:])}
        listed = {}
        for (part, (starts, ends)), name in zip(bounds.items(), (c.VAL_TARGETS, c.TEST_TARGETS), strict=True):
            events = np.array(read_array(self.path / name, np.int64, (None,)))
            inside = (events >= 0) & (events < len(self.items))
            users = self.event_users(np.where(inside, events, 0))
            fit = inside & (events >= np.asarray(starts)[users]) & (events < np.asarray(ends)[users])
            if not fit.all() or (np.diff(events) <= 0).any():
                raise ValueError(
                    f"{self.path / name} has {int((~fit).sum()):,} events outside the {part} part or is not in order, "
                    f"expected ascending indices of {part} events; make it again: recsys prepare-data"
                )
            listed[part] = events
        return listed

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        return int(self.manifest["counts"]["items"])

    @property
    def has_time(self) -> bool:
        """Whether times are seconds; if not, they only give an order."""
        return bool(self.manifest["has"]["time"])

    @property
    def action_names(self) -> list[str]:
        """Action types: number n is action_names[n - 1], 0 is unknown."""
        return self.manifest["actions"]

    @property
    def protocol(self) -> dict[str, Any]:
        return self.manifest["protocol"]

    @property
    def seen_rule(self) -> Seen:
        """`keep` if the dataset keeps repeated events, because a seen item can then be the target; else `filter`."""
        return "keep" if self.protocol["repeats"] == "keep" else "filter"

    @cached_property
    def cold(self) -> np.ndarray:
        """Cold items, withheld from all training, (V + 1,) bool."""
        return np.array(read_array(self.path / c.ITEM_COLD))

    @cached_property
    def train_counts(self) -> np.ndarray:
        """Training events of each item, (V + 1,) int64."""
        train = spans(self.offsets[:-1], self.train_ends)
        return np.bincount(self.items[train.values], minlength=self.num_items + 1)

    @cached_property
    def target_counts(self) -> np.ndarray:
        """How often each item is a training target, (V + 1,) int64: in each training event except a user's first."""
        first = np.asarray(self.offsets[:-1])
        first = np.asarray(self.items[first[np.asarray(self.train_ends) > first]])
        return self.train_counts - np.bincount(first, minlength=self.num_items + 1)

    @cached_property
    def last_times(self) -> np.ndarray:
        """Seconds of each item's newest training event, 0 where it has none, (V + 1,) int64."""
        train = spans(self.offsets[:-1], self.train_ends).values
        newest = np.zeros(self.num_items + 1, dtype=np.int64)
        np.maximum.at(newest, self.items[train], self.times[train])
        return newest

    def event_users(self, events: np.ndarray) -> np.ndarray:
        """User of each event, (n,) int64."""
        return np.searchsorted(self.offsets, events, side="right") - 1

    def users(self, split: Part) -> np.ndarray:
        """Users that have a target in this split, ascending, (B,) int64."""
        if self.listed_targets is not None:
            return np.unique(self.target_events(split)[0])
        indices = self.target_indices(split)
        return np.flatnonzero(indices < (self.val_ends if split == "val" else self.offsets[1:]))

    def target_indices(self, split: Part) -> np.ndarray:
        """Index of each user's first target among all events; valid for `users(split)` only, (U,) int64."""
        check_option("split", split, Part)
        first = np.asarray(self.val_starts if split == "val" else self.val_ends)
        if self.listed_targets is None:
            return first
        users, events = self.target_events(split)
        own, row = np.unique(users, return_index=True)
        first = np.array(first)
        first[own] = events[row]
        return first

    def target_events(self, split: Part) -> tuple[np.ndarray, np.ndarray]:
        """All targets that evaluation and early stopping use: users and event indices, ascending, (n,) int64 each.

        One per user of `users(split)`, or several where the split lists them (`SessionStarts`, `Baskets`). `ends` gives
        the end of the history of each.
        """
        check_option("split", split, Part)
        if self.listed_targets is None:
            users = self.users(split)
            return users, self.target_indices(split)[users]
        events = self.listed_targets[split]
        return self.event_users(events), events

    @property
    def baskets(self) -> bool:
        """Whether all events of a target's time are withheld from its history, as with the split `Baskets`."""
        return bool(self.manifest.get("targets", {}).get("baskets", False))

    @cached_property
    def basket_starts(self) -> np.ndarray:
        """Index of the first event of each event's basket, the events of the same user and time, (E,) int64."""
        return basket_starts(np.asarray(self.times), np.asarray(self.offsets))

    def events(self, starts: np.ndarray, ends: np.ndarray) -> Padded:
        """Events starts[b] .. ends[b] - 1 of each row, left-aligned."""
        return left_aligned(self.items, self.times, starts, ends, self.ratings, self.actions)

    def ends(self, users: np.ndarray, at: At) -> np.ndarray:
        """End of each history, (B,) int64: the index of the target or, with baskets, of the first event of its basket.

        Args:
            users: (B,) users.
            at: `val` or `test`: the user's (first) target; `all`: after the last event; or (B,) indices of targets.
        """
        if isinstance(at, str) and at == "all":
            return np.asarray(self.offsets[users + 1])
        targets = self.indices_at(users, at)
        return self.basket_starts[targets] if self.baskets else targets

    def indices_at(self, users: np.ndarray, at: At) -> np.ndarray:
        """Index of each user's target among all events, (B,) int64: `at` itself if it has indices; not `all`."""
        return at if isinstance(at, np.ndarray) else self.target_indices(at)[users]  # type: ignore[arg-type]  # checked there

    def val_targets(self, newest: int | None = None, gap: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Targets of the ranker's lists, by user and time: users and event indices, (n,) int64 each.

        These are all validation events with an earlier event or, where the split lists them, the validation targets.

        Args:
            newest: at most this many newest ones per user; None: all.
            gap: minimum seconds since the previous event.
        """
        if self.listed_targets is None:
            starts = np.maximum(np.asarray(self.val_starts), self.offsets[:-1] + 1)
            targets = spans(starts, np.asarray(self.val_ends))
            users, indices = targets.rows, targets.values
        else:
            users, indices = self.target_events("val")
            late = self.ends(users, indices) > self.offsets[users]
            users, indices = users[late], indices[late]
        if gap:
            late = self.times[indices] - self.times[self.ends(users, indices) - 1] >= gap
            users, indices = users[late], indices[late]
        if newest is not None:
            ends = np.cumsum(np.bincount(users, minlength=self.num_users))
            kept = np.arange(len(users)) >= ends[users] - newest
            users, indices = users[kept], indices[kept]
        return users, indices

    def co_targets(self, users: np.ndarray, at: At) -> Ragged:
        """Items of each target's basket, the target included, which are no negatives of it; none without baskets."""
        if not self.baskets:
            return no_items(len(users))
        starts = self.ends(users, at)
        index = spans(starts, np.searchsorted(self.basket_starts, starts, side="right"))
        return Ragged(self.items[index.values].astype(np.int64), index.offsets)

    def histories(self, users: np.ndarray, at: At, max_length: int) -> Padded:
        """The newest events before each user's target, at most `max_length`."""
        ends = self.ends(users, at)
        return self.events(np.maximum(ends - max_length, self.offsets[users]), ends)._replace(
            user=self.user_values(users)
        )

    def user_values(self, users: np.ndarray) -> tuple[np.ndarray, ...]:
        """The values of each declared user feature, (B, P) each."""
        return tuple(feature["values"][users].reshape(len(users), -1) for feature in self.user_features)

    def seen(self, users: np.ndarray, at: At) -> Ragged:
        """Items of all of a user's events before the target, with repeats."""
        index = spans(np.asarray(self.offsets[users]), self.ends(users, at))
        return Ragged(self.items[index.values].astype(np.int64), index.offsets)

    def filtered_items(self, users: np.ndarray, at: At) -> Ragged:
        """The seen items that are filtered from each user's ranking: all of them, or none with `repeats: keep`.

        With `repeats: keep` a seen item can be the target, and filtering all others would reveal it.
        """
        return self.seen(users, at) if self.seen_rule == "filter" else no_items(len(users))

    def targets(self, users: np.ndarray, at: At) -> np.ndarray:
        """Target item of each user, (B,) int64."""
        return self.items[self.indices_at(users, at)].astype(np.int64)

    def target_action(self, users: np.ndarray, at: At, next_action: str) -> np.ndarray | None:
        """Action type that each request is conditioned on, (B,) int64; None for `next_action: none`.

        Args:
            next_action: none, target (the action type of the target), or the name of one action type for all requests.
        """
        self.check_next_action(next_action)
        if next_action == "none":
            return None
        if next_action == "target" and self.actions is not None:
            return self.actions[self.indices_at(users, at)].astype(np.int64)
        return np.full(len(users), 1 + self.action_names.index(next_action))

    def request_times(self, users: np.ndarray, at: At) -> np.ndarray:
        """Time of each user's target, (B,) int64 seconds."""
        return np.asarray(self.times[self.indices_at(users, at)])

    @cached_property
    def item_features(self) -> list[dict[str, Any]]:
        """The declared item features with their arrays.

        Each is {"name", "kind", "size", "values"}: values are (V + 1,) int32 codes for a categorical, (V + 1, P) int32
        codes padded with 0 for a multi-valued, (V + 1,) float32 for a numeric feature and (V + 1, P) float32 for
        vectors (NaN where unknown).
        """
        return self._features("items")

    @cached_property
    def user_features(self) -> list[dict[str, Any]]:
        """The declared user features with their arrays: as `item_features`, with one row per user, from 0."""
        return self._features("users")

    def _features(self, owner: Literal["items", "users"]) -> list[dict[str, Any]]:
        return [{**feature, "values": self._feature(owner, feature)} for feature in self.manifest["features"][owner]]

    def _feature(self, owner: str, feature: dict[str, Any]) -> np.ndarray:
        name, kind = feature_stem(owner, feature["name"]), feature["kind"]
        if kind in ("numeric", "vector"):
            return np.array(read_array(self.path / f"{name}.values.npy"))
        codes = np.array(read_array(self.path / f"{name}.codes.npy"))
        if kind == "categorical":
            return codes
        offsets = np.array(read_array(self.path / f"{name}.offsets.npy"))
        index, real = padded_indices(offsets[:-1], offsets[1:])
        return np.where(real, np.append(codes, c.UNKNOWN)[index], c.UNKNOWN).astype(np.int32)

    def check_split(self, folder: Path, split_hash: str | None) -> None:
        """Raises a ValueError for an artifact trained on another split.

        Args:
            folder: the artifact.
            split_hash: of the dataset it was made from; None: not recorded.
        """
        if split_hash is None:
            raise ValueError(
                f"{folder} has no split hash, expected that of {self.path}; fit it again by "
                "recsys fit, on a data module with a dataset"
            )
        if split_hash != self.manifest["split_hash"]:
            raise ValueError(
                f"{folder} was made from a dataset with split hash {split_hash[:12]}…, but {self.path} has "
                f"{self.manifest['split_hash'][:12]}…: its test events may have been trained on; make {folder} again"
            )

    def check_request_time(self, request_time: RequestTime) -> None:
        check_option("request_time", request_time, RequestTime)
        if request_time != "none" and not self.has_time:
            raise ValueError(
                f"request_time is {request_time!r} but {self.path} has an order and no times; use request_time: none"
            )

    def check_next_action(self, next_action: str) -> None:
        if next_action == "none":
            return
        if self.actions is None:
            raise ValueError(
                f"next_action is {next_action!r} but the events of {self.path} have no action types; use "
                "next_action: none, or prepare the data with a column of actions"
            )
        if next_action not in ("target", *self.action_names):
            raise ValueError(
                f"next_action is {next_action!r}, expected none, target or one of {', '.join(self.action_names)}"
            )


def sample_users(users: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """A random sample of `count` users, or all users, ascending."""
    if count is not None:
        check_integer("users", count, other="null for all")
    if count is None or count >= len(users):
        return users
    return np.sort(np.random.default_rng(seed).choice(users, count, replace=False))


def feature_stem(owner: str, name: str) -> str:
    """Beginning of the file names of a feature. A slash, which no file name can hold, is written as %2F.

    Args:
        owner: items or users.
        name: of the feature.
    """
    return f"{owner}.{name.replace('/', '%2F')}"


def feature_specs(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Feature declarations that models are built from: `values` is the number of values per row, not the array."""
    return [
        {"name": f["name"], "kind": f["kind"], "size": f["size"], "values": f["values"][0].size or 1} for f in features
    ]
