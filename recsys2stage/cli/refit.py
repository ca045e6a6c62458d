"""Refits: a chosen retriever or ranker is trained again on more events or lists, as long as validation found best."""

from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from recsys2stage.checkpoints import OPTIONS, load_checkpoint
from recsys2stage.cli.checkpoint_checks import check_same_data, check_same_options
from recsys2stage.retrieval.histories import BEST


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
    step = "refit with the options that were chosen, or choose a run with these first"
    check_same_options(given, stored, best, step)
    check_same_data(model, stored, best, step)
    planned, trainer.fit_loop.max_epochs = trainer.max_epochs, epochs
    if planned is not None and (planned == -1 or planned > epochs):
        model.planned_epochs = planned  # type: ignore[assignment]  # of RecsysModule
    trainer.limit_val_batches = 0  # the events or lists of validation are trained on
    for stopping in trainer.early_stopping_callbacks:
        stopping.patience, stopping.strict = epochs + 1, False
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback.monitor = None
