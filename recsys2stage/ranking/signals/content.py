"""What the retriever would say of an item of which it knew nothing but the features. V items, P columns of features."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys2stage.columns import PAD, UNKNOWN
from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.affinity import FURTHEST, standardised
from recsys2stage.ranking.signals.base import Proposer, Requests, unit
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, cut, highest

ITEMS_IN_FLIGHT = 1 << 12  # rows of features that are made dense together


class Content(Proposer):
    """The retriever's query beside item vectors that are read off features (Gantner et al., ICDM 2010, linear map).

    With f_i the declared features of item i, v_i its vector as the retriever made it and w_i = log(1 + n_i) of its n_i
    training events, the map is

        W = argmin  Σ_i w_i |v_i − W f_i|² + ridge · w · |W|²,    w the mean of the w_i above 0,

    and an item's vector is what the *other* items make of its features, by the identity of leave-one-out in ridge
    regression:

        v̂_i = v_i − (v_i − W f_i) / (1 − h_i),    h_i = w_i f_iᵀ (Σ_j w_j f_j f_jᵀ + ridge · w · I)⁻¹ f_i.

    So it holds nothing that was learned from the item's own id, and speaks of an item without training events as of any
    other. The numbers are cosines of the query and v̂: of declared features (`cosine`), and of these with log(1 + n_i),
    its square and its cube (`cosine_popular`). They are 0 without a history.

    Proposals are the items with at most `rare` training events whose `cosine` is largest: those that an index of
    learned vectors cannot find.

    Args:
        candidates: how many it names at each request; 0: none.
        rare: training events of an item that may be named, at most.
        ridge: penalty of the map, in items.
        classes: of a categorical or multi-valued feature the most frequent so many are told apart.
    """

    names, counted = ("cosine", "cosine_popular"), ("cosine_popular",)

    def __init__(self, candidates: int = 0, rare: int = 0, ridge: float = 30.0, classes: int = 1000) -> None:
        super().__init__(candidates)
        if ridge <= 0:
            raise ValueError(f"ridge is {ridge}, expected a number of items above 0")
        if rare < 0 or classes < 1:
            raise ValueError(f"rare is {rare} and classes {classes}, expected at least 0 and at least 1")
        self.rare, self.ridge, self.classes = rare, ridge, classes

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if not dataset.item_features:
            raise ValueError(
                f"the items of {dataset.path} have no features; declare some when the data are prepared, or leave "
                "Content out"
            )
        counts = np.asarray(dataset.train_counts)
        told = [np.ones((len(counts), 1)), *(columns(f, counts, self.classes) for f in dataset.item_features)]
        log = np.log1p(counts.astype(np.float64))
        popular = standardised(log, counts > 0)[:, None]
        self.tables = {
            "vectors": _left_out(told, log, vectors, self.ridge),
            "vectors_popular": _left_out([*told, popular, popular**2, popular**3], log, vectors, self.ridge),
            "rare": 1 + np.flatnonzero(counts[1:] <= self.rare),
        }

    def __call__(self, requests: Requests) -> np.ndarray:
        items, queries = requests.items.clip(min=PAD), self._queries(requests)
        told = [np.asarray(self.tables[name])[items] for name in ("vectors", "vectors_popular")]
        cosines = np.stack([np.einsum("bd,bcd->bc", queries, vectors) for vectors in told], axis=-1)
        return np.where(items[..., None] > 0, cosines, np.float32(0))

    def _queries(self, requests: Requests) -> np.ndarray:
        return unit(requests.queries) * (np.asarray(requests.history.lengths) > 0)[:, None].astype(np.float32)

    def propose(self, requests: Requests, known: Ragged) -> np.ndarray:
        rare, queries = np.asarray(self.tables["rare"]), self._queries(requests)
        vectors, size = np.asarray(self.tables["vectors"]), len(self.tables["vectors"])
        proposals = np.zeros((len(queries), self.candidates), dtype=np.int64)
        for begin in range(0, len(queries), ROWS_IN_FLIGHT):
            rows = slice(begin, begin + ROWS_IN_FLIGHT)
            scores = queries[rows] @ vectors[rare].T
            scores[np.asarray(requests.history.lengths)[rows] == 0] = -np.inf
            proposals[rows] = highest(scores, rare, cut(known, begin, begin + len(scores)), size, self.candidates)
        return proposals


def columns(feature: dict[str, Any], counts: np.ndarray, classes: int) -> np.ndarray:
    """A feature as columns of numbers, (V + 1, p), or as numbers of classes, (V + 1, n) int64, −1 for none.

    Args:
        feature: a declared feature with its array.
        counts: (V + 1,) training events of the items.
        classes: how many are told apart, the most frequent ones.
    """
    values = np.asarray(feature["values"]).reshape(len(counts), -1)
    if feature["kind"] == "numeric":
        return np.nan_to_num(standardised(values[:, 0], counts)).clip(-FURTHEST, FURTHEST)[:, None]
    if feature["kind"] == "vector":
        known = np.nan_to_num(values)
        length = np.square(known[counts > 0]).sum(1).mean() if counts.any() else 0
        return known / max(np.sqrt(length), np.finfo(known.dtype).tiny)
    shown = values[counts > 0]  # what no training event shows has no say
    items = np.bincount(shown[shown != UNKNOWN], minlength=feature["size"])
    frequent = np.argsort(-items, kind="stable")[:classes]
    number = np.full(len(items), -1)
    number[frequent] = np.where(items[frequent] > 0, np.arange(len(frequent)), -1)
    return number[values]


def _left_out(told: Sequence[np.ndarray], weights: np.ndarray, vectors: np.ndarray, ridge: float) -> np.ndarray:
    """What the other items make of each item's features, (V + 1, D) float32, unit; row 0 zero.

    Args:
        told: columns of numbers, or of classes.
        weights: (V + 1,) of the items.
        vectors: (V + 1, D) of the items.
        ridge: penalty, in items of the mean weight.
    """
    penalty = ridge * (weights[weights > 0].mean() if weights.any() else 1)
    width = _dense(told, slice(0, 1)).shape[1]
    gram, targets = penalty * np.eye(width), np.zeros((width, vectors.shape[1]))
    for rows in _blocks(len(vectors)):
        features = _dense(told, rows)
        weighted = features * weights[rows, None]
        gram += features.T @ weighted
        targets += weighted.T @ vectors[rows]
    inverse = np.linalg.inv(gram)
    mapped, found = inverse @ targets, np.zeros(vectors.shape, dtype=np.float32)
    for rows in _blocks(len(vectors)):
        features = _dense(told, rows)
        leverage = weights[rows] * ((features @ inverse) * features).sum(1)
        found[rows] = vectors[rows] - (vectors[rows] - features @ mapped) / (1 - leverage)[:, None]
    return unit(found)


def _blocks(size: int) -> list[slice]:
    """All items, some at a time."""
    return [slice(begin, min(begin + ITEMS_IN_FLIGHT, size)) for begin in range(1, size, ITEMS_IN_FLIGHT)]


def _dense(told: Sequence[np.ndarray], rows: slice) -> np.ndarray:
    """(rows, P) float64; a class becomes a column of its own, 1 for those that carry it."""
    parts = []
    for values in told:
        part = values[rows]
        if part.dtype.kind == "i":
            width = int(values.max(initial=-1)) + 1
            part = np.zeros((len(part), width + 1))  # none: the last column, which -1 is
            part[np.arange(len(part))[:, None], values[rows]] = 1
            part = part[:, :width]
        parts.append(part)
    return np.concatenate(parts, axis=1)
