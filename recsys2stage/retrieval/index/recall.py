"""Recall and latency of an index."""

import time

import numpy as np
from jaxtyping import Float32, Int64

from recsys2stage.retrieval.index.base import Index
from recsys2stage.retrieval.index.exact import Exact
from recsys2stage.retrieval.index.rows import Exclude, take_rows


def measure(
    index: Index, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None, singles: int = 200
) -> dict[str, int | float]:
    """Recall of an index against exact search, and its latency on this machine.

    Args:
        index: the index to measure.
        queries: query vectors.
        k: number of items per query.
        exclude: items not to return, as in `Index.search`.
        singles: number of queries that are searched again one at a time, for the latency.

    Returns:
        k, queries, recall@k (share of the exact top k that the index returns), median_ms and p95_ms of a single query,
        batch_ms per query when all are searched in one batch.
    """
    if not len(queries):
        raise ValueError("there are no queries to measure the index with, expected at least 1")
    exact = Exact()
    exact.build(index.vectors)
    exclude = index._check(queries, k, exclude)
    truth = exact.search(queries, k, exclude)[1]
    index.search(queries[:1], k, take_rows(exclude, np.arange(1)))  # warm-up: the first search includes one-time costs
    start = time.perf_counter()
    found = index.search(queries, k, exclude)[1]
    batch = time.perf_counter() - start
    latencies = []
    for row in np.unique(np.linspace(0, len(queries) - 1, singles).astype(np.int64)):
        query, own = queries[row : row + 1], take_rows(exclude, np.array([row]))
        start = time.perf_counter()
        index.search(query, k, own)
        latencies.append(time.perf_counter() - start)
    return {
        "k": k,
        "queries": len(queries),
        f"recall@{k}": recall_of(found, truth),
        "median_ms": float(np.median(latencies) * 1e3),
        "p95_ms": float(np.quantile(latencies, 0.95) * 1e3),
        "batch_ms": batch / len(queries) * 1e3,
    }


def recall_of(found: Int64[np.ndarray, "B k"], truth: Int64[np.ndarray, "B k"]) -> float:
    """The share of the items of exact search that an index has found; 1 if there are none."""
    owners = np.arange(len(truth))[:, None] * (1 + max(found.max(initial=0), truth.max(initial=0)))
    hits = np.isin((owners + truth)[truth > 0], (owners + found)[found > 0])
    return float(hits.mean()) if hits.size else 1.0
