"""Cohorts: groups of targets with separate metrics in a report; each cohort type puts every target into one group."""

import itertools
from collections.abc import Iterator

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import At, Dataset
from recsys2stage.retrieval.encoders.times import DAY, YEAR

MONTH = 30 * DAY
NEVER = np.iinfo(np.int64).max

Groups = Iterator[tuple[str, np.ndarray]]  # label and members, (n,) bool


def cohorts(dataset: Dataset, users: np.ndarray, at: At) -> dict[str, Groups]:
    """All cohort types by name; those that use times only if the data have them.

    Args:
        users: (n,) user of each target.
        at: (n,) indices of the targets, or `val` or `test` for each user's (first) target. A basket is given by one of
            its targets; it has no popularity or age.
    """
    groups = {"history_length": history_cohorts(dataset, users, at)}
    if not dataset.baskets:
        groups["target_popularity"] = popularity_cohorts(dataset, users, at)
    if dataset.has_time:
        groups["gap_to_request"] = gap_cohorts(dataset, users, at)
        if not dataset.baskets:
            groups["target_age"] = age_cohorts(dataset, users, at)
    return groups


def history_cohorts(dataset: Dataset, users: np.ndarray, at: At) -> Groups:
    """Targets by quarter of the number of events before the target."""
    length = dataset.ends(users, at) - dataset.offsets[users]
    cuts = np.unique(np.quantile(length, [0, 0.25, 0.5, 0.75, 1]).astype(int))
    for low, high in itertools.pairwise(cuts):
        last = high == cuts[-1]
        yield (
            f"{low}-{high if last else high - 1} events",
            (length >= low) & ((length <= high) if last else (length < high)),
        )
    if len(cuts) == 1:
        yield f"{cuts[0]} events", np.ones(len(users), dtype=bool)


def popularity_cohorts(dataset: Dataset, users: np.ndarray, at: At) -> Groups:
    """Targets by their number of training events."""
    count = dataset.train_counts[dataset.targets(users, at)]
    for low, high in ((0, 1), (1, 10), (10, 100), (100, 1000), (1000, 1 << 62)):
        label = "never trained" if low == 0 else f"{low}-{high - 1} events" if high < 1 << 62 else f"{low}+ events"
        yield label, (count >= low) & (count < high)


def gap_cohorts(dataset: Dataset, users: np.ndarray, at: At) -> Groups:
    """Targets by the time from the newest event before them to the request (the time of the target)."""
    ends = dataset.ends(users, at)
    empty = ends == dataset.offsets[users]
    gap = dataset.request_times(users, at) - dataset.times[np.maximum(ends - 1, 0)]
    yield "no event before", empty
    for label, low, high in (
        ("the same second", -NEVER, 1),
        ("under a minute", 1, 60),
        ("a minute to an hour", 60, 3_600),
        ("an hour to a day", 3_600, DAY),
        ("a day to a month", DAY, MONTH),
        ("a month or longer", MONTH, NEVER),
    ):
        yield label, ~empty & (gap >= low) & (gap < high)


def age_cohorts(dataset: Dataset, users: np.ndarray, at: At) -> Groups:
    """Targets by their age: the time from its first training event, of any user, to the request."""
    train = spans(dataset.offsets[:-1], dataset.train_ends).values
    first = np.full(dataset.num_items + 1, NEVER)
    np.minimum.at(first, dataset.items[train], dataset.times[train])
    first, request = first[dataset.targets(users, at)], dataset.request_times(users, at)
    known = first < request
    age = request - np.where(known, first, request)
    yield "not seen before the request", ~known
    yield "under a month", known & (age < MONTH)
    yield "a month to a year", known & (age >= MONTH) & (age < YEAR)
    yield "a year or older", known & (age >= YEAR)
