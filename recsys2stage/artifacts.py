"""Artifacts: folders written atomically, each with a manifest.json that records how it was made."""

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recsys2stage import __version__
from recsys2stage.columns import CARD, MANIFEST

FORMAT = 1  # of artifacts and checkpoints; increase it when older files can no longer be read
SEALED = ("index", "bundle", "candidates")  # artifacts whose manifests list the checksum of every file
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
MADE_BY = {  # kind of artifact -> verb that writes it
    "dataset": "recsys prepare-data",
    "retriever": "recsys fit",
    "index": "recsys export-index",
    "candidates": "recsys mine-negatives",
    "ranker": "recsys fit",
    "bundle": "recsys export-bundle",
    "model": "TwoStageRecommender.save",
}
MAX_JSON_BYTES = 1 << 26
RUN = Path("runs/ml-20m")  # default run, as `make pipeline` writes it
DATA = Path("data/ml-20m")


@contextmanager
def atomic_write(path: str | Path, kind: str | None = None) -> Iterator[Path]:
    """Yields a temporary path next to `path`, for a folder or a file; on success it is renamed to `path`.

    On failure it is removed. An existing `path` stays untouched until the new artifact is complete.

    Args:
        path: final path.
        kind: for a folder: the kind of artifact. A folder that holds anything else is not replaced.
    """
    path = Path(path)
    if kind is not None:
        _check_replaceable(path, kind)
    if path.is_symlink() and path.is_dir():  # a folder on another disk: the link stays, its target is replaced
        path = path.resolve()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    for left in path.parent.glob(f".{path.name}.*.*"):  # left by a killed run
        owner, pid, state = left.name.rsplit(".", 2)
        if owner == f".{path.name}" and pid.isdigit() and state in ("partial", "old") and not is_alive(int(pid)):
            if state == "old" and not path.exists():  # killed between the two renames below
                left.rename(path)
            else:
                _remove(left)
    _remove(temporary)
    try:
        with explained(path):
            yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step, so the old one is renamed first
            aside = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(aside)
            temporary.rename(path)
            _remove(aside)
        else:
            os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns errors of the disk in writing an artifact into one sentence.

    Args:
        path: final path of the artifact.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                f"{path} cannot be written: no space is left on its disk; free some, or choose another output"
            ) from error
        named = str(error.filename or "")
        own = named.startswith(str(path.with_name(f".{path.name}.")))  # the temporary path
        if error.errno not in UNWRITABLE or not (own or (named and str(path).startswith(named))):
            raise
        blocked = next((part for part in path.parents if part.exists() and not part.is_dir()), None)
        why = f"{blocked} is a file" if blocked else f"{error.strerror} ({error.filename})"
        raise OSError(
            f"{path} cannot be written: {why}, expected a folder that you may write to; choose another output"
        ) from error


