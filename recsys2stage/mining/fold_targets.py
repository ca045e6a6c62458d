"""Targets of a fold's lists: events of its users, sampled so that the lists resemble the requests that are served."""

from typing import NamedTuple

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset, sample_users
from recsys2stage.data.folds import Fold
from recsys2stage.mining.draws import ListDraws
from recsys2stage.ranking.lists import validation_users
from recsys2stage.retrieval.encoders.times import DAY

GAPS = (1, 60, 3_600, DAY)  # seconds: bounds of the bins of the time since the event before
PERIODS = 4  # bins of the place in time, with equally many events of the fold
ROUNDS = 50  # of raking
CLOSE = 0.05  # total variation distance from the served requests up to which lists are sampled by default
BINS = 32  # at least as many as a property has
SALT = 1 << 32  # added to the seed, which is below it: the miner's own random numbers begin with the seed


class FoldTargets(NamedTuple):
    """Sampled targets of n lists, by user and time."""

    users: np.ndarray  # (n,)
    places: np.ndarray  # (n,) index of each target among all events
    eligible: int  # number of events that they were sampled from
    distances: dict[str, float]  # property -> total variation distance of its distribution from the served requests'


def fold_targets(
    dataset: Dataset,
    fold: Fold,
    targets: int | None,
    gap: int,
    match: bool,
    select: float,
    users: int | None,
    seed: int,
) -> FoldTargets:
    """Samples events of the fold's users, without the ranker's validation users.

    Any training or validation event with an event before it can be a target, never a test event. Where one time splits
    all users' events into training and validation, only training events can: signals know all events up to that time.

    To match, each event is sampled with a weight, such that the distributions of the history length and, where the data
    have times, of the time since the event before and of the time of the request are those of the validation targets
    (raking, Deming & Stephan 1940). Each event is sampled or not by a random number of its own.

    Args:
        dataset: prepared dataset, with the fold's events.
        fold: whose retriever was not trained on its users.
        targets: mean number of lists per user; None: as many as match closely, or all if `match` is False.
        gap: minimum seconds since the event before, of the lists and of the validation targets that they match.
        match: whether to match the validation targets; if not, all events are equally likely.
        select: share of the ranker's validation users.
        users: number of users, sampled at random; None: all.
        seed: of all sampling.

    Raises:
        ValueError: if no event is eligible.
    """
    last = np.asarray(dataset.val_starts if is_split_in_time(dataset) else dataset.val_ends)
    starts = np.asarray(dataset.offsets[:-1]) + 1
    found = spans(starts, last)
    owner, places = found.rows, found.values
    if dataset.baskets:  # the first one has no history
        later = dataset.ends(owner, places) > dataset.offsets[owner]
        owner, places = owner[later], places[later]
    if gap:
        late = dataset.times[places] - dataset.times[dataset.ends(owner, places) - 1] >= gap
        owner, places = owner[late], places[late]
    eligible = fold.members(dataset.num_users)[owner] & ~validation_users(owner, select, seed)
    owner, places = owner[eligible], places[eligible]
    if users is not None:
        sampled = np.isin(owner, sample_users(np.unique(owner), users, seed))
        owner, places = owner[sampled], places[sampled]
    if not len(places):
        raise ValueError(
            f"fold {fold} of {dataset.path} has no user outside the ranker's validation users with an event after "
            f"another{f' by {gap} seconds' if gap else ''}, expected at least one; lower gap or the count of folds"
        )
    if not match:
        share = 1.0 if targets is None else targets * len(np.unique(owner)) / len(places)
        kept = sampled_mask(np.full(len(places), min(share, 1.0)), owner, places, seed)
        return FoldTargets(owner[kept], places[kept], len(places), {})
    served_users, served = dataset.val_targets(None, gap)
    if not len(served):
        raise ValueError(
            f"{dataset.path} has no validation target{f' after {gap} seconds' if gap else ''} whose requests the lists "
            f"of fold {fold} could match; set match to false"
        )
    periods = np.quantile(dataset.times[places], np.arange(1, PERIODS) / PERIODS)
    pool = request_bins(dataset, owner, places, periods)
    wanted = request_bins(dataset, served_users, served, periods)
    shares = {name: np.bincount(bins, minlength=BINS) / len(bins) for name, bins in wanted.items()}
    weights = rake(pool, shares)
    if not weights.any():
        raise ValueError(
            f"no event of fold {fold} of {dataset.path} resembles a validation target in its {' and '.join(pool)}; set "
            "match to false"
        )
    count = largest_close(weights, pool, shares) if targets is None else float(targets * len(np.unique(owner)))
    kept = sampled_mask(inclusion(weights, count), owner, places, seed)
    return FoldTargets(owner[kept], places[kept], len(places), distances(kept, pool, shares))


