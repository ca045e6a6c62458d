"""Lightning's verbs: any LightningModule on any LightningDataModule, both named in the config."""

import logging
import sys
import warnings
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from recsys2stage.checkpoints import OPTIONS, load_checkpoint
from recsys2stage.cli.callbacks import (
    BEST,
    KeepLast,
    MeasureTheEnd,
    NextEpoch,
    OwnFiles,
    RequireFinite,
    ReseedEveryStep,
    StayStopped,
    WholeCheckpoints,
    WriteManifest,
)
from recsys2stage.ranking import scorers  # noqa: F401
from recsys2stage.ranking.candidates import Candidates  # noqa: F401
from recsys2stage.ranking.ranker import Ranker  # noqa: F401

# short class names in YAML resolve once their module is imported
from recsys2stage.retrieval import encoders, inputs, losses, objectives, users  # noqa: F401
from recsys2stage.retrieval.encoders import positions, times  # noqa: F401
from recsys2stage.retrieval.histories import Histories  # noqa: F401
from recsys2stage.retrieval.retriever import Retriever  # noqa: F401
from recsys2stage.trust import Trust, arguments, trusting

RESUME = "recsys fit, without --ckpt_path"

logger = logging.getLogger("recsys2stage")


class RecsysCLI(LightningCLI):
    """Trains whatever LightningModule the config names on whatever LightningDataModule it names.

    The folder `output` receives best.ckpt (by checkpoint.monitor), last.ckpt, log/ and, when the fit has come to its
    end, manifest.json.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=Path, required=True, help="Folder of this run's checkpoints and logs.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(KeepLast, "last")  # after the best, whose score it holds
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/ndcg@10",
                "checkpoint.mode": "max",
                "checkpoint.enable_version_counter": False,
                "early_stopping.monitor": "val/ndcg@10",
                "early_stopping.mode": "max",
                "early_stopping.patience": 5,
            }
        )
        parser.add_argument(
            "--trust",
            type=Trust,
            help="Modules outside this package whose classes a checkpoint, given by --ckpt_path, may name.",
        )
        for name in ("checkpoint", "last"):
            parser.link_arguments("output", f"{name}.dirpath", compute_fn=str)
        # the data knows, the model asks; what a model has no argument for is not passed
        for name in (
            *("num_items", "features", "vector_dim", "num_candidates", "signals", "scores_cold", "recent"),
            *("max_length", "request_time", "next_action", "user_features", "actions"),
        ):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Takes the options that the checkpoint holds, as Lightning does, but first looks at the classes they name."""
        options = self.config.get(self.config.get("subcommand") or "")
        if options is None or not options.get("ckpt_path") or not Path(options.ckpt_path).is_file():
            return
        module, _, name = options.model.class_path.rpartition(".")  # of the config, which the parser has imported
        kind = getattr(import_module(module), name)
        stored = load_checkpoint(options.ckpt_path, RESUME)[OPTIONS]
        stored = {name: value for name, value in stored.items() if name in signature(kind).parameters}
        stored.pop("optimizer", None)  # its state is restored; what it is, the config says
        with trusting(options.trust):
            arguments(kind, stored, options.ckpt_path)
        model = {"class_path": options.model.class_path, "dict_kwargs": stored}
        self.config = self.parser.parse_object({self.config.subcommand: {"model": model}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config[str(self.subcommand)]
        if options.trainer.logger is None:
            kwargs["logger"] = CSVLogger(options.output, name="log")
        if options.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = options.output  # of config.yaml where there is no logger
        accelerator = options.trainer.accelerator
        if MPSAccelerator.is_available() and accelerator in ("auto", "gpu", "mps"):
            if accelerator != "auto":
                raise ValueError(
                    f"trainer.accelerator is {accelerator!r}, Apple's MPS, which has no float64 for times and metrics; "
                    "use --trainer.accelerator cpu"
                )
            logger.warning("running on the CPU: Apple's MPS has no float64 for times and metrics")
            kwargs["accelerator"] = "cpu"
        elif options.trainer.precision is None and not options.trainer.plugins and computes_in_bf16(accelerator):
            kwargs["precision"] = "bf16-mixed"
        if options.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(TQDMProgressBar(refresh_rate=20))  # a step takes milliseconds
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        self._load_weights_only("fit")
        output = Path(self.config_init["fit"].output)
        for name, folder in getattr(self.datamodule, "parents", {}).items():
            if output.resolve() == Path(folder).resolve():  # its manifest would be lost, and a refit's epochs with it
                raise ValueError(f"{output} is the {name} of this fit and would be overwritten; name another --output")
        epochs = getattr(self.datamodule, "epochs", None)
        if epochs is not None:  # selected before: train so long, and keep the last weights
            self.trainer.fit_loop.max_epochs = epochs
            for stopping in self.trainer.early_stopping_callbacks:
                stopping.patience = epochs + 1
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    callback.monitor = None
        self._refuse_a_fit_without_a_best()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    def _refuse_a_fit_without_a_best(self) -> None:
        """A fit that takes no step, or never measures what best.ckpt is chosen by, would end without one."""
        trainer = self.trainer
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(trainer, name) == 0:
                raise ValueError(f"trainer.{name} is 0, so the fit would take no step; set it above 0")
        every, epochs, unmeasured = trainer.check_val_every_n_epoch, trainer.max_epochs, None
        if trainer.limit_val_batches == 0:
            unmeasured = "trainer.limit_val_batches is 0"
        elif every is not None and epochs is not None and 0 < epochs < every:
            unmeasured = f"trainer.check_val_every_n_epoch is {every} in a fit of {epochs} epochs"
        if unmeasured is None:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith("val/"):
                raise ValueError(
                    f"{unmeasured}, so {callback.monitor}, by which best.ckpt is chosen, would not be measured; let it "
                    "validate, or keep the last weights with --checkpoint.monitor null"
                )
        for stopping in trainer.early_stopping_callbacks:
            stopping.strict = stopping.strict and not stopping.monitor.startswith("val/")  # else it stops the fit

    def before_validate(self) -> None:
        self._measure_the_best("validate")

    def before_test(self) -> None:
        if not is_overridden("test_step", self.model):
            raise ValueError(
                f"a {type(self.model).__name__} is not tested alone but beside its retriever; run: recsys evaluate"
            )
        self._measure_the_best("test")

    def _measure_the_best(self, verb: str) -> None:
        self._load_weights_only(verb)
        options = self.config_init[verb]
        if options.ckpt_path is None:
            options.ckpt_path = str(Path(options.output) / BEST)
        if not Path(options.ckpt_path).is_file():
            raise FileNotFoundError(f"{options.ckpt_path} does not exist; run recsys fit first, or name a --ckpt_path")
        load_checkpoint(options.ckpt_path, RESUME)  # says what is wrong with it, where torch would only fail

    def _load_weights_only(self, verb: str) -> None:
        """Never unpickles code from a checkpoint, unless told to."""
        if self.config_init[verb].weights_only is None:
            self.config_init[verb].weights_only = True


def computes_in_bf16(accelerator: Any) -> bool:
    """Whether a trainer with this accelerator runs on CUDA GPUs that compute in bfloat16 natively, without emulation.

    Args:
        accelerator: value of --trainer.accelerator.
    """
    cuda = accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
    return cuda and torch.cuda.is_bf16_supported(including_emulation=False)


CALLBACKS = (ReseedEveryStep, RequireFinite, MeasureTheEnd, OwnFiles, WriteManifest, StayStopped, NextEpoch)
IGNORED = (
    ".*exists and is not empty",  # log/ is there before the first checkpoint
    ".*LeafSpec.* is deprecated",  # Lightning 2.6's use of torch
    ".*smaller than the logging interval",  # what is logged is logged once an epoch
    ".*GPU available but not used",  # where another accelerator was chosen
    ".*args parameter is intended to run from within Python",  # as it does where options are given
)


def train(verb: str, options: list[str] | None = None) -> None:
    """Runs a verb of Lightning's.

    Args:
        verb: fit, validate or test.
        options: what would stand after it on the command line; None: the command line itself, whose errors end the
            process.
    """
    with warnings.catch_warnings():
        for message in IGNORED:
            warnings.filterwarnings("ignore", message)
        try:
            RecsysCLI(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,  # the optimiser is part of the model's own config
                seed_everything_default=0,
                trainer_defaults={
                    "callbacks": [callback() for callback in CALLBACKS],
                    "num_sanity_val_steps": 0,
                },
                save_config_callback=SaveConfigCallback if verb == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_kwargs={} if options is None else {"exit_on_error": False, verb: {"exit_on_error": False}},
                args=None if options is None else [verb, *options],
            )
        except SIGTERMException:  # whose exit status is 0, as if the fit had come to its end
            sys.exit(f"recsys {verb}: ended by SIGTERM; a fit goes on with --ckpt_path OUTPUT/last.ckpt")