def make_folder(path: Path) -> None:
    """Creates a folder for artifacts, if it is missing; the error of one that cannot be made is a sentence."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)


def _check_replaceable(path: Path, kind: str) -> None:
    if path.is_file():
        raise ValueError(f"{path} is a file, expected the name of a folder for a new {kind}; choose another output")
    if not path.is_dir() or not any(path.iterdir()):
        return
    manifest = path / MANIFEST
    held = read_json(manifest, dict, "remove it").get("kind") if manifest.is_file() else None
    if held != kind:
        what = "other things" if held is None else with_article(held)
        raise ValueError(f"{path} holds {what} and would be lost; name another folder for the new {kind}")


def is_alive(pid: int) -> bool:
    """Whether a process of this host exists."""
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
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def write_manifest(folder: Path, kind: str, options: dict[str, Any], parents: dict[str, Any], **facts: Any) -> None:
    """Writes `folder/manifest.json`.

    Args:
        kind: what the artifact is: dataset, retriever, index, candidates, ranker, bundle, ...
        options: arguments that it was made with.
        parents: name -> path of each input; recorded with its path, absolute and relative to `folder`, and its hash.
        facts: counts, hashes and measurements.
    """
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "command": " ".join(sys.argv),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": options,
        "parents": {
            name: {"path": str(Path(path).absolute()), "relative": _relative(path, folder), "hash": fingerprint(path)}
            for name, path in parents.items()
        },
        "versions": {"recsys2stage": __version__, "python": platform.python_version(), "numpy": np.__version__},
        **facts,
        **({"files": checksums(folder)} if kind in SEALED else {}),
    }
    write_json(folder / MANIFEST, manifest)


def read_manifest(folder: str | Path, kind: str, make: str) -> dict[str, Any]:
    """Reads and checks the manifest of an artifact.

    Args:
        kind: expected kind of artifact.
        make: command that makes one, for the error.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, so there is no {kind} in {folder}; run: {make}")
    manifest = read_json(path, dict, make)
    if manifest.get("kind") != kind:
        raise ValueError(
            f"{folder} holds {with_article(manifest.get('kind'))}, expected {with_article(kind)}; give the folder that "
            f"{MADE_BY.get(kind, make)} wrote"
        )
    check_format(path, manifest.get("format"), manifest.get("versions"), make)
    parents = manifest.get("parents")
    if not (isinstance(parents, dict) and all(isinstance(p, dict) and _is_parent(p) for p in parents.values())):
        raise ValueError(f"{path} has the parents {parents!r}, expected a path and a hash of each; run: {make}")
    if kind in SEALED and "data" not in parents:
        raise ValueError(f"{path} has no parent 'data', expected the dataset it was made from; run: {make}")
    return manifest


def with_article(kind: Any) -> str:
    """A kind of artifact as a noun with its article."""
    if kind not in MADE_BY:
        return f"an artifact of kind {kind!r}"
    return kind if kind == "candidates" else f"{'an' if kind == 'index' else 'a'} {kind}"


def _is_parent(parent: dict[str, Any]) -> bool:
    path, others = parent.get("path"), (parent.get("relative"), parent.get("hash"))
    return isinstance(path, str) and "\0" not in path and all(isinstance(other, str | None) for other in others)


def _relative(path: str | Path, folder: str | Path) -> str:
    """Path relative to a folder. Symbolic links are followed in the parents of both, but not at their own names."""
    target, base = ((Path(one).parent.resolve() / Path(one).name) for one in (path, folder))
    return Path(os.path.relpath(target, base)).as_posix()


def locate_parent(folder: str | Path, parent: dict[str, Any]) -> Path:
    """Path of a parent: where it was, or at the same place relative to `folder`, for folders moved together.

    Args:
        folder: the artifact.
        parent: path, relative path and hash, from the manifest of `folder`.

    Returns:
        The first path with the recorded hash, else the first one that exists, else the absolute one.
    """
    paths, moved = [Path(parent["path"])], parent.get("relative")
    if moved is not None and "\0" not in moved:
        paths.append(Path(os.path.normpath(Path(folder).resolve() / moved)))
    same = [path for path in paths if parent.get("hash") and fingerprint(path) == parent["hash"]]
    return [*same, *(path for path in paths if path.exists()), paths[0]][0]


def find_parent(folder: str | Path, manifest: dict[str, Any], name: str, advice: str) -> Path:
    """Path of a parent that exists; see `locate_parent`.

    Args:
        folder: the artifact.
        manifest: its manifest.
        name: of the parent, such as "data".
        advice: what to do if it is missing, for the error.

    Raises:
        FileNotFoundError: if it is missing, with the paths that were tried.
    """
    parent = take(take(manifest, "parents", dict, Path(folder) / MANIFEST), name, dict, Path(folder) / MANIFEST)
    path = locate_parent(folder, parent)
    if not path.exists():
        moved = parent.get("relative")
        tried = f"{path}" + ("" if moved is None else f" or {os.path.normpath(Path(folder).resolve() / moved)}")
        raise FileNotFoundError(f"the {name} of {folder} does not exist, expected at {tried}; {advice}")
    return path


