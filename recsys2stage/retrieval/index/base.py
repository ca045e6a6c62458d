"""The base class of indexes: options, files, and the checks of a search."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from recsys2stage.artifacts import atomic_write, read_array, read_json, take, write_json
from recsys2stage.options import check_integer
from recsys2stage.retrieval.index.rows import Exclude, SearchResult, finite_rows
from recsys2stage.trust import class_name, find_class

VECTORS, DESCRIPTION = "index.npy", "index.json"  # files of a saved index


class Index(ABC):
    """Base class: finds the items with the largest inner product with a query.

    A subclass stores each constructor argument as an attribute of the same name: `save` writes these attributes, and
    `load` passes them to the constructor.
    """

    vectors: Float32[np.ndarray, "V D"]
    tried: Sequence[dict[str, Any]] = ()  # settings and recalls that a choice was made from

    def build(self, vectors: Float32[np.ndarray, "V D"]) -> None:
        """Builds the index from the vectors of items 1..V."""
        if vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"item vectors have shape {vectors.shape}, expected (items, width): were any exported?")
        if (bad := np.flatnonzero(~finite_rows(vectors))).size:
            raise ValueError(
                f"{bad.size:,} of {len(vectors):,} item vectors are not finite, first item {bad[0] + 1}; "
                "expected numbers only: did training diverge? Lower its learning rate"
            )
        self.share(np.require(vectors, np.float32, ["C", "W"]))  # torch needs writable memory

    def share(self, vectors: Float32[np.ndarray, "V D"]) -> None:
        """As `build`, with vectors that another index has checked and holds."""
        self.vectors = vectors
        self._prepare()

    def build_for(
        self, vectors: Float32[np.ndarray, "V D"], queries: Float32[np.ndarray, "B D"], exclude: Exclude | None = None
    ) -> "Index":
        """Builds the index for queries like these; returns the one to save, which is this index except for `Auto`.

        Args:
            vectors: vectors of items 1..V.
            queries: a sample of query vectors.
            exclude: items not to return, as in `search`.
        """
        self.build(vectors)
        return self

    @abstractmethod
    def search(
        self,
        queries: Float32[np.ndarray, "B D"],
        k: int,
        exclude: Exclude | None = None,
        allowed: Bool[np.ndarray, "*rows V"] | None = None,
    ) -> SearchResult:
        """The min(k, n) best of the n items that each query allows and does not exclude.

        Args:
            queries: one vector per row.
            k: number of items per query.
            exclude: items not to return, as flat items (sum,) and offsets (B + 1,): those of query b are
                items[offsets[b]:offsets[b + 1]].
            allowed: True for each item 1..V that may be returned, (V,) for all queries or (B, V); None: all items.

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
        check_integer("k", k, example=10)
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

    def _check_allowed(
        self, queries: np.ndarray, allowed: Bool[np.ndarray, "*rows V"] | None
    ) -> Bool[np.ndarray, "*rows V"] | None:
        """Validates the argument `allowed` of `search`; returns it."""
        if allowed is None:
            return None
        shape = (len(queries), len(self.vectors))
        if allowed.shape not in (shape, shape[1:]):
            raise ValueError(
                f"allowed has the shape {allowed.shape}, expected {shape[1:]} for all queries or {shape}; give one "
                "value for each item"
            )
        return allowed
