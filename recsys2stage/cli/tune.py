"""The command tune: fits with sampled options, and the best of them by validation."""

import shlex
import sys
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recsys2stage.artifacts import RUN
from recsys2stage.cli.messages import INTERRUPTED, capital, debugging, first_sentences, plain_message
from recsys2stage.cli.tune_ranges import Range, write_overlay
from recsys2stage.data.summary import print_summary
from recsys2stage.options import check_integer, check_number, check_option, check_seed

if TYPE_CHECKING:  # an extra, and slow to import
    import optuna

    from recsys2stage.cli.tune_study import Study

Mode = Literal["max", "min"]
Sampler = Literal["tpe", "random"]
Pruner = Literal["median", "none"]
Keep = Literal["best", "all"]
MOST_FAILURES = 5  # at the start of a study, all trials of which fail: the config is wrong, and not the ranges
BEST, OPTIONS = "best.yaml", "options.yaml"
MONITORS = ("checkpoint", "early_stopping")


def tune(
    fit: Path | list[Path],
    ranges: dict[str, Range],
    output: Path = RUN / "tune",
    metric: str = "val/ndcg@10",
    mode: Mode = "max",
    trials: int = 20,
    timeout: float | int | None = None,
    trial_options: dict[str, Any] | None = None,
    sampler: Sampler = "tpe",
    pruner: Pruner = "median",
    startup: int = 5,
    warmup: int = 1,
    keep: Keep = "best",
    seed: int = 0,
) -> None:
    """Search the options of a fit with Optuna; write report.md, report.json, figures and best.yaml.

    Each trial is a fit in a folder of its own, chosen by validation; test events are never read. The study is kept in
    tune.sqlite: after a kill the same command continues, and the same command in further processes shares the trials.
    Needs the extra `tune`.

    Args:
        fit: config of `recsys fit`, or several, of which later ones override earlier ones.
        ranges: dotted option of `recsys fit` -> the values to try.
        output: folder of the study.
        metric: validation metric to optimize: the best epoch of a trial counts. It also selects best.ckpt.
        mode: max or min.
        trials: number of trials of the study, over all processes and restarts; raise it to continue.
        timeout: seconds after which this process starts no more trials; null: no limit.
        trial_options: options of the trials alone, such as trainer.max_epochs for short ones; not in best.yaml.
        sampler: tpe, which learns from earlier trials, or random.
        pruner: median ends a trial whose best epoch is below the median of the others at that epoch; none ends none.
        startup: first trials, which are sampled at random and after which trials may be pruned.
        warmup: epochs of each trial before it may be pruned.
        keep: checkpoints that stay: those of the best trial, or of all.
        seed: of the sampler. The seed of the fits is seed_everything of their config.

    Raises:
        ValueError: for options that do not fit, or if all trials fail.
    """
    check_option("mode", mode, Mode)
    check_option("sampler", sampler, Sampler)
    check_option("pruner", pruner, Pruner)
    check_option("keep", keep, Keep)
    check_integer("trials", trials, example=20)
    check_integer("startup", startup, example=5)
    check_integer("warmup", warmup, 0, example=1)
    check_number("timeout", timeout, above=0, other="null for no limit", example=3600, what="seconds")
    check_seed("seed", seed)
    if metric.startswith("test"):
        raise ValueError(
            f"metric is {metric!r}, expected one of validation, since options that are chosen by test events flatter "
            "the test; set metric to val/ndcg@10, for example"
        )
    if not ranges:
        raise ValueError(
            "ranges is empty, expected one option or more; add to the config, for example, ranges: "
            "{model.init_args.optimizer.init_args.lr: {low: 0.0003, high: 0.01, log: true}}"
        )
    if find_spec("optuna") is None:
        raise ValueError("tune needs optuna, which is not installed: pip install 'recsys2stage[tune]'")
    from recsys2stage.cli import tune_trials  # imports Lightning, which is slow
    from recsys2stage.cli.tune_report import write_report
    from recsys2stage.cli.tune_study import Study

    configs, own = [fit] if isinstance(fit, Path) else list(fit), dict(trial_options or {})
    monitor = {"monitor": metric, "mode": mode}
    fixed: dict[str, Any] = {f"{part}.{name}": value for part in MONITORS for name, value in monitor.items()}
    parsed = tune_trials.check_ranges(configs, ranges, own, fixed)
    if parsed.trainer.devices == "auto":  # one even where there are several
        fixed["trainer.devices"] = 1
    study = Study(
        output=output,
        ranges=ranges,
        metric=metric,
        mode=mode,
        trials=trials,
        sampler=sampler,
        pruner=pruner,
        startup=startup,
        warmup=warmup,
        seed=seed,
        identity=tune_trials.identity(parsed, ranges, metric, mode),
    )
    started = time.monotonic()
    try:
        while True:
            with ExitStack() as lock:
                trial = study.claim(lock, ask=timeout is None or time.monotonic() - started < timeout)
                if trial is None:
                    break
                _run(study, trial, configs, {**own, **fixed}, keep)
            _check_some_succeed(study, MOST_FAILURES)
    except KeyboardInterrupt:
        print(f"\nrecsys tune: interrupted; the same command continues in {output}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    _check_some_succeed(study, 1)
    best = study.best
    if best is None:
        print(f"{output}: no trial is complete yet; the same command continues")
        return
    command = ["recsys", "fit", *tune_trials.config_words([*configs, output / BEST]), "--output", str(output / "best")]
    ended = study.frozen("COMPLETE", "PRUNED")
    title = f"trial {best.number} is the best of {len(ended)} by {metric}, {best.value:.4f}"
    with study.alone():
        chosen = {**study.options(best.params), **{name: fixed[name] for name in fixed if "devices" not in name}}
        write_overlay(output / BEST, chosen, f"{capital(title)}.\n{shlex.join(command)}")
        details = write_report(study, shlex.join(command), own)
    print_summary(output / "report.md", title, *details, then=shlex.join(command))


def _run(study: "Study", trial: "optuna.Trial", configs: list[Path], fixed: dict[str, Any], keep: Keep) -> None:
    """Fits with the options of a trial, records how it ended, and prints a line."""
    import optuna

    from recsys2stage.cli.tune_trials import config_words, run_trial

    folder, started = study.folder(trial.number), time.monotonic()
    write_overlay(folder / OPTIONS, {**fixed, **study.options(trial.params)}, f"Options of trial {trial.number}.")
    error, pruned = None, False
    try:
        run_trial(config_words([*configs, folder / OPTIONS]), folder, study.metric, partial(study.report, trial))
    except optuna.TrialPruned:
        pruned = True
    except Exception as problem:  # of a fit, whose classes may be of the user: a failed trial is recorded
        if debugging():
            raise
        error = first_sentences(plain_message(problem)) or type(problem).__name__
    ended = study.finish(trial, time.monotonic() - started, error, pruned, keep)
    print(f"{trial_line(study, ended)}", flush=True)


def trial_line(study: "Study", trial: "optuna.trial.FrozenTrial") -> str:
    """How a trial ended, on one line."""
    best, leader = trial.user_attrs.get("best"), study.best
    at = "" if best is None else f"{study.metric} {best['value']:.4f} in epoch {best['epoch']}, "
    how = {"PRUNED": "pruned, ", "FAIL": f"failed ({trial.user_attrs.get('error')}), "}.get(trial.state.name, "")
    first = "" if leader is None else f"; best {leader.value:.4f}, trial {leader.number}"
    return f"trial {trial.number}: {how}{at}{trial.user_attrs['seconds']:,.0f} s{first}"


def _check_some_succeed(study: "Study", failures: int) -> None:
    """Raises a ValueError if all trials that have ended failed, this many or more."""
    failed = study.frozen("FAIL")
    if len(failed) >= failures and not study.frozen("COMPLETE", "PRUNED"):
        reason = failed[-1].user_attrs.get("error")
        raise ValueError(
            f"{study.output}: all {len(failed)} trials failed, expected some to end; the last: {reason}. Correct the "
            "config or the ranges, and choose another --output, or remove this one"
        )
