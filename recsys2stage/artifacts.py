"""Artifacts are folders that appear whole or not at all, each with a manifest.json of what made it."""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recsys2stage import __version__
from recsys2stage.columns import MANIFEST

RUN = Path("runs/ml-20m")  # the default run, as `make pipeline` leaves it
DATA = Path("data/ml-20m")


@contextmanager
def whole(path: str | Path, kind: str | None = None) -> Iterator[Path]:
    """Gives a free name beside `path`, for a folder or a file; on success what was made there takes the name `path`.

    On failure it is removed. What stood at `path` before stays untouched until the new artifact is complete.

    Args:
        path: where the artifact shall be.
        kind: of a folder: what it will hold. A folder that holds anything else is not replaced.
    """
    path = Path(path)
    if kind is not None:
        _refuse_to_replace_another(path, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    for left in path.parent.glob(f".{path.name}.*.*"):  # what a killed run left behind
        owner, pid, state = left.name.rsplit(".", 2)
        if owner == f".{path.name}" and pid.isdigit() and state in ("partial", "old") and not _alive(int(pid)):
            if state == "old" and not path.exists():  # it was killed between the two renames below
                left.rename(path)
            else:
                _remove(left)
    _remove(beside)
    try:
        yield beside
        if path.is_dir():  # a folder cannot be replaced in one step, so the old one steps aside first
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(aside)
            beside.rename(path)
            _remove(aside)
        else:
            os.replace(beside, path)
    finally:
        _remove(beside)


def _refuse_to_replace_another(path: Path, kind: str) -> None:
    if path.is_file():
        raise ValueError(f"{path} is a file, expected the name of a folder for a new {kind}")
    if not path.is_dir() or not any(path.iterdir()):
        return
    manifest = path / MANIFEST
    held = json.loads(manifest.read_text(encoding="utf-8")).get("kind") if manifest.is_file() else None
    if held != kind:
        what = "other things" if held is None else f"a {held}"
        raise ValueError(f"{path} holds {what} and would be lost; name another folder for the new {kind}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    with whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_manifest(folder: Path, kind: str, options: dict[str, Any], parents: dict[str, Any], **facts: Any) -> None:
    """Writes `folder/manifest.json`.

    Args:
        kind: what the artifact is: dataset, retriever, index, candidates, ranker, bundle, ...
        options: the arguments that made it.
        parents: name -> folder of each artifact it was made from; their fingerprints are recorded.
        facts: counts, hashes and measurements worth keeping.
    """
    manifest = {
        "kind": kind,
        "command": " ".join(sys.argv),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": options,
        "parents": {name: {"path": str(path), "hash": fingerprint(path)} for name, path in parents.items()},
        "versions": {"recsys2stage": __version__, "python": platform.python_version(), "numpy": np.__version__},
        **facts,
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: str | Path, kind: str, make: str) -> dict[str, Any]:
    """The manifest of an artifact, or an error that says how to make it.

    Args:
        kind: what the artifact must be.
        make: the command that makes one, for the error.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so there is no {kind} in {folder}; run: {make}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} is not JSON ({error}); make the {kind} again: {make}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} is not a JSON object; make the {kind} again: {make}")
    if manifest.get("kind") != kind:
        raise ValueError(f"{folder} holds a {manifest.get('kind')!r}, expected a {kind!r}; run: {make}")
    return manifest


def fingerprint(path: str | Path) -> str | None:
    """SHA-256 of a file, or of a folder's manifest; None where there is neither."""
    path = Path(path)
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        return None
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 over the types, shapes and contents of arrays, in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class ParquetStream:
    """Writes tables of like columns one after the other into one Parquet file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer: Any = None

    def __enter__(self) -> "ParquetStream":
        return self

    def write(self, table: dict[str, np.ndarray]) -> None:
        import pyarrow as pa  # here, because training writes manifests and needs no Parquet
        import pyarrow.parquet as pq

        arrow = pa.table(table)
        self.writer = self.writer or pq.ParquetWriter(self.path, arrow.schema, compression="zstd")
        self.writer.write_table(arrow)

    def __exit__(self, *error: object) -> None:
        if self.writer:
            self.writer.close()
