"""Plain options and weights, as checkpoints and served folders hold them, made modules again; needs no Lightning."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from recsys2stage.artifacts import FORMAT, check_format, take
from recsys2stage.trust import arguments, plainly

OPTIONS, SPLIT, VERSIONS = "hyper_parameters", "split_hash", "versions"  # of a checkpoint
MOST_UNSAVED = 1 << 30  # bytes of a table that a module makes itself


def sign(checkpoint: dict[str, Any], split_hash: str | None, version: str) -> None:
    """Adds to a checkpoint what those who load it look at, and names classes as files do.

    Args:
        checkpoint: as Lightning dumps it; changed.
        split_hash: of the dataset it was trained on, where known.
        version: of this package.
    """
    checkpoint |= {"format": FORMAT, VERSIONS: {"recsys2stage": version}, SPLIT: split_hash}
    options = plainly(checkpoint.get(OPTIONS, {}))
    options.pop("_class_path", None)  # who loads it says of which class it is
    checkpoint[OPTIONS] = options


def load_checkpoint(path: str | Path, make: str) -> dict[str, Any]:
    """A checkpoint of a fit: plain values and tensors, never code.

    Args:
        path: checkpoint.
        make: the command that makes such a checkpoint, for the error.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run: {make}")
    checkpoint = load_tensors(path, path, make)
    check_format(path, checkpoint.get("format"), checkpoint.get(VERSIONS), make)
    take(checkpoint, OPTIONS, dict, path)
    take(checkpoint, "state_dict", dict, path)
    take(checkpoint, SPLIT, str | None, path)
    return checkpoint


def load_tensors(file: Path | io.BytesIO, where: str | Path, make: str) -> dict[str, Any]:
    """A dictionary that torch.save wrote, whose tensors take no more memory than their file has bytes.

    Args:
        file: a path, or the bytes of a file.
        where: what it is, for the error.
        make: the command that makes it again, for the error.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        size = file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
        if unpacked > size:
            raise ValueError(f"{where} unpacks from {size:,} to {unpacked:,} bytes, expected no compression")
        if not isinstance(file, Path):
            file.seek(0)
        content = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} is not a checkpoint, or not a whole one; make it again: {make}") from error
    if not (isinstance(content, dict) and all(isinstance(name, str) for name in content)):
        raise ValueError(f"{where} holds a {type(content).__name__}, expected values by name; make it again: {make}")
    return content


def read_checkpoint(path: Path, part: str, make: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The options a checkpoint was trained with, and the weights of one part of it.

    Args:
        path: checkpoint.
        part: attribute of the trained module, such as "towers".
        make: the command that makes such a checkpoint, for the error.

    Returns:
        The options, among them `split_hash` of the data it was trained on (None where unknown), and the weights.
    """
    checkpoint = load_checkpoint(path, make)
    weights = {
        name.removeprefix(f"{part}."): value
        for name, value in checkpoint["state_dict"].items()
        if isinstance(name, str) and name.startswith(f"{part}.")
    }
    if not weights:
        raise ValueError(f"{path} holds no {part}; expected a checkpoint made by: {make}")
    return {**checkpoint[OPTIONS], SPLIT: checkpoint[SPLIT]}, weights


def build(kind: type, options: Any, weights: dict[str, torch.Tensor], where: str | Path) -> Any:
    """A module from plain options, in which {"class_path", "init_args"} stands for a factory, and its weights.

    Args:
        kind: class of the module.
        options: its arguments, by name.
        weights: of all its parameters and buffers.
        where: the file they come from, for the error.

    Raises:
        ValueError: where options or weights do not make such a module; no memory is taken for others.
    """
    made = arguments(kind, options, where)
    try:
        for name, value in weights.items():
            if not isinstance(value, torch.Tensor) or value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"the weights {name} are no whole tensor")
        _check_shapes(kind, made, weights)
        module = kind(**made)
        module.load_state_dict(weights)
    except Exception as error:  # whatever a constructor says of untrusted options
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{where} does not hold options and weights of one {kind.__name__} ({reason[0]}); make it again"
        ) from error
    return module.eval()


def _check_shapes(kind: type, options: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Refuses weights that the module has not, or in other shapes, before memory is taken for it."""
    given = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        with torch.device("meta"):
            module = kind(**options)
    except (RuntimeError, TypeError):  # a class that looks at its own numbers when it is made, which have none here
        largest = max((size for shape in given.values() for size in shape), default=0)
        for name in ("num_items", "dim"):
            if isinstance(options.get(name), int) and options[name] > largest:
                raise ValueError(
                    f"{name} is {options[name]:,}, but no weights have more than {largest:,} rows"
                ) from None
        return
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in {**wanted, **given}:
        if wanted.get(name) != given.get(name):
            raise ValueError(f"{name} has shape {given.get(name)}, expected {wanted.get(name)}")
    for name, table in module.named_buffers():
        if name not in wanted and table.nbytes > MOST_UNSAVED:  # such as angles, a row for each place
            raise ValueError(f"{name} would take {table.nbytes:,} bytes, expected at most {MOST_UNSAVED:,}")
