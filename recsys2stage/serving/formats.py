"""Files of recommendations: Parquet, CSV or JSON lines by the ending of the name, written batch by batch."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.data.parquet import ParquetStream
from recsys2stage.ranking.beyond import Recommendations

ENDINGS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
TYPES = {"string": pl.String, "int64": pl.Int64, "uint64": pl.UInt64, "int32": pl.Int32, "float32": pl.Float32}


@runtime_checkable
class Stream(Protocol):
    """Writes tables with the same columns, and values of the same types, one after another."""

    def write(self, table: dict[str, np.ndarray]) -> None: ...


def check_ending(output: Path) -> str:
    """The ending of a file of recommendations, one of ENDINGS.

    Raises:
        ValueError: for another ending, or the name of a folder.
    """
    ending = next((ending for ending in ENDINGS if output.name.lower().endswith(ending)), None)
    if ending is None:
        raise ValueError(
            f"--output is {output}, expected a file name that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}; for "
            f"example --output {output.with_suffix('.csv') if output.name else Path('lists.csv')}"
        )
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder, expected a file; for example {output / f'lists{ending}'}")
    return ending


class ListWriter:
    """Writes the recommendations of batches of users: user_id, item_id, title if known, score, rank, retriever_score.

    Types are those of all users and items, whatever a batch holds, so that batches without a row have them too.

    Args:
        stream: where to write.
        user_ids: (U,) ids of all users, whole numbers or text.
        catalogue: item ids and titles.
    """

    def __init__(self, stream: Stream, user_ids: np.ndarray, catalogue: Catalogue) -> None:
        self.stream, self.user_ids = stream, user_ids
        self.item_ids = catalogue.items[c.ITEM_ID].to_numpy()
        self.titles = catalogue.items[c.TITLE].to_numpy() if c.TITLE in catalogue.items.columns else None
        self.rows = 0

    @staticmethod
    @contextmanager
    def open(output: Path, user_ids: np.ndarray, catalogue: Catalogue) -> Iterator["ListWriter"]:
        """A writer to a file, in the format of its ending; the file appears when all of it is written.

        Args:
            output: the file.
            user_ids: (U,) ids of all users.
            catalogue: item ids and titles.
        """
        ending = check_ending(output)
        types = {
            c.USER_ID: _id_type(user_ids),
            c.ITEM_ID: _id_type(catalogue.items[c.ITEM_ID].to_numpy()),
            **({c.TITLE: "string"} if c.TITLE in catalogue.items.columns else {}),
            **{c.SCORE: "float32", c.RANK: "int32", c.RETRIEVER_SCORE: "float32"},
        }
        with atomic_write(output) as temporary:
            if ending == ".parquet":
                with ParquetStream(temporary, types) as parquet:
                    yield ListWriter(parquet, user_ids, catalogue)
            else:
                with _open_text(temporary, ending) as file:
                    yield ListWriter(_TextStream(file, types, ending.startswith(".csv")), user_ids, catalogue)

    def write(self, part: slice, ranking: Recommendations) -> None:
        """Writes the lists of some users, which may be shorter than others or empty.

        Args:
            part: which of the users.
            ranking: their lists, with 0 or -1 for no item.
        """
        row, column = np.nonzero(ranking.items > 0)
        items = ranking.items[row, column] - 1
        self.stream.write(
            {
                c.USER_ID: self.user_ids[part][row],
                c.ITEM_ID: self.item_ids[items],
                **({} if self.titles is None else {c.TITLE: self.titles[items]}),
                c.SCORE: ranking.score[row, column],
                c.RANK: column + 1,
                c.RETRIEVER_SCORE: ranking.retriever_score[row, column],
            }
        )
        self.rows += len(row)


class _TextStream:
    def __init__(self, file: Any, types: dict[str, str], csv: bool) -> None:
        self.file, self.csv, self.header = file, csv, True
        self.types = pl.Schema({name: TYPES[kind] for name, kind in types.items()})

    def write(self, table: dict[str, np.ndarray]) -> None:
        # an array of objects that begins with None has no type for polars
        plain = {name: values.tolist() if values.dtype == object else values for name, values in table.items()}
        frame = pl.DataFrame(plain, schema_overrides=self.types, nan_to_null=True).cast(self.types)
        if self.csv:
            frame.write_csv(self.file, include_header=self.header)
            self.header = False
        else:
            frame.write_ndjson(self.file)


@contextmanager
def _open_text(path: Path, ending: str) -> Iterator[Any]:
    with path.open("wb") as file:
        if not ending.endswith(".gz"):
            yield file
            return
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:  # the same bytes each time
            yield packed


def _id_type(ids: np.ndarray) -> str:
    """Name of the Arrow type of ids: text, or whole numbers."""
    return {"u": "uint64", "i": "int64"}.get(ids.dtype.kind, "string")
