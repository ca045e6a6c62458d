"""An index that is chosen by its measured recall."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from recsys2stage.options import check_number
from recsys2stage.retrieval.index.base import Index
from recsys2stage.retrieval.index.exact import Exact
from recsys2stage.retrieval.index.faiss_index import Faiss
from recsys2stage.retrieval.index.recall import recall_of
from recsys2stage.retrieval.index.rows import Exclude, SearchResult

SMALL = 50_000  # items up to which exact search takes about a millisecond
K = 100  # items whose recall is measured
QUERIES, NOISE = 1000, 0.5  # queries made from item vectors where none are given; length of their noise to the item's
MAX_LISTS, DEGREE, CODES = 8192, 32, 16  # lists of IVF; neighbors of HNSW; bytes of a code of PQ
# Expected time of a query, in item vectors of a full scan that take as long; measured by benchmarks/speed/indexes.py
SCAN, VISIT, CODE, SCORE = 1.5, 10.0, 1.5, 55.0  # a vector in a list, a neighbor in a graph, a code, a candidate


class Candidate(NamedTuple):
    """A search setting that may be chosen."""

    cost: float  # expected time of a query, in vectors of a full scan
    memory: float  # bytes beside the item vectors
    factory: str  # of faiss; empty: exact search
    parameters: dict[str, int | float] | None = None
    k_factor: int = 1

    @property
    def name(self) -> str:
        """As shown to the user."""
        parts = [f"{name} {value}" for name, value in (self.parameters or {}).items()]
        parts += [f"k_factor {self.k_factor}"] if self.k_factor > 1 else []
        return ", ".join([self.factory or "Exact", *parts])


class Auto(Index):
    """Chooses the fastest index that reaches a recall: exact search, HNSW, IVF, or IVF with PQ codes.

    Settings are tried in the order of their expected query time for this number of items, and the first whose measured
    recall@100 reaches `recall` is chosen, so that two runs choose alike. Exact search is chosen up to 50,000 items, or
    if nothing faster reaches the recall. `save` writes the chosen index, which is loaded without Auto.

    Args:
        recall: share of the exact 100 best items that the index has to return, averaged over queries without a filter.
        memory_gb: GiB that the index may take in addition to the item vectors, so that codes (PQ) are tried where graph
            and lists would take more; None: no limit, and no codes.
    """

    def __init__(self, recall: float = 0.95, memory_gb: float | None = None) -> None:
        check_number("recall", recall, above=0, high=1, example=0.95)
        check_number("memory_gb", memory_gb, above=0, other="null for no limit", example=2)
        self.recall = recall
        self.memory_gb = memory_gb
        self.chosen: Index | None = None
        self.tried: list[dict[str, Any]] = []

    def build(self, vectors: Float32[np.ndarray, "V D"]) -> None:
        """Chooses and builds, with item vectors plus noise as queries."""
        Exact().build(vectors)  # the checks
        rng = np.random.default_rng(0)
        some = vectors[rng.integers(0, len(vectors), QUERIES)]
        noise = rng.standard_normal(some.shape, dtype=np.float32)
        length = np.linalg.norm(some, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
        self.build_for(vectors, some + NOISE * length * noise)

    def build_for(
        self, vectors: Float32[np.ndarray, "V D"], queries: Float32[np.ndarray, "B D"], exclude: Exclude | None = None
    ) -> Index:
        exact = Exact()
        exact.build(vectors)
        self.vectors, self.tried = exact.vectors, []
        built: dict[str, Faiss] = {}
        k = min(K, len(vectors))
        truth = None
        count, width = vectors.shape
        for one in candidates(count, width, self.memory_gb):
            if not one.factory:
                self.chosen = exact
                self.tried.append({"index": one.name, f"recall@{k}": 1.0})
                break
            truth = exact.search(queries, k, exclude)[1] if truth is None else truth
            if one.factory not in built:
                built[one.factory] = Faiss(one.factory, one.parameters, k_factor=one.k_factor)
                built[one.factory].build(exact.vectors)
            index = built[one.factory]
            index.set_parameters(one.parameters, one.k_factor)
            recall = recall_of(index.search(queries, k, exclude)[1], truth)
            self.tried.append({"index": one.name, f"recall@{k}": round(recall, 4)})
            if recall >= self.recall:
                self.chosen = index
                break
        return self._searched()

    def search(
        self,
        queries: Float32[np.ndarray, "B D"],
        k: int,
        exclude: Exclude | None = None,
        allowed: Bool[np.ndarray, "*rows V"] | None = None,
    ) -> SearchResult:
        return self._searched().search(queries, k, exclude, allowed)

    def save(self, folder: str | Path) -> None:
        """Writes the chosen index to `folder`."""
        self._searched().save(folder)

    def _searched(self) -> Index:
        if self.chosen is None:
            raise ValueError("Auto has chosen no index, expected one chosen by its recall; call build(vectors) first")
        return self.chosen


def candidates(count: int, width: int, memory_gb: float | None) -> list[Candidate]:
    """Settings in the order in which they are tried: by expected query time, exact search last."""
    exact = Candidate(float(count), 0, "")
    if count <= SMALL:
        return [exact]
    limit = np.inf if memory_gb is None else memory_gb * 2**30
    able = [one for one in _approximate(count, width, memory_gb is not None) if one.memory <= limit]
    faster = [one for one in able if one.cost < exact.cost]
    return [*sorted(faster, key=lambda one: (one.cost, one.name)), exact]


def _approximate(count: int, width: int, codes: bool) -> Iterator[Candidate]:
    vector = 4 * width
    lists = min(MAX_LISTS, 1 << round(np.log2(4 * np.sqrt(count))))
    for n in range(3, 11):
        probes = {"nprobe": 1 << n}
        scanned = (1 << n) * count / lists
        if 1 << n <= lists // 2:
            yield Candidate(lists + SCAN * scanned, count * (vector + 8), f"IVF{lists},Flat", dict(probes))
        if codes and 1 << n <= lists // 2 and width % CODES == 0:
            for k_factor in (4, 16):
                cost = lists + CODE * scanned + SCORE * k_factor * K
                yield Candidate(cost, count * (CODES + 8), f"IVF{lists},PQ{CODES}", dict(probes), k_factor)
    for n in range(7, 12):
        cost = VISIT * (1 << n) * DEGREE
        yield Candidate(cost, count * (vector + 8 * DEGREE + 8), f"HNSW{DEGREE}", {"efSearch": 1 << n})
