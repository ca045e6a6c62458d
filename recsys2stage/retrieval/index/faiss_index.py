"""Any index of faiss, by its factory string."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from recsys2stage.artifacts import atomic_write
from recsys2stage.options import check_integer
from recsys2stage.retrieval.index.approximate import Approximate
from recsys2stage.retrieval.index.base import VECTORS

GRAPH = "index.faiss"  # faiss's own file in a saved index
PER_LIST, PER_CODEBOOK = 64, 65_536  # vectors to train on, for each list of IVF and for the codebooks of PQ


class Faiss(Approximate):
    """Any faiss index, by inner product.

    IVF, HNSW, Flat and SQ leave out items that are not allowed while they search. The fewer are allowed, the more lists
    (IVF: nprobe times the square root of the ratio) or nodes (HNSW: efSearch times the ratio) are visited, so that
    recall is about that without a filter.

    Args:
        factory: faiss's factory string, for example Flat, HNSW32, IVF1024,Flat or IVF1024,PQ16.
        parameters: search parameters, for example {nprobe: 16}, {efSearch: 128} or "nprobe=16,quantizer_efSearch=64".
        train_on: number of vectors that lists and codes are trained on, a random sample of fixed seed; None: 64 for
            each list, at least 65,536.
        k_factor: number of candidates fetched for each item to return. Candidates are scored exactly, so that a larger
            one makes up for compressed codes (PQ, SQ).
    """

    def __init__(
        self,
        factory: str = "HNSW32",
        parameters: dict[str, int | float] | str | None = None,
        train_on: int | None = None,
        k_factor: int = 1,
    ) -> None:
        check_integer("train_on", train_on, other="null for 64 vectors a list", example=100_000)
        check_integer("k_factor", k_factor, high=1000, example=4)
        self.factory = factory
        self.parameters = parameters
        self.train_on = train_on
        self.k_factor = k_factor

    def set_parameters(self, parameters: dict[str, int | float] | str | None, k_factor: int = 1) -> None:
        """Changes how a built index is searched; arguments as of the constructor."""
        check_integer("k_factor", k_factor, high=1000, example=4)
        self.parameters, self.k_factor = parameters, k_factor
        self._tune(self._index)

    def candidates(self, queries: Float32[np.ndarray, "B D"], n: int) -> Int64[np.ndarray, "B n"]:
        _, rows = self._index.search(np.ascontiguousarray(queries), n)
        return np.where(rows < 0, -1, rows + 1)

    def allowed_candidates(
        self, queries: Float32[np.ndarray, "B D"], n: int, allowed: Bool[np.ndarray, " V"]
    ) -> Int64[np.ndarray, "B n"]:
        import faiss

        library: Any = faiss  # its stubs lack the arguments of search parameters
        bits = np.packbits(allowed, bitorder="little")  # the selector reads it, and does not copy it
        selector = library.IDSelectorBitmap(bits)
        times = len(allowed) / max(int(np.count_nonzero(allowed)), 1)
        if isinstance(self._core, faiss.IndexIVF):
            nprobe = min(int(np.ceil(self._core.nprobe * np.sqrt(times))), self._core.nlist)
            parameters = library.SearchParametersIVF(sel=selector, nprobe=nprobe)
        elif isinstance(self._core, faiss.IndexHNSW):
            visited = max(self._core.hnsw.efSearch, n) * times
            parameters = library.SearchParametersHNSW(sel=selector, efSearch=min(int(np.ceil(visited)), len(allowed)))
        else:
            parameters = library.SearchParameters(sel=selector)
        _, rows = self._index.search(np.ascontiguousarray(queries), n, params=parameters)
        return np.where(rows < 0, -1, rows + 1)

    def _prepare(self) -> None:
        super()._prepare()
        import faiss

        count, width = self.vectors.shape
        if "IDMap" in self.factory:
            without = ",".join(part for part in self.factory.split(",") if not part.startswith("IDMap"))
            raise ValueError(
                f"the factory string is {self.factory!r}, expected one without IDMap, since items are numbered by "
                f"the position of their vectors; use {without or 'Flat'!r}"
            )
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
        sample = self._sample(index)
        try:
            index.train(sample)
        except RuntimeError as error:
            raise ValueError(
                f"{self.factory!r} cannot be trained on {len(sample):,} item vectors ({_reason(error)}); expected at "
                "least as many vectors as it has lists (IVF) and codes (256 for PQ); use a smaller one, HNSW32 or Flat"
                + (", or a larger train_on" if len(sample) < count else "")
            ) from error
        index.add(self.vectors)
        self._tune(index)

    def _sample(self, index: Any) -> Float32[np.ndarray, "N D"]:
        """The vectors to train on: k-means uses no more, and XX."""
        import faiss

        lists = faiss.try_extract_index_ivf(index)
        size = self.train_on or max(PER_LIST * (lists.nlist if lists is not None else 0), PER_CODEBOOK)
        if index.is_trained or size >= len(self.vectors):
            return self.vectors
        return self.vectors[np.sort(np.random.default_rng(0).choice(len(self.vectors), size, replace=False))]

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
        self._index = self._core = index
        while isinstance(self._core, faiss.IndexPreTransform):  # transforms pass the search parameters on
            self._core = faiss.downcast_index(self._core.index)
        able = (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer)
        self.filters = isinstance(self._core, able)


def _reason(error: RuntimeError) -> str:
    """The message of a faiss error without its source location."""
    return re.sub(r"^Error in .* at \S+:\d+:\s*(Error: )?", "", str(error).strip())
