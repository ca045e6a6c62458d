"""Affinity: agreement of a candidate's declared features with the user's history. L events, P classes per item."""

import numpy as np

from recsys2stage.columns import UNKNOWN
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_number
from recsys2stage.ranking.signals.base import Requests, Signal

YEAR = 365.2425 * 86_400  # seconds
CELLS = 1 << 20  # largest dense table of requests by classes; above it only the pairs that occur are stored
FURTHEST = 10.0  # standard deviations; larger values, outliers or data errors, are clipped
LATEST = 9_999.0  # a year; greater values are seconds, days or the like


class Affinity(Signal):
    """Similarity of a candidate's features to those of the history; 0 where the feature is missing.

    A categorical or multi-valued feature gives three values. With w the weight of each event, W the sum of the weights,
    n(g) that of the events with class g, and s(g) = (N(g) + 1) / (N + number of classes) the smoothed share of the N
    training events with class g,

        lift = log((Σ n(g) + smoothing · Σ s(g)) / ((W + smoothing) · Σ s(g))), over the classes g of the candidate,

    compares the share of the candidate's classes in the history with that in the training events, with `smoothing`
    average events added to each history. w = 1 gives `share`, and w = decay^k for the event k positions before the
    newest gives `recent`. The third value, `newest`, is the Jaccard similarity to the classes of the newest event.

    A numeric feature gives two values: the absolute distance of the candidate from the mean of the history
    (`from_mean`) and from the newest event (`from_newest`), in standard deviations over training events, at most 10.

    Args:
        decay: weight of an event relative to the next newer one.
        smoothing: average events added to each history.
        released: numeric feature with the item's release year, such as 1995 or 1995.5; adds the value log(1 + years
            from release to the request), 0 where that is in the future. None: no such feature.
    """

    def __init__(self, decay: float = 0.9, smoothing: float = 1.0, released: str | None = None) -> None:
        check_number("decay", decay, above=0, high=1, example=0.9)
        check_number("smoothing", smoothing, above=0, example=1.0, what="a number of events")
        self.decay, self.smoothing, self.released = decay, smoothing, released

    @property
    def names(self) -> tuple[str, ...]:  # depend on the dataset, stored in the tables
        return tuple(self.tables["names"].tolist())

    @property
    def reads_times(self) -> bool:  # only the years since release
        return self.released is not None

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        features = [feature for feature in dataset.item_features if feature["kind"] != "vector"]
        if not features:
            raise ValueError(
                f"the items of {dataset.path} have no categorical, multi or numeric features; declare some when the "
                "data are prepared, or leave Affinity out"
            )
        self.tables, names, counts = {}, [], dataset.train_counts
        for number, feature in enumerate(features):
            values = feature["values"].reshape(len(counts), -1)
            if feature["kind"] == "numeric":
                self.tables[f"values{number}"] = standardised(values[:, 0], counts)
                names += [f"{feature['name']}_from_mean", f"{feature['name']}_from_newest"]
            else:
                self.tables[f"classes{number}"] = values
                self.tables[f"shares{number}"] = shares(values, feature["size"], counts)
                names += [f"{feature['name']}_{end}" for end in ("share", "recent", "newest")]
        if self.released is not None:
            self.tables["released"] = years(dataset, self.released)
            names.append("years_since_release")
        self.tables["names"] = np.array(names)
        self.restore(self.tables)

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        super().restore(tables)
        # all features with classes side by side, so that one pass counts them: classes are numbered through
        numbers = [int(name.removeprefix("classes")) for name in tables if name.startswith("classes")]
        parts: list[np.ndarray] = []
        usual, first = [], 0
        for number in sorted(numbers):
            classes, share = np.asarray(tables[f"classes{number}"]), np.asarray(tables[f"shares{number}"])
            parts.append(np.where(classes != UNKNOWN, classes + np.int32(first), np.int32(UNKNOWN)))
            first += int(classes.max(initial=0))
            usual.append(np.where(share > 0, share, 1))  # of items without classes any: their lift is set to 0
        widths = [part.shape[1] for part in parts]
        self._features = np.eye(len(parts)).repeat(widths, axis=0)  # (P, F) 1 for the columns of each feature, else 0
        if parts:
            self._classes, self._usual = np.concatenate(parts, axis=1), np.stack(usual, axis=1)
            self._own = (self._classes != UNKNOWN) @ self._features  # (V + 1, F) number of classes

    def __call__(self, requests: Requests) -> np.ndarray:
        length = requests.history.items.shape[1]
        lag = np.asarray(requests.history.lengths)[:, None] - 1 - np.arange(length)  # (B, L), 0 is the newest event
        weights = np.empty((3, *lag.shape))
        weights[0], weights[2] = lag >= 0, lag == 0
        weights[1] = weights[0] * self.decay ** np.maximum(lag, 0)
        values = np.zeros((*requests.items.shape, len(self.names)), dtype=np.float32)
        if len(self._features):
            by_class, place = self._class_values(requests, weights), 0
        column = 0
        for number in range(len(self.tables)):
            if f"classes{number}" in self.tables:
                values[..., column : column + 3] = by_class[:, :, place]
                column, place = column + 3, place + 1
            elif f"values{number}" in self.tables:
                values[..., column : column + 2] = np.moveaxis(self._numeric_values(number, requests, lag), 0, -1)
                column += 2
        if self.released is not None:
            age = 1970 + requests.request_time[:, None] / YEAR - np.asarray(self.tables["released"])[requests.items]
            values[..., column] = np.log1p(np.maximum(np.nan_to_num(age), 0))
        values[requests.items <= 0] = 0
        return values

    def _class_values(self, requests: Requests, weights: np.ndarray) -> np.ndarray:
        """Three values of each feature with classes, (B, C, features, 3)."""
        history, candidates = (  # (B, L or C, P)
            self._classes.take(items, axis=0) for items in (requests.history.items, requests.items)
        )
        sums = class_weights(history, weights, candidates, self._features)
        usual, own = self._usual.take(requests.items, axis=0), self._own.take(requests.items, axis=0)
        total = weights[:2].sum(2)[:, :, None, None]
        lifts = np.log((sums[:2] + self.smoothing * usual) / ((total + self.smoothing) * usual))
        newest = self._own[requests.newest_items(1)]  # (B, 1, features)
        values = np.empty((*own.shape, 3), dtype=np.float32)
        values[..., :2] = np.moveaxis(np.where(own > 0, lifts, 0), 0, -1)
        values[..., 2] = sums[2] / np.maximum(own + newest - sums[2], 1)
        return values

    def _numeric_values(self, number: int, requests: Requests, lag: np.ndarray) -> np.ndarray:
        values = np.asarray(self.tables[f"values{number}"])
        history, candidates = values[requests.history.items].astype(np.float64), values[requests.items]
        present = (lag >= 0) & np.isfinite(history)
        count = present.sum(1)
        mean = np.where(count > 0, np.where(present, history, 0).sum(1) / count.clip(min=1), np.nan)
        newest = np.where((lag == 0) & present, history, 0).sum(1)
        newest = np.where(((lag == 0) & present).any(1), newest, np.nan)
        distance = np.abs(candidates - np.stack([mean, newest])[:, :, None])
        return np.where(np.isnan(distance), 0, distance.clip(max=FURTHEST))


