"""One trial of `recsys tune`: a fit with sampled options in this process, and the parser that checks the options."""

import gc
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from recsys2stage.artifacts import fingerprint
from recsys2stage.cli.callbacks import LAST
from recsys2stage.cli.fit_checks import check_monitors
from recsys2stage.cli.messages import UsageError, shown
from recsys2stage.cli.parser import explained
from recsys2stage.cli.quiet import quiet
from recsys2stage.cli.training import IGNORED, RecsysCLI, TrainingParser, train
from recsys2stage.cli.tune_ranges import Range, write_overlay
from recsys2stage.columns import MANIFEST
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.retrieval.histories import Histories

Report = Callable[[int, float], None]  # epoch, from 0, and value of the metric
OWN = ("output", "ckpt_path", "trainer.enable_progress_bar")  # options of a trial that the command sets
PREPARED: dict[type, str] = {Histories: "prepare-data", Candidates: "mine-negatives"}


class ParsedFit(RecsysCLI):
    """The parsed options of a fit, which is not run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}

    def _set_seed(self) -> None:
        """Leaves the random state of this process as it is."""

    def instantiate_classes(self) -> None:
        """Builds nothing: the options are checked, the data are not read."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def parse_fit(options: Sequence[str]) -> Namespace:
    """The options of `recsys fit` from configs, words and defaults.

    Args:
        options: the words after `recsys fit`.

    Raises:
        UsageError: an option or a value that the parser refuses.
        ValueError: an option of the trainer that cannot work.
    """
    with warnings.catch_warnings(), explained():
        for message in IGNORED:
            warnings.filterwarnings("ignore", message)
        parsed = ParsedFit(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=TrainingParser,
            args=["fit", *options],
        )
    return parsed.config["fit"]


class ReportMetric(Callback):
    """Reports the metric after each validation of a fit.

    Args:
        metric: name of the metric.
        report: receives the epoch, from 0, and the value; what it raises ends the fit.
    """

    def __init__(self, metric: str, report: Report) -> None:
        self.metric, self.report = metric, report

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = float(trainer.callback_metrics.get(self.metric, math.nan))
        if trainer.state.fn == "fit" and math.isfinite(value):
            self.report(trainer.current_epoch, value)


def run_trial(options: Sequence[str], folder: Path, metric: str, report: Report) -> None:
    """Fits with the options of a trial; resumes from its last.ckpt if it was interrupted.

    Args:
        options: the words after `recsys fit`, without --output.
        folder: folder of the trial.
        metric: name of the metric.
        report: as of `ReportMetric`.
    """
    words = [*options, "--output", str(folder), "--trainer.enable_progress_bar=false"]
    if (folder / LAST).is_file():
        words += ["--ckpt_path", str(folder / LAST)]
    try:
        with quiet(bool(os.environ.get("RECSYS_DEBUG"))):
            train("fit", words, [ReportMetric(metric, report)])
    finally:
        gc.collect()  # the model and its trainer refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_ranges(
    configs: Sequence[Path], ranges: Mapping[str, Range], trial_options: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Namespace:
    """Parses the fit at both ends of all ranges, and with each of their choices; returns the first of these parses.

    Args:
        configs: configs of the fit.
        ranges: dotted option -> its range.
        trial_options: dotted option -> value in all trials.
        fixed: what the command itself sets, likewise.

    Raises:
        UsageError: an option or a value that a fit refuses.
        ValueError: an option that is given twice, or that the command sets; data that are not prepared.
    """
    for name in (*ranges, *trial_options):
        if name in (*fixed, *OWN):
            raise ValueError(f"{name} is set by recsys tune for each trial, expected other options; leave it out")
        if name in ranges and name in trial_options:
            raise ValueError(f"{name} is in ranges and in trial_options, expected in one; remove it from the other")
    ends = {name: one.ends() for name, one in ranges.items()}
    parses = []
    with tempfile.TemporaryDirectory(prefix="recsys-") as folder:
        file = Path(folder) / "ranges.yaml"
        for number in range(max(map(len, ends.values()))):
            sampled = {name: values[min(number, len(values) - 1)] for name, values in ends.items()}
            write_overlay(file, {**trial_options, **fixed, **sampled}, "One end of each range.")
            try:
                parses.append(parse_fit([*config_words([*configs, file]), "--output", "trial"]))
            except UsageError as error:
                text, place = str(error), f"{file}: "
                given = [name for name in trial_options if text.startswith(f"{place}{name}")]
                raise UsageError(text.replace(place, "trial_options: " if given else "ranges: ")) from error
    _check_devices(parses[0].trainer.devices)
    model, data = (_class(parses[0][part].class_path) for part in ("model", "data"))
    check_monitors([fixed["checkpoint.monitor"]], model)
    path = parses[0].data.init_args.get("path")
    if data in PREPARED and not (Path(path) / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{path}/{MANIFEST} does not exist, expected the data of the fit; run recsys {PREPARED[data]} first"
        )
    return parses[0]


def config_words(configs: Sequence[Path]) -> list[str]:
    """Configs as words of a command line."""
    return [word for config in configs for word in ("--config", str(config))]


def _class(path: str) -> Any:
    """The class of a dotted path in a parsed config, whose module the parser has imported."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _check_devices(devices: Any) -> None:
    """Raises a ValueError unless a fit runs on one device."""
    one = devices in ("auto", 1, "1") or (isinstance(devices, list) and len(devices) == 1)
    if not one and not re.fullmatch(r"\d+,", str(devices)):
        raise ValueError(
            f"trainer.devices is {shown(devices)}, expected one device for each trial; set it to 1 in trial_options, "
            "and start recsys tune once for each device, with CUDA_VISIBLE_DEVICES"
        )


def identity(parsed: Namespace, ranges: Mapping[str, Range], metric: str, mode: str) -> dict[str, Any]:
    """What must stay the same in a study, so that its trials can be compared.

    Args:
        parsed: options of the fit, from `check_ranges`.
        ranges: dotted option -> its range.
        metric: what is optimized.
        mode: max or min.
    """
    flat = {name: str(value) for name, value in vars(parsed.as_flat()).items()}
    kept = {
        name: value
        for name, value in flat.items()
        if name not in OWN and not name.startswith((*ranges, "config", "checkpoint.dirpath", "last.dirpath"))
    }
    return {
        "options": kept,
        "ranges": {name: asdict(one) for name, one in ranges.items()},
        "metric": metric,
        "mode": mode,
        "data": fingerprint(str(parsed.data.init_args.get("path"))),
    }
