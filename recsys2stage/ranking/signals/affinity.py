"""How the features of a candidate agree with those of the user's history. L events, P classes of an item."""

import numpy as np

from recsys2stage.columns import UNKNOWN
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.base import Requests, Signal

YEAR = 365.2425 * 86_400  # seconds
CELLS = 1 << 20  # of a table of users by classes; beyond it only the pairs that occur are kept
FURTHEST = 10.0  # spreads; a number that lies further is an outlier or an error of the data
LATEST = 9_999.0  # a year; greater numbers are seconds, days or the like


class Affinity(Signal):
    """Features of a candidate beside those of the history; a feature that is not known says 0.

    A categorical or multi-valued feature gives three numbers. With w the weight of each event, n(g) the weights of the
    events that carry class g, all together W, and s(g) = (N(g) + 1) / (N + number of classes) the share of the N
    training events that carry it,

        lift = log((Σ n(g) + smoothing · Σ s(g)) / ((W + smoothing) · Σ s(g))), over the classes g of the candidate,

    which is the mean share of its classes in the history over that in the log, as if each history had `smoothing` more
    events of an average user. It is told with w = 1 (`share`) and with w = decay^place, 0 the newest place (`recent`).
    The third (`newest`) is the overlap with the newest event's classes, those in both over those in either (Jaccard).

    A numeric feature gives two: how far the candidate lies from the mean of the history (`from_mean`) and from the
    newest event (`from_newest`), in standard deviations over training events, at most 10.

    Args:
        decay: weight of an event over that of the next newer one.
        smoothing: events of an average user that are added to each history.
        released: the numeric feature that holds the year in which an item came out, such as 1995 or 1995.5; gives
            log(1 + years from then to the request), 0 where that is in the future. None: there is none.
    """

    def __init__(self, decay: float = 0.9, smoothing: float = 1.0, released: str | None = None) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay is {decay}, expected above 0 and at most 1, which forgets nothing")
        if smoothing <= 0:
            raise ValueError(f"smoothing is {smoothing}, expected a number of events above 0")
        self.decay, self.smoothing, self.released = decay, smoothing, released

    @property
    def names(self) -> tuple[str, ...]:  # they depend on the data, and come with the tables
        return tuple(self.tables["names"].tolist())

    @property
    def reads_times(self) -> bool:  # only an age looks at the clock
        return self.released is not None

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        told = [feature for feature in dataset.item_features if feature["kind"] != "vector"]
        if not told:
            raise ValueError(
                f"the items of {dataset.path} have no categorical, multi or numeric features; declare some when the "
                "data are prepared, or leave Affinity out"
            )
        self.tables, names, counts = {}, [], dataset.train_counts
        for number, feature in enumerate(told):
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

    def __call__(self, requests: Requests) -> np.ndarray:
        length = requests.history.items.shape[1]
        place = np.asarray(requests.history.lengths)[:, None] - 1 - np.arange(length)  # 0 is the newest, (B, L)
        weights = np.stack([place >= 0, np.where(place >= 0, self.decay ** place.clip(min=0), 0), place == 0])
        parts = []  # (numbers, B, C) each
        for number in range(len(self.tables)):
            if f"classes{number}" in self.tables:
                parts.append(self._of_classes(number, requests, weights))
            elif f"values{number}" in self.tables:
                parts.append(self._of_numbers(number, requests, place))
        if self.released is not None:
            age = 1970 + requests.now[:, None] / YEAR - np.asarray(self.tables["released"])[requests.items]
            parts.append(np.log1p(np.nan_to_num(age).clip(min=0))[None])
        numbers = np.where(requests.items > 0, np.concatenate(parts), 0)
        return np.ascontiguousarray(np.moveaxis(numbers, 0, -1), dtype=np.float32)

    def _of_classes(self, number: int, requests: Requests, weights: np.ndarray) -> np.ndarray:
        classes = np.asarray(self.tables[f"classes{number}"])
        seen, target_action = classes[requests.history.items], classes[requests.items]  # (B, L, P), (B, C, P)
        tallies = tally(seen, weights, target_action)
        usual = np.asarray(self.tables[f"shares{number}"])[requests.items]
        usual = np.where(usual > 0, usual, 1)  # where no class is known; the lift is left out below
        total = weights[:2].sum(2)[:, :, None]
        lifts = np.log((tallies[:2] + self.smoothing * usual) / ((total + self.smoothing) * usual))
        own = (target_action != UNKNOWN).sum(2)
        newest = ((seen != UNKNOWN).sum(2) * weights[2]).sum(1)[:, None]
        overlap = tallies[2] / (own + newest - tallies[2]).clip(min=1)
        return np.concatenate([np.where(own > 0, lifts, 0), overlap[None]])

    def _of_numbers(self, number: int, requests: Requests, place: np.ndarray) -> np.ndarray:
        values = np.asarray(self.tables[f"values{number}"])
        seen, target_action = values[requests.history.items].astype(np.float64), values[requests.items]
        known = (place >= 0) & np.isfinite(seen)
        count = known.sum(1)
        mean = np.where(count > 0, np.where(known, seen, 0).sum(1) / count.clip(min=1), np.nan)
        newest = np.where((place == 0) & known, seen, 0).sum(1)
        newest = np.where(((place == 0) & known).any(1), newest, np.nan)
        distance = np.abs(target_action - np.stack([mean, newest])[:, :, None])
        return np.where(np.isnan(distance), 0, distance.clip(max=FURTHEST))


def tally(seen: np.ndarray, weights: np.ndarray, target_action: np.ndarray) -> np.ndarray:
    """Weights of the events that carry a class, summed over the classes of each candidate, (W, B, C) float64.

    Args:
        seen: (B, L, P) classes of the events, 0 where there are no more.
        weights: (W, B, L) weights of the events, several ways.
        asked: (B, C, P) classes of the candidates.
    """
    size = 1 + max(int(seen.max(initial=0)), int(target_action.max(initial=0)))
    row = size * np.arange(len(seen))[:, None, None]
    found, wanted, cells = row + seen, row + target_action, size * len(seen)
    if cells > CELLS:
        kept, inverse = np.unique(found.ravel(), return_inverse=True)
        at = np.searchsorted(kept, wanted).clip(max=len(kept) - 1)
        found, wanted, cells = inverse, np.where(kept[at] == wanted, at, len(kept)), len(kept) + 1
    tallies = np.empty((len(weights), *target_action.shape[:2]))
    for number, weight in enumerate(weights):
        mass = np.where(seen != UNKNOWN, weight[:, :, None], 0.0)
        tallies[number] = np.bincount(found.ravel(), mass.ravel(), cells)[wanted].sum(2)
    return tallies


def shares(classes: np.ndarray, size: int, counts: np.ndarray) -> np.ndarray:
    """The smoothed shares of training events of an item's classes, added up; 0 where none is known, (V + 1,) float64.

    Args:
        classes: (V + 1, P) classes of the items, below `size`.
        counts: (V + 1,) training events of the items.
    """
    carried = np.bincount(classes.ravel(), np.repeat(counts, classes.shape[1]), size)
    return np.where(classes != UNKNOWN, ((carried + 1) / (counts.sum() + size))[classes], 0).sum(1)


def standardised(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(V + 1,) numbers with mean 0 and spread 1 over training events, float64; NaN where not known.

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
    """The numeric feature of this name, which holds years, (V + 1,) float64; NaN where not known."""
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
