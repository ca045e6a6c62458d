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
    count_allowed,
    empty_result,
    exclusion_keys,
    mask_groups,
    masks_of,
    take_rows,
)

FEW = 64  # where at most 1 / FEW of the items are allowed, they are scored exactly


class Approximate(Index):
    """Approximate search: over-fetches candidates, scores them exactly and removes excluded items.

    The more items are excluded, the more are fetched. Items that are not allowed are left out by the index itself
    where it can (`filters`); elsewhere more are fetched. Exact search handles rows that end up with too few items, rows
    for which most items would have to be fetched, and rows that allow only a few.
    """

    filters: bool = False  # whether the index implements `allowed_candidates`
    k_factor: int = 1  # candidates fetched for each item to return

    @abstractmethod
    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        """Approximately the n best items of each query, distinct, in any order; -1 where there are fewer."""

    def allowed_candidates(
        self, queries: Float32[np.ndarray, "B D"], n: int, allowed: Bool[np.ndarray, " V"]
    ) -> Int64[np.ndarray, "B n"]:
        """As `candidates`, of the allowed items alone; called if `filters` is True."""
        raise NotImplementedError(f"{type(self).__name__} sets filters to True; implement allowed_candidates")

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
        need, allowed_count = self.k_factor * k + np.diff(exclude[1]), np.full(len(queries), count)
        if allowed is not None:
            allowed_count = count_allowed(allowed, len(queries))
            if not self.filters:
                need = np.ceil(need * (count / np.maximum(allowed_count, 1))).astype(np.int64)
        # one fetch serves many rows, so rows are grouped by the number they need, rounded up to a power of two
        fetch = np.minimum(2 ** np.ceil(np.log2(need)).astype(np.int64), count)
        few = (allowed_count <= fetch) | (FEW * allowed_count <= count)
        fetch[(2 * need > count) | few] = 0  # exact search
        short = [np.flatnonzero(fetch == 0)]
        for n in np.unique(fetch[fetch > 0]).tolist():
            for group, mask in mask_groups(allowed if self.filters else None, np.flatnonzero(fetch == n)):
                for rows in chunks(group, n * self.vectors.shape[1]):
                    items = (
                        self.candidates(queries[rows], n)
                        if mask is None
                        else self.allowed_candidates(queries[rows], n, mask)
                    )
                    excluded = exclusion_keys(*take_rows(exclude, rows), count)
                    missing = (items < 1) | np.isin(np.arange(len(rows))[:, None] * (count + 1) + items, excluded)
                    if allowed is not None:  # also of a filtered search: nothing else comes through
                        missing |= ~_lookup(allowed, rows[:, None], items.clip(1) - 1)
                        owner, item = np.divmod(excluded, count + 1)  # exclusions among the allowed items
                        excluded = excluded[_lookup(allowed, rows[owner], item - 1)]
                    scores = np.matmul(self.vectors[items.clip(1) - 1], queries[rows][:, :, None])[:, :, 0]  # (b, n)
                    scores, items = best_first(np.where(missing, -np.inf, scores).astype(np.float32), items)
                    top_scores[rows], top_items[rows] = scores[:, :k], items[:, :k]
                    available = allowed_count[rows] - np.bincount(excluded // (count + 1), minlength=len(rows))
                    short.append(rows[(~missing).sum(1) < np.minimum(k, available)])
        if (rows := np.concatenate(short)).size:
            own, masks = take_rows(exclude, rows), masks_of(allowed, rows)
            top_scores[rows], top_items[rows] = self._exact.search(queries[rows], k, own, masks)
        return top_scores, top_items

    def _prepare(self) -> None:
        self._exact = Exact()
        self._exact.share(self.vectors)


def _lookup(allowed: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of the mask of all rows, or of the mask of each row."""
    return allowed[columns] if allowed.ndim == 1 else allowed[rows, columns]