def is_split_in_time(dataset: Dataset) -> bool:
    """Whether all validation events come after all training events, as under GlobalTime."""
    if not dataset.has_time:
        return False
    train = dataset.times[spans(dataset.offsets[:-1], dataset.val_starts).values]
    validation = dataset.times[spans(dataset.val_starts, dataset.val_ends).values]
    return bool(len(train) and len(validation) and train.max() <= validation.min())


def request_bins(dataset: Dataset, users: np.ndarray, places: np.ndarray, periods: np.ndarray) -> dict[str, np.ndarray]:
    """The bin of each request by property, (n,) int64 each, below BINS.

    Args:
        dataset: prepared dataset.
        users: (n,) user of each target.
        places: (n,) index of each target among all events, with a history before it.
        periods: (PERIODS − 1,) bounds of the bins of the request time, ascending.
    """
    ends = dataset.ends(users, places)
    lengths = ends - np.asarray(dataset.offsets)[users]
    bins = {"history length": np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)}
    if dataset.has_time:
        times = np.asarray(dataset.times[places])
        bins["gap"] = np.searchsorted(GAPS, times - dataset.times[ends - 1], side="right")
        bins["time"] = np.searchsorted(periods, times, side="right")
    return bins


def rake(pool: dict[str, np.ndarray], shares: dict[str, np.ndarray]) -> np.ndarray:
    """Weights of n events with which each property is distributed as wanted (iterative proportional fitting).

    Args:
        pool: property -> (n,) bin of each event.
        shares: property -> (BINS,) wanted share of each bin.

    Returns:
        (n,) float64 with sum n; all 0 if no event has wanted bins of all properties.
    """
    weights = np.ones(len(next(iter(pool.values()))))
    for _ in range(ROUNDS):
        for name, bins in pool.items():
            held = np.bincount(bins, weights, minlength=BINS)
            weights *= np.divide(shares[name], held, out=np.zeros(BINS), where=held > 0)[bins]
    total = weights.sum()
    return weights * (len(weights) / total) if total > 0 else weights


def inclusion(weights: np.ndarray, count: float) -> np.ndarray:
    """Probabilities in proportion to the weights, at most 1, whose sum is `count` or the number of positive weights."""
    certain = np.zeros(len(weights), dtype=bool)
    while True:
        rest = float(weights[~certain].sum())
        if rest <= 0:
            return certain.astype(np.float64)
        probability = np.where(certain, 1.0, weights * ((count - certain.sum()) / rest))
        if not (probability[~certain] > 1).any():
            return probability
        certain |= probability >= 1


def distances(kept: np.ndarray, pool: dict[str, np.ndarray], shares: dict[str, np.ndarray]) -> dict[str, float]:
    """Total variation distance of each property of the sampled events from what is wanted: 0 equal, 1 disjoint.

    Args:
        kept: (n,) bool, or the probability of each event.
        pool: property -> (n,) bin of each event.
        shares: property -> (BINS,) wanted share of each bin.
    """
    total = max(float(kept.sum()), 1e-12)
    return {
        name: float(np.abs(np.bincount(bins, kept, minlength=BINS) / total - shares[name]).sum() / 2)
        for name, bins in pool.items()
    }


def largest_close(weights: np.ndarray, pool: dict[str, np.ndarray], shares: dict[str, np.ndarray]) -> float:
    """The largest expected number of events whose properties lie within CLOSE of what is wanted, by bisection.

    Where a few events cannot match either, since wanted bins are empty, within CLOSE of the best possible distances.
    """
    best = distances(weights, pool, shares)

    def close(count: float) -> bool:
        now = distances(inclusion(weights, count), pool, shares)
        return all(now[name] <= best[name] + CLOSE for name in now)

    low, high = 1.0, float((weights > 0).sum())
    if close(high):
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if close(middle) else (low, middle)
    return low


def sampled_mask(probability: np.ndarray, users: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    """Which events are sampled, (n,) bool: by a random number that depends on seed, user and place only."""
    return ListDraws.of(seed + SALT, users, places).random((len(users), 1))[:, 0] < probability