def check_format(path: Path, number: Any, versions: Any, make: str) -> None:
    """Raises a ValueError unless an artifact has the format that this version reads.

    Args:
        path: the artifact, or its manifest.
        number: its format number; None if it has none.
        versions: versions of the packages that wrote it, by name, if recorded.
        make: command that makes it again.
    """
    if type(number) is int and number == FORMAT:
        return
    version = versions.get("recsys2stage") if isinstance(versions, dict) else None
    by = f"recsys2stage {version}" if isinstance(version, str) else "another version of recsys2stage"
    has = "no format number" if number is None else f"the format {number!r}"
    raise ValueError(f"{path} has {has}, expected {FORMAT}; it was written by {by}, make it again: {make}")


def take(content: dict[str, Any], name: str, kind: Any, where: str | Path) -> Any:
    """Returns a required value of a JSON object and checks its type.

    Args:
        content: the JSON object.
        name: key of the value.
        kind: type or types, as for `isinstance`; a bool is not accepted as a number.
        where: the file, for the error.
    """
    value = content.get(name)
    if name not in content or not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
        actual = f"the {name} {value!r}" if name in content else f"no {name}"
        raise ValueError(f"{where} has {actual[:80]}, expected {getattr(kind, '__name__', kind)}; make it again")
    return value


def read_json(path: Path, kind: type, make: str) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        kind: expected type: dict or list.
        make: command that makes the file again, for the error.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {MAX_JSON_BYTES:,}; make it again: {make}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deeply
        raise ValueError(f"{path} is not JSON ({error}); make it again: {make}") from error
    if not isinstance(content, kind):
        expected = "object" if kind is dict else kind.__name__
        raise ValueError(f"{path} is not a JSON {expected}; make it again: {make}")
    return content


def read_array(path: Path, dtype: Any = None, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """Memory-maps a .npy file. Refuses pickled objects, and arrays larger than their file.

    Args:
        path: the file.
        dtype: expected type; None: any but objects.
        shape: expected shape, with None for any size; None: any shape.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make its folder again")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OverflowError, TypeError) as error:  # not an array, truncated, or of Python objects
        raise ValueError(f"{path} cannot be read as an array ({error}); make it again") from error
    fits = shape is None or (
        array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    )
    if not fits or (dtype is not None and array.dtype != dtype):
        raise ValueError(
            f"{path} has shape {array.shape} and type {array.dtype}, expected "
            f"{'any shape' if shape is None else shape} and {'any type' if dtype is None else np.dtype(dtype)}; it "
            "may be of another run, make it again"
        )
    return array


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder except its manifest and its model card, by relative path."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, expected a regular file; put a copy there")
        if path.is_file() and name not in (MANIFEST, CARD) and not path.name.startswith("."):
            digests[name] = str(fingerprint(path))
    return digests


def verify(folder: str | Path, manifest: dict[str, Any], make: str) -> None:
    """Raises an error unless the files of a folder match the names and checksums in its manifest.

    Args:
        folder: a SEALED artifact.
        manifest: its manifest.
        make: command that makes it again, for the error.
    """
    folder = Path(folder)
    expected = take(manifest, "files", dict, folder / MANIFEST)
    for name in expected:
        if name != PurePosixPath(name).as_posix() or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise ValueError(f"{folder / MANIFEST} lists {name!r}, expected relative paths of its files; run: {make}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; make {folder} again: {make}")
    for name, digest in checksums(folder).items():
        if name not in expected:
            raise ValueError(f"{folder / name} is not listed in {folder / MANIFEST}; remove it, or make {folder} again")
        if digest != expected[name]:
            raise ValueError(
                f"{folder / name} is not the file that was written with {folder / MANIFEST} (its checksum differs): it "
                f"is damaged or of another run; make {folder} again: {make}"
            )


def fingerprint(path: str | Path) -> str | None:
    """SHA-256 of a file, or of a folder's manifest; None if there is neither."""
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
