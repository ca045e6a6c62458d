"""Cohorts: user groups with separate metrics in a report; each cohort type puts every user into one group."""

import itertools
from collections.abc import Iterator

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import Part
from recsys2stage.retrieval.encoders.times import DAY, YEAR

MONTH = 30 * DAY
NEVER = np.iinfo(np.int64).max

Groups = Iterator[tuple[str, np.ndarray]]  # label and members, (n,) bool


def cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> dict[str, Groups]:
    """All cohort types by name; those that use times only if the data have them.

    Args:
        users: (n,) users with a target in `split`.
    """
    groups = {
        "history_length": history_cohorts(dataset, users, split),
        "target_popularity": popularity_cohorts(dataset, users, split),
    }
    if dataset.has_time:
        groups["gap_to_request"] = gap_cohorts(dataset, users, split)
        groups["target_age"] = age_cohorts(dataset, users, split)
    return groups


def history_cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> Groups:
    """Users by quarter of the number of events before the target."""
    length = dataset.target_indices(split)[users] - dataset.offsets[users]
    cuts = np.unique(np.quantile(length, [0, 0.25, 0.5, 0.75, 1]).astype(int))
    for low, high in itertools.pairwise(cuts):
        last = high == cuts[-1]
        yield (
            f"{low}-{high if last else high - 1} events",
            (length >= low) & ((length <= high) if last else (length < high)),
        )
    if len(cuts) == 1:
        yield f"{cuts[0]} events", np.ones(len(users), dtype=bool)


def popularity_cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> Groups:
    """Users by the number of training events of their target."""
    count = dataset.train_counts[dataset.targets(users, split)]
    for low, high in ((0, 1), (1, 10), (10, 100), (100, 1000), (1000, 1 << 62)):
        label = "never trained" if low == 0 else f"{low}-{high - 1} events" if high < 1 << 62 else f"{low}+ events"
        yield label, (count >= low) & (count < high)


def gap_cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> Groups:
    """Users by the time from their newest event to the request (the time of the target)."""
    ends = dataset.target_indices(split)[users]
    empty = ends == dataset.offsets[users]
    gap = dataset.request_times(users, split) - dataset.times[np.maximum(ends - 1, 0)]
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


def age_cohorts(dataset: Dataset, users: np.ndarray, split: Part) -> Groups:
    """Users by the age of their target: the time from its first training event, of any user, to the request."""
    train = spans(dataset.offsets[:-1], dataset.train_ends).values
    first = np.full(dataset.num_items + 1, NEVER)
    np.minimum.at(first, dataset.items[train], dataset.times[train])
    first, request = first[dataset.targets(users, split)], dataset.request_times(users, split)
    known = first < request
    age = request - np.where(known, first, request)
    yield "not seen before the request", ~known
    yield "under a month", known & (age < MONTH)
    yield "a month to a year", known & (age >= MONTH) & (age < YEAR)
    yield "a year or older", known & (age >= YEAR)
