"""Parquet files that are written in parts."""

from pathlib import Path
from typing import Any

import numpy as np


class ParquetStream:
    """Writes tables with the same columns one after another to one Parquet file.

    Args:
        path: the file.
        types: column name -> name of its Arrow type, such as "string" or "float32"; None: those of the first table. A
            column of objects has no type of its own in a table without rows. With types, NaN is written as null.
    """

    def __init__(self, path: Path, types: dict[str, str] | None = None) -> None:
        self.path, self.types = path, types
        self.writer: Any = None

    def __enter__(self) -> "ParquetStream":
        return self

    def write(self, table: dict[str, np.ndarray]) -> None:
        import pyarrow as pa  # imported here: training writes manifests but needs no Parquet
        import pyarrow.parquet as pq

        schema = None if self.writer is None else self.writer.schema
        if schema is None and self.types is not None:
            schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in self.types.items()])
        columns = {
            name: pa.array(
                values, None if schema is None else schema.field(name).type, from_pandas=self.types is not None
            )
            for name, values in table.items()
        }
        arrow = pa.table(columns, schema=schema)
        self.writer = self.writer or pq.ParquetWriter(self.path, arrow.schema, compression="zstd")
        self.writer.write_table(arrow)

    def __exit__(self, *error: object) -> None:
        if self.writer:
            self.writer.close()
