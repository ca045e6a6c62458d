"""Demographics: popularity of a candidate among users with the same categorical features."""

import numpy as np

from recsys2stage.columns import UNKNOWN
from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_number
from recsys2stage.ranking.signals.base import Requests, Signal
from recsys2stage.ranking.signals.keys import END, batched_searchsorted

DENSE = 1 << 21  # values of all features that are computed once, 4 bytes each


class Demographics(Signal):
    """Lift of a candidate among users of the same class over its overall popularity.

    For each categorical user feature, with g the user's class and b the candidate,

        log((n(b, g) + alpha) / (n(b) · p(g) + alpha))

    where n(b, g) counts the training events of b by users of class g, n(b) those of b, and p(g) is the share of all
    training events by users of class g: observed over expected counts, as in Transitions. It is 0 if the user's class
    is unknown or b has no events.

    Args:
        alpha: pseudo-events added to both counts.
    """

    reads_user = True

    def __init__(self, alpha: float = 5.0) -> None:
        check_number("alpha", alpha, above=0, example=5.0, what="a number of events")
        self.alpha = alpha

    @property
    def names(self) -> tuple[str, ...]:  # depend on the dataset, stored in the tables
        return tuple(self.tables["names"].tolist())

    @property
    def counted(self) -> tuple[str, ...]:
        return self.names

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        features = [(index, f) for index, f in enumerate(dataset.user_features) if f["kind"] == "categorical"]
        if not features:
            raise ValueError(
                f"the users of {dataset.path} have no categorical features; declare some when the data are prepared, "
                "or leave Demographics out"
            )
        train, size = spans(np.asarray(dataset.offsets[:-1]), np.asarray(dataset.train_ends)), dataset.num_items + 1
        items = np.asarray(dataset.items)[train.values].astype(np.int64)
        tables = {
            "names": np.array([f"{feature['name']}_lift" for _, feature in features]),
            "features": np.array([index for index, _ in features]),  # among all user features
            "counts": dataset.train_counts,
        }
        for number, (_, feature) in enumerate(features):
            classes = np.asarray(feature["values"])[train.rows].astype(np.int64)
            keys, counts = np.unique(classes * size + items, return_counts=True)
            tables |= {
                f"keys{number}": np.append(keys, END),  # class · (V + 1) + item
                f"events{number}": np.append(counts, 0),
                f"share{number}": np.bincount(classes, minlength=feature["size"]) / max(len(items), 1),
            }
        self.restore(tables)

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        super().restore(tables)
        sizes = [len(tables[f"share{number}"]) for number in range(len(tables["features"]))]  # classes
        self._dense: np.ndarray | None = None  # the values of all features, (classes of all, V + 1) float32
        self._first = np.cumsum([0, *sizes[:-1]])  # row of each feature's class 0
        if sum(sizes) * len(tables["counts"]) <= DENSE:
            items = np.arange(len(tables["counts"]))
            lifts = [self._lift(number, np.arange(size)[:, None], items) for number, size in enumerate(sizes)]
            self._dense = np.concatenate(lifts).astype(np.float32)

    def __call__(self, requests: Requests) -> np.ndarray:
        user, features = requests.history.user, self.tables["features"].tolist()
        if user is None:
            return np.zeros((*requests.items.shape, len(features)), dtype=np.float32)
        classes = np.concatenate([user[feature].reshape(-1, 1).astype(np.int64) for feature in features], axis=1)
        if self._dense is not None:
            return self._dense[(self._first + classes)[:, None], requests.items[..., None]]
        lifts = [self._lift(number, classes[:, number, None], requests.items) for number in range(len(features))]
        return np.stack(lifts, axis=2).astype(np.float32)

    def _lift(self, number: int, classes: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The values of a feature.

        Args:
            number: of the feature.
            classes: (B, 1).
            items: (B, C) or (C,).
        """
        counts = np.asarray(self.tables["counts"])
        keys, queries = self.tables[f"keys{number}"], classes * len(counts) + items
        index = batched_searchsorted(keys, queries)
        events = np.where(keys[index] == queries, self.tables[f"events{number}"][index], 0)
        expected = counts[items] * np.asarray(self.tables[f"share{number}"])[classes]
        lift = np.log((events + self.alpha) / (expected + self.alpha))
        return np.where((classes != UNKNOWN) & (counts[items] > 0), lift, 0)
