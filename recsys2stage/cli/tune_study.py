"""The study of `recsys tune`: an Optuna study in SQLite, whose trials several processes claim, resume and end."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys2stage.artifacts import make_folder
from recsys2stage.cli.messages import shown
from recsys2stage.cli.tune_ranges import Range
from recsys2stage.columns import MANIFEST
from recsys2stage.data.hashing import splitmix64
from recsys2stage.data.locks import locked

if TYPE_CHECKING:  # an extra, and slow to import
    import optuna

DATABASE, NAME = "tune.sqlite", "recsys-tune"
PATIENCE = 120.0  # seconds to wait for another process to choose or end a trial, which takes much less
MOST_STARTS = 3  # of a trial whose process was killed each time, for lack of memory perhaps
BEST, ERROR, STARTS, SECONDS = "best", "error", "starts", "seconds"  # attributes of a trial
CHECKPOINTS = ("best.ckpt", "last.ckpt", MANIFEST)  # of a trial that is not the best; its log and options stay


@dataclass
class Study:
    """The trials of one output folder, in as many processes as are started.

    Args:
        output: folder of the study.
        ranges: dotted option -> its range.
        metric: what is optimized.
        mode: max or min.
        trials: number of trials of the whole study.
        sampler: tpe or random.
        pruner: median or none.
        startup: trials that are sampled at random, and that end before any is pruned.
        warmup: epochs of each trial before it may be pruned.
        seed: of the sampler.
        identity: what must stay the same for trials to be comparable.
    """

    output: Path
    ranges: Mapping[str, Range]
    metric: str
    mode: str
    trials: int
    sampler: str
    pruner: str
    startup: int
    warmup: int
    seed: int
    identity: dict[str, Any]
    study: "optuna.Study" = field(init=False)

    def __post_init__(self) -> None:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        make_folder(self.output)
        path = (self.output / DATABASE).absolute()
        with self.alone():
            try:
                storage = optuna.storages.RDBStorage(
                    f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": PATIENCE}}
                )
                self.study = optuna.create_study(
                    storage=storage,
                    study_name=NAME,
                    direction="maximize" if self.mode == "max" else "minimize",
                    load_if_exists=True,
                    pruner=self._pruner(),
                )
            except (SQLAlchemyError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{path} cannot be read as a study of recsys tune ({reason}), expected one, or none; choose "
                    "another --output"
                ) from error
            self._check_same()

    def _check_same(self) -> None:
        """Raises a ValueError if the study was begun with other options."""
        before, now = self.study.user_attrs, json.loads(json.dumps(self.identity, default=str))
        for name, value in now.items():
            if name in before and before[name] != value:
                raise ValueError(
                    f"{self.output} holds a study with other {name} ({_difference(before[name], value)}), expected the "
                    "same, as trials would not be comparable; choose another --output, or remove it"
                )
            self.study.set_user_attr(name, value)

    def _sampler(self, number: int) -> "optuna.samplers.BaseSampler":
        """A sampler for one trial: by its number, so that neither a kill nor other processes repeat samples."""
        import optuna

        seed = int(splitmix64(np.array([number]), self.seed)[0]) % 2**32
        if self.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(n_startup_trials=self.startup, seed=seed, constant_liar=True)

    def _pruner(self) -> "optuna.pruners.BasePruner":
        import optuna

        if self.pruner == "none":
            return optuna.pruners.NopPruner()
        return optuna.pruners.MedianPruner(n_startup_trials=self.startup, n_warmup_steps=self.warmup)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock of the study, for the moments in which a process chooses or ends a trial, or reports."""
        end = time.monotonic() + PATIENCE
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(locked(self.output / "study"))
                    break
                except ValueError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.1)
            yield

    def folder(self, number: int) -> Path:
        return self.output / f"trial-{number:04}"

    def frozen(self, *states: str) -> list["optuna.trial.FrozenTrial"]:
        """The trials in these states (COMPLETE, PRUNED, FAIL, RUNNING); all without any."""
        import optuna

        return self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState[name] for name in states] or None)

    def claim(self, stack: ExitStack, ask: bool) -> "optuna.Trial | None":
        """The next trial of this process: one whose process has ended, or a new one; None if all are taken.

        Args:
            stack: holds the lock of the trial.
            ask: False: take no new trial.
        """
        import optuna

        with self.alone():
            for frozen in self.frozen("RUNNING"):
                try:
                    stack.enter_context(locked(self.folder(frozen.number) / "trial"))
                except ValueError:  # of a living process
                    continue
                trial = optuna.Trial(self.study, frozen._trial_id)
                starts = frozen.user_attrs.get(STARTS, 1)
                if starts < MOST_STARTS:
                    trial.set_user_attr(STARTS, starts + 1)
                    return trial
                self._end(trial, f"its process ended {starts} times before the fit did; it may need more memory")
                stack.close()
            if not ask or len(self.frozen()) >= self.trials:
                return None
            self.study.sampler = self._sampler(len(self.frozen()))
            trial = self.study.ask({name: one.distribution() for name, one in self.ranges.items()})
            stack.enter_context(locked(self.folder(trial.number) / "trial"))
            trial.set_user_attr(STARTS, 1)
            return trial

    def options(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Dotted option -> value of a trial."""
        return {name: one.value(params[name]) for name, one in self.ranges.items()}

    def report(self, trial: "optuna.Trial", epoch: int, value: float) -> None:
        """Records a validation of a trial.

        Raises:
            optuna.TrialPruned: if the trial is worse than the median of the others.
        """
        import optuna

        best = trial.user_attrs.get(BEST)
        if best is None or (value > best["value"] if self.mode == "max" else value < best["value"]):
            trial.set_user_attr(BEST, {"value": value, "epoch": epoch + 1})
        if epoch in self.frozen()[trial.number].intermediate_values:  # validated twice, or the fit was interrupted
            return
        trial.report(value, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned

    def finish(
        self, trial: "optuna.Trial", seconds: float, error: str | None, pruned: bool, keep: str
    ) -> "optuna.trial.FrozenTrial":
        """Records the end of a trial, and removes the checkpoints that are not kept.

        Args:
            trial: the trial.
            seconds: of this process.
            error: why it failed; None: it did not.
            pruned: whether it was pruned.
            keep: best or all.
        """
        with self.alone():
            trial.set_user_attr(SECONDS, round(trial.user_attrs.get(SECONDS, 0.0) + seconds, 1))
            best = trial.user_attrs.get(BEST)
            if error is None and not pruned and best is None:
                error = f"{self.metric} was not logged, expected it after each validation"
            self._end(trial, error, pruned)
            for frozen in self.frozen("COMPLETE", "PRUNED", "FAIL") if keep == "best" else ():
                if not (self.best is not None and frozen.number == self.best.number):
                    for name in CHECKPOINTS:
                        (self.folder(frozen.number) / name).unlink(missing_ok=True)
            return self.frozen()[trial.number]

    def _end(self, trial: "optuna.Trial", error: str | None, pruned: bool = False) -> None:
        from optuna.trial import TrialState

        if error is not None:
            trial.set_user_attr(ERROR, error)
            self.study.tell(trial, state=TrialState.FAIL)
        elif pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, trial.user_attrs[BEST]["value"])

    @property
    def best(self) -> "optuna.trial.FrozenTrial | None":
        """The best complete trial."""
        complete = self.frozen("COMPLETE")
        sign = 1 if self.mode == "max" else -1
        return max(complete, key=lambda trial: (sign * (trial.value or 0.0), -trial.number), default=None)


def _difference(before: Any, now: Any) -> str:
    """What differs, on one line."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        first = names[0]
        return f"{first}: {shown(before.get(first))} there, {shown(now.get(first))} here"
    return f"{shown(before)} there, {shown(now)} here"
