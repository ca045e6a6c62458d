"""`Vectors`: precomputed item embeddings of text, images or audio, in Parquet or .npy."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recsys2stage.artifacts import read_array
from recsys2stage.columns import ITEM_ID
from recsys2stage.data import ids as id_rule
from recsys2stage.data.checks import require

VECTOR = "vector"  # the column of a Parquet file


@dataclass
class Vectors:
    """Item vectors of equal length; not every item needs one.

    Args:
        path: a Parquet file with the columns item_id and vector (lists of numbers), or a .npy array (n, P).
        ids: for .npy, a text file with the raw item id of each row, one per line.
    """

    path: Path
    ids: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.ids is None else [self.path, self.ids]

    def read(self) -> tuple[pl.Series, np.ndarray]:
        """Raw item ids as text, (n,), and their vectors, (n, P) float32.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: for missing or repeated ids, for vectors that are missing, not finite or of different lengths,
                and if the numbers of ids and vectors differ.
        """
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; pass a file of vectors or of their ids")
        ids, vectors = self._read_array() if self.path.suffix == ".npy" else self._read_table()
        empty = ids.is_null() | (ids.str.strip_chars() == "")
        if empty.any():
            raise ValueError(f"{self.ids or self.path}, row {first_rows(empty)}: the item id is missing; fill it in")
        if ids.n_unique() < len(ids):
            repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
            raise ValueError(
                f"{self.ids or self.path} repeats {len(repeated)} item ids, first {repeated[0]!r}; keep one row each"
            )
        finite = pl.Series(np.isfinite(vectors).all(axis=1))
        if not finite.all():
            raise ValueError(
                f"{self.path}, row {first_rows(~finite)}: the vector has a value that is not finite; remove such "
                "rows; their items then have no vector"
            )
        return ids, vectors

    def _read_array(self) -> tuple[pl.Series, np.ndarray]:
        if self.ids is None:
            raise ValueError(
                f"{self.path} is an array without ids; set ids to a text file with the item id of each row"
            )
        vectors = read_array(self.path)
        if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype.kind not in "fiu":
            raise ValueError(
                f"{self.path} has shape {vectors.shape} and type {vectors.dtype}, expected one row of numbers per item"
            )
        ids = id_rule.read_id_lines(self.ids)
        if len(ids) != len(vectors):
            raise ValueError(
                f"{self.path} has {len(vectors)} rows but {self.ids} has {len(ids)} lines; give one id per row"
            )
        return pl.Series(ITEM_ID, ids, dtype=pl.String), np.asarray(vectors, dtype=np.float32)

    def _read_table(self) -> tuple[pl.Series, np.ndarray]:
        if self.ids is not None:
            raise ValueError(
                f"ids is {self.ids}, but only .npy files need it: {self.path} has an id column; leave out ids"
            )
        try:
            names = pl.read_parquet_schema(self.path)
            require((ITEM_ID, VECTOR), list(names), self.path)
            table = pl.read_parquet(self.path, columns=[ITEM_ID, VECTOR])
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
        dtype = table.schema[VECTOR]
        if not (isinstance(dtype, (pl.List, pl.Array)) and dtype.inner is not None and dtype.inner.is_numeric()):
            raise ValueError(f"{self.path} has vectors of type {dtype}, expected lists of numbers")
        lists = table[VECTOR].cast(pl.List(pl.Float32))
        widths = lists.list.len().fill_null(0)
        width = int(np.median(widths)) if len(widths) else 0
        if not width:
            raise ValueError(f"most rows of {self.path} hold no vector; remove them, or give each row one")
        bad_length = widths != width
        if bad_length.any():
            raise ValueError(
                f"{self.path}, row {first_rows(bad_length)}: the vector is not of length {width} like most; "
                "give all the same length"
            )
        flat = lists.explode().fill_null(float("nan"))
        return id_rule.parse_ids(table[ITEM_ID], self.path).cast(pl.String), flat.to_numpy().reshape(len(table), width)


def first_rows(bad: pl.Series) -> str:
    """The numbers of the first three True rows, counted from 1, for messages."""
    rows = bad.arg_true()
    return ", ".join(str(row + 1) for row in rows.head(3)) + (", ..." if len(rows) > 3 else "")
