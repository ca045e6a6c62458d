"""Outputs of both stages for B requests, and the completion of long lists with items beyond the candidates."""

from typing import NamedTuple

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.batches import Ragged


class RetrievedItems(NamedTuple):
    """The candidates of B requests, sorted by the retriever's score; padded with −1 and −inf."""

    items: np.ndarray  # (B, K) int64
    score: np.ndarray  # (B, K) float32, of the retriever
    proposed: list[np.ndarray]  # items of each source, best first, (B, up to K) each: the index, then the signals


class Recommendations(NamedTuple):
    """The recommended items of B requests, best first; padded with −1 and −inf."""

    items: np.ndarray  # (B, k) int64
    score: np.ndarray  # (B, k) float32, of the last stage
    retriever_score: np.ndarray  # (B, k) float32


def beyond(
    queries: np.ndarray,
    vectors: np.ndarray,
    excluded: Ragged,
    ranked: Recommendations,
    count: int,
    scale: float | None,
    allowed: np.ndarray | None = None,
) -> Recommendations:
    """The retriever's best items that are neither excluded nor candidates, to append after the candidates.

    With a ranker, their scores continue from its lowest logit with the retriever's score differences, on the ranker's
    calibrated scale. Without one, they are the retriever's scores.

    Args:
        queries: (B, D) query vectors.
        vectors: (V + 1, D) item vectors.
        excluded: items not to recommend.
        ranked: all candidates, ranked.
        count: maximum number of items.
        scale: the ranker's scale of the retriever's score; None: no ranker.
        allowed: (V,) or (B, V) bool, items that may be recommended; None: all.
    """
    own = queries @ vectors.T  # (B, V + 1)
    rows, columns = np.nonzero(ranked.items > 0)
    own[:, c.PAD] = own[excluded.rows, excluded.values] = own[rows, ranked.items[rows, columns]] = -np.inf
    if allowed is not None:
        own[:, 1:][~np.broadcast_to(allowed, own[:, 1:].shape)] = -np.inf
    items = np.argsort(-own, axis=1, kind="stable")[:, :count]
    own = np.take_along_axis(own, items, axis=1)
    real = own > -np.inf
    lowest = np.where(ranked.items > 0, ranked.score, np.inf).min(axis=1, keepdims=True)
    lowest[np.isinf(lowest)] = 0  # a row without candidates has no other items either
    if scale is None:
        score = np.minimum(own, lowest)  # an approximate index may have missed a better item
    else:
        score = lowest + scale * (own - own[:, :1].clip(min=np.finfo(own.dtype).min))
    return Recommendations(np.where(real, items, -1), np.where(real, score, -np.inf).astype(np.float32), own)
