"""The command embed-items: vectors of the items' texts, for `item_vectors` of a dataset."""

import os
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write, read_json
from recsys2stage.cli.messages import choices, first_sentences, shown
from recsys2stage.data.checks import Column, Rows, empty_to_null, id_column, read
from recsys2stage.data.locks import locked
from recsys2stage.data.sources.base import csv_rows
from recsys2stage.data.sources.plain import Unpacker, original_names, plain_suffix
from recsys2stage.data.sources.table import DELIMITED, PARQUET, typed_tables
from recsys2stage.data.sources.vectors import VECTOR
from recsys2stage.data.summary import on_terminal, print_summary
from recsys2stage.options import check_integer

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
MODULES = "modules.json"  # lists the modules of a sentence-transformers model, with their classes
ROUTERS = ("router_config.json", "config.json")  # may list further modules; the second name is that of older versions
OWN = "sentence_transformers."  # the package of its own classes
Encode = Callable[[list[str], int], np.ndarray]  # texts and batch size -> their vectors, (n, P)
INSTALL = "pip install 'recsys2stage[text]'"


def embed_items(
    items: Path,
    output: Path,
    id: str = c.ITEM_ID,
    text: str | list[str] = c.TITLE,
    model: str = MODEL,
    separator: str = ",",
    download: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
) -> None:
    """Embed the texts of items with a sentence-transformers model; write vectors that prepare-data reads.

    The output is a Parquet file with the columns item_id and vector, to name as `item_vectors` of a prepare config.
    Items without text have no vector: their feature is unknown. Needs the extra `text`.

    Args:
        items: item table: CSV, TSV or Parquet, also gzipped text; items.parquet of a prepared dataset is one.
        output: Parquet file to write.
        id: its id column.
        text: its text columns, of which one text is made in this order; empty ones are left out.
        model: folder of a sentence-transformers model, or the name of a downloaded one.
        separator: column separator of .csv and .txt files; .tsv and .tab use tabs.
        download: allow the download of the model from the Hugging Face hub.
        batch_size: texts per batch.
        device: torch device of the model, such as cpu or cuda.

    Raises:
        ValueError: for bad rows, no text at all, or a model that cannot be loaded. Nothing is written in that case.
        FileNotFoundError: if the table or the model is missing.
    """
    check_integer("batch_size", batch_size, example=64)
    if output.suffix not in PARQUET:
        raise ValueError(f"output is {output}, expected a Parquet file; name it {output.with_suffix('.parquet')}")
    columns = [text] if isinstance(text, str) else list(text)
    if not columns or len(set(columns)) < len(columns):
        raise ValueError(
            f"text is {shown(text)}, expected different columns; set it to [title, description], for example"
        )
    with locked(output):
        texts = read_texts(items, id, columns, separator)
        known = texts.filter(pl.col("text") != "")
        if not len(known):
            raise ValueError(
                f"{items}: all {len(texts):,} items have no text in {choices(columns, 'and')}, expected some; set text "
                "to other columns"
            )
        vectors = embed(load_model(model, download, device), known["text"], batch_size)
        lists = pl.Series(VECTOR, vectors, dtype=pl.Array(pl.Float32, vectors.shape[1]))
        with atomic_write(output) as temporary:
            pl.DataFrame([known[c.ITEM_ID], lists]).write_parquet(temporary)
    missing = len(texts) - len(known)
    without = f"{missing:,} items have none, and no vector" if missing else "no item has none"
    print_summary(
        output,
        f"{len(known):,} vectors of {vectors.shape[1]} dimensions, by {model}",
        f"text from {choices(columns, 'and')}; {without}",
        then=f"recsys prepare-data --config configs/NAME/prepare.yaml --item_vectors '{{text: {{path: {output}}}}}'",
    )


