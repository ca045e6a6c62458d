"""`recsys tune`: ranges, trials that end, fail, are pruned, resumed and shared, and the report."""

import json
import math
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from pipeline_fixtures import Run, recsys
from wrong_inputs import check_message

from recsys2stage.cli import tune_trials
from recsys2stage.cli.messages import UsageError
from recsys2stage.cli.tune import tune
from recsys2stage.cli.tune_ranges import Range, overlay
from recsys2stage.cli.tune_study import Study
from recsys2stage.data.locks import locked

LR, DIM, ENCODER = "model.init_args.optimizer.init_args.lr", "model.init_args.dim", "model.init_args.encoder"
RANGES = {LR: Range(1e-4, 1e-2, log=True), DIM: Range(8, 16, step=8)}
Curve = Callable[[dict[str, Any]], list[float]]  # options of a trial -> its metric after each epoch


# ranges


def test_numbers_are_integers_where_both_ends_are() -> None:
    integers = Range(8, 16, step=4).distribution()
    numbers = Range(0.0, 0.5, step=0.1)
    assert isinstance(integers, optuna.distributions.IntDistribution)
    assert isinstance(numbers.distribution(), optuna.distributions.FloatDistribution)
    assert numbers.value(0.1 + 0.2) == 0.3  # exact: it is rounded to the decimal that a YAML file holds
    assert Range(1e-4, 1e-2, log=True).value(0.00123456) == 0.001235  # likewise


def test_choices_may_be_classes_with_options() -> None:
    hstu = {"class_path": "HSTU", "init_args": {"heads": 4}}
    one = Range(choices=["SASRec", hstu, None])
    sampled = one.distribution()
    assert isinstance(sampled, optuna.distributions.CategoricalDistribution)
    assert [one.value(choice) for choice in sampled.choices] == ["SASRec", hstu, None]


def test_an_overlay_joins_a_class_and_its_options() -> None:
    flat = {f"{ENCODER}.init_args.dropout": 0.1, ENCODER: "HSTU", DIM: 8, "trainer.max_epochs": 2}
    assert overlay(flat) == {
        "model": {"init_args": {"dim": 8, "encoder": {"class_path": "HSTU", "init_args": {"dropout": 0.1}}}},
        "trainer": {"max_epochs": 2},
    }


