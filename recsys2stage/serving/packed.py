"""Histories of known users: of a prepared dataset, or packed into a bundle by `export-bundle --with_histories`.

The folder histories/ of a bundle holds, under the names that a prepared dataset has for them, the events' items, times,
ratings and actions, the users' offsets and ids, and features.N.npy with the values of the N-th declared user feature.
Both are memory-mapped: a worker's memory does not grow with the log.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import read_array, take
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.bundle import bundle_data, bundle_manifest, check_split

FOLDER = "histories"
EVENT_FILES = {"items": c.EVENT_ITEMS, "times": c.EVENT_TIMES, "ratings": c.EVENT_RATINGS, "actions": c.EVENT_ACTIONS}
TYPES = {"items": np.int32, "times": np.int64, "ratings": np.float32, "actions": np.int32}


class KnownEvents(NamedTuple):
    """A user's events in the prepared data, oldest first."""

    items: np.ndarray  # (n,) int64 item numbers
    times: np.ndarray  # (n,) int64
    ratings: np.ndarray | None  # (n,) float32
    actions: np.ndarray | None  # (n,) int64
    user: tuple[np.ndarray, ...] | None  # (1, P) of each declared user feature


class KnownUsers:
    """Users by id, with their events.

    Args:
        user_ids: (U,) ids by user number.
        offsets: (U + 1,) int64: user u owns the events [offsets[u], offsets[u + 1]).
        items: (E,) item numbers.
        times: (E,) seconds, or an order.
        ratings: (E,) or None.
        actions: (E,) numbers of action types, or None.
        features: (U, P) values of each declared user feature.
    """

    def __init__(
        self,
        user_ids: pl.Series,
        offsets: np.ndarray,
        items: np.ndarray,
        times: np.ndarray,
        ratings: np.ndarray | None = None,
        actions: np.ndarray | None = None,
        features: tuple[np.ndarray, ...] = (),
    ) -> None:
        self.user_ids, self.offsets, self.items, self.times = user_ids, offsets, items, times
        self.ratings, self.actions, self.features = ratings, actions, features
        self._sorted, self._order = user_ids, None  # ids in ascending order, and the user number of each
        if not user_ids.is_sorted():
            self._order = user_ids.arg_sort().to_numpy()
            self._sorted = user_ids.gather(self._order)

    def __len__(self) -> int:
        return len(self.user_ids)

    def number(self, user_id: str) -> int | None:
        """The user number of an id, given as text; None if it is unknown."""
        value: Any = user_id
        if self._sorted.dtype.is_integer():
            digits = user_id.removeprefix("-")
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 20) or str(int(user_id)) != user_id:
                return None  # 007 is not user 7
            value = int(user_id)
            if not -(1 << 63) <= value < 1 << 63:
                return None
        place = self._sorted.search_sorted(value)
        if place >= len(self._sorted) or self._sorted[place] != value:
            return None
        return int(place) if self._order is None else int(self._order[place])

    def ids(self, start: int, count: int) -> list[str]:
        """Ids of the users start .. start + count - 1, as text."""
        return [str(user_id) for user_id in self.user_ids.slice(start, count)]

    def events(self, user: int) -> KnownEvents:
        """All events of a user, by user number."""
        part = slice(int(self.offsets[user]), int(self.offsets[user + 1]))
        return KnownEvents(
            self.items[part].astype(np.int64),
            np.array(self.times[part]),
            None if self.ratings is None else np.array(self.ratings[part]),
            None if self.actions is None else self.actions[part].astype(np.int64),
            tuple(values[user : user + 1] for values in self.features) or None,
        )

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "KnownUsers":
        """The users of a prepared dataset, with all their events."""
        return cls(
            read_user_ids(dataset.path / c.USER_TABLE, dataset.num_users),
            dataset.offsets,
            dataset.items,
            dataset.times,
            dataset.ratings,
            dataset.actions,
            tuple(feature["values"].reshape(dataset.num_users, -1) for feature in dataset.user_features),
        )

    @classmethod
    def of_bundle(cls, bundle: Path) -> "KnownUsers":
        """The users whose histories are packed into a bundle; the bundle's checksums have been verified.

        Raises:
            ValueError: if the arrays do not fit together.
        """
        folder, manifest = bundle / FOLDER, bundle_manifest(bundle)
        facts = take(manifest, FOLDER, dict, bundle / c.MANIFEST)
        users, events = (take(facts, name, int, bundle / c.MANIFEST) for name in ("users", "events"))
        arrays = {
            name: read_array(folder / file, TYPES[name], (events,)) if (folder / file).is_file() else None
            for name, file in EVENT_FILES.items()
        }
        items, times = arrays["items"], arrays["times"]
        offsets = read_array(folder / c.USER_OFFSETS, np.int64, (users + 1,))
        highest = take(manifest, "items", int, bundle / c.MANIFEST)
        if (
            items is None
            or times is None
            or offsets[0] != 0
            or offsets[-1] != events
            or (np.diff(offsets) < 0).any()
            or (events and not 1 <= items.min() <= items.max() <= highest)
        ):
            raise ValueError(
                f"{folder} does not hold the histories of {users:,} users with {events:,} events of {highest:,} items; "
                "make the bundle again: recsys export-bundle --with_histories true"
            )
        declared = len(take(manifest, "user_features", list, bundle / c.MANIFEST))
        features = tuple(
            read_array(folder / f"features.{number}.npy", None, (users, None)) for number in range(declared)
        )
        user_ids = read_user_ids(folder / c.USER_TABLE, users)
        return cls(user_ids, offsets, items, times, arrays["ratings"], arrays["actions"], features)


