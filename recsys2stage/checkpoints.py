"""Checkpoints: options and weights, loaded without pickled code and rebuilt into modules without Lightning."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from recsys2stage.artifacts import FORMAT, check_format, take
from recsys2stage.options import TRAINED_TARGETS, Until
from recsys2stage.trust import arguments, shorten_class_paths

OPTIONS, SPLIT, VERSIONS = "hyper_parameters", "split_hash", "versions"  # keys of a checkpoint
UNTIL = "trained_until"  # key of checkpoints and manifests: where training events end; "val" if it is missing
KINDS = {"towers": "retriever", "reranker": "ranker"}  # submodule -> model that has it
MAX_BUFFER_BYTES = 1 << 30  # largest buffer that is not in the state_dict


def add_metadata(checkpoint: dict[str, Any], split_hash: str | None, version: str, until: Until = "val") -> None:
    """Adds format, versions, split hash and training stretch to a checkpoint; shortens the class paths in its options.

    Args:
        checkpoint: as Lightning makes it; changed in place.
        split_hash: of the training dataset, if known.
        version: of this package.
        until: where the training events end.
    """
    checkpoint |= {"format": FORMAT, VERSIONS: {"recsys2stage": version}, SPLIT: split_hash, UNTIL: until}
    options = shorten_class_paths(checkpoint.get(OPTIONS, {}))
    options.pop("_class_path", None)  # the caller that loads it gives the class
    checkpoint[OPTIONS] = options


def load_checkpoint(path: str | Path, make: str) -> dict[str, Any]:
    """Loads a checkpoint of a fit: plain values and tensors, no pickled code.

    Args:
        path: checkpoint.
        make: command that makes such a checkpoint, for the error.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a checkpoint; give a file of it: {path / 'best.ckpt'}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a checkpoint; give its path, or run: {make}")
    checkpoint = load_tensors(path, path, make)
    check_format(path, checkpoint.get("format"), checkpoint.get(VERSIONS), make)
    take(checkpoint, OPTIONS, dict, path)
    take(checkpoint, "state_dict", dict, path)
    take(checkpoint, SPLIT, str | None, path)
    trained_until(checkpoint, path)
    return checkpoint


def trained_until(content: dict[str, Any], where: str | Path) -> Until:
    """Where the training events of a checkpoint, or of the artifact of a manifest, end.

    Args:
        content: the checkpoint or the manifest; those of versions without refits lack the key.
        where: the file, for the error.
    """
    until = content.get(UNTIL, "val")
    if not isinstance(until, str) or until not in TRAINED_TARGETS:
        expected = ", ".join(TRAINED_TARGETS)
        raise ValueError(f"{where} has the {UNTIL} {str(until)[:80]!r}, expected one of {expected}; make it again")
    return until


def check_selected(path: str | Path, manifest: dict[str, Any], step: str) -> None:
    """Raises a ValueError for a ranker that is a refit: its validation lists were trained on.

    Args:
        path: the ranker's checkpoint, for the error.
        manifest: of its fit.
        step: what to do instead, for the error.
    """
    if (selected := manifest["parents"].get("selected")) is not None:
        raise ValueError(
            f"{path} is a refit of {selected['path']}, expected a ranker that was not trained on the validation lists; "
            f"{step}"
        )


def load_tensors(file: Path | io.BytesIO, where: str | Path, make: str) -> dict[str, Any]:
    """Loads a dictionary written by torch.save. Refuses compression, so memory use is limited by the file size.

    Args:
        file: a path, or the bytes of a file.
        where: name of the file, for the error.
        make: command that makes it again, for the error.
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
        raise ValueError(f"{where} is not a checkpoint, or is incomplete; make it again: {make}") from error
    if not (isinstance(content, dict) and all(isinstance(name, str) for name in content)):
        raise ValueError(f"{where} holds a {type(content).__name__}, expected values by name; make it again: {make}")
    return content


def read_checkpoint(path: Path, part: str, make: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads the options of a checkpoint and the weights of one submodule.

    Args:
        path: checkpoint.
        part: submodule of the trained module, such as "towers".
        make: command that makes such a checkpoint, for the error.

    Returns:
        The options, with the `split_hash` of the training data (None if unknown) and `trained_until`, and the weights.
    """
    checkpoint = load_checkpoint(path, make)
    weights = {
        name.removeprefix(f"{part}."): value
        for name, value in checkpoint["state_dict"].items()
        if isinstance(name, str) and name.startswith(f"{part}.")
    }
    if not weights:
        check_kind(checkpoint, part, path, f"give such a checkpoint, or run: {make}")
    return {**checkpoint[OPTIONS], SPLIT: checkpoint[SPLIT], UNTIL: trained_until(checkpoint, path)}, weights


def check_kind(checkpoint: dict[str, Any], part: str, path: str | Path, step: str) -> None:
    """Raises a ValueError unless a checkpoint has the weights of a submodule, which tells retrievers from rankers.

    Args:
        checkpoint: as loaded.
        part: submodule, of KINDS.
        path: the file, for the error.
        step: what to do next, for the error.
    """
    parts = {name.partition(".")[0] for name in checkpoint["state_dict"] if isinstance(name, str) and "." in name}
    if part not in parts:
        other = next((f"that of a {kind}" for name, kind in KINDS.items() if name in parts), "of no such model")
        raise ValueError(f"{path} holds no {part}: the checkpoint is {other}, expected that of a {KINDS[part]}; {step}")


def build(kind: type, options: Any, weights: dict[str, torch.Tensor], where: str | Path) -> Any:
    """Builds a module in eval mode from plain options, where {"class_path", "init_args"} is a factory, and weights.

    Args:
        kind: class of the module.
        options: its arguments, by name.
        weights: its state_dict.
        where: the file they come from, for the error.

    Raises:
        ValueError: if options or weights do not fit the class; shapes are checked before memory is allocated.
    """
    made = arguments(kind, options, where)
    try:
        for name, value in weights.items():
            if not isinstance(value, torch.Tensor) or value.nbytes > value.untyped_storage().nbytes():
                raise ValueError(f"the weights {name} are not a tensor, or are larger than their storage")
        _check_shapes(kind, made, weights)
        module = kind(**made)
        module.load_state_dict(weights)
    except Exception as error:  # untrusted options can make a constructor raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{where} does not hold options and weights of one {kind.__name__} ({reason[0]}); make it again"
        ) from error
    return module.eval()


def _check_shapes(kind: type, options: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Raises a ValueError for missing, unexpected or misshapen weights, before memory is allocated for the module."""
    given = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        with torch.device("meta"):
            module = kind(**options)
    except (RuntimeError, TypeError):  # the constructor reads values, which meta tensors lack
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
        if name not in wanted and table.nbytes > MAX_BUFFER_BYTES:  # such as rotary angles, a row per position
            raise ValueError(f"{name} would take {table.nbytes:,} bytes, expected at most {MAX_BUFFER_BYTES:,}")
