"""Content: retriever scores with item vectors predicted from features only. V items, P feature columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys2stage.columns import PAD, UNKNOWN
from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_integer, check_number
from recsys2stage.ranking.signals.affinity import FURTHEST, standardised
from recsys2stage.ranking.signals.base import Proposer, Requests, unit
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, slice_rows, top_by_score

ITEMS_IN_FLIGHT = 1 << 12  # items per block of dense feature rows


class Content(Proposer):
    """Cosine of the query and item vectors predicted from features (linear map of Gantner et al., ICDM 2010).

    With f_i the declared features of item i, v_i its retriever vector and w_i = log(1 + n_i) of its n_i training
    events, the map is

        W = argmin  Σ_i w_i |v_i − W f_i|² + ridge · w · |W|²,    w the mean of the w_i above 0,

    and an item's vector is the leave-one-out prediction, from a map fitted to all *other* items, by the closed form of
    ridge regression:

        v̂_i = v_i − (v_i − W f_i) / (1 − h_i),    h_i = w_i f_iᵀ (Σ_j w_j f_j f_jᵀ + ridge · w · I)⁻¹ f_i.

    So it contains nothing learned from the item's own ID, and cold items are treated like all others. The values are
    cosines of the query and v̂: of declared features (`cosine`), and of these with log(1 + n_i), its square and its cube
    (`cosine_popular`). They are 0 without a history.

    Proposals are the items with the largest `cosine` among those with at most `rare` training events, which an index of
    learned vectors cannot retrieve.

    Args:
        candidates: number of items proposed for each request; 0: none.
        rare: maximum number of training events of a proposed item.
        ridge: L2 penalty of the map, in items of mean weight.
        classes: number of most frequent classes of a categorical or multi-valued feature that get columns.
    """

    reads_allowed = True
    names, counted = ("cosine", "cosine_popular"), ("cosine_popular",)

    def __init__(self, candidates: int = 0, rare: int = 0, ridge: float = 30.0, classes: int = 1000) -> None:
        super().__init__(candidates)
        check_number("ridge", ridge, above=0, example=30.0, what="a number of items")
        check_integer("rare", rare, 0, example=5)
        check_integer("classes", classes, 1, example=1000)
        self.rare, self.ridge, self.classes = rare, ridge, classes
        self._rare: np.ndarray | None = None  # vectors of the rare items

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if not dataset.item_features:
            raise ValueError(
                f"the items of {dataset.path} have no features; declare some when the data are prepared, or leave "
                "Content out"
            )
        counts = np.asarray(dataset.train_counts)
        features = [np.ones((len(counts), 1)), *(columns(f, counts, self.classes) for f in dataset.item_features)]
        log = np.log1p(counts.astype(np.float64))
        popular = standardised(log, counts > 0)[:, None]
        tables = {
            "vectors": _leave_one_out(features, log, vectors, self.ridge),
            "vectors_popular": _leave_one_out([*features, popular, popular**2, popular**3], log, vectors, self.ridge),
            "rare": 1 + np.flatnonzero(counts[1:] <= self.rare),
        }
        self.restore(tables)

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        super().restore(tables)
        self._rare = None

    def __call__(self, requests: Requests) -> np.ndarray:
        items, queries = np.maximum(requests.items, PAD), self._queries(requests)
        values = np.empty((*items.shape, 2), dtype=np.float32)
        for number, name in enumerate(("vectors", "vectors_popular")):
            values[..., number] = np.matmul(self.tables[name].take(items, axis=0), queries[..., None])[..., 0]
        values[items == 0] = 0
        return values

    def _queries(self, requests: Requests) -> np.ndarray:
        return unit(requests.queries) * (np.asarray(requests.history.lengths) > 0)[:, None].astype(np.float32)

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        rare, queries = self.tables["rare"], self._queries(requests)
        if self._rare is None:  # a table of their own: gathering them takes longer than scoring them
            self._rare = self.tables["vectors"][rare]
        proposals = np.zeros((len(queries), self.candidates), dtype=np.int64)
        for begin in range(0, len(queries), ROWS_IN_FLIGHT):
            rows = slice(begin, begin + ROWS_IN_FLIGHT)
            scores = queries[rows] @ self._rare.T
            scores[np.asarray(requests.history.lengths)[rows] == 0] = -np.inf
            own = slice_rows(excluded, begin, begin + len(scores))
            allowed = None if requests.allowed is None else requests.allowed[rows]
            proposals[rows] = top_by_score(scores, rare, own, self.candidates, allowed)
        return proposals


def columns(feature: dict[str, Any], counts: np.ndarray, classes: int) -> np.ndarray:
    """A feature as dense columns, (V + 1, p) float, or as column numbers of its classes, (V + 1, n) int64, −1 for none.

    Args:
        feature: a declared feature with its array.
        counts: (V + 1,) training events of the items.
        classes: number of most frequent classes that get columns.
    """
    values = np.asarray(feature["values"]).reshape(len(counts), -1)
    if feature["kind"] == "numeric":
        return np.nan_to_num(standardised(values[:, 0], counts)).clip(-FURTHEST, FURTHEST)[:, None]
    if feature["kind"] == "vector":
        dense = np.nan_to_num(values)
        length = np.square(dense[counts > 0]).sum(1).mean() if counts.any() else 0
        return dense / max(np.sqrt(length), np.finfo(dense.dtype).tiny)
    warm = values[counts > 0]  # cold items are not counted
    items = np.bincount(warm[warm != UNKNOWN], minlength=feature["size"])
    frequent = np.argsort(-items, kind="stable")[:classes]
    number = np.full(len(items), -1)
    number[frequent] = np.where(items[frequent] > 0, np.arange(len(frequent)), -1)
    return number[values]


def _leave_one_out(parts: Sequence[np.ndarray], weights: np.ndarray, vectors: np.ndarray, ridge: float) -> np.ndarray:
    """Item vectors predicted from features by leave-one-out ridge regression, (V + 1, D) float32, unit; row 0 zero.

    Args:
        parts: feature columns, as `columns` returns them.
        weights: (V + 1,) item weights.
        vectors: (V + 1, D) retriever item vectors.
        ridge: L2 penalty, in items of mean weight.
    """
    penalty = ridge * (weights[weights > 0].mean() if weights.any() else 1)
    width = _dense(parts, slice(0, 1)).shape[1]
    gram, targets = penalty * np.eye(width), np.zeros((width, vectors.shape[1]))
    for rows in _blocks(len(vectors)):
        features = _dense(parts, rows)
        weighted = features * weights[rows, None]
        gram += features.T @ weighted
        targets += weighted.T @ vectors[rows]
    inverse = np.linalg.inv(gram)
    mapped, predicted = inverse @ targets, np.zeros(vectors.shape, dtype=np.float32)
    for rows in _blocks(len(vectors)):
        features = _dense(parts, rows)
        leverage = weights[rows] * ((features @ inverse) * features).sum(1)
        predicted[rows] = vectors[rows] - (vectors[rows] - features @ mapped) / (1 - leverage)[:, None]
    return unit(predicted)


def _blocks(size: int) -> list[slice]:
    """Items 1 .. size - 1 in blocks."""
    return [slice(begin, min(begin + ITEMS_IN_FLIGHT, size)) for begin in range(1, size, ITEMS_IN_FLIGHT)]


def _dense(parts: Sequence[np.ndarray], rows: slice) -> np.ndarray:
    """(rows, P) float64; classes are multi-hot encoded."""
    blocks = []
    for values in parts:
        block = values[rows]
        if block.dtype.kind == "i":
            width = int(values.max(initial=-1)) + 1
            block = np.zeros((len(block), width + 1))  # -1 indexes the last column, which is dropped
            block[np.arange(len(block))[:, None], values[rows]] = 1
            block = block[:, :width]
        blocks.append(block)
    return np.concatenate(blocks, axis=1)
