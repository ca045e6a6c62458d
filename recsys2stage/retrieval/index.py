"""Maximum inner product search over item vectors, with excluded items: `Exact`, `Approximate` (base class), `Faiss`.

Row i of the (V, D) vectors is item i + 1; item 0 is padding and is never returned. Every index returns, for each query,
min(k, items not excluded) items with their exact inner products, sorted by score and then by item number; the rest of
the row is item -1 with score -inf.

To add an approximate index, subclass `Approximate` and implement `candidates` (and `_prepare`, `_write`, `_read` for
data besides the vectors). Rows for which it returns too few items are completed by exact search.
"""

import inspect
import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, Integer

from recsys2stage.artifacts import atomic_write, read_array, read_json, take, write_json
from recsys2stage.trust import class_name, find_class

logger = logging.getLogger("recsys2stage")

VECTORS, GRAPH, DESCRIPTION = "index.npy", "index.faiss", "index.json"
DEVICES = ("cpu", "cuda", "mps", "xpu")
CELLS = 1 << 24  # maximum number of scores or fetched vector components in memory, whatever the number of queries

Exclude = tuple[Integer[np.ndarray, " _"], Integer[np.ndarray, " _"]]  # items (sum,) flat, offsets (B + 1,)
SearchResult = tuple[Float32[np.ndarray, "B k"], Int64[np.ndarray, "B k"]]


class Index(ABC):
    """Base class: finds the items with the largest inner product with a query.

    A subclass stores each constructor argument as an attribute of the same name: `save` writes these attributes, and
    `load` passes them to the constructor.
    """

    vectors: Float32[np.ndarray, "V D"]

    def build(self, vectors: Float32[np.ndarray, "V D"]) -> None:
        """Builds the index from the vectors of items 1..V."""
        if vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"item vectors have shape {vectors.shape}, expected (items, width): were any exported?")
        if not np.isfinite(vectors).all():
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            raise ValueError(
                f"{bad.size:,} of {len(vectors):,} item vectors are not finite, first item {bad[0] + 1}; "
                "expected numbers only: did training diverge? Lower its learning rate"
            )
        self.vectors = np.require(vectors, np.float32, ["C", "W"])  # torch needs writable memory
        self._prepare()

    @abstractmethod
    def search(self, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None) -> SearchResult:
        """The k best items of each query.

        Args:
            queries: one vector per row.
            k: number of items per query.
            exclude: items not to return, as flat items (sum,) and offsets (B + 1,): those of query b are
                items[offsets[b]:offsets[b + 1]].

        Returns:
            scores (B, k) float32 and items (B, k) int64.
        """

    def save(self, folder: str | Path) -> None:
        """Writes the vectors, the other data of the index, and its class and options to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = type(self)
        options = {name: getattr(self, name) for name in inspect.signature(kind).parameters}
        with atomic_write(folder / VECTORS) as temporary, temporary.open("wb") as file:
            np.save(file, self.vectors)
        self._write(folder)
        write_json(folder / DESCRIPTION, {"class": class_name(kind), "options": options})

    @staticmethod
    def load(folder: str | Path) -> "Index":
        """Loads the index saved in `folder`, as an instance of the class that saved it.

        faiss reads its own file without validation. `Recommender.load` verifies the checksum first, but load such a
        folder only from a source you trust.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION).is_file():
            raise FileNotFoundError(f"{folder / DESCRIPTION} does not exist; to make an index run: recsys export-index")
        path = folder / DESCRIPTION
        description = read_json(path, dict, "recsys export-index")
        kind = find_class(description.get("class"), Index, path)
        options = take(description, "options", dict, path)
        try:
            index: Index = kind(**options)
        except Exception as error:  # a constructor may raise anything on untrusted options
            raise ValueError(
                f"{path} has options that {kind.__name__} does not accept ({error}); export it again"
            ) from error
        vectors = read_array(folder / VECTORS, np.float32, (None, None))
        if not vectors.size:
            raise ValueError(f"{folder / VECTORS} holds no vectors; export it again: recsys export-index")
        index.vectors = np.array(vectors)
        index._read(folder)
        return index

    def _prepare(self) -> None:  # noqa: B027, may do nothing
        """Builds the search structures from `self.vectors`."""

    def _write(self, folder: Path) -> None:  # noqa: B027
        """Writes the search structures; an index that is quick to prepare writes nothing."""

    def _read(self, folder: Path) -> None:
        """Reads the search structures, or builds them again."""
        self._prepare()

    def _check(self, queries: np.ndarray, k: int, exclude: Exclude | None) -> Exclude:
        """Validates the arguments of `search`; returns the exclusions, empty for None."""
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"queries have shape {queries.shape}, expected (queries, {self.vectors.shape[1]}) as the item vectors; "
                "are retriever and index of the same run?"
            )
        if not np.isfinite(queries).all():
            raise ValueError("a query is not finite, expected numbers only: did training diverge?")
        if exclude is None:
            return np.zeros(0, np.int64), np.zeros(len(queries) + 1, np.int64)
        items, offsets = exclude
        rise = offsets[:1].tolist() == [0] and (np.diff(offsets) >= 0).all() and offsets[-1] == len(items)
        if len(offsets) != len(queries) + 1 or not rise:
            raise ValueError(
                f"exclusions have {len(offsets):,} offsets and {len(items):,} items, "
                f"expected {len(queries) + 1:,} offsets that rise from 0 to the number of items"
            )
        if items.size and (items.min() < 0 or items.max() > len(self.vectors)):
            raise ValueError(f"excluded items are in {items.min()}..{items.max()}, expected 1..{len(self.vectors)}")
        return items, offsets


