"""The base class of approximate indexes, completed by exact search."""

from abc import abstractmethod

import numpy as np
from jaxtyping import Bool, Float32, Int64

from recsys2stage.retrieval.index.base import Index
from recsys2stage.retrieval.index.exact import Exact
from recsys2stage.retrieval.index.rows import (
    Exclude,
    SearchResult,
    best_first,
    chunks,
    empty_result,
    exclusion_keys,
    take_rows,
)


class Approximate(Index):
    """Approximate search: over-fetches candidates, scores them exactly and removes excluded items.

    The more items are excluded or not allowed, the more are fetched. Exact search handles rows that end up with too few
    items, rows for which most items would have to be fetched, and rows that allow only a few.
    """

    @abstractmethod
    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        """Approximately the n best items of each query, distinct, in any order; -1 where there are fewer."""

    def search(
        self,
        queries: Float32[np.ndarray, "B D"],
        k: int,
        exclude: Exclude | None = None,
        allowed: Bool[np.ndarray, "*rows V"] | None = None,
    ) -> SearchResult:
        exclude, allowed = self._check(queries, k, exclude), self._check_allowed(queries, allowed)
        top_scores, top_items = empty_result(len(queries), k)
        count = len(self.vectors)
        need, allowed_count = k + np.diff(exclude[1]), np.full(len(queries), count)
        if allowed is not None:
            allowed_count = allowed.sum(1)
            need = np.ceil(need * (count / np.maximum(allowed_count, 1))).astype(np.int64)
        # one fetch serves many rows, so rows are grouped by the number they need, rounded up to a power of two
        fetch = np.minimum(2 ** np.ceil(np.log2(need)).astype(np.int64), count)
        fetch[(2 * need > count) | (allowed_count <= fetch)] = 0  # at most that many are allowed: exact search
        short = [np.flatnonzero(fetch == 0)]
        for n in np.unique(fetch[fetch > 0]).tolist():
            for rows in chunks(np.flatnonzero(fetch == n), n * self.vectors.shape[1]):
                items = self.candidates(queries[rows], n)
                excluded = exclusion_keys(*take_rows(exclude, rows), count)
                missing = (items < 1) | np.isin(np.arange(len(rows))[:, None] * (count + 1) + items, excluded)
                if allowed is not None:
                    missing |= ~np.take_along_axis(allowed[rows], items.clip(1) - 1, axis=1)
                scores = np.matmul(self.vectors[items.clip(1) - 1], queries[rows][:, :, None])[:, :, 0]  # (b, n)
                scores, items = best_first(np.where(missing, -np.inf, scores).astype(np.float32), items)
                top_scores[rows], top_items[rows] = scores[:, :k], items[:, :k]
                if allowed is not None:  # exclusions among the allowed items
                    owner, item = np.divmod(excluded, count + 1)
                    excluded = excluded[allowed[rows[owner], item - 1]]
                available = allowed_count[rows] - np.bincount(excluded // (count + 1), minlength=len(rows))
                short.append(rows[(~missing).sum(1) < np.minimum(k, available)])
        if (rows := np.concatenate(short)).size:
            masks = None if allowed is None else allowed[rows]
            top_scores[rows], top_items[rows] = self._exact.search(queries[rows], k, take_rows(exclude, rows), masks)
        return top_scores, top_items

    def _prepare(self) -> None:
        self._exact = Exact()
        self._exact.build(self.vectors)
