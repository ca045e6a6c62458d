"""Ratings: rating statistics of the candidate before the request, and of the user. E rated training events."""

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_number
from recsys2stage.ranking.signals.base import Requests, Signal
from recsys2stage.ranking.signals.keys import batched_searchsorted

NONE = 0  # an event without a rating


class Ratings(Signal):
    """Ratings of the candidate in earlier training events, and of the user in the history. A rating of 0 is missing.

    - item_mean: mean of the candidate's ratings strictly before the request (of all training events where the data
      have no times), (sum + prior · m) / (count + prior) with m the mean of all training events;
    - item_count: log(1 + number of those ratings);
    - user_mean: mean of the user's ratings, m without ratings;
    - newest_over_mean: the user's newest rating − user_mean, 0 without ratings;
    - user_spread: standard deviation of the user's ratings, 0 without ratings;
    - item_over_user: item_mean − user_mean.

    Args:
        prior: number of average ratings added to those of each item.
    """

    names = ("item_mean", "item_count", "user_mean", "newest_over_mean", "user_spread", "item_over_user")
    counted = ("item_mean", "item_count", "item_over_user")

    def __init__(self, prior: float = 20.0) -> None:
        check_number("prior", prior, above=0, example=20.0, what="a number of ratings")
        self.prior = prior

    @property
    def reads_times(self) -> bool:  # only if the dataset has times
        return "clock" in self.tables

    @property
    def reads_ratings(self) -> bool:
        return True

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if dataset.ratings is None:
            raise ValueError(f"the events of {dataset.path} have no ratings; leave Ratings out")
        train = spans(np.asarray(dataset.offsets[:-1]), np.asarray(dataset.train_ends)).values
        train = train[np.asarray(dataset.ratings)[train] != NONE]
        if not len(train):
            raise ValueError(f"no training event of {dataset.path} has a rating; leave Ratings out")
        items = np.asarray(dataset.items)[train]
        keys = items.astype(np.int64)
        if dataset.has_time:
            times = np.asarray(dataset.times)[train]
            clock = np.array([times.min(), times.max() - times.min() + 2])  # first second, and number of seconds + 1
            keys = keys * clock[1] + (times - clock[0])
        order = np.argsort(keys, kind="stable")
        sums = np.cumsum(np.asarray(dataset.ratings)[train[order]], dtype=np.float64)
        self.tables = {
            "sums": np.append(0.0, sums),  # (E + 1,) cumulative ratings, sorted by item and time
            "starts": np.searchsorted(items[order], np.arange(dataset.num_items + 2)),  # (V + 2,) of each item's events
            "mean": sums[-1:] / len(train),
        }
        if dataset.has_time:
            self.tables |= {"keys": keys[order], "clock": clock}  # (E,) item · clock[1] + seconds since clock[0]

    def __call__(self, requests: Requests) -> np.ndarray:
        sums, starts = np.asarray(self.tables["sums"]), np.asarray(self.tables["starts"])
        begin, end = starts[requests.items], self._ends(requests)
        mean, count = float(self.tables["mean"][0]), end - begin
        item_mean = (sums[end] - sums[begin] + self.prior * mean) / (count + self.prior)
        user_mean, newest, spread = (value[:, None] for value in self._user_values(requests, mean))
        values = [item_mean, np.log1p(count), user_mean, newest, spread, item_mean - user_mean]
        out = np.empty((*requests.items.shape, len(values)), dtype=np.float32)
        for column, value in enumerate(values):
            out[..., column] = value
        out[requests.items <= 0] = 0
        return out

    def _ends(self, requests: Requests) -> np.ndarray:
        """Index after each candidate's newest event before the request, in the order of `sums`, (B, C)."""
        if "clock" not in self.tables:
            return np.asarray(self.tables["starts"])[requests.items + 1]
        first, span = self.tables["clock"].tolist()
        if (requests.request_time >= first + span - 1).all():  # after all ratings, as most requests of a service are
            return np.asarray(self.tables["starts"])[requests.items + 1]
        time = np.minimum(np.maximum(requests.request_time - first, 0), span - 1)[:, None]
        return batched_searchsorted(np.asarray(self.tables["keys"]), requests.items * span + time)

    def _user_values(self, requests: Requests, mean: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, newest − mean, and standard deviation of each user's ratings, (B,) each."""
        ratings, count = requests.history.ratings, len(requests.request_time)
        if ratings is None:
            return np.full(count, mean), np.zeros(count), np.zeros(count)
        column = np.arange(ratings.shape[1])
        rated = (column < np.asarray(requests.history.lengths)[:, None]) & (ratings != NONE)
        number, ratings = rated.sum(1), ratings.astype(np.float64)
        own = np.where(number > 0, np.where(rated, ratings, 0).sum(1) / np.maximum(number, 1), mean)
        deviation = np.where(rated, ratings - own[:, None], 0)
        newest = deviation[np.arange(count), np.where(rated, column, 0).max(1)]
        return own, newest, np.sqrt((deviation**2).sum(1) / np.maximum(number, 1))
