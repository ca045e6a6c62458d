"""Users' histories: events of the prepared data, merged with those that the service received."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from recsys2stage.data.catalogue import Catalogue
from recsys2stage.serving.packed import KnownEvents, KnownUsers
from recsys2stage.serving.store import Store, Stored, Version

USER_COST = 32  # a history in memory takes as much as this many events, however short it is: about 1 KB


@dataclass(frozen=True, eq=False)
class UserEvents:
    """A user's events, oldest first, as the model numbers them."""

    items: np.ndarray  # (n,) int64 item numbers; 0: the model does not know the item
    times: np.ndarray  # (n,) int64 seconds, ascending; without real time, an order
    ratings: np.ndarray | None = None  # (n,) float32, 0 where missing
    actions: np.ndarray | None = None  # (n,) int64 numbers of action types, 0 where unknown
    user: tuple[np.ndarray, ...] | None = None  # (1, P) of each declared user feature
    stored: np.ndarray | None = None  # (n,) bool: received by the service; None: none of them
    unknown_ids: dict[int, str] = field(default_factory=dict)  # position -> id of an item that the model does not know

    def __len__(self) -> int:
        return len(self.items)


class Histories:
    """The users that one worker knows, under one bundle.

    A user without new events costs no memory. Of others the merged history is kept, up to `cached` events in all, and
    is looked up by its version in the store; so workers that share a store know each other's events.

    Args:
        store: new events.
        known: users of the prepared data; None: none.
        catalogue: items and actions of the bundle.
        has_time: whether times of the prepared data are seconds; if not, new events follow in the order of arrival.
        cached: maximum number of events held in memory, at about 32 bytes each; every user counts as `USER_COST` more.
    """

    def __init__(
        self,
        store: Store,
        known: KnownUsers | None,
        catalogue: Catalogue,
        has_time: bool = True,
        cached: int = 2_000_000,
    ) -> None:
        self.store, self.known, self.catalogue, self.has_time, self.limit = store, known, catalogue, has_time, cached
        self.cached_events = self._cost = 0
        self._cache: OrderedDict[str, tuple[Version, UserEvents]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def cached_users(self) -> int:
        return len(self._cache)

    def version(self, user_id: str) -> Version:
        """Changes whenever `events` would."""
        return self.store.version(user_id)

    def events(self, user_id: str) -> UserEvents | None:
        """All events of a user; None for an unknown or erased one.

        Args:
            user_id: as text; 0012 is not 12.
        """
        version = self.store.version(user_id)
        if not version.newest:
            known = None if version.erased else self._known(user_id)
            return None if known is None else UserEvents(*known)
        with self._lock:
            held = self._cache.get(user_id)
            if held is not None:
                self._cache.move_to_end(user_id)
        if held is not None and held[0] == version:
            return held[1]
        if held is not None and held[0].erased == version.erased and held[0].newest < version.newest:
            old, after = held[1], held[0].newest  # only the new ones are read
        else:
            known = None if version.erased else self._known(user_id)
            old, after = UserEvents(*(known or _no_events())), 0
        new = self.store.events(user_id, after)
        if new and new[-1].id > version.newest:  # some came in between
            version = version._replace(newest=new[-1].id)
        merged = self._merge(old, new)
        if not len(merged):  # erased in between
            return None
        self._keep(user_id, version, merged)
        return merged

    def delete(self, user_id: str) -> None:
        """Erases what the store has of a user, and hides the user of the prepared data for good."""
        self.store.delete(user_id, in_data=self.known is not None and self.known.number(user_id) is not None)
        with self._lock:
            held = self._cache.pop(user_id, None)
            if held is not None:
                self._count(held[1], -1)

    def users(self, limit: int, offset: int = 0) -> tuple[int, list[str]]:
        """Ids of known users: those of the prepared data, then those with new events only, newest first.

        Args:
            limit: most ids; a page holds fewer where users were erased.
            offset: number of users to skip.

        Returns:
            The number of users, and the ids.
        """
        known = 0 if self.known is None else len(self.known)
        only_new = [user for user in self.store.newest_users() if self.known is None or self._is_new(user)]
        total = known - (self.store.erased_in_data() if known else 0) + len(only_new)
        page: list[str] = []
        if self.known is not None and offset < known:
            ids = self.known.ids(offset, limit)
            page = [user for user in ids if not self.store.version(user).erased]
        start = max(offset - known, 0)
        return total, page + only_new[start : start + max(0, limit - max(known - offset, 0))]

    def _is_new(self, user_id: str) -> bool:
        assert self.known is not None
        return self.known.number(user_id) is None or bool(self.store.version(user_id).erased)

    def _known(self, user_id: str) -> KnownEvents | None:
        number = None if self.known is None else self.known.number(user_id)
        return None if self.known is None or number is None else self.known.events(number)

    def _keep(self, user_id: str, version: Version, events: UserEvents) -> None:
        """Holds a history, and drops those that were asked for longest ago."""
        with self._lock:
            held = self._cache.pop(user_id, None)
            if held is not None:
                self._count(held[1], -1)
            if len(events) + USER_COST > self.limit:
                return
            self._cache[user_id] = version, events
            self._count(events, 1)
            while self._cost > self.limit:
                _, (_, dropped) = self._cache.popitem(last=False)
                self._count(dropped, -1)

    def _count(self, events: UserEvents, sign: int) -> None:
        self.cached_events += sign * len(events)
        self._cost += sign * (len(events) + USER_COST)

    def _merge(self, old: UserEvents, new: list[Stored]) -> UserEvents:
        """Merges new events by time; of equal times the old ones come first, then the order of arrival decides."""
        if not new:
            return old
        ids = [event.item_id for event in new]
        items = self.catalogue.numbers(ids)
        if self.has_time:
            times = np.array([event.time for event in new], dtype=np.int64)
        else:
            times = int(old.times.max(initial=0)) + 1 + np.arange(len(new), dtype=np.int64)
        number = {name: place for place, name in enumerate(self.catalogue.actions, start=1)}
        actions = np.array([number.get(event.action or "", 0) for event in new], dtype=np.int64)
        ratings = np.array([event.rating or 0.0 for event in new], dtype=np.float32)
        order = np.argsort(np.concatenate([old.times, times]), kind="stable")
        stored = np.concatenate([_or_zeros(old.stored, len(old), np.bool_), np.ones(len(new), dtype=np.bool_)])[order]
        unknown = {len(old) + place: ids[place] for place in np.flatnonzero(items == 0)} | old.unknown_ids
        place_of = np.argsort(order)
        return UserEvents(
            np.concatenate([old.items, items])[order],
            np.concatenate([old.times, times])[order],
            _merged(old.ratings, ratings, len(old), order),
            _merged(old.actions, actions, len(old), order),
            old.user,
            stored,
            {int(place_of[place]): text for place, text in unknown.items()},
        )


def _no_events() -> KnownEvents:
    none = np.zeros(0, dtype=np.int64)
    return KnownEvents(none, none, None, None, None)


def _or_zeros(values: np.ndarray | None, count: int, dtype: type[np.generic]) -> np.ndarray:
    return np.zeros(count, dtype=dtype) if values is None else values


def _merged(old: np.ndarray | None, new: np.ndarray, count: int, order: np.ndarray) -> np.ndarray | None:
    """Both in order; None if no event has a value."""
    if old is None and not new.any():
        return None
    return np.concatenate([_or_zeros(old, count, type(new[0])), new])[order]
