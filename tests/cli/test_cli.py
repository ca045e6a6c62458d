"""What a user types: every verb is found, described and forgiving; what is wrong is said in one line."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser, capture_parser
from pipeline_fixtures import RETRIEVER, Run, recsys

from recsys2stage import optim
from recsys2stage.artifacts import read_manifest
from recsys2stage.cli import main as cli
from recsys2stage.data import sources, split
from recsys2stage.mining import miners
from recsys2stage.ranking import scorers, signals
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.losses import ListLoss
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval import encoders, index, inputs, items, losses, objectives, users
from recsys2stage.retrieval.encoders import positions, times
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.retriever import Retriever

VERBS = {
    *("simulate", "prepare-data", "fit", "validate", "test", "export-index", "export-onnx"),
    *("serve", "export-log", "mine-negatives", "export-bundle", "recommend", "evaluate", "init", "list"),
    *("tune", "embed-items"),
}
RECSYS = Path(sys.executable).with_name("recsys")


def parser_of(verb: str) -> ArgumentParser:
    """The parser that this verb's options go through."""
    with mock.patch.object(sys, "argv", ["recsys", verb]):
        parser = capture_parser(cli.main)
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices[verb]


def undescribed(parser: ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if not (action.help or "").strip() or "SUPPRESS" in action.help]


