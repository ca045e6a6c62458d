"""Checks that a checkpoint belongs to the model of a config, with the values of both in the error."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule

from recsys2stage.checkpoints import KINDS, OPTIONS, check_kind
from recsys2stage.cli.messages import shown
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.trust import CLASS, shorten_class_paths
from recsys2stage.trust import OPTIONS as INIT

FROM_CONFIG = ("optimizer",)  # its class comes from the config, its state from the checkpoint
FROM_DATA = (  # links of the data module set them
    *("num_items", "features", "vector_dim", "num_candidates", "signals", "scores_cold", "recent"),
    *("max_length", "request_time", "next_action", "user_features", "actions", "fold"),
)
CHOSEN = "mask_ids"  # where it is not given, a fit chooses it at its end, after training without it
PARTS = {Retriever: "towers", Ranker: "reranker"}


def check_model(checkpoint: dict[str, Any], model: type, path: str | Path) -> None:
    """Raises a ValueError for a ranker's checkpoint given to a retriever, or a retriever's to a ranker.

    Args:
        checkpoint: as loaded.
        model: class of the model of the config.
        path: the checkpoint, for the error.
    """
    for kind, part in PARTS.items():
        if issubclass(model, kind):
            step = f"give a {KINDS[part]}'s checkpoint, or the config of the model that wrote this one"
            check_kind(checkpoint, part, path, step)


RESUME = "resume it with the same options, or start a new fit without --ckpt_path"
SAME_DATA = "resume it with the same data and options, or start a new fit without --ckpt_path"


def check_same_options(given: Any, stored: Mapping[str, Any], path: str | Path, step: str = RESUME) -> None:
    """Raises a ValueError if a fit is to be resumed, or repeated, with other options of the model than it began with.

    The options in a checkpoint would override those given, in silence.

    Args:
        given: options of the model in the config and on the command line.
        stored: those in the checkpoint.
        path: the checkpoint, for the error.
        step: what to do next, for the error.
    """
    for name, now, then in differences(plain(given), plain(stored)):
        raise ValueError(f"model.{INIT}.{name} is {shown(now)}, but the fit of {path} began with {shown(then)}; {step}")


def check_same_data(model: LightningModule, stored: Mapping[str, Any], path: str | Path, step: str = SAME_DATA) -> None:
    """Raises a ValueError if a fit is to be resumed, or repeated, with data whose options shape the model otherwise.

    Args:
        model: the model, built for the data of this config.
        stored: its options in the checkpoint.
        path: the checkpoint, for the error.
        step: what to do next, for the error.
    """
    for name in ("num_items", "max_length", "request_time", "next_action", "vector_dim", "recent", "fold"):
        now, then = model.hparams.get(name), stored.get(name)
        comparable = name in stored if name == "fold" else now is not None and then is not None  # no fold: all users
        if comparable and now != then:
            raise ValueError(
                f"{name} of the data is {shown(now)}, but the fit of {path} began with {shown(then)}; {step}"
            )


def check_weights(model: LightningModule, checkpoint: dict[str, Any], given: Any, path: str | Path) -> None:
    """Raises a ValueError if the weights of a checkpoint do not have the shapes of the model's.

    Args:
        model: the model, built from the config.
        checkpoint: as loaded.
        given: options of the model in the config and on the command line.
        path: the checkpoint, for the error.
    """
    weights = checkpoint["state_dict"]
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items() if hasattr(value, "shape")}
    wrong = next((name for name in {**own, **theirs} if own.get(name) != theirs.get(name)), None)
    if wrong is None:
        return
    step = "give the config of that fit, or another --ckpt_path"
    for name, now, then in differences(plain(given), plain(checkpoint[OPTIONS])):
        raise ValueError(f"model.{INIT}.{name} is {shown(now)}, but {path} was trained with {shown(then)}; {step}")
    raise ValueError(
        f"{path} holds {wrong} of shape {theirs.get(wrong)}, expected {own.get(wrong)}, as of this config; {step}"
    )


def differences(given: Any, stored: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Options that both have with different values: dotted name, value given and value stored."""
    if isinstance(given, dict) and isinstance(stored, dict) and given.get(CLASS) == stored.get(CLASS):
        for key in [key for key in given if key in stored]:
            if not name and key == CHOSEN and given[key] is False:
                continue
            if name or key not in FROM_CONFIG + FROM_DATA:
                yield from differences(given[key], stored[key], f"{name}.{key}" if name else key)
    elif given != stored:
        yield name, _short(given), _short(stored)


def _short(value: Any) -> Any:
    """The name of a class instead of its options."""
    return value[CLASS] if isinstance(value, dict) and CLASS in value else value


def plain(options: Any) -> Any:
    """Options as they are after a way through JSON, with short names of classes."""
    as_dict = options.as_dict() if hasattr(options, "as_dict") else dict(options or {})
    return shorten_class_paths(json.loads(json.dumps(as_dict, default=str)))
