"""Any index of faiss, by its factory string."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from recsys2stage.artifacts import atomic_write
from recsys2stage.retrieval.index.approximate import Approximate
from recsys2stage.retrieval.index.base import VECTORS

GRAPH = "index.faiss"  # faiss's own file in a saved index


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


def _reason(error: RuntimeError) -> str:
    """The message of a faiss error without its source location."""
    return re.sub(r"^Error in .* at \S+:\d+:\s*(Error: )?", "", str(error).strip())
