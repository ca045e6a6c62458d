"""Vectors of items that were made elsewhere: embeddings of their texts, images or sounds."""

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
    """A vector for each of some items, of one length.

    Args:
        path: a Parquet file with the columns item_id and vector (lists of numbers), or an array (n, P) in .npy.
        ids: with .npy, a text file with the raw item id of each row, one a line.
    """

    path: Path
    ids: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [self.path] if self.ids is None else [self.path, self.ids]

    def read(self) -> tuple[pl.Series, np.ndarray]:
        """Raw item ids as text, (n,), and their vectors, (n, P) float32.

        Raises:
            FileNotFoundError: where a file is missing.
            ValueError: for ids that are missing or repeated, and for vectors that are missing, not finite, of several
                lengths, or not as many as there are ids.
        """
        for file in self.files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} does not exist; name a file of vectors, or of their ids")
        ids, vectors = self._read_array() if self.path.suffix == ".npy" else self._read_table()
        empty = ids.is_null() | (ids.str.strip_chars() == "")
        if empty.any():
            raise ValueError(f"{self.ids or self.path}, row {first_rows(empty)}: the item id is missing; fill it in")
        if ids.n_unique() < len(ids):
            twice = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
            raise ValueError(
                f"{self.ids or self.path} repeats {len(twice)} item ids, the first {twice[0]!r}; keep one row of each"
            )
        finite = pl.Series(np.isfinite(vectors).all(axis=1))
        if not finite.all():
            raise ValueError(
                f"{self.path}, row {first_rows(~finite)}: the vector holds a number that is not finite; leave such "
                "rows out, and their items count as without a vector"
            )
        return ids, vectors

    def _read_array(self) -> tuple[pl.Series, np.ndarray]:
        if self.ids is None:
            raise ValueError(f"{self.path} is an array without ids; name a text file with the item id of each row: ids")
        vectors = read_array(self.path)
        if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype.kind not in "fiu":
            raise ValueError(
                f"{self.path} has shape {vectors.shape} and type {vectors.dtype}, expected a row of numbers an item"
            )
        ids = id_rule.read_id_lines(self.ids)
        if len(ids) != len(vectors):
            raise ValueError(f"{self.path} has {len(vectors)} rows but {self.ids} has {len(ids)} lines; give one a row")
        return pl.Series(ITEM_ID, ids, dtype=pl.String), np.asarray(vectors, dtype=np.float32)

    def _read_table(self) -> tuple[pl.Series, np.ndarray]:
        if self.ids is not None:
            raise ValueError(
                f"ids is {self.ids}, but only an .npy needs it: {self.path} has a column of ids; leave it out"
            )
        try:
            names = pl.read_parquet_schema(self.path)
            require((ITEM_ID, VECTOR), list(names), self.path)
            table = pl.read_parquet(self.path, columns=[ITEM_ID, VECTOR])
        except pl.exceptions.PolarsError as error:
            raise ValueError(f"{self.path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
        kind = table.schema[VECTOR]
        if not (isinstance(kind, (pl.List, pl.Array)) and kind.inner is not None and kind.inner.is_numeric()):
            raise ValueError(f"{self.path} has vectors of type {kind}, expected lists of numbers")
        lists = table[VECTOR].cast(pl.List(pl.Float32))
        widths = lists.list.len().fill_null(0)
        width = int(np.median(widths)) if len(widths) else 0
        if not width:
            raise ValueError(f"most rows of {self.path} hold no vector; leave those out, or give each one")
        wrong = widths != width
        if wrong.any():
            raise ValueError(
                f"{self.path}, row {first_rows(wrong)}: the vector is not of length {width}, as most are; "
                "give all the same length"
            )
        flat = lists.explode().fill_null(float("nan"))
        return id_rule.parse_ids(table[ITEM_ID], self.path).cast(pl.String), flat.to_numpy().reshape(len(table), width)


def first_rows(bad: pl.Series) -> str:
    """The first three rows, from 1, in which something is true."""
    rows = bad.arg_true()
    return ", ".join(str(row + 1) for row in rows.head(3)) + (", ..." if len(rows) > 3 else "")