class Exact(Index):
    """Brute-force search: scores every item. Reference for recall; fast enough for up to a few 100,000 items.

    Args:
        device: torch device that computes the scores, for example cpu or cuda. Falls back to the CPU if the machine
            does not have it.

    Raises:
        ValueError: for an unknown device name.
    """

    def __init__(self, device: str = "cpu") -> None:
        if device.partition(":")[0] not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", device):
            raise ValueError(f"device is {device!r}, expected {', '.join(DEVICES)}, or with a number, such as cuda:1")
        self.device = device  # as given: a saved index may be loaded on a machine that has it

    def search(self, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None) -> SearchResult:
        exclude = self._check(queries, k, exclude)
        top_scores, top_items = _empty_result(len(queries), k)
        top = min(k, len(self.vectors))
        for rows in _chunks(np.arange(len(queries)), len(self.vectors)):
            items, offsets = _take_rows(exclude, rows)
            scores = (
                torch.from_numpy(np.ascontiguousarray(queries[rows])).to(self._table.device) @ self._table.T
            )  # (b, V)
            owners = np.repeat(np.arange(len(rows)), np.diff(offsets))[items > 0]
            excluded = owners * len(self.vectors) + items[items > 0] - 1
            scores.view(-1)[torch.from_numpy(excluded).to(scores.device)] = -torch.inf
            best, columns = scores.topk(top)
            # topk returns any of the items that tie at the k-th score, so rows with such a tie are fully sorted
            tied = ((best[:, -1] > -torch.inf) & ((scores >= best[:, -1:]).sum(1) > top)).nonzero().squeeze(1)
            if len(tied):
                ordered = scores[tied].sort(dim=1, descending=True, stable=True)
                best[tied], columns[tied] = ordered.values[:, :top], ordered.indices[:, :top]
            top_scores[rows, :top], top_items[rows, :top] = _best_first(best.cpu().numpy(), columns.cpu().numpy() + 1)
        return top_scores, top_items

    def _prepare(self) -> None:
        self._table = torch.from_numpy(self.vectors).to(available_device(self.device))  # (V, D)


