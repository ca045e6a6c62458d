"""Cosine of items by their declared features: classes weighted by rarity, and vectors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys2stage.columns import UNKNOWN
from recsys2stage.ranking.signals.base import unit


class FeatureSimilarity:
    """Cosine similarity of items, the mean over their features; numeric features are not used.

    A categorical or multi-valued feature is the vector of its classes, each weighted by log(items / items of the
    class), so that rare classes count more. A vector feature is used as it is. An item without a value of a feature has
    similarity 0 in it.

    Args:
        features: declared item features with their arrays, as `Dataset.item_features` gives them.
        size: V + 1.
    """

    def __init__(self, features: Sequence[dict[str, Any]], size: int) -> None:
        codes, weights, self._dense = [], [], np.zeros((size, 0), dtype=np.float32)
        used = [feature for feature in features if feature["kind"] != "numeric"]
        self._width = 0
        for feature in used:
            values = np.asarray(feature["values"]).reshape(size, -1)
            if feature["kind"] == "vector":
                own = unit(np.nan_to_num(values).astype(np.float32)) / np.float32(np.sqrt(len(used)))
                self._dense = np.concatenate([self._dense, own], axis=1)
                continue
            known = values != UNKNOWN
            items = np.bincount(values[known], minlength=feature["size"])
            rarity = np.log(max(size - 1, 2) / np.maximum(items, 1)) + 1e-3  # a class of all items counts, a little
            own = np.where(known, rarity[values], 0)
            weights.append(unit(own) / np.sqrt(len(used)))
            codes.append(np.where(known, values + self._width, 0))
            self._width += int(feature["size"])
        self._codes = np.concatenate([*codes, np.zeros((size, 0), np.int64)], axis=1).astype(np.int64)
        self._weights = np.concatenate([*weights, np.zeros((size, 0))], axis=1).astype(np.float32)
        self._query = np.zeros(self._width + 1, dtype=np.float32)

    def __call__(self, item: int, others: np.ndarray) -> np.ndarray:
        """Cosines of an item and (n,) others, (n,) float32, −1 to 1."""
        query, codes = self._query, self._codes[item]
        query[codes] = self._weights[item]
        query[0] = 0
        cosines = (query[self._codes[others]] * self._weights[others]).sum(axis=1)
        query[codes] = 0
        return cosines + self._dense[others] @ self._dense[item]
