"""Plain options and weights, as checkpoints and served folders hold them, made modules again; needs no Lightning."""

import functools
import importlib
import pickle
from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: Path, part: str, make: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The options a checkpoint was trained with, and the weights of one part of it.

    Args:
        path: checkpoint.
        part: attribute of the trained module, such as "towers".
        make: the command that makes such a checkpoint, for the error.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; run: {make}")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint, or not a whole one; make it again: {make}") from error
    weights = {
        name.removeprefix(f"{part}."): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith(f"{part}.")
    }
    if not weights:
        raise ValueError(f"{path} holds no {part}; expected a checkpoint made by: {make}")
    return checkpoint["hyper_parameters"], weights


def build(kind: type, options: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """A module from plain options, in which {"class_path", "init_args"} stands for a factory, and its weights."""
    module = kind(**{name: factory(value) for name, value in options.items()})
    module.load_state_dict(weights)
    return module.eval()


def factory(value: Any) -> Any:
    """A description with a class_path becomes that class with its options bound; anything else stays as it is."""
    if isinstance(value, list):
        return [factory(part) for part in value]
    if not (isinstance(value, dict) and "class_path" in value):
        return value
    module, _, name = value["class_path"].rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{value['class_path']} cannot be imported ({error}); put its module on PYTHONPATH") from error
    return functools.partial(kind, **{key: factory(option) for key, option in (value.get("init_args") or {}).items()})