class Approximate(Index):
    """Approximate search: over-fetches candidates, scores them exactly and removes excluded items.

    Exact search handles rows that end up with too few items, and rows with so many exclusions that most items would
    have to be fetched.
    """

    @abstractmethod
    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        """Approximately the n best items of each query, distinct, in any order; -1 where there are fewer."""

    def search(self, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None) -> SearchResult:
        exclude = self._check(queries, k, exclude)
        top_scores, top_items = _empty_result(len(queries), k)
        count = len(self.vectors)
        need = k + np.diff(exclude[1])
        # one fetch serves many rows, so rows are grouped by the number they need, rounded up to a power of two
        fetch = np.minimum(2 ** np.ceil(np.log2(need)).astype(np.int64), count)
        fetch[2 * need > count] = 0
        short = [np.flatnonzero(fetch == 0)]
        for n in np.unique(fetch[fetch > 0]).tolist():
            for rows in _chunks(np.flatnonzero(fetch == n), n * self.vectors.shape[1]):
                items = self.candidates(queries[rows], n)
                excluded = _exclusion_keys(*_take_rows(exclude, rows), count)
                missing = (items < 1) | np.isin(np.arange(len(rows))[:, None] * (count + 1) + items, excluded)
                scores = np.matmul(self.vectors[items.clip(1) - 1], queries[rows][:, :, None])[:, :, 0]  # (b, n)
                scores, items = _best_first(np.where(missing, -np.inf, scores).astype(np.float32), items)
                top_scores[rows], top_items[rows] = scores[:, :k], items[:, :k]
                available = count - np.bincount(excluded // (count + 1), minlength=len(rows))
                short.append(rows[(~missing).sum(1) < np.minimum(k, available)])
        if (rows := np.concatenate(short)).size:
            top_scores[rows], top_items[rows] = self._exact.search(queries[rows], k, _take_rows(exclude, rows))
        return top_scores, top_items

    def _prepare(self) -> None:
        self._exact = Exact()
        self._exact.build(self.vectors)


class Faiss(Approximate):
    """Any faiss index, by inner product.

    Args:
        factory: faiss's factory string, for example Flat, HNSW32, IVF1024,Flat or IVF1024,PQ16.
        parameters: search parameters, for example {nprobe: 16}, {efSearch: 128} or "nprobe=16,quantizer_efSearch=64".
    """

    def __init__(self, factory: str = "HNSW32", parameters: dict[str, int | float] | str | None = None) -> None:
        self.factory = factory
        self.parameters = parameters

    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        _, rows = self._index.search(np.ascontiguousarray(queries), n)
        return np.where(rows < 0, -1, rows + 1)

    def _prepare(self) -> None:
        super()._prepare()
        import faiss

        count, width = self.vectors.shape
        try:
            index = faiss.index_factory(width, self.factory, faiss.METRIC_INNER_PRODUCT)  # the default is L2
        except RuntimeError as error:
            raise ValueError(
                f"faiss cannot build {self.factory!r} for vectors of width {width} ({_reason(error)}); expected a "
                "factory string such as Flat, HNSW32 or IVF1024,PQ16, with a width that is a multiple of PQ's number"
            ) from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"faiss supports {self.factory!r} only for L2 distance, expected inner product; use HNSW32 or Flat"
            )
        try:
            index.train(self.vectors)
        except RuntimeError as error:
            raise ValueError(
                f"{self.factory!r} cannot be trained on {count:,} item vectors ({_reason(error)}); expected at "
                "least as many vectors as it has lists (IVF) and codes (256 for PQ); use a smaller one, HNSW32 or Flat"
            ) from error
        index.add(self.vectors)
        self._tune(index)

    def _write(self, folder: Path) -> None:
        import faiss

        with atomic_write(folder / GRAPH) as temporary:
            faiss.write_index(self._index, str(temporary))

    def _read(self, folder: Path) -> None:
        import faiss

        super()._prepare()
        path, shape = folder / GRAPH, self.vectors.shape
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; export the index again: recsys export-index")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is not a complete faiss index ({_reason(error)}); export it again") from error
        if (index.ntotal, index.d) != shape or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"{path} holds {index.ntotal:,} vectors of width {index.d}, expected {shape[0]:,} of width {shape[1]} "
                f"as in {VECTORS}, for inner product; export it again: recsys export-index"
            )
        self._tune(index)

    def _tune(self, index: Any) -> None:
        import faiss

        text = self.parameters or ""
        if isinstance(text, dict):
            text = ",".join(f"{name}={value}" for name, value in text.items())
        try:
            faiss.ParameterSpace().set_index_parameters(index, text)  # type: ignore[arg-type]  # the stubs have only one overload
        except RuntimeError as error:
            raise ValueError(
                f"{self.factory!r} does not accept the parameters {text!r} ({_reason(error)}); "
                "expected, for example, nprobe=16 for IVF or efSearch=128 for HNSW"
            ) from error
        self._index = index


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
    index.search(queries[:1], k, _take_rows(exclude, np.arange(1)))  # warm-up: the first search includes one-time costs
    start = time.perf_counter()
    found = index.search(queries, k, exclude)[1]
    batch = time.perf_counter() - start
    owners = np.arange(len(queries))[:, None] * (len(index.vectors) + 1)
    hits = np.isin((owners + truth)[truth > 0], (owners + found)[found > 0])
    latencies = []
    for row in np.unique(np.linspace(0, len(queries) - 1, singles).astype(np.int64)):
        query, own = queries[row : row + 1], _take_rows(exclude, np.array([row]))
        start = time.perf_counter()
        index.search(query, k, own)
        latencies.append(time.perf_counter() - start)
    return {
        "k": k,
        "queries": len(queries),
        f"recall@{k}": float(hits.mean()) if hits.size else 1.0,
        "median_ms": float(np.median(latencies) * 1e3),
        "p95_ms": float(np.quantile(latencies, 0.95) * 1e3),
        "batch_ms": batch / len(queries) * 1e3,
    }


