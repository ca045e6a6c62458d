"""Outputs of both stages for B requests, and the completion of long lists with items beyond the candidates."""

from typing import NamedTuple

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.batches import Ragged, in_chunks

NUMBERS_IN_FLIGHT = 1 << 24  # scores at once


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
    left_out = [excluded.rows, np.nonzero(ranked.items > 0)[0]], [excluded.values, ranked.items[ranked.items > 0]]
    rows, values = (np.concatenate(part) for part in left_out)
    width = min(count, len(vectors))
    items, own = np.zeros((len(queries), width), dtype=np.int64), np.zeros((len(queries), width), dtype=np.float32)
    for part in in_chunks(len(queries), max(1, NUMBERS_IN_FLIGHT // len(vectors))):
        scores = queries[part] @ vectors.T  # (b, V + 1)
        within = (rows >= part.start) & (rows < part.stop)
        scores[:, c.PAD] = scores[rows[within] - part.start, values[within]] = -np.inf
        if allowed is not None:
            scores[:, 1:][
                ~np.broadcast_to(allowed if allowed.ndim == 1 else allowed[part], scores[:, 1:].shape)
            ] = -np.inf
        for row, score in enumerate(scores, start=part.start):
            least = np.partition(score, len(score) - width)[len(score) - width]
            best = np.flatnonzero(score >= least)  # more than `width` if scores are equal: the lower items count
            best = best[np.argsort(-score[best], kind="stable")[:width]]
            items[row], own[row] = best, score[best]
    real = own > -np.inf
    lowest = np.where(ranked.items > 0, ranked.score, np.inf).min(axis=1, keepdims=True)
    lowest[np.isinf(lowest)] = 0  # a row without candidates has no other items either
    if scale is None:
        score = np.minimum(own, lowest)  # an approximate index may have missed a better item
    else:
        score = lowest + scale * (own - own[:, :1].clip(min=np.finfo(own.dtype).min))
    return Recommendations(np.where(real, items, -1), np.where(real, score, -np.inf).astype(np.float32), own)