def one_line(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The error a verb ends in: one line and exit code 1, no traceback."""
    with pytest.raises(SystemExit) as end:
        recsys(*words)
    assert isinstance(end.value.code, str), end.value.code  # Python prints a text to stderr and exits with 1
    assert "\n" not in end.value.code
    assert end.value.code.startswith(f"recsys {words[0]}: ")
    assert "Traceback" not in capsys.readouterr().err
    return end.value.code


def test_help_lists_every_verb_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        recsys("--help")
    assert end.value.code == 0
    listed = capsys.readouterr().out.split("Available subcommands:")[1]
    for verb in VERBS:
        assert f"\n    {verb} " in listed, verb
    assert set(cli.TRAINING) | set(cli.COMMANDS) == VERBS
    assert all(command.__doc__ for command in (cli.TRAINING | cli.COMMANDS).values())


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_option_of_every_verb_is_described(verb: str) -> None:
    parser = parser_of(verb)
    assert len(parser._actions) > 3
    assert undescribed(parser) == []
    assert {"config", "print_config"} <= {action.dest for action in parser._actions}


@pytest.mark.parametrize("verb", ["mine-negatives", "fit"])
def test_help_shows_the_descriptions(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        recsys(verb, "--help")
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert {"mine-negatives": "candidates per request.", "fit": "Folder of this run's checkpoints"}[verb] in shown


def parts() -> Iterator[type]:
    """Every class that a config may name."""
    bases = [
        *(encoders.Encoder, positions.Position, times.Time, objectives.Objective, losses.Loss, ListLoss),
        *(losses.Negatives, losses.NormPenalty, inputs.Input, users.UserTower),
        *(miners.Miner, scorers.Scorer, index.Index, sources.Source, split.Split, items.ItemTable, optim.RecsysAdamW),
        *(signals.Signal, Retriever, Ranker, Histories, Candidates),
    ]
    while bases:
        kind = bases.pop()
        bases += kind.__subclasses__()
        if kind.__module__.startswith("recsys2stage") and not kind.__name__.startswith("_"):
            yield kind


@pytest.mark.parametrize("kind", sorted(set(parts()), key=lambda kind: kind.__qualname__))
def test_every_option_of_every_part_is_described(kind: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    if "__init__" in vars(kind):
        parser.add_class_arguments(kind, as_group=False)
    own = [option for option in undescribed(parser) if not option.startswith("shape.")]  # which the encoder gives
    assert own == []
    assert (kind.__doc__ or "").strip()


def test_a_part_without_descriptions_would_be_found() -> None:
    class Part:
        """Its one option is described nowhere."""

        def __init__(self, width: int = 1) -> None: ...

    parser = ArgumentParser()
    parser.add_class_arguments(Part, as_group=False)
    assert undescribed(parser) == ["width"]


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_prints_its_config(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"prepare-data": ["--source", "MovieLens", "--output", "data"]}
    of_a_fit = ["--model", "Retriever", "--data", "Histories", "--data.path", "data", "--output", "runs"]
    with pytest.raises(SystemExit) as end:
        recsys(verb, *(of_a_fit if verb in cli.TRAINING else needed.get(verb, [])), "--print_config")
    assert end.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config.keys() & {"source", "output", "retriever", "bundle", "folder", "kind"}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_misspelt_option_is_an_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        recsys(verb, "--ouptut", "x")
    assert end.value.code == 2
    assert "ouptut" in capsys.readouterr().err


def test_a_misspelt_option_of_a_nested_part_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("miner: {class_path: RankBand, init_args: {skip_tpo: 3}}\n")
    with pytest.raises(SystemExit) as end:
        recsys("mine-negatives", "--config", tmp_path / "mine.yaml")
    assert end.value.code == 2
    assert "skip_tpo" in capsys.readouterr().err


def test_a_config_is_overridden_by_what_follows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("miner: {class_path: RankBand, init_args: {skip_top: 3}}\nk: 77\n")
    with pytest.raises(SystemExit):
        recsys("mine-negatives", "--config", tmp_path / "mine.yaml", "--miner.last", 50, "--k", 78, "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["k"] == 78
    assert config["miner"]["init_args"] == {"count": None, "skip_top": 3, "last": 50}


# training


def test_a_fit_leaves_its_checkpoints_log_config_and_signature(trained: Run) -> None:
    for stage, kind, parent in (("retriever", "retriever", trained.data), ("ranker", "ranker", trained.candidates)):
        folder = trained.folder / stage
        assert {"best.ckpt", "last.ckpt", "log", "manifest.json"} == {file.name for file in folder.iterdir()}
        manifest = read_manifest(folder, kind, "")
        assert [entry["path"] for entry in manifest["parents"].values()] == [str(parent)]
        assert Path(manifest["options"]["config"]).is_file()
        assert manifest["monitor"] == "val/ndcg@10"
        assert manifest["best"] > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the checkpoint was copied on purpose
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_without_a_checkpoint_the_best_is_measured(
    trained: Run, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.folder / "retriever", tmp_path / "retriever", ignore=shutil.ignore_patterns("last.ckpt"))
    options = (verb, "--config", trained.folder / "retriever.yaml", "--data.path", trained.data)

    def measured(*words: object) -> float:
        recsys(*options, *words)
        line = next(line for line in capsys.readouterr().out.splitlines() if "/ndcg@10 " in line)
        return float(line.strip(" │┃").split()[-1])  # in a table, if rich is installed

    best = measured("--output", tmp_path / "retriever")
    named = measured("--output", tmp_path / "elsewhere", "--ckpt_path", trained.retriever)
    assert best == named
    if verb == "validate":
        assert best == pytest.approx(read_manifest(trained.retriever.parent, "retriever", "")["best"], abs=1e-6)
    checkpoint = torch.load(trained.retriever, weights_only=True)
    for name in checkpoint["state_dict"]:
        checkpoint["state_dict"][name] = torch.zeros_like(checkpoint["state_dict"][name])
    torch.save(checkpoint, tmp_path / "retriever" / "best.ckpt")  # which is read, or this would change nothing
    assert measured("--output", tmp_path / "retriever") != best


def test_without_any_checkpoint_measuring_says_what_to_do(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = trained.folder / "retriever.yaml"
    words = ["test", "--config", config, "--data.path", trained.data, "--output", tmp_path]
    assert one_line(words, capsys).endswith("does not exist; run recsys fit first, or give another --ckpt_path")


def test_a_ranker_is_not_tested_alone(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--config", trained.folder / "ranker.yaml", "--data.path", trained.candidates]
    assert "run: recsys evaluate" in one_line([*words, "--output", trained.folder / "ranker"], capsys)


@pytest.mark.parametrize("steps", [3, 10**6])
def test_a_fit_that_runs_out_of_steps_in_mid_epoch_is_measured_and_signed(
    trained: Run, tmp_path: Path, steps: int
) -> None:
    of = ("--config", trained.folder / "retriever.yaml", "--data.path", trained.data, "--output", tmp_path)
    recsys("fit", *of, "--trainer.max_steps", steps, "--trainer.max_epochs", 2)
    manifest = read_manifest(tmp_path, "retriever", "")
    batches = len(Histories(trained.data, max_length=20, batch_size=32).train_dataloader())
    assert batches > 3
    assert manifest["steps"] == min(steps, 2 * batches)
    assert manifest["best"] > 0
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] in (manifest["steps"], batches)


PREPARE = "source: {class_path: MovieLens, init_args: {path: raw}}\noutput: data/mini\n"


@pytest.fixture
def configs(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's own folder with raw data and configs/mini/."""
    shutil.copytree(raw, tmp_path / "raw")
    folder = tmp_path / "configs" / "mini"
    folder.mkdir(parents=True)
    (folder / "prepare.yaml").write_text(PREPARE)
    paths = "{path: data/mini, prepare: configs/mini/prepare.yaml, "
    retriever = RETRIEVER.replace("init_args: {max_length", f"init_args: {paths}max_length").replace(
        "epochs: 3", "epochs: 1"
    )
    (folder / "retriever.yaml").write_text("output: runs/mini/retriever\n" + retriever)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_fit_works_inside_and_outside_the_configs_and_prepares_what_is_missing(
    configs: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    root = Path.cwd()
    if inside:
        monkeypatch.chdir(configs)
    recsys("fit", "--config", "retriever.yaml" if inside else "configs/mini/retriever.yaml")
    assert (root / "data/mini/manifest.json").is_file()
    assert (root / "runs/mini/retriever/best.ckpt").is_file()
    assert sorted(file.name for file in configs.iterdir()) == ["prepare.yaml", "retriever.yaml"]


def test_fit_leaves_prepared_data_as_they_are(configs: Path) -> None:
    recsys("prepare-data", "--config", "configs/mini/prepare.yaml", "--tie_break", "item_id")
    before = Path("data/mini/manifest.json").read_bytes()
    recsys("fit", "--config", "configs/mini/retriever.yaml", "--trainer.limit_train_batches", 1)
    assert Path("data/mini/manifest.json").read_bytes() == before


def test_words_that_name_files_inside_configs_still_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "mini"
    folder.mkdir(parents=True)
    (folder / "a.yaml").touch()
    (tmp_path / "recsys").touch()
    monkeypatch.chdir(folder)
    argv = [
        "../../recsys",
        "fit",
        "--config",
        "a.yaml",
        "--config=a.yaml",
        "--output",
        "runs/x",
        "-c",
        "../mini/a.yaml",
        "--k=3",
    ]
    cli.step_out_of_configs(argv)
    assert Path.cwd() == tmp_path
    assert Path(argv[0]).samefile(tmp_path / "recsys"), "further processes find the program"
    assert argv[3] == str(folder / "a.yaml")
    assert argv[4] == f"--config={folder / 'a.yaml'}"
    assert argv[6] == "runs/x"
    assert Path(argv[8]).samefile(folder / "a.yaml")
    assert argv[9] == "--k=3"
    outside = ["recsys", "fit", "--config", "configs/mini/a.yaml"]
    cli.step_out_of_configs(outside)
    assert outside[3] == "configs/mini/a.yaml"
    assert Path.cwd() == tmp_path


# what is wrong is said in one line


def test_wrong_input_ends_in_one_readable_line(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_source = ["prepare-data", "--source", "MovieLens", "--source.path", tmp_path / "no", "--output", tmp_path / "d"]
    assert "does not exist" in one_line(bad_source, capsys)
    assert "recsys fit" in one_line(
        ["export-index", "--retriever", tmp_path / "a.ckpt", "--data", trained.data], capsys
    )
    assert "recsys prepare-data" in one_line(["mine-negatives", "--data", tmp_path, "--index", trained.index], capsys)
    assert "recsys export-index" in one_line(["mine-negatives", "--data", trained.data, "--index", tmp_path], capsys)
    assert "recsys export-bundle" in one_line(["evaluate", "--bundle", tmp_path], capsys)
    unknown = ["recommend", "--bundle", trained.bundle, "--users", "['nobody']", "--output", tmp_path / "o.csv"]
    line = one_line(unknown, capsys)
    assert "user 'nobody' is not in the data, expected ids such as " in line
    assert "check the id, or give a history: --histories" in line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.path", "nowhere"], "nowhere/manifest.json does not exist"),
        (["--data.path", "nowhere", "--data.prepare", "none.yaml"], "none.yaml does not exist"),
        (["--data.max_length", "0"], "max_length is 0, expected at least 1"),
        (["--model.encoder.heads", "3"], "dim 16 is not a multiple of heads 3"),
        (["--model.encoder.time", "RequestGap"], "request_time is 'none'"),
        (["--model.loss", "InfoNCE", "--model.loss.temperature", "0"], "temperature is 0"),
        (["--ckpt_path", "none.ckpt"], "none.ckpt"),
    ],
)
def test_a_wrong_setting_of_a_fit_ends_in_one_readable_line(
    trained: Run, tmp_path: Path, words: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["fit", "--config", trained.folder / "retriever.yaml", "--data.path", trained.data]
    assert message in one_line([*base, "--output", tmp_path / "out", *words], capsys)


def test_a_real_process_ends_with_code_1_and_one_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RECSYS_DEBUG"}
    command = [RECSYS, "evaluate", "--bundle", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"recsys evaluate: {tmp_path} holds neither a bundle nor an index; "
        f"make a bundle: recsys export-bundle --output {tmp_path}, or an index of the first stage: recsys export-index"
    ]


def test_further_inside_configs_nothing_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs" / "mini" / "deep"  # whoever works there has a project of his own
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    cli.step_out_of_configs(["recsys", "fit"])
    assert Path.cwd() == folder


def test_where_an_error_came_from_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECSYS_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="neither a bundle nor an index"):
        recsys("evaluate", "--bundle", tmp_path)


def test_training_needs_neither_polars_nor_faiss_and_the_other_verbs_no_lightning() -> None:
    code = """
import sys
import recsys2stage.retrieval.retriever, recsys2stage.retrieval.histories
import recsys2stage.ranking.ranker, recsys2stage.cli.callbacks
assert "lightning" in sys.modules
found = [name for name in ("polars", "faiss", "pyarrow", "pandas") if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    code = """
import sys
import recsys2stage.cli.main
assert "polars" in sys.modules
found = [name for name in ("lightning", "torchmetrics", "faiss") if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_epoch_of_numpy_and_torch_seeds_is_set(trained: Run) -> None:
    """`seed_everything` defaults to 0, so that a fit without a word about seeds can be repeated."""
    config = yaml.safe_load((trained.folder / "retriever" / "log" / "version_0" / "config.yaml").read_text())
    assert config["seed_everything"] == 0
    assert np.isfinite(config["model"]["init_args"]["warmup_steps"])
