"""Splits of each user's events into training, validation and test."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int8, Int64

from recsys2stage.columns import YEAR_2100
from recsys2stage.options import MAX_LENGTH, check_integer, check_number

PARTS = ("train", "val", "test")


class Split(ABC):
    """Splits each user's events, in time order, into training, validation and test events."""

    min_events: ClassVar[int]  # users with fewer events are too short to evaluate
    needs_time: ClassVar[bool] = False
    baskets: ClassVar[bool] = False  # the history of a target ends before all events of the target's time

    @abstractmethod
    def ends(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"]]:
        """Ends of the training and validation events.

        Args:
            times: seconds since 1970, ascending within a user.
            offsets: user u owns events [offsets[u], offsets[u + 1]).

        Returns:
            train_end and val_end, with offsets[u] <= train_end[u] <= val_end[u] <= offsets[u + 1].
        """

    def targets(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]] | None:
        """Validation and test targets, for a split with several targets per user.

        Returns:
            The indices of the events that are validation targets and of those that are test targets, ascending: events
            of the validation and of the test part with an earlier event of the same user. None: the first event of each
            user's validation and test events.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Name and options, for the protocol."""
        return {"split": type(self).__name__, **vars(self)}


class LeaveOneOut(Split):
    """Each user's last event is for test, the one before for validation; users with fewer than three only for training.

    Args:
        val: validation events per user. More than one give the ranker more lists of targets on which the retriever was
            not trained; the test does not change. At least one event of each user is for training.
    """

    min_events: ClassVar[int] = 3

    def __init__(self, val: int = 1) -> None:
        check_integer("val", val, 1, MAX_LENGTH)
        self.val = val

    def ends(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"]]:
        end = offsets[1:]
        enough = np.diff(offsets) >= self.min_events
        val_end = np.where(enough, end - 1, end)
        return np.where(enough, np.maximum(val_end - self.val, offsets[:-1] + 1), end), val_end


class Marked(Split):
    """The source marks each event as train, val or test; a user's later events must not have earlier marks."""

    min_events: ClassVar[int] = 2

    def ends(
        self,
        times: Int64[np.ndarray, " E"],
        offsets: Int64[np.ndarray, " _"],
        parts: Int8[np.ndarray, " E"] | None = None,
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"]]:
        """Ends of the training and validation events.

        Args:
            parts: index of each event's mark in PARTS; None: the events are not marked, which is an error.
        """
        if parts is None:
            raise ValueError("the events are not marked; name the column of marks (part of a Table), or another split")
        back = parts[1:] < parts[:-1]
        back[offsets[1:-1] - 1] = False  # not across users
        if back.any():
            users = len(np.unique(np.searchsorted(offsets, np.flatnonzero(back), side="right")))
            raise ValueError(
                f"{users:,} of {len(offsets) - 1:,} users have events marked {', '.join(PARTS)} in another order than "
                "that of time; mark what comes later as the later part"
            )
        trains, validates = (np.add.reduceat(parts == part, offsets[:-1], dtype=np.int64) for part in (0, 1))
        return offsets[:-1] + trains, offsets[:-1] + trains + validates


class GlobalTime(Split):
    """The same two cut times for all users: events from the second on are for test, those between for validation.

    Args:
        val: start of validation: a share of all events (0.1: the tenth before the test events) or, from 1 on, a time in
            seconds since 1970.
        test: start of the test: a share of all events (0.1: the latest tenth) or, from 1 on, a time in seconds.
    """

    min_events: ClassVar[int] = 2
    needs_time: ClassVar[bool] = True

    def __init__(self, val: float | int = 0.1, test: float | int = 0.1):
        for name, value in (("val", val), ("test", test)):
            check_number(name, value, below=YEAR_2100, example=0.1, what="a share or a time in seconds")
        shares = 0 < val < 1 and 0 < test < 1 and val + test < 1
        if not shares and not 1 <= val < test:
            raise ValueError(
                f"GlobalTime(val={val}, test={test}): expected two shares whose sum is below 1, or two times in "
                "seconds since 1970 with val before test; set both to 0.1, for example"
            )
        self.val = val
        self.test = test

    def ends(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"]]:
        if self.test < 1:  # events at the cut time come after the cut, so simultaneous events stay together
            first = [len(times) - round(share * len(times)) for share in (self.val + self.test, self.test)]
            first = [min(index, len(times) - 1) for index in first]
            val_start, test_start = np.partition(times, first)[first]
        else:
            val_start, test_start = self.val, self.test
        before_val = np.add.reduceat(times < val_start, offsets[:-1], dtype=np.int64)
        before_test = np.add.reduceat(times < test_start, offsets[:-1], dtype=np.int64)
        return offsets[:-1] + before_val, offsets[:-1] + before_test


class TargetSplit(Split):
    """A split that lists its targets: each part of a user's events ends before the user's first target of the next."""

    @abstractmethod
    def targets(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]: ...

    def ends(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " U"], Int64[np.ndarray, " U"]]:
        validation, test = self.targets(times, offsets)
        val_end = first_of_users(test, offsets, np.asarray(offsets[1:], dtype=np.int64))
        return first_of_users(validation, offsets, val_end), val_end


class SessionStarts(TargetSplit):
    """Each user's newest session beginnings are for test, those before them for validation.

    A session begins with an event that comes `gap` seconds or more after the user's event before it; a user's first
    event has no history and is no target. All events before a user's first validation target (without one: before the
    first test target) train. Events between targets are in histories only. Test targets come first: a user with fewer
    session beginnings than `test` has no validation target, and one without any only trains.

    Args:
        gap: seconds without an event before a session begins.
        test: test targets per user, at most.
        val: validation targets per user, at most. They give the ranker its lists, one each.
    """

    min_events: ClassVar[int] = 2
    needs_time: ClassVar[bool] = True

    def __init__(self, gap: int = 3600, test: int = 3, val: int = 5) -> None:
        check_integer("gap", gap, 1, YEAR_2100, example=3600)
        check_integer("test", test, 1, MAX_LENGTH, example=3)
        check_integer("val", val, 1, MAX_LENGTH, example=5)
        self.gap, self.test, self.val = gap, test, val

    def targets(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]:
        starts = np.flatnonzero(np.diff(times, prepend=times[:1]) >= self.gap)
        starts = np.setdiff1d(starts, offsets[:-1], assume_unique=True)
        place = places_from_newest(starts, offsets)
        return starts[(place >= self.test) & (place < self.test + self.val)], starts[place < self.test]


class Baskets(TargetSplit):
    """Events of one user and time are a basket: each user's last basket is for test, those before it for validation.

    All events of a basket are targets with the same history, which ends before the basket. A user's first basket
    trains. Test comes first: a user with two baskets has no validation basket, and one with a single one only trains.

    Args:
        val: validation baskets per user, at most.
    """

    min_events: ClassVar[int] = 2
    needs_time: ClassVar[bool] = True
    baskets: ClassVar[bool] = True

    def __init__(self, val: int = 1) -> None:
        check_integer("val", val, 1, MAX_LENGTH)
        self.val = val

    def targets(
        self, times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]
    ) -> tuple[Int64[np.ndarray, " N"], Int64[np.ndarray, " M"]]:
        starts, basket = np.unique(basket_starts(times, offsets), return_inverse=True)
        place = places_from_newest(starts, offsets)
        place[np.isin(starts, offsets[:-1])] = -1  # a first basket has no history
        place = place[basket]
        return np.flatnonzero((place >= 1) & (place <= self.val)), np.flatnonzero(place == 0)


def basket_starts(times: Int64[np.ndarray, " E"], offsets: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " E"]:
    """Index of the first event of each event's basket, the events of the same user and time.

    Args:
        times: seconds, ascending within a user.
        offsets: user u owns events [offsets[u], offsets[u + 1]).
    """
    first = np.diff(times, prepend=times[:1]) != 0
    first[offsets[:-1]] = True
    return np.maximum.accumulate(np.where(first, np.arange(len(times)), 0))


def places_from_newest(events: Int64[np.ndarray, " N"], offsets: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " N"]:
    """How many of the given events of the same user are newer than each of them.

    Args:
        events: indices of events, ascending.
        offsets: user u owns events [offsets[u], offsets[u + 1]).
    """
    users = np.searchsorted(offsets, events, side="right") - 1
    last = np.cumsum(np.bincount(users, minlength=len(offsets) - 1)) - 1
    return last[users] - np.arange(len(events))


def first_of_users(
    events: Int64[np.ndarray, " N"], offsets: Int64[np.ndarray, " _"], end: Int64[np.ndarray, " U"]
) -> Int64[np.ndarray, " U"]:
    """Each user's first of the given events, or `end` where that comes first."""
    first = end.copy()
    np.minimum.at(first, np.searchsorted(offsets, events, side="right") - 1, events)
    return first
