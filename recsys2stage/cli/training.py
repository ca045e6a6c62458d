"""The commands fit, validate and test: LightningCLI for any LightningModule and LightningDataModule of a config."""

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden

from recsys2stage.artifacts import read_manifest
from recsys2stage.checkpoints import OPTIONS, check_selected, load_checkpoint, trained_until
from recsys2stage.cli.callbacks import (
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
from recsys2stage.cli.checkpoint_checks import (
    CHOSEN,
    FROM_DATA,
    check_model,
    check_same_data,
    check_same_options,
    check_weights,
)
from recsys2stage.cli.fit_checks import check_monitors, check_options, check_output
from recsys2stage.cli.messages import INTERRUPTED, first_sentences
from recsys2stage.cli.parser import ClearErrors, check_accepted, explained
from recsys2stage.cli.progress import FitLines, quiet_lightning
from recsys2stage.cli.refit import check_same_config, prepare_refit
from recsys2stage.columns import MANIFEST
from recsys2stage.data.locks import locked
from recsys2stage.data.summary import on_terminal
from recsys2stage.options import Part, check_untrained
from recsys2stage.ranking import scorers  # noqa: F401
from recsys2stage.ranking.candidates import Candidates  # noqa: F401
from recsys2stage.ranking.ranker import Ranker

# short class names in YAML resolve once their module is imported
from recsys2stage.retrieval import encoders, inputs, losses, objectives, users  # noqa: F401
from recsys2stage.retrieval.encoders import positions, times  # noqa: F401
from recsys2stage.retrieval.histories import BEST, Histories  # noqa: F401  # Histories: short class names resolve once it is imported
from recsys2stage.retrieval.retriever import Retriever  # noqa: F401
from recsys2stage.trust import Trust, arguments, trusting

RESUME = "recsys fit, without --ckpt_path"
NO_FIGURES: dict[Part, str] = {
    "val": "validate the run that it was refitted from",
    "test": "test a refit until the test targets",
}

logger = logging.getLogger("recsys2stage")


class TrainingParser(ClearErrors, LightningArgumentParser):
    """Lightning's parser, with errors of one sentence."""


class RecsysCLI(LightningCLI):
    """LightningCLI with the defaults, links and checks of this package.

    A fit writes best.ckpt (by checkpoint.monitor), last.ckpt, log/ and, when it is complete, manifest.json to the
    folder `output`.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=Path, required=True, help="Folder of this run's checkpoints and logs.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(KeepLast, "last")  # after `checkpoint`, as it holds the best score
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
            help="Modules outside this package from which the checkpoint of --ckpt_path may load classes.",
        )
        for name in ("checkpoint", "last"):
            parser.link_arguments("output", f"{name}.dirpath", compute_fn=str)
        # from the data module to the model; skipped for models without such an argument
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        check_accepted(parser)
        verb = str(self.config.subcommand)
        check_options(verb, self.config[verb])

    def _parse_ckpt_path(self) -> None:
        """Takes the hyperparameters of the checkpoint, as Lightning does, but checks their classes first."""
        options = self.config.get(self.config.get("subcommand") or "")
        if options is None or not options.get("ckpt_path") or not Path(options.ckpt_path).is_file():
            return
        module, _, name = options.model.class_path.rpartition(".")  # of the config: already imported
        model_class = getattr(import_module(module), name)
        checkpoint = load_checkpoint(options.ckpt_path, RESUME)
        check_model(checkpoint, model_class, options.ckpt_path)
        stored = {
            name: value for name, value in checkpoint[OPTIONS].items() if name in signature(model_class).parameters
        }
        stored.pop("optimizer", None)  # the class comes from the config, the state from the checkpoint
        if self.config.subcommand == "fit":
            check_same_options(options.model.init_args, stored, options.ckpt_path)
            stored.pop(CHOSEN, None)  # else the rest of the fit would train with it
        with trusting(options.trust):
            arguments(model_class, stored, options.ckpt_path)
        model = {"class_path": options.model.class_path, "dict_kwargs": stored}
        self.config = self.parser.parse_object({self.config.subcommand: {"model": model}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config[str(self.subcommand)]
        given = self.config_init[str(self.subcommand)].trainer.logger
        loggers = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
        if given in (None, True) or (loggers and not any(isinstance(one, CSVLogger) for one in loggers)):
            kwargs["logger"] = [CSVLogger(options.output, name="log"), *loggers]  # the figures of a report read it
        if options.trainer.default_root_dir is None:
            kwargs["default_root_dir"] = options.output  # for config.yaml if there is no logger
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
        bar = options.trainer.enable_progress_bar
        enabled = bar is not False
        if bar is None:
            bar = kwargs["enable_progress_bar"] = on_terminal()
        self.trainer_defaults["callbacks"].append(FitLines(str(self.subcommand), bar, enabled))  # before the bar's line
        if bar:
            self.trainer_defaults["callbacks"].append(TQDMProgressBar(refresh_rate=20))  # a step takes milliseconds
        if options.trainer.enable_model_summary is None:
            kwargs["enable_model_summary"] = False  # FitLines prints the number of parameters
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """Holds the lock of the output folder during a fit; only the first process of a fit takes it."""
        writes = subcommand == "fit" and self.trainer.is_global_zero
        with locked(self.config_init["fit"].output) if writes else nullcontext():
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        self._load_weights_only("fit")
        output = Path(self.config_init["fit"].output)
        for name, folder in getattr(self.datamodule, "parents", {}).items():
            parent = Path(folder).parent if name == "selected" and not Path(folder).is_dir() else Path(folder)
            if output.resolve() == parent.resolve():  # would lose its manifest, with the epochs for a refit
                raise ValueError(
                    f"{output} is the {name} of this fit and would be overwritten; choose another --output"
                )
        prepare_refit(self.trainer, self.model, self.datamodule, self.config["fit"].model.init_args)
        if getattr(self.datamodule, "epochs", None) is not None:
            check_same_config(self.config["fit"], Path(self.datamodule.refit))
        if (ckpt_path := self.config_init["fit"].ckpt_path) is not None and Path(ckpt_path).is_file():
            check_same_data(self.model, load_checkpoint(ckpt_path, RESUME)[OPTIONS], ckpt_path)
        check_output(output, self.model)
        self._check_best_is_selectable()
        self._check_monitors()
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpoints()

    def _check_best_is_selectable(self) -> None:
        """Raises for a fit without steps, or without the validation metric that selects best.ckpt."""
        trainer = self.trainer
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside Trainer.__init__
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
                    f"{unmeasured}, so {callback.monitor}, which selects best.ckpt, would not be logged; enable "
                    "validation, or keep the last weights with --checkpoint.monitor null"
                )
        for stopping in trainer.early_stopping_callbacks:
            stopping.strict = stopping.strict and not stopping.monitor.startswith("val/")  # else it raises

    def _check_monitors(self) -> None:
        stopping = [callback.monitor for callback in self.trainer.early_stopping_callbacks]
        saving = [one.monitor for one in self.trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        check_monitors([name for name in (*saving, *stopping) if name is not None], type(self.model))

    def before_validate(self) -> None:
        self._use_best_checkpoint("validate")

    def before_test(self) -> None:
        if not is_overridden("test_step", self.model):
            raise ValueError(
                f"a {type(self.model).__name__} is only tested together with its retriever; run: recsys evaluate"
            )
        self._use_best_checkpoint("test")

    def _use_best_checkpoint(self, verb: str) -> None:
        self._load_weights_only(verb)
        options = self.config_init[verb]
        if options.ckpt_path is None:
            options.ckpt_path = str(Path(options.output) / BEST)
        if not Path(options.ckpt_path).is_file():
            raise FileNotFoundError(
                f"{options.ckpt_path} does not exist; run recsys fit first, or give another --ckpt_path"
            )
        checkpoint = load_checkpoint(options.ckpt_path, RESUME)  # raises clearer errors than torch
        check_model(checkpoint, type(self.model), options.ckpt_path)
        part: Part = "val" if verb == "validate" else "test"
        check_untrained(options.ckpt_path, trained_until(checkpoint, options.ckpt_path), part, NO_FIGURES[part])
        folder = Path(options.ckpt_path).parent
        if isinstance(self.model, Ranker) and (folder / MANIFEST).is_file():  # a fit that was ended has none
            manifest = read_manifest(folder, type(self.model).__name__.lower(), f"recsys fit --output {folder}")
            check_selected(options.ckpt_path, manifest, NO_FIGURES["val"])
        check_weights(self.model, checkpoint, self.config[verb].model.init_args, options.ckpt_path)

    def _load_weights_only(self, verb: str) -> None:
        """Unpickles no code from a checkpoint, unless weights_only is set to false."""
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
    ".*exists and is not empty",  # log/ is written before the first checkpoint
    ".*LeafSpec.* is deprecated",  # Lightning 2.6's use of torch
    ".*smaller than the logging interval",  # metrics are logged once per epoch
    ".*does not have many workers",  # batches are gathers, workers would only copy them
    ".*GPU available but not used",  # another accelerator was chosen
    ".*args parameter is intended to run from within Python",  # as with `options` below
)


def train(verb: str, options: list[str] | None = None, callbacks: Sequence[Callback] = ()) -> None:
    """Runs fit, validate or test.

    Args:
        verb: fit, validate or test.
        options: its command-line options; None: those of sys.argv.
        callbacks: more callbacks of the trainer.

    Raises:
        UsageError: for options or configs that cannot be parsed.
    """

    class OneVerb(RecsysCLI):
        """With the parser of one verb, as that of each takes a while to build."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {verb: LightningCLI.subcommands()[verb]}

    with warnings.catch_warnings(), explained(), quiet_lightning():
        for message in IGNORED:
            warnings.filterwarnings("ignore", message)
        try:
            OneVerb(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,  # the optimizer is part of the model's config
                seed_everything_default=0,
                trainer_defaults={
                    "callbacks": [*(callback() for callback in CALLBACKS), *callbacks],
                    "num_sanity_val_steps": 0,
                },
                save_config_callback=SaveConfigCallback if verb == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_class=TrainingParser,
                args=None if options is None else [verb, *options],
            )
        except MisconfigurationException as error:
            raise ValueError(f"{first_sentences(str(error))}; see: recsys {verb} --help") from error
        except SIGTERMException:  # its exit status would be 0, as after a complete fit
            sys.exit(f"recsys {verb}: ended by SIGTERM; resume a fit with --ckpt_path OUTPUT/last.ckpt")
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # Lightning ends with 1, as after an error
                if options is not None:
                    raise KeyboardInterrupt from None
                raise SystemExit(INTERRUPTED) from None
            raise
