"""Nearest items by inner product: item vectors in, the best k items of a query out, never one that is excluded.

Row i of the (V, D) vectors is item i + 1; item 0 is padding and is never returned. Whatever the index, each row of an
answer has min(k, items not excluded) items with their true inner products, best first and, among equals, the lower item
first; the rest of the row is item -1 with score -inf.

To add an approximate index, subclass `Approximate` and write `candidates` (and `_prepare`, `_write`, `_read` for what
it holds besides the vectors); what it misses is filled in for it.
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
from recsys2stage.trust import find_class, name_of

logger = logging.getLogger("recsys2stage")

VECTORS, GRAPH, DESCRIPTION = "index.npy", "index.faiss", "index.json"
DEVICES = ("cpu", "cuda", "mps", "xpu")
CELLS = 1 << 24  # scores or fetched numbers held at once, so that memory does not grow with the number of queries

Exclude = tuple[Integer[np.ndarray, " _"], Integer[np.ndarray, " _"]]  # items (sum,) flat, offsets (B + 1,)
SearchResult = tuple[Float32[np.ndarray, "B k"], Int64[np.ndarray, "B k"]]


class Index(ABC):
    """Finds the items whose vectors have the largest inner product with a query.

    A member keeps each constructor argument as an attribute of the same name: `save` writes them, `load` passes them.
    """

    vectors: Float32[np.ndarray, "V D"]

    def build(self, vectors: Float32[np.ndarray, "V D"]) -> None:
        """Takes the vectors of items 1..V."""
        if vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"item vectors have shape {vectors.shape}, expected (items, width): were any exported?")
        if not np.isfinite(vectors).all():
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            raise ValueError(
                f"{bad.size:,} of {len(vectors):,} item vectors are not finite, first item {bad[0] + 1}; "
                "expected numbers only: did training diverge? Lower its learning rate"
            )
        self.vectors = np.require(vectors, np.float32, ["C", "W"])  # torch wants memory it may write to
        self._prepare()

    @abstractmethod
    def search(self, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None) -> SearchResult:
        """The k best items of each query.

        Args:
            queries: one vector a row.
            k: items wanted of each query.
            exclude: items never to be returned: all of them flat (sum,), and offsets (B + 1,) that say which are whose.

        Returns:
            scores (B, k) float32 and items (B, k) int64.
        """

    def save(self, folder: str | Path) -> None:
        """Writes the vectors, what the index holds besides, and which class reads it, into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = type(self)
        options = {name: getattr(self, name) for name in inspect.signature(kind).parameters}
        with atomic_write(folder / VECTORS) as temporary, temporary.open("wb") as file:
            np.save(file, self.vectors)
        self._write(folder)
        write_json(folder / DESCRIPTION, {"class": name_of(kind), "options": options})

    @staticmethod
    def load(folder: str | Path) -> "Index":
        """The index saved in `folder`, as the class that saved it.

        The file of a faiss index is read by faiss itself, which trusts it: `Recommender.load` verifies its checksum
        first, so load such a folder only from a source you trust.
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
        except Exception as error:  # whatever a constructor says of untrusted options
            raise ValueError(f"{path} has options that no {kind.__name__} takes ({error}); export it again") from error
        vectors = read_array(folder / VECTORS, np.float32, (None, None))
        if not vectors.size:
            raise ValueError(f"{folder / VECTORS} holds no vectors; export it again: recsys export-index")
        index.vectors = np.array(vectors)
        index._read(folder)
        return index

    def _prepare(self) -> None:  # noqa: B027, nothing is a fair answer
        """Makes from `self.vectors` what the search needs besides."""

    def _write(self, folder: Path) -> None:  # noqa: B027
        """Writes what `_prepare` made; an index that is quick to prepare writes nothing."""

    def _read(self, folder: Path) -> None:
        """Reads what `_write` wrote."""
        self._prepare()

    def _check(self, queries: np.ndarray, k: int, exclude: Exclude | None) -> Exclude:
        """Refuses what no index can answer; gives the exclusions, empty ones for None."""
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
            raise ValueError(f"exclusions name items {items.min()}..{items.max()}, expected 1..{len(self.vectors)}")
        return items, offsets


class Exact(Index):
    """Scores every item: the truth the others are measured against, and fast enough up to a few 100,000 items.

    Args:
        device: where the scores are computed, for example cpu or cuda. On a machine without it, on the CPU.

    Raises:
        ValueError: for a device that does not exist anywhere.
    """

    def __init__(self, device: str = "cpu") -> None:
        if device.partition(":")[0] not in DEVICES or not re.fullmatch(r"[a-z]+(:\d+)?", device):
            raise ValueError(f"device is {device!r}, expected {', '.join(DEVICES)}, or one of several such as cuda:1")
        self.device = device  # as declared, for another machine that has it

    def search(self, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None) -> SearchResult:
        exclude = self._check(queries, k, exclude)
        found_scores, found_items = _nothing(len(queries), k)
        top = min(k, len(self.vectors))
        for rows in _chunks(np.arange(len(queries)), len(self.vectors)):
            items, offsets = _of(exclude, rows)
            scores = (
                torch.from_numpy(np.ascontiguousarray(queries[rows])).to(self._table.device) @ self._table.T
            )  # (b, V)
            owners = np.repeat(np.arange(len(rows)), np.diff(offsets))[items > 0]
            gone = owners * len(self.vectors) + items[items > 0] - 1
            scores.view(-1)[torch.from_numpy(gone).to(scores.device)] = -torch.inf
            best, places = scores.topk(top)
            # topk takes any of the items that tie for the last place, so rows with such a tie are sorted whole
            tied = ((best[:, -1] > -torch.inf) & ((scores >= best[:, -1:]).sum(1) > top)).nonzero().squeeze(1)
            if len(tied):
                ordered = scores[tied].sort(dim=1, descending=True, stable=True)
                best[tied], places[tied] = ordered.values[:, :top], ordered.indices[:, :top]
            found_scores[rows, :top], found_items[rows, :top] = _best_first(
                best.cpu().numpy(), places.cpu().numpy() + 1
            )
        return found_scores, found_items

    def _prepare(self) -> None:
        self._table = torch.from_numpy(self.vectors).to(here(self.device))  # (V, D)


class Approximate(Index):
    """An index that may miss items: more are fetched than wanted, scored exactly and filtered.

    A row that ends up short, and one so full of exclusions that most items would have to be fetched, is answered by the
    exact search.
    """

    @abstractmethod
    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        """About the n best items of each query in any order, none twice; -1 where none was found."""

    def search(self, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None) -> SearchResult:
        exclude = self._check(queries, k, exclude)
        found_scores, found_items = _nothing(len(queries), k)
        count = len(self.vectors)
        need = k + np.diff(exclude[1])
        # fetching is one call for many rows, so rows are grouped by what they need, rounded up to a power of two
        fetch = np.minimum(2 ** np.ceil(np.log2(need)).astype(np.int64), count)
        fetch[2 * need > count] = 0
        short = [np.flatnonzero(fetch == 0)]
        for n in np.unique(fetch[fetch > 0]).tolist():
            for rows in _chunks(np.flatnonzero(fetch == n), n * self.vectors.shape[1]):
                items = self.candidates(queries[rows], n)
                gone = _keys(*_of(exclude, rows), count)
                missing = (items < 1) | np.isin(np.arange(len(rows))[:, None] * (count + 1) + items, gone)
                scores = np.matmul(self.vectors[items.clip(1) - 1], queries[rows][:, :, None])[:, :, 0]  # (b, n)
                scores, items = _best_first(np.where(missing, -np.inf, scores).astype(np.float32), items)
                found_scores[rows], found_items[rows] = scores[:, :k], items[:, :k]
                available = count - np.bincount(gone // (count + 1), minlength=len(rows))
                short.append(rows[(~missing).sum(1) < np.minimum(k, available)])
        if (rows := np.concatenate(short)).size:
            found_scores[rows], found_items[rows] = self._exact.search(queries[rows], k, _of(exclude, rows))
        return found_scores, found_items

    def _prepare(self) -> None:
        self._exact = Exact()
        self._exact.build(self.vectors)


class Faiss(Approximate):
    """Any index of faiss, by inner product.

    Args:
        factory: faiss's factory string, for example Flat, HNSW32, IVF1024,Flat or IVF1024,PQ16.
        parameters: how hard to search, for example {nprobe: 16}, {efSearch: 128} or "nprobe=16,quantizer_efSearch=64".
    """

    def __init__(self, factory: str = "HNSW32", parameters: dict[str, int | float] | str | None = None) -> None:
        self.factory = factory
        self.parameters = parameters

    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        _, places = self._index.search(np.ascontiguousarray(queries), n)
        return np.where(places < 0, -1, places + 1)

    def _prepare(self) -> None:
        super()._prepare()
        import faiss

        count, width = self.vectors.shape
        try:
            index = faiss.index_factory(width, self.factory, faiss.METRIC_INNER_PRODUCT)  # faiss's own default is L2
        except RuntimeError as error:
            raise ValueError(
                f"faiss cannot make {self.factory!r} for vectors {width} wide ({_reason(error)}); expected a factory "
                "string such as Flat, HNSW32 or IVF1024,PQ16, where the width is a multiple of PQ's number"
            ) from error
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"faiss has {self.factory!r} only for distances, expected inner products: use HNSW32 or Flat"
            )
        try:
            index.train(self.vectors)
        except RuntimeError as error:
            raise ValueError(
                f"{self.factory!r} cannot be trained on {count:,} item vectors ({_reason(error)}); expected at "
                "least as many vectors as it has lists (IVF) and codes (256 for PQ): use a smaller one, HNSW32 or Flat"
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
            raise ValueError(f"{path} is not a whole faiss index ({_reason(error)}); export it again") from error
        if (index.ntotal, index.d) != shape or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"{path} holds {index.ntotal:,} vectors {index.d} wide, expected {shape[0]:,} of width {shape[1]} as "
                f"in {VECTORS}, by inner product; export it again: recsys export-index"
            )
        self._tune(index)

    def _tune(self, index: Any) -> None:
        import faiss

        text = self.parameters or ""
        if isinstance(text, dict):
            text = ",".join(f"{name}={value}" for name, value in text.items())
        try:
            faiss.ParameterSpace().set_index_parameters(index, text)  # type: ignore[arg-type]  # its stubs see only one overload
        except RuntimeError as error:
            raise ValueError(
                f"{self.factory!r} does not take the parameters {text!r} ({_reason(error)}); "
                "expected such as nprobe=16 for IVF or efSearch=128 for HNSW"
            ) from error
        self._index = index


def measure(
    index: Index, queries: Float32[np.ndarray, "B D"], k: int, exclude: Exclude | None = None, singles: int = 200
) -> dict[str, int | float]:
    """How much of the exact answer an index finds, and how long it takes on this machine.

    Args:
        index: the index to measure.
        queries: what it is asked.
        k: items wanted of each query.
        exclude: items never to be returned, as in `Index.search`.
        singles: how many of the queries are asked again one by one, for the latency.

    Returns:
        k, queries, recall@k (share of the exact answer's items that were found), median_ms and p95_ms of a query asked
        alone, batch_ms for each query when all are asked at once.
    """
    if not len(queries):
        raise ValueError("there are no queries to measure the index with, expected at least 1")
    exact = Exact()
    exact.build(index.vectors)
    exclude = index._check(queries, k, exclude)
    truth = exact.search(queries, k, exclude)[1]
    index.search(queries[:1], k, _of(exclude, np.arange(1)))  # the first search pays for what is made once
    start = time.perf_counter()
    found = index.search(queries, k, exclude)[1]
    batch = time.perf_counter() - start
    owners = np.arange(len(queries))[:, None] * (len(index.vectors) + 1)
    hits = np.isin((owners + truth)[truth > 0], (owners + found)[found > 0])
    latencies = []
    for row in np.unique(np.linspace(0, len(queries) - 1, singles).astype(np.int64)):
        query, own = queries[row : row + 1], _of(exclude, np.array([row]))
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


def here(device: str) -> str:
    """The device, or the CPU with a warning where this machine or this build of torch does not have it."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError):  # torch raises the one without the backend, the other without the device
        logger.warning("the index is for the device %s, which this machine does not have; searching on the CPU", device)
        return "cpu"
    return device


def _nothing(rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """An answer without items."""
    return np.full((rows, k), -np.inf, np.float32), np.full((rows, k), -1, np.int64)


def _chunks(rows: np.ndarray, cells: int) -> Iterator[np.ndarray]:
    """Rows in runs so short that `cells` numbers for each stay within the bound."""
    step = max(1, CELLS // cells)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _of(exclude: Exclude, rows: np.ndarray) -> Exclude:
    """The exclusions of some rows."""
    items, offsets = exclude
    lengths = np.diff(offsets)[rows]
    ends = np.cumsum(lengths)
    places = np.arange(lengths.sum()) + np.repeat(offsets[rows] - ends + lengths, lengths)
    return items[places].astype(np.int64), np.concatenate([[0], ends]).astype(np.int64)


def _keys(items: np.ndarray, offsets: np.ndarray, count: int) -> np.ndarray:
    """One number for each excluded (row, item), sorted, without repeats and without padding."""
    keys = np.unique(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * (count + 1) + items)
    return keys[keys % (count + 1) > 0]


def _best_first(scores: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts each row by score, then by item; what scores -inf becomes item -1."""
    order = np.lexsort((items, -scores), axis=-1)
    scores, items = np.take_along_axis(scores, order, -1), np.take_along_axis(items, order, -1)
    return scores, np.where(np.isneginf(scores), -1, items)


def _reason(error: RuntimeError) -> str:
    """What faiss says, without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+:\s*(Error: )?", "", str(error).strip())
