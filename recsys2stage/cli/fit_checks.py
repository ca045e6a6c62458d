"""Checks of the options of fit, validate and test that Lightning would refuse late, with a traceback, or not at all."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from recsys2stage.artifacts import MADE_BY, read_json, with_article
from recsys2stage.cli.messages import shown, unknown
from recsys2stage.columns import MANIFEST
from recsys2stage.metrics import KS
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval.retriever import Retriever

LEAST = {  # option -> least value, and whether -1 means without a limit
    "trainer.max_epochs": (1, True),
    "trainer.max_steps": (1, True),
    "trainer.num_nodes": (1, False),
    "trainer.accumulate_grad_batches": (1, False),
    "trainer.check_val_every_n_epoch": (1, False),
    "trainer.gradient_clip_val": (0, False),
    "trainer.log_every_n_steps": (1, False),
    "early_stopping.patience": (0, False),
    "last.every_n_train_steps": (1, False),
}
SHARES = ("train", "val", "test")
MODES = ("min", "max")
LARGEST_SEED = 2**32 - 1
OF_A_RUN = ("last", "best", "hpc")  # words of Lightning for a checkpoint


def check_options(verb: str, options: Any) -> None:
    """Raises a ValueError for options of the trainer and its callbacks that cannot work.

    Args:
        verb: fit, validate or test.
        options: the parsed options of this verb.
    """
    step = f"see: recsys {verb} --help"
    for name, (least, unlimited) in LEAST.items():
        value = options.get(name)
        if value is None or isinstance(value, bool) or value >= least or (unlimited and value == -1):
            continue
        if unlimited and value == 0:  # a fit without steps is refused as such
            continue
        other = ", or -1 for no limit" if unlimited else ""
        raise ValueError(f"{name} is {value}, expected at least {least}{other}; set --{name}, or {step}")
    for part in SHARES:
        name, value = f"trainer.limit_{part}_batches", options.get(f"trainer.limit_{part}_batches")
        if isinstance(value, float | int) and (value < 0 or (value > 1 and value % 1)):
            raise ValueError(
                f"{name} is {value}, expected a whole number of batches, or a share from 0.0 to 1.0; set --{name}, or "
                f"{step}"
            )
    for name in ("early_stopping.mode", "checkpoint.mode"):
        if (value := options.get(name)) not in MODES:
            raise ValueError(unknown(f"{name} is {value!r}", str(value), MODES, step))
    seed = options.get("seed_everything")
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(
            f"seed_everything is {seed}, expected a whole number from 0 to {LARGEST_SEED}; set --seed_everything 0"
        )
    _check_devices(options, step)
    _check_checkpoint(options.get("ckpt_path"), verb)


def _check_devices(options: Any, step: str) -> None:
    devices = options.get("trainer.devices")
    numbers = re.fullmatch(r"auto|-1|[1-9]\d*|\d+(,\s*\d+)+,?|\d+,", str(devices))
    if not isinstance(devices, list) and numbers is None:
        raise ValueError(
            f"trainer.devices is {shown(devices)}, expected auto, -1 for all, a number from 1 on, or a list such as "
            f"[0, 1]; set --trainer.devices, or {step}"
        )
    for name, registry, more in (
        ("accelerator", AcceleratorRegistry.available_accelerators(), ("auto", "gpu")),
        ("strategy", StrategyRegistry.available_strategies(), ("auto",)),
    ):
        value, names = options.get(f"trainer.{name}"), sorted([*registry, *more])
        if isinstance(value, str) and value not in names:
            raise ValueError(unknown(f"trainer.{name} is {value!r}", value, names, step))


def _check_checkpoint(path: Any, verb: str) -> None:
    """Raises for a checkpoint that is not there; Lightning would look for it after it has read the data."""
    if path is None or str(path) in OF_A_RUN or str(path).startswith("registry") or Path(path).is_file():
        return
    what = "is a folder" if Path(path).is_dir() else "does not exist"
    other = "leave it out to start from scratch" if verb == "fit" else "leave it out for OUTPUT/best.ckpt"
    raise ValueError(
        f"--ckpt_path {path} {what}, expected a checkpoint of a fit, such as OUTPUT/last.ckpt; give its path, or "
        f"{other}"
    )


def check_output(output: Path, model: LightningModule) -> None:
    """Raises a ValueError if the output folder of a fit is a file or holds another artifact, which it would damage."""
    file = next((path for path in (output, *output.parents) if path.is_file()), None)
    if file is not None:
        raise ValueError(f"--output {output}: {file} is a file, expected a folder; choose another --output")
    manifest, kind = output / MANIFEST, type(model).__name__.lower()
    if not manifest.is_file():
        return
    held = read_json(manifest, dict, "choose another --output").get("kind")
    if held in MADE_BY and held != kind:
        raise ValueError(
            f"--output {output} holds {with_article(held)}, which would be lost, expected a new folder or that of a "
            f"{kind}; choose another --output"
        )


def check_monitors(names: Iterable[str], model: type[LightningModule]) -> None:
    """Raises a ValueError for a metric that neither retrievers nor rankers log, before the first epoch.

    Args:
        names: metrics that select the best checkpoint or stop the fit.
        model: class of the model of the fit.
    """
    if not issubclass(model, Retriever | Ranker):
        return
    prefixes = ("val/", "val/retriever_", "val/masked_") if issubclass(model, Ranker) else ("val/",)
    metrics = [*(f"{name}@{k}" for name in ("hr", "ndcg") for k in KS), "mrr"]
    known = [f"{prefix}{name}" for prefix in prefixes for name in metrics]
    for name in names:
        if name.startswith("val/") and name not in known:
            raise ValueError(
                unknown(
                    f"the metric {name!r} is not logged by a {model.__name__}",
                    name,
                    known,
                    "set --checkpoint.monitor and --early_stopping.monitor",
                )
            )