def read_user_ids(path: Path, count: int) -> pl.Series:
    """The ids of users by user number.

    Args:
        path: Parquet file with user and user_id.
        count: the number of users.
    """
    try:
        table = pl.read_parquet(path, columns=[c.USER, c.USER_ID]).sort(c.USER)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); make it again") from error
    if not np.array_equal(table[c.USER].to_numpy(), np.arange(count)):
        raise ValueError(f"{path} has {len(table):,} users, expected {count:,}, numbered from 0; make it again")
    return table[c.USER_ID]


def pack(dataset: Dataset, bundle: Path) -> dict[str, Any]:
    """Writes a dataset's histories into the folder of a bundle that is being made; returns the facts for its manifest.

    Args:
        dataset: of the same split as the bundle.
        bundle: the folder; its manifest is written afterwards.
    """
    folder = bundle / FOLDER
    folder.mkdir()
    for file in (*EVENT_FILES.values(), c.USER_OFFSETS):
        if (dataset.path / file).is_file():
            shutil.copyfile(dataset.path / file, folder / file)
    pl.read_parquet(dataset.path / c.USER_TABLE, columns=[c.USER, c.USER_ID]).write_parquet(folder / c.USER_TABLE)
    for number, feature in enumerate(dataset.user_features):
        np.save(folder / f"features.{number}.npy", feature["values"].reshape(dataset.num_users, -1))
    return {"users": dataset.num_users, "events": len(dataset.items)}


def load_known_users(bundle: Path, data: Path | None = None) -> KnownUsers | None:
    """The known users of a service; None if there are none.

    Args:
        bundle: a bundle or an index, whose checksums have been verified.
        data: prepared dataset; None: the histories packed into the bundle, else the dataset that the bundle was made
            from, if it is there.

    Raises:
        ValueError: if the dataset has another split than the bundle: its item numbers mean other items.
    """
    manifest = bundle_manifest(bundle)
    if data is None and FOLDER in manifest:
        return KnownUsers.of_bundle(bundle)
    if data is None:
        try:
            data = bundle_data(bundle)
        except FileNotFoundError:
            return None
    dataset = Dataset(data)
    check_split(dataset, bundle)
    return KnownUsers.of_dataset(dataset)
