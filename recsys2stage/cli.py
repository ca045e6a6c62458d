"""recsys: from a raw log of events to ranked, measured recommendations.

fit, validate and test are Lightning's verbs; the others carry data from stage to stage. Each takes --config FILE,
--print_config and dotted overrides such as --trainer.max_epochs 3.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

# short class names in YAML resolve once their module is imported
from recsys2stage import encoders, losses, mining, objectives, positions, scorers, sources, split, times  # noqa: F401
from recsys2stage.callbacks import ReseedEveryStep, SignFit
from recsys2stage.commands import COMMANDS
from recsys2stage.data import Candidates, Histories  # noqa: F401
from recsys2stage.ranker import Ranker  # noqa: F401
from recsys2stage.retriever import Retriever  # noqa: F401


class RecsysCLI(LightningCLI):
    """Trains whatever LightningModule the config names on whatever LightningDataModule it names.

    The folder `output` receives best.ckpt (by checkpoint.monitor), last.ckpt, log/ and, when the fit has come to its
    end, manifest.json.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=Path, required=True, help="Folder of this run's checkpoints and logs.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/ndcg@10",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
                "early_stopping.monitor": "val/ndcg@10",
                "early_stopping.mode": "max",
                "early_stopping.patience": 5,
            }
        )
        parser.link_arguments("output", "checkpoint.dirpath", compute_fn=str)
        # the data knows, the model asks; what a model has no argument for is not passed
        for name in ("num_items", "max_length", "request_time", "vector_dim", "features"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config[str(self.subcommand)]
        if options.trainer.logger is None:
            kwargs["logger"] = CSVLogger(options.output, name="log")
        if options.trainer.precision is None and torch.cuda.is_available():
            kwargs["precision"] = "bf16-mixed"
        return super().instantiate_trainer(**kwargs)

    def before_validate(self) -> None:
        self._measure_the_best("validate")

    def before_test(self) -> None:
        self._measure_the_best("test")

    def _measure_the_best(self, verb: str) -> None:
        options = self.config_init[verb]
        if options.ckpt_path is None:
            options.ckpt_path = str(Path(options.output) / "best.ckpt")
        if not Path(options.ckpt_path).is_file():
            raise FileNotFoundError(f"{options.ckpt_path} does not exist; run recsys fit first, or name a --ckpt_path")


def train(verb: str) -> None:
    warnings.filterwarnings("ignore", ".*exists and is not empty")  # log/ is there before the first checkpoint
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning 2.6's use of torch
    RecsysCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # the optimiser is part of the model's own config
        seed_everything_default=0,
        trainer_defaults={"callbacks": [ReseedEveryStep(), SignFit()], "num_sanity_val_steps": 0},
        save_config_callback=SaveConfigCallback if verb == "fit" else None,
    )


def fit() -> None:
    """Train a retriever or a ranker."""
    train("fit")


def validate() -> None:
    """Measure a checkpoint on the validation targets."""
    train("validate")


def test() -> None:
    """Measure a retriever on the test targets; a ranker is tested beside its retriever by `evaluate`."""
    train("test")


TRAINING: dict[str, Callable[..., Any]] = {"fit": fit, "validate": validate, "test": test}


def main() -> None:
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    step_out_of_configs(sys.argv)
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    try:
        if verb in TRAINING:
            TRAINING[verb]()
        else:
            auto_cli(TRAINING | COMMANDS, as_positional=False, prog="recsys", description=__doc__)
    except (ValueError, FileNotFoundError, OSError) as error:  # what a user can cause; RECSYS_DEBUG=1 shows where
        if os.environ.get("RECSYS_DEBUG"):
            raise
        sys.exit(f"recsys {verb}: {error}")


def step_out_of_configs(argv: list[str]) -> None:
    """Inside `configs/`, works from the folder that holds it, where the configs' own paths start.

    So `recsys fit --config retriever.yaml` means the same in `configs/ml-1m/` as its full name does outside.
    """
    here = Path.cwd()
    root = next((folder.parent for folder in (here, *here.parents) if folder.name == "configs"), None)
    if root is None:
        return
    for place, word in enumerate(argv[1:], start=1):
        option, equals, value = word.rpartition("=")
        if value and not value.startswith("-") and (here / value).exists():
            argv[place] = f"{option}{equals}{here / value}"
    os.chdir(root)
    print(f"recsys: working from {root}", file=sys.stderr)


if __name__ == "__main__":
    main()