def read_texts(items: Path, id: str, columns: list[str], separator: str) -> pl.DataFrame:
    """Item ids and texts, (item_id, text), one row for each id; the first of repeated ones.

    Args:
        items: as of `embed_items`.
        id: id column.
        columns: text columns.
        separator: column separator.
    """
    if not items.is_file():
        raise FileNotFoundError(f"{items} does not exist, expected a table of items; give its file with --items")
    if plain_suffix(items) not in (*PARQUET, *DELIMITED):
        raise ValueError(
            f"{items} has the type {items.suffix!r}, expected {choices([*DELIMITED, *PARQUET])}; convert it"
        )
    rules = {c.ITEM_ID: id_column(id)}
    rules |= {f"text {number}": Column(name, "", empty_to_null, required=False) for number, name in enumerate(columns)}
    names: dict[str, str] = {}
    with original_names(names), tempfile.TemporaryDirectory(prefix="recsys-") as copies:
        table, _ = read(_rows(items, rules, separator, Unpacker(Path(copies), names)), needs=tuple(rules))
    parts = [pl.col(name).cast(pl.String).str.strip_chars().replace("", None) for name in list(rules)[1:]]
    return table.select(
        pl.col(c.ITEM_ID).cast(pl.String), text=pl.concat_str(parts, separator=". ", ignore_nulls=True)
    ).unique(c.ITEM_ID, keep="first", maintain_order=True)


def _rows(items: Path, rules: dict[str, Column], separator: str, unpack: Unpacker) -> Rows:
    suffix = plain_suffix(items)
    if suffix in PARQUET:
        return typed_tables([items], rules, [str(items)])
    return csv_rows(unpack([items]), rules, "\t" if suffix in (".tsv", ".tab") else separator, names=unpack.names)


def load_model(model: str, download: bool, device: str) -> Encode:
    """The vectors of a sentence-transformers model, which runs no code of its own.

    Args:
        model: folder, or name on the Hugging Face hub.
        download: whether to download a model that is not on this machine.
        device: torch device.

    Raises:
        FileNotFoundError: it is not on this machine.
        ValueError: sentence-transformers is not installed, or the model needs code of its own.
    """
    if find_spec("sentence_transformers") is None:
        raise ValueError(f"embed-items needs sentence-transformers, which is not installed: {INSTALL}")
    if Path(model).is_dir():
        _check_folder(Path(model))
    elif not download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
    from sentence_transformers import SentenceTransformer

    try:
        loaded = SentenceTransformer(model, device=device, local_files_only=not download, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"model is {model!r}, which is neither a folder nor {'on the hub' if download else 'downloaded'}, expected "
            f"a sentence-transformers model; give its folder{'' if download else ', or allow --download true'}"
        ) from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"model {model!r} cannot be loaded ({first_sentences(str(error), 150)}), expected a sentence-transformers "
            "model without code of its own; give another"
        ) from error

    def encode(texts: list[str], batch_size: int) -> np.ndarray:
        return loaded.encode(texts, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=on_terminal())

    return encode


def _check_folder(folder: Path) -> None:
    """Raises a ValueError if a model's folder is none of sentence-transformers, or names classes of its own.

    Versions of sentence-transformers before 6 import classes from a local folder without asking.
    """
    file = folder / MODULES
    if not file.is_file():
        raise ValueError(f"model {folder} has no {MODULES}, expected a folder of sentence-transformers; give another")
    kinds = [
        str(part.get("type")) for part in read_json(file, list, "download the model again") if isinstance(part, dict)
    ]
    for config in sorted(path for path in folder.rglob("*.json") if path.name in ROUTERS and path.is_file()):
        content = read_json(config, object, "download the model again")
        types = content.get("types") if isinstance(content, dict) else None
        kinds += [str(kind) for kind in types.values()] if isinstance(types, dict) else []
    if foreign := [kind for kind in kinds if not kind.startswith(OWN)]:
        raise ValueError(
            f"model {folder} names the class {foreign[0]!r}, expected classes of sentence-transformers only, as a "
            "model must not run code of its own; give another"
        )


def embed(encode: Encode, texts: pl.Series, batch_size: int) -> np.ndarray:
    """Vectors of texts, (n, P) float32; equal texts are embedded once.

    Raises:
        ValueError: the model returns vectors that are not finite or of another number.
    """
    once = texts.unique(maintain_order=True)
    vectors = np.asarray(encode(once.to_list(), batch_size), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(once) or not np.isfinite(vectors).all():
        raise ValueError(
            f"the model returned vectors of shape {vectors.shape} for {len(once):,} texts, expected one row of finite "
            "numbers each; give another model"
        )
    place = pl.DataFrame({"text": once, "row": np.arange(len(once))})
    rows = pl.DataFrame({"text": texts}).join(place, on="text", how="left", maintain_order="left")["row"]
    return vectors[rows.to_numpy()]
