"""Refits: a chosen retriever or ranker is trained again on more events or lists, as long as validation found best."""

from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from recsys2stage.artifacts import read_json, take
from recsys2stage.checkpoints import OPTIONS, load_checkpoint
from recsys2stage.cli.checkpoint_checks import check_same_data, check_same_options, differences, plain
from recsys2stage.cli.messages import shown
from recsys2stage.columns import MANIFEST
from recsys2stage.retrieval.histories import BEST
from recsys2stage.trust import OPTIONS as INIT

SAME = "refit with the options that were chosen, or choose a run with these first"
FREE = ("path", "prepare", "eval_batch_size", "refit", "until", "fold", "folds")  # checked elsewhere, or of no effect
LENGTH = ("max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


def prepare_refit(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule, given: Any) -> None:
    """Prepares a refit, if the data module has one: its length, no validation, the last weights as best.ckpt.

    The learning rate follows the schedule of the whole chosen run, up to the epoch of its best checkpoint: this is the
    training that validation has chosen, while a shorter schedule would be one that nothing was measured for.

    Args:
        trainer: trainer of the fit; changed in place.
        model: model of the fit; changed in place.
        datamodule: with the attributes `refit` (folder of the chosen run) and `epochs`, if it supports refits.
        given: options of the model in the config and on the command line.

    Raises:
        ValueError: if the model has other options than the chosen one.
    """
    epochs = getattr(datamodule, "epochs", None)
    if epochs is None:
        return
    best = Path(getattr(datamodule, "refit", "")) / BEST
    stored = load_checkpoint(best, "recsys fit, without refit")[OPTIONS]
    check_same_options(given, stored, best, SAME)
    check_same_data(model, stored, best, SAME)
    planned, trainer.fit_loop.max_epochs = trainer.max_epochs, epochs
    if planned is not None and (planned == -1 or planned > epochs):
        model.planned_epochs = planned  # type: ignore[assignment]  # of RecsysModule
    trainer.limit_val_batches = 0  # the events or lists of validation are trained on
    for stopping in trainer.early_stopping_callbacks:
        stopping.patience, stopping.strict = epochs + 1, False
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.monitor, callback._train_time_interval = None, None
            callback._every_n_train_steps, callback._every_n_epochs = 0, 1  # the last epoch is saved, whichever it is
            callback._save_on_train_epoch_end = True  # not after validation, as there is none


def check_same_config(config: Any, refit: Path) -> None:
    """Raises a ValueError if a refit has another config than the chosen run, in what shapes the training.

    Checkpoints lack some of these options: the loss, the optimizer, the batch size, the length of the fit.

    Args:
        config: of the refit, with model, data and trainer.
        refit: folder of the chosen run. Its config is not compared if it is missing.
    """
    manifest = read_json(refit / MANIFEST, dict, "fit it again")
    noted = take(take(manifest, "options", dict, refit / MANIFEST), "config", str, refit / MANIFEST)
    in_folder = refit / Path(noted).parent.parent.name / Path(noted).parent.name / Path(noted).name
    path = next((path for path in (in_folder, Path(noted)) if path.is_file()), None)  # the folder may have been moved
    if path is None:
        return
    try:
        chosen = _compared(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}), expected the config of the fit of {refit}; fit it again"
        ) from error
    for name, now, then in differences(_compared(config), chosen):
        raise ValueError(f"{name} is {shown(now)}, expected {shown(then)}, as in {path}; {SAME}")


def _compared(config: Any) -> dict[str, Any]:
    """The part of a config that a refit shares with the chosen run."""
    data, trainer = plain(config["data"]), plain(config["trainer"])
    return {
        "model": plain(config["model"]),
        "data": data | {INIT: {name: value for name, value in data.get(INIT, {}).items() if name not in FREE}},
        "trainer": {name: trainer[name] for name in LENGTH if name in trainer},
    }