@pytest.mark.parametrize(
    ("options", "value", "expected"),
    [
        ({}, "neither low nor choices", "low and high"),
        ({"low": 1}, "has low 1", "low and high"),
        ({"low": 2, "high": 1}, "from 2 to 1", "low below high"),
        ({"low": "a", "high": 1}, "low of a range is 'a'", "a number"),
        ({"low": 0, "high": 1, "log": True}, "low 0", "above 0"),
        ({"low": 1, "high": 8, "log": True, "step": 1}, "step 1 and log: true", "one of them"),
        ({"low": 0.0, "high": 1.0, "step": 0.3}, "step 0.3", "divides it"),
        ({"low": 0, "high": 1, "step": -1}, "step -1", "divides it"),
        ({"choices": ["a"]}, r"\['a'\]", "two or more"),
        ({"choices": ["a", "a"]}, r"\['a', 'a'\]", "different values"),
        ({"choices": ["a", "b"], "low": 1}, "choices and low 1", "expected one"),
    ],
    ids=str,
)
def test_a_wrong_range_gets_one_sentence(options: dict[str, Any], value: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        Range(**options)
    check_message(str(error.value), value, expected, "write {low: 0.001")


# the study, with curves instead of fits


def fits(curve: Curve) -> Callable[..., None]:
    """A stand-in for `run_trial`, which reports a curve of the options in the last config."""

    def run(options: list[str], folder: Path, metric: str, report: Callable[[int, float], None]) -> None:
        given = yaml.safe_load(Path(options[-1]).read_text())["model"]["init_args"]
        (folder / "best.ckpt").touch()
        for epoch, value in enumerate(curve({LR: given["optimizer"]["init_args"]["lr"], DIM: given["dim"]})):
            report(epoch, value)

    return run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A study of curves: runs it and returns its report."""
    config = tmp_path / "retriever.yaml"
    config.write_text("model: {}")
    parsed = tune_trials.Namespace(trainer=tune_trials.Namespace(devices=1), data={"init_args": {}})
    monkeypatch.setattr(tune_trials, "check_ranges", lambda *_: parsed)
    monkeypatch.setattr(tune_trials, "identity", lambda *_: {"ranges": {n: vars(r) for n, r in RANGES.items()}})
    monkeypatch.setattr("recsys2stage.cli.tune_report.write_report", write)

    def go(curve: Curve, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(tune_trials, "run_trial", fits(curve))
        tune(config, RANGES, tmp_path / "tune", **options)
        return json.loads((tmp_path / "tune/report.json").read_text())

    return go


def write(study: Study, command: str, trial_options: dict[str, Any]) -> list[str]:
    """The trials as report.json, without figures, which take longer than the study."""
    from recsys2stage.cli.tune_report import trial_row

    rows = [trial_row(study, frozen) for frozen in study.frozen()]
    (study.output / "report.json").write_text(json.dumps({"best": study.best.number, "trials": rows}))  # type: ignore[union-attr]
    return []


def quadratic(options: dict[str, Any]) -> list[float]:
    """Best at lr 0.001 and dim 16, in the second of three epochs."""
    best = 1 - abs(math.log10(options[LR] / 1e-3)) / 2 - (16 - options[DIM]) / 32
    return [best - 0.2, best, best - 0.1]


def test_the_best_epoch_of_the_best_trial_wins_and_keeps_its_checkpoint(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = run(quadratic, trials=4, pruner="none")
    values = [trial["value"] for trial in report["trials"]]
    assert len(values) == 4
    assert report["best"] == values.index(max(values))
    assert all(trial["epoch"] == 2 for trial in report["trials"])
    kept = [path.parent.name for path in (tmp_path / "tune").glob("trial-*/best.ckpt")]
    assert kept == [f"trial-{report['best']:04}"]
    chosen = yaml.safe_load((tmp_path / "tune/best.yaml").read_text())
    options = report["trials"][report["best"]]["options"]
    assert chosen["model"]["init_args"]["dim"] == options[DIM]
    assert chosen["model"]["init_args"]["optimizer"]["init_args"]["lr"] == options[LR]
    assert chosen["checkpoint"] == {"monitor": "val/ndcg@10", "mode": "max"}


def test_trials_below_the_median_are_pruned_and_min_is_minimised(run: Callable[..., dict[str, Any]]) -> None:
    report = run(lambda options: [-value for value in quadratic(options)], mode="min", trials=6, startup=2, keep="all")
    states = [trial["state"] for trial in report["trials"]]
    assert states[:2] == ["complete"] * 2
    assert "pruned" in states
    complete = [trial for trial in report["trials"] if trial["state"] == "complete"]
    assert report["best"] == min(complete, key=lambda trial: trial["value"])["number"]
    assert all(trial["epochs"] > 1 for trial in report["trials"]), "none is pruned in its first epoch"


def test_a_study_in_two_parts_equals_one_in_one(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Trials are sampled by their number and the trials before, not by a generator that a restart would reset."""
    run(quadratic, trials=1, startup=1)
    parts = run(quadratic, trials=3, startup=1)["trials"]
    (tmp_path / "tune").rename(tmp_path / "parts")
    once = run(quadratic, trials=3, startup=1)["trials"]
    assert [trial["options"] for trial in parts] == [trial["options"] for trial in once]


def test_a_failed_trial_is_recorded_and_the_study_goes_on(
    run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    starts: list[None] = []

    def some_fail(options: dict[str, Any]) -> list[float]:
        starts.append(None)
        if len(starts) % 2:
            raise ValueError("the loss of step 3 is NaN or infinite")
        return quadratic(options)

    trials = run(some_fail, trials=2)["trials"]
    assert [trial["state"] for trial in trials] == ["failed", "complete"]
    assert all("NaN" in trial["error"] for trial in trials[::2])
    assert "failed (the loss of step 3 is NaN or infinite)" in capsys.readouterr().out


def test_a_study_whose_trials_all_fail_ends_early_with_the_reason(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def fail(options: dict[str, Any]) -> list[float]:
        raise RuntimeError("no memory")

    with pytest.raises(ValueError, match="all 5 trials failed") as error:
        run(fail, trials=50)
    check_message(str(error.value), "all 5 trials failed", "the last: no memory", "choose another --output")
    assert len(list((tmp_path / "tune").glob("trial-*"))) == 5


def test_a_metric_that_is_not_logged_fails_the_trial(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="val/ndcg@10 was not logged, expected it after each validation"):
        run(lambda options: [], trials=2)


def test_a_study_goes_on_with_its_own_options_only(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run(quadratic, trials=1)
    study = Study(tmp_path / "tune", RANGES, "m", "max", 1, "tpe", "none", 5, 1, 0, {"metric": "val/mrr"})
    study.study.set_user_attr("metric", "val/hr@10")
    with pytest.raises(ValueError, match="other metric") as error:
        Study(tmp_path / "tune", RANGES, "m", "max", 1, "tpe", "none", 5, 1, 0, {"metric": "val/mrr"})
    check_message(str(error.value), "'val/hr@10' there, 'val/mrr' here", "expected the same", "another --output")
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("create table notes (id int)")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/tune.sqlite").write_bytes(b"not a database, but long enough" * 40)
    with pytest.raises(ValueError, match="cannot be read as a study") as error:
        Study(tmp_path / "damaged", RANGES, "m", "max", 1, "tpe", "none", 5, 1, 0, {})
    check_message(str(error.value), "tune.sqlite", "expected one, or none", "choose another --output")


def test_trials_are_claimed_once_and_those_of_dead_processes_again(tmp_path: Path) -> None:
    def study() -> Study:
        return Study(tmp_path, RANGES, "m", "max", 3, "tpe", "median", 5, 1, 0, {})

    first, second, third = study(), study(), study()
    with ExitStack() as mine, ExitStack() as yours:
        one, two = first.claim(mine, ask=True), second.claim(yours, ask=True)
        assert one is not None
        assert two is not None
        assert (one.number, two.number) == (0, 1), "both are running"
        with ExitStack() as none:
            assert third.claim(none, ask=False) is None
        first.report(one, 0, 0.5)
        mine.close()  # as if the first process were killed
        with ExitStack() as next_:
            again = third.claim(next_, ask=True)
            assert again is not None
            assert again.number == 0
            assert again.params == one.params
            third.report(again, 0, 0.4)  # the epoch that was lost, once more
            assert (
                third.finish(again, 1.0, None, pruned=False, keep="best").value == 0.5
            )  # exact: it is stored, not computed
        for _ in range(2):
            yours.close()
            with ExitStack() as next_:
                assert third.claim(next_, ask=False) is not None, "started a second and a third time"
        with ExitStack() as none:
            assert third.claim(none, ask=False) is None
        assert "its process ended 3 times" in third.frozen("FAIL")[0].user_attrs["error"]


def test_whoever_chooses_a_trial_waits_for_others(tmp_path: Path) -> None:
    study = Study(tmp_path, RANGES, "m", "max", 3, "tpe", "median", 5, 1, 0, {})
    with locked(tmp_path / "study"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsys2stage.cli.tune_study.PATIENCE", 0.2)
        with pytest.raises(ValueError, match="is being written by process"), study.alone():
            pass


# with fits


CONFIG = """
fit: {config}
output: {output}
ranges:
  model.init_args.optimizer.init_args.lr: {{low: 3.0e-3, high: 3.0e-2, log: true}}
  model.init_args.encoder: {{choices: [SASRec, Transformer]}}
trials: 2
trial_options: {{trainer.max_epochs: 1, data.init_args.path: {data}}}
"""


def config_of(trained: Run, folder: Path) -> Path:
    path = folder / "tune.yaml"
    config = trained.folder / "retriever.yaml"
    path.write_text(CONFIG.format(config=config, output=folder / "tune", data=trained.data))
    return path


def test_a_study_of_fits_is_reported_and_its_best_can_be_fitted(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recsys("tune", "--config", config_of(trained, tmp_path))
    shown, folder = capsys.readouterr().out, tmp_path / "tune"
    report = json.loads((folder / "report.json").read_text())
    assert report["counts"]["complete"] == 2
    best = report["best"]
    assert best["value"] == max(trial["value"] for trial in report["trials"])
    manifest = json.loads((folder / f"trial-{best['trial']:04}/manifest.json").read_text())
    assert manifest["best"] == pytest.approx(best["value"], abs=1e-6)
    assert (folder / f"trial-{best['trial']:04}/best.ckpt").is_file()
    assert not list(folder.glob(f"trial-{1 - best['trial']:04}/*.ckpt"))
    assert not list(folder.rglob(".*")), "no locks are left"
    assert {path.name for path in folder.iterdir()} >= {"history.png", "slices.png", "best.yaml", "tune.sqlite"}
    text = (folder / "report.md").read_text()
    assert report["command"] in text
    assert "test events were not read" in text
    assert "Options of the trials alone, which the command above does not set: trainer.max_epochs 1" in text
    assert f"{folder / 'report.md'}: trial {best['trial']} is the best of 2 by val/ndcg@10" in shown
    words = report["command"].split()[1:]
    with pytest.raises(SystemExit) as end:
        recsys(*words, "--data.init_args.path", trained.data, "--print_config")
    assert end.value.code == 0
    fitted = yaml.safe_load(capsys.readouterr().out)
    assert fitted["model"]["init_args"]["optimizer"]["init_args"]["lr"] == best["options"][LR]
    assert fitted["model"]["init_args"]["encoder"]["class_path"].endswith(f".{best['options'][ENCODER]}")
    assert fitted["trainer"]["max_epochs"] == 3, "the epochs of a full fit"


MONITOR = {"checkpoint.monitor": "val/ndcg@10", "checkpoint.mode": "max"}


@pytest.mark.parametrize(
    ("ranges", "options", "value", "expected", "step"),
    [
        ({"model.init_args.dmi": Range(8, 16)}, {}, "ranges: model.init_args.dmi is not an option", "mean dim", "help"),
        ({ENCODER: Range(choices=["SASRec", "HTSU"])}, {}, "ranges: .*'HTSU'", "HSTU", "recsys list encoders"),
        ({DIM: Range(8, 16)}, {"trainer.max_epoch": 2}, "trial_options: trainer.max_epoch", "max_epochs", "help"),
        ({DIM: Range(8, 16)}, {DIM: 8}, "model.init_args.dim is in ranges and", "in one", "remove it"),
        ({DIM: Range(8, 16)}, {"output": "x"}, "output is set by recsys tune", "other options", "leave it out"),
    ],
    ids=["name", "class", "trial option", "twice", "own"],
)
def test_wrong_ranges_are_found_before_the_study(
    trained: Run, ranges: dict[str, Range], options: dict[str, Any], value: str, expected: str, step: str
) -> None:
    own = {"data.init_args.path": str(trained.data)} | options
    with pytest.raises((ValueError, UsageError)) as error:
        tune_trials.check_ranges([trained.folder / "retriever.yaml"], ranges, own, MONITOR)
    check_message(str(error.value), value, expected, step)


def test_what_no_trial_could_do_is_found_before_the_study(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several devices, data that are not there, and a metric that is not logged."""
    path = ["--config", str(trained.folder / "retriever.yaml"), "--data.init_args.path", str(trained.data)]
    parsed = tune_trials.parse_fit([*path, "--output", "x"])
    monkeypatch.setattr(tune_trials, "parse_fit", lambda _: parsed)
    arguments: tuple[Any, ...] = ([], {DIM: Range(8, 16)}, {})
    assert tune_trials.check_ranges(*arguments, MONITOR) is parsed
    with pytest.raises(ValueError, match="'val/ndgc@10' is not logged by a Retriever; did you mean val/ndcg@10"):
        tune_trials.check_ranges(*arguments, {"checkpoint.monitor": "val/ndgc@10"})
    parsed.data.init_args.path = "no"
    with pytest.raises(FileNotFoundError, match=r"no/manifest\.json does not exist, .*run recsys prepare-data first"):
        tune_trials.check_ranges(*arguments, MONITOR)
    parsed.trainer.devices = 2
    with pytest.raises(ValueError, match=r"devices is 2, expected one device.*CUDA_VISIBLE_DEVICES"):
        tune_trials.check_ranges(*arguments, MONITOR)


def test_test_metrics_and_empty_ranges_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'test/ndcg@10', expected one of validation"):
        tune(tmp_path / "a.yaml", RANGES, tmp_path / "tune", metric="test/ndcg@10")
    with pytest.raises(ValueError, match="ranges is empty, expected one option or more; add to the config"):
        tune(tmp_path / "a.yaml", {}, tmp_path / "tune")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # two processes that import torch
def test_a_killed_trial_goes_on_and_two_processes_share_a_study(trained: Run, tmp_path: Path) -> None:
    words = ["--config", config_of(trained, tmp_path), "--trials", "4"]
    command = [sys.executable, "-m", "recsys2stage", "tune", *map(str, words)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shown = "".join(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert all(shown.count(f"trial {number}: ") == 1 for number in range(4)), shown
    folder = tmp_path / "tune"
    command[-1] = "5"
    killed = subprocess.Popen([*command, "--pruner", "none"], stdout=subprocess.DEVNULL)
    while not (folder / "trial-0004/options.yaml").is_file():
        assert killed.poll() is None
    killed.kill()
    killed.wait()
    recsys("tune", *words[:-1], "5")
    trials = json.loads((folder / "report.json").read_text())["trials"]
    assert len(trials) == 5
    assert trials[4]["state"] in ("complete", "pruned")