def available_device(device: str) -> str:
    """`device`, or the CPU with a warning if this machine or this build of torch does not have it."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # raised without the backend, and without the device
        logger.warning("the index is for the device %s, which this machine does not have; searching on the CPU", device)
        return "cpu"
    return device


def _empty_result(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A search result without items."""
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int64)


def _chunks(rows: np.ndarray, cells: int) -> Iterator[np.ndarray]:
    """Splits rows into chunks of at most CELLS numbers, at `cells` numbers per row."""
    step = max(1, CELLS // cells)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _take_rows(exclude: Exclude, rows: np.ndarray) -> Exclude:
    """The exclusions of the given rows."""
    items, offsets = exclude
    lengths = np.diff(offsets)[rows]
    ends = np.cumsum(lengths)
    index = np.arange(lengths.sum()) + np.repeat(offsets[rows] - ends + lengths, lengths)
    return items[index].astype(np.int64), np.concatenate([[0], ends]).astype(np.int64)


def _exclusion_keys(items: np.ndarray, offsets: np.ndarray, count: int) -> np.ndarray:
    """row · (count + 1) + item for each excluded (row, item): sorted, unique, without padding."""
    keys = np.unique(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * (count + 1) + items)
    return keys[keys % (count + 1) > 0]


def _best_first(scores: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row by score, then by item; items that score -inf become -1."""
    order = np.lexsort((items, -scores), axis=-1)
    scores, items = np.take_along_axis(scores, order, -1), np.take_along_axis(items, order, -1)
    return scores, np.where(np.isneginf(scores), -1, items)


def _reason(error: RuntimeError) -> str:
    """The message of a faiss error without its source location."""
    return re.sub(r"^Error in .* at \S+:\d+:\s*(Error: )?", "", str(error).strip())