def class_weights(history: np.ndarray, weights: np.ndarray, candidates: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Summed weights of the events that share a class with each candidate, one term per class, (W, B, C, F) float64.

    Args:
        history: (B, L, P) classes of the events, padded with 0.
        weights: (W, B, L) W alternative weightings of the events.
        candidates: (B, C, P) classes of the candidates.
        features: (P, F) 1 for the columns of each feature, else 0.
    """
    size = 1 + max(int(history.max(initial=0)), int(candidates.max(initial=0)))
    row = size * np.arange(len(history))[:, None, None]
    keys, queries, cells = (row + history).ravel(), row + candidates, size * len(history)
    nothing = row.ravel() + UNKNOWN
    if cells > CELLS:
        distinct, keys = np.unique(keys, return_inverse=True)
        index = np.minimum(np.searchsorted(distinct, queries), len(distinct) - 1)
        found = (distinct[index] == queries) & (candidates != UNKNOWN)
        queries, cells = np.where(found, index, len(distinct)), len(distinct) + 1
        nothing = nothing[:0]
    of_class = np.stack([np.bincount(keys, weight.repeat(history.shape[2]), cells) for weight in weights])
    of_class[:, nothing] = 0
    return of_class.take(queries, axis=1) @ features


def shares(classes: np.ndarray, size: int, counts: np.ndarray) -> np.ndarray:
    """Sum over an item's classes of their smoothed shares of training events; 0 without classes, (V + 1,) float64.

    Args:
        classes: (V + 1, P) classes of the items, below `size`.
        counts: (V + 1,) training events of the items.
    """
    events = np.bincount(classes.ravel(), np.repeat(counts, classes.shape[1]), size)
    return np.where(classes != UNKNOWN, ((events + 1) / (counts.sum() + size))[classes], 0).sum(1)


def standardised(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(V + 1,) values with mean 0 and standard deviation 1 over training events, float64; NaN where missing.

    Args:
        counts: (V + 1,) training events of the items.
    """
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    weights = np.where(np.isnan(values), 0, counts)
    total = max(weights.sum(), 1)
    values = values - (weights * np.nan_to_num(values)).sum() / total
    spread = np.sqrt((weights * np.nan_to_num(values) ** 2).sum() / total)
    return values / (spread if spread > 0 else 1)


def years(dataset: Dataset, name: str) -> np.ndarray:
    """The numeric feature of this name, which holds years, (V + 1,) float64; NaN where missing."""
    if not dataset.has_time:
        raise ValueError(f"released is {name!r} but {dataset.path} has an order and no times; leave released out")
    numeric = {feature["name"]: feature["values"] for feature in dataset.item_features if feature["kind"] == "numeric"}
    if name not in numeric:
        raise ValueError(
            f"released is {name!r}, expected a numeric item feature of {dataset.path}, which has "
            f"{', '.join(sorted(numeric)) or 'none'}; declare the year as numeric when the data are prepared"
        )
    values = np.where(np.isfinite(numeric[name]), numeric[name], np.nan).astype(np.float64)
    latest = np.nanmax(values, initial=0)
    if latest > LATEST:
        raise ValueError(f"released is {name!r}, which reaches {latest:g}; expected years, such as 1995 or 1995.5")
    return values
