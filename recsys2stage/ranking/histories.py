"""Raw histories to arrays: the events of one user, checked and numbered, and batches of several users."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.data.batches import Padded, left_aligned
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.data.request_inputs import as_seconds, check_ascending, fill_ratings


class Events(NamedTuple):
    """The events of one user, oldest first, and the user's features."""

    items: np.ndarray  # (n,) int64 item numbers; 0: the model does not know the item
    times: np.ndarray  # (n,) int64 seconds, ascending
    ratings: np.ndarray | None = None  # (n,) float32, 0 where missing
    actions: np.ndarray | None = None  # (n,) int64, 0 where unknown
    user: tuple[np.ndarray, ...] | None = None  # (1, P) of each declared user feature; None: unknown

    @property
    def known(self) -> np.ndarray:
        """Numbers of the items that the model knows, in order, (m,) int64."""
        return self.items[self.items > 0]

    @property
    def newest(self) -> int:
        """Seconds of the newest event, of a known item or not; 0 without events."""
        return int(self.times.max(initial=0))


def as_list(name: str, values: Any, of: str) -> list[Any]:
    """The entries of a list, tuple, array or column.

    Args:
        name: of the argument, for the error.
        values: as given.
        of: what the entries are, for the error.

    Raises:
        ValueError: for a text, a number, None and a mapping.
    """
    if isinstance(values, str | bytes):
        raise ValueError(f"{name} is the text {values!r}, expected a sequence of {of}: [{values!r}]")
    try:
        entries = None if isinstance(values, Mapping) else list(values)
    except TypeError:  # a number, None, an array of no dimension
        entries = None
    if entries is None:
        raise ValueError(f"{name} is {values!r}, expected a sequence of {of}; put it in a list")
    nested = next((entry for entry in entries if isinstance(entry, list | tuple | dict | set | np.ndarray)), None)
    if nested is not None:
        raise ValueError(f"{name} holds {nested!r}, expected a flat sequence of {of}; give the entries of one user")
    return entries


def parse_events(
    catalogue: Catalogue,
    history: Any,
    times: Any = None,
    ratings: Any = None,
    actions: Any = None,
    newest_time: int | None = None,
    reads_actions: bool = True,
) -> Events:
    """Checks and numbers a raw history.

    Args:
        catalogue: items and action types of the model.
        history: item ids, oldest first.
        times: whole seconds since 1970 of each event, ascending; None: not known.
        ratings: a number of each event, None where missing; None: not known.
        actions: name of the action type of each event, None where missing; None: not known.
        newest_time: seconds of the newest training event, as in `as_seconds`.
        reads_actions: whether the model reads action types; if not, they may have any names.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(history, set | frozenset):
        raise ValueError(f"history is the set {history!r}, expected a sequence of item ids; list them oldest first")
    items = as_list("history", history, "item ids, oldest first")
    given = {}
    for name, values, of in (("time", times, "seconds"), ("rating", ratings, "numbers"), ("action", actions, "names")):
        if values is None:
            continue
        given[name] = as_list(f"{name}s", values, f"{of}, one for each event")
        if len(given[name]) != len(items):
            raise ValueError(
                f"history has {len(items)} events but {name}s has {len(given[name])}; give one {name} for each"
            )
    seconds = np.zeros(len(items), dtype=np.int64)
    if "time" in given:
        seconds = as_seconds(given["time"], "times", newest_time)
        check_ascending(seconds)
    return Events(
        catalogue.numbers(items),
        seconds,
        _checked_ratings(given["rating"]) if "rating" in given else None,
        _checked_actions(given["action"], catalogue, reads_actions) if "action" in given else None,
    )


def _checked_ratings(ratings: list[Any]) -> np.ndarray:
    """Ratings, 0 where missing, (n,) float32."""
    for value in ratings:
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or abs(float(value)) > 1e30):
            raise ValueError(f"ratings holds {value!r}, expected finite numbers, or None where an event has none")
    return fill_ratings(ratings)


def _checked_actions(actions: list[Any], catalogue: Catalogue, read: bool) -> np.ndarray | None:
    """Numbers of action types, 0 where unknown, (n,) int64; None if the model does not read them."""
    for value in actions:
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"actions holds {value!r}, expected names of action types, or None where an event has none"
            )
    return catalogue.action_numbers(actions, "history") if read else None


def pad_events(rows: Sequence[Events], max_length: int, ratings: bool, actions: bool) -> Padded:
    """The newest `max_length` events of known items of each user, as one batch.

    Args:
        rows: the users.
        max_length: history length of the model.
        ratings: whether the model reads ratings.
        actions: whether it reads actions.
    """
    newest = [np.flatnonzero(row.items)[-max_length:] for row in rows]
    ends = np.cumsum([len(own) for own in newest])
    starts = ends - [len(own) for own in newest]

    def gather(columns: Sequence[np.ndarray | None], dtype: type[np.generic]) -> np.ndarray:
        parts = [
            np.zeros(len(own), dtype=dtype) if column is None else column[own]
            for own, column in zip(newest, columns, strict=True)
        ]
        return np.concatenate(parts).astype(dtype)

    rated, acted = [row.ratings for row in rows], [row.actions for row in rows]
    padded = left_aligned(
        gather([row.items for row in rows], np.int64),
        gather([row.times for row in rows], np.int64),
        starts,
        ends,
        gather(rated, np.float32) if ratings and any(one is not None for one in rated) else None,
        gather(acted, np.int64) if actions and any(one is not None for one in acted) else None,
    )
    return padded._replace(user=_stack_users([row.user for row in rows]))


def _stack_users(users: Sequence[tuple[np.ndarray, ...] | None]) -> tuple[np.ndarray, ...] | None:
    """The features of all users, (B, P) each, unknown where a user has none; None if nobody has any."""
    like = next((user for user in users if user is not None), None)
    if like is None:
        return None
    stacked = []
    for number, example in enumerate(like):
        width = max(user[number].shape[1] for user in users if user is not None)
        missing = np.nan if example.dtype.kind == "f" else 0
        table = np.full((len(users), width), missing, dtype=example.dtype)
        for row, user in zip(table, users, strict=True):
            if user is not None:
                row[: user[number].shape[1]] = user[number][0]
        stacked.append(table)
    return tuple(stacked)
