"""What both stages found for B requests, and the items beyond the candidates, which follow them in a longer list."""

from typing import NamedTuple

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.batches import Ragged


class RetrievedItems(NamedTuple):
    """The candidates of B requests, by the retriever's score; −1 and −inf past the last."""

    items: np.ndarray  # (B, K) int64
    score: np.ndarray  # (B, K) float32, the retriever's
    proposed: list[np.ndarray]  # items of each source, best first, (B, up to K) each: the index, then the signals


class Recommendations(NamedTuple):
    """The best items of B requests, best first; −1 and −inf past the end of a list."""

    items: np.ndarray  # (B, k) int64
    score: np.ndarray  # (B, k) float32, of the last stage
    retriever_score: np.ndarray  # (B, k) float32


def beyond(
    queries: np.ndarray, vectors: np.ndarray, excluded: Ragged, ranked: Recommendations, count: int, scale: float | None
) -> Recommendations:
    """The best items by the retriever that are neither excluded nor candidates, to follow the candidates.

    After a second stage their scores go on from its lowest logit with the retriever's differences on the scale to which
    it was calibrated; without one they are the retriever's own.

    Args:
        queries: (B, D) of the retriever.
        vectors: (V + 1, D) of the items.
        excluded: items that are not to be recommended.
        ranked: all candidates.
        count: how many at most.
        scale: of the retriever's score in the second stage; None: there is none.
    """
    own = queries @ vectors.T  # (B, V + 1)
    rows, places = np.nonzero(ranked.items > 0)
    own[:, c.PAD] = own[excluded.rows, excluded.values] = own[rows, ranked.items[rows, places]] = -np.inf
    items = np.argsort(-own, axis=1, kind="stable")[:, :count]
    own = np.take_along_axis(own, items, axis=1)
    real = own > -np.inf
    lowest = np.where(ranked.items > 0, ranked.score, np.inf).min(axis=1, keepdims=True)
    lowest[np.isinf(lowest)] = 0  # without a candidate there is no other item either
    if scale is None:
        score = np.minimum(own, lowest)  # an approximate index may have missed a better one
    else:
        score = lowest + scale * (own - own[:, :1].clip(min=np.finfo(own.dtype).min))
    return Recommendations(np.where(real, items, -1), np.where(real, score, -np.inf).astype(np.float32), own)
