"""Wrong command lines and configs of every verb: each gets one sentence with value, expectation and next step."""
# ruff: noqa: E501  rows of the tables

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from pipeline_fixtures import RETRIEVER, SIGNALS, Run, recsys
from wrong_inputs import check_error, check_message, nothing_written

from recsys2stage.cli import main as cli
from recsys2stage.cli import parser as parsing
from recsys2stage.cli.classes import class_names, families
from recsys2stage.cli.diagnosis import Diagnosis
from recsys2stage.cli.messages import UsageError, informative_line, nearest, type_words, without_dashes
from recsys2stage.estimator import TwoStageRecommender
from recsys2stage.retrieval.encoders import EncoderFactory

TABLE = """
source:
  class_path: Table
  init_args:
    path: events.csv
    items: {path: items.csv, id: sku, columns: {brand: {kind: categorical}}}
split: {class_path: LeaveOneOut, init_args: {val: 3}}
output: OUT
"""
CONFIGS = {"fit": RETRIEVER, "prepare-data": TABLE, "mine-negatives": f"{SIGNALS}k: 10\n", "recommend": "k: 5\n"}
CONFIGS |= {"validate": RETRIEVER, "test": RETRIEVER}


@dataclass(frozen=True)
class Wrong:
    """A wrong command line.

    Attributes:
        words: the command line; C is a right config of its verb, OUT a folder that does not exist.
        value, expected, step: patterns of the parts of the message.
        edit: text of the config -> text instead, if the config is wrong.
    """

    words: str
    value: str
    expected: str
    step: str
    edit: tuple[str, str] | None = None


FIT = "fit --config C --data.path nowhere --output OUT"
PREPARE, MINE, RECOMMEND = "prepare-data --config C", "mine-negatives --config C", "recommend --config C"
HELP = r"[Ss]ee: recsys fit --help"
LISTED = r"see: recsys list encoders"
ROWS = [
    # verbs
    Wrong("fti", "'fti' is not a verb", "did you mean fit.*prepare-data", "recsys --help"),
    Wrong("", "no verb is given", "one of fit, validate", "recsys --help"),
    Wrong("serve-me", "'serve-me' is not a verb", "one of|did you mean", "recsys --help"),
    Wrong("--config C fit", "--config comes before the verb", "verb first: recsys fit --config", "recsys --help"),
    Wrong("evaluate evaluate", "'evaluate' follows no option", "--option VALUE", "recsys evaluate --help"),
    # options
    Wrong(f"{FIT} --optput x", "--optput is not an option", "did you mean --output", HELP),
    Wrong(f"{FIT} --max_epochs 3", "--max_epochs is not an option", "did you mean --trainer.max_epochs", HELP),
    Wrong(f"{FIT} --trainer.max_epoch 3", "--trainer.max_epoch is not", "did you mean max_epochs", HELP),
    Wrong(f"{FIT} --model.dmi 3", "--model.dmi is not an option of Retriever", "did you mean dim", "--model.help Retr"),
    Wrong(f"{FIT} --model.encoder.head 3", "head is not an option of Transformer", "mean heads", r"encoder\.help Transf"),
    Wrong(f"{FIT} --output", "--output has no value", "expected a path", "write --output VALUE"),
    Wrong(f"{FIT} --config", "--config has no value", "a YAML file", "write --config VALUE"),
    Wrong(f"{FIT} --model.encoder", "--model.encoder has no value", "expected", "VALUE"),
    Wrong(f"{FIT} --data.lenght 3", "--data.lenght is not an option of Histories", "max_length", r"--data\.help Hist"),
    Wrong("recommend -k 3", "-k is not an option", "did you mean --k", "recsys recommend --help"),
    Wrong("recommend --k --seen keep", "--k has no value", "a whole number", "write --k VALUE"),
    Wrong("export-bundle --rankr x", "--rankr is not an option", "did you mean --ranker", "export-bundle --help"),
    Wrong("export-onnx --bundel x", "--bundel is not an option", "did you mean --bundle", "export-onnx --help"),
    Wrong("simulate --outptu x", "--outptu is not an option", "did you mean --output", "simulate --help"),
    Wrong(f"{PREPARE} --time_unit iso", "--time_unit is not an option", "one of .*--core", "prepare-data --help"),
    Wrong(f"{PREPARE} --split.vall 3", "--split.vall is not an option of LeaveOneOut", "did you mean val", "split.help"),
    Wrong("export-index --index.factory Flat", "without a class", "one of .*Exact, Faiss", "write --index Faiss before"),
    Wrong("export-index --index Faiss --index.factry x", "factry is not an option of Faiss", "factory", "index.help"),
    # what would have no effect
    Wrong(f"{FIT} --model.num_items 3", "--model.num_items is '3'", "unset.*by the data", "leave it out"),
    Wrong(f"{FIT} --checkpoint.dirpath x", "checkpoint.dirpath cannot be set", "follow output", "set output"),
    Wrong("fit --config C --output OUT", "trainer is 3", "a mapping of options", HELP, ("trainer: {", "trainer: 3\nlast: {")),
    # files of options
    Wrong(f"{FIT} --config configs/with/hstuu.yaml", "hstuu.yaml does not exist", "a YAML file", "did you mean .*hstu.yaml"),
    Wrong(f"{FIT} --config nowhere/x.yaml", "nowhere/x.yaml does not exist", "a YAML file", "check the path"),
    Wrong(f"{FIT} --config configs/with", "configs/with is a folder", "a YAML file", "a file of it: bce.yaml"),
    Wrong(f"{FIT} --config Makefile", "Makefile is not YAML in line", "a YAML file", "correct that line"),
    Wrong("fit --config C", "is empty", "a YAML file", "recsys fit --print_config", (RETRIEVER, "")),
    Wrong("fit --config C", "holds a list", "a mapping", HELP, (RETRIEVER, "- a\n- b")),
    Wrong("fit --config C", "holds 'words'", "a mapping", HELP, (RETRIEVER, "words")),
    Wrong("fit --config C", "C: False is a bool", "the name of an option", "put it in quotes", (RETRIEVER, "no: 3")),
    # what is missing
    Wrong("fit", "--model, --data and --output are missing", "LightningModule.*a path", "give --config FILE"),
    Wrong("validate --config C", "--output is missing from C", "a path", "set it in a config"),
    Wrong("test --model Retriever", "--data and --output are missing", "a path", "--config FILE"),
    Wrong("prepare-data", "--source and --output are missing", "a Source, a path", "--config FILE.*prepare.yaml"),
    Wrong(PREPARE, "names Table without path", "a path", r"set source\.init_args\.path", ("path: events.csv", "user: u")),
    Wrong(PREPARE, "items has no id", "text", r"add source\.init_args\.items\.id", ("id: sku, ", "")),
    # keys
    Wrong(FIT, "C: trainr is not an option", "did you mean trainer", HELP, ("trainer:", "trainr:")),
    Wrong(FIT, r"C: trainer\.max_epoch is not", "max_epochs", HELP, ("max_epochs", "max_epoch")),
    Wrong(FIT, r"C: model\.init_args\.dmi is not", "mean dim", r"--model\.help Retriever", ("dim:", "dmi:")),
    Wrong(FIT, r"encoder\.init_args\.layer is", "mean layers", r"encoder\.help Transformer", ("layers:", "layer:")),
    Wrong(FIT, r"model\.class_pth is not a key", "mean class_path", HELP, ("class_path: Retr", "class_pth: Retr")),
    Wrong(FIT, r"model\.init_arg is not a key", "mean init_args", HELP, ("init_args:\n    dim", "init_arg:\n    dim")),
    Wrong(PREPARE, r"columns\.brand\.knd", "mean kind", "prepare-data --help", ("kind: cat", "knd: cat")),
    Wrong(PREPARE, "C: ouptut is not an option", "mean output", "prepare-data --help", ("output:", "ouptut:")),
    Wrong(MINE, r"signals\.0\.init_args\.candidate is", "mean candidates", r"signals\.help Pop", ("candidates: 5", "candidate: 5")),
    # classes
    Wrong(f"{FIT} --model.encoder HTSU", "'HTSU', which is no Encoder", "did you mean HSTU.*SASRec", LISTED),
    Wrong(FIT, "'Tranformer'", "mean Transformer", LISTED, ("Transformer", "Tranformer")),
    Wrong(f"{FIT} --model.encoder InfoNCE", "'InfoNCE', a Loss", "an Encoder, such as", LISTED),
    Wrong(f"{FIT} --model.loss HSTU", "'HSTU', an Encoder", "a Loss", "recsys list losses"),
    Wrong(f"{FIT} --model.encoder Encoder", "an abstract class", "BERT4Rec", LISTED),
    Wrong(f"{FIT} --model.encoder no.such.Thing", "No module named 'no'", "one of BERT4Rec", LISTED),
    Wrong(f"{FIT} --model.encoder torch.nn.Linear", "'torch.nn.Linear', another class", "an Encoder", LISTED),
    Wrong(f"{FIT} --model Retreiver", "'Retreiver'", "mean Retriever.*Ranker", HELP),
    Wrong(FIT, "encoder is 3", "an Encoder, by class_path", LISTED, ("encoder: {class_path: Transformer, init_args: {layers: 1, heads: 2}}", "encoder: 3")),
    Wrong(f"{PREPARE} --source Tabel", "'Tabel', which is no Source", "mean Table", "recsys list sources"),
    Wrong(f"{PREPARE} --split LeaveOneOt", "'LeaveOneOt'", "mean LeaveOneOut", "prepare-data --help"),
    Wrong(MINE, "'Contnt', which is no Signal", "mean Content.*Affinity", "list signals", ("- Content", "- Contnt")),
    Wrong(MINE, r"signals\.2 is 3|signals\.\d is 3", "a Signal, by class_path", "list signals", ("- Content", "- 3")),
    Wrong(MINE, "signals is 'Content'", "a list of Signal", "list signals", (SIGNALS, "signals: Content\n")),
    Wrong(f"{MINE} --miner RankBnd", "'RankBnd', which is no Miner", "mean RankBand", "mine-negatives --help"),
    Wrong("export-index --index Fiass", "'Fiass', which is no Index", "mean Faiss.*Exact", "export-index --help"),
    # values
    Wrong(f"{FIT} --trainer.max_epochs 3.5", "max_epochs is '3.5'", "a whole number or null", HELP),
    Wrong(FIT, "dim is 'wide'", "a whole number", HELP, ("dim: 16", "dim: wide")),
    Wrong(FIT, "init_args is 3", "a mapping of options", HELP, ("init_args: {max_length: 20, batch_size: 32}", "init_args: 3")),
    Wrong(f"{FIT} --data.request_time never", "'never'", "one of none, last_event, target", HELP),
    Wrong(f"{FIT} --model.encoder HSTU --model.encoder.scaling widht", "'widht'", "mean width.*length", HELP),
    Wrong(f"{FIT} --trainer.max_epochs=-5", "max_epochs is -5", "at least 1, or -1", HELP),
    Wrong(f"{FIT} --trainer.devices many", "devices is 'many'", r"auto, .*\[0, 1\]", HELP),
    Wrong(f"{FIT} --trainer.accelerator cpuu", "'cpuu'", "mean cpu", HELP),
    Wrong(f"{FIT} --early_stopping.mode up", "mode is 'up'", "min, max", HELP),
    Wrong(f"{FIT} --seed_everything=-3", "seed_everything is -3", "from 0 to", "set --seed_everything"),
    Wrong(f"{FIT} --trainer.limit_train_batches 2.5", "2.5", "a share from 0.0 to 1.0", HELP),
    Wrong(f"{FIT} --ckpt_path nope.ckpt", "nope.ckpt does not exist", "a checkpoint of a fit", "give its path, or"),
    Wrong(f"{FIT} --ckpt_path configs", "configs is a folder", "a checkpoint of a fit", "give its path, or"),
    Wrong(PREPARE, r"brand\.kind is 'catgorical'", "mean categorical.*multi", "prepare-data --help", ("categorical", "catgorical")),
    Wrong(PREPARE, "brand is 'text'", "a mapping with kind", "prepare-data --help", ("{kind: categorical}", "text")),
    Wrong(PREPARE, "brand has no kind", "categorical, multi or numeric", "add .*kind", ("{kind: categorical}", "{}")),
    Wrong(f"{PREPARE} --repeats no", "--repeats is 'no'", "first, last, keep", "prepare-data --help"),
    Wrong(MINE, "k is 'ten'", "a whole number", "mine-negatives --help", ("k: 10", "k: ten")),
    Wrong(MINE, "data is .'a', 'b'.", "a path", "mine-negatives --help", ("k: 10", "data: [a, b]")),
    Wrong("recommend --k ten", "--k is 'ten'", "a whole number", "recommend --help"),
    Wrong("recommend --seen maybe", "--seen is 'maybe'", "keep, filter", "recommend --help"),
    Wrong(RECOMMEND, "users is False as YAML reads it", "a list of text", "recommend --help", ("k: 5", "users: no")),
    Wrong(RECOMMEND, "users is 1000.0", "a list of text", "recommend --help", ("k: 5", "users: 1e3")),
    Wrong("evaluate --split tset", "--split is 'tset'", "mean test.*val", "evaluate --help"),
    Wrong("evaluate --plots maybe", "--plots is 'maybe'", "a boolean", "evaluate --help"),
    Wrong("export-index --index Auto --index.recall 1.5", r"recall is 1\.5", "above 0 and at most 1", r"set recall to 0\.95"),
    Wrong("export-index --index Auto --index.memory_gb=-2", r"memory_gb is -2", "above 0, or null", "set memory_gb to 2"),
    Wrong("export-index --index Auto --index.recal 0.9", "recal is not an option of Auto", "did you mean recall", "index.help"),
    Wrong("export-index --index Faiss --index.train_on 0", "train_on is 0", "at least 1, or null", "set train_on to"),
    Wrong("export-index --index Faiss --index.k_factor 0", "k_factor is 0", "at least 1", "set k_factor to 4"),
    Wrong("simulate --size big", "--size is 'big'", "demo, ml-20m", "simulate --help"),
]  # fmt: skip


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and text of a command line that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        recsys(*words)
    text = capsys.readouterr().err
    if isinstance(end.value.code, str):  # which Python prints, and exits with 1
        return 1, f"{end.value.code}\n"
    assert isinstance(end.value.code, int)
    return end.value.code, text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.words} {row.edit or ''}"[:70])
def test_a_wrong_command_line_gets_one_sentence(row: Wrong, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(row.words)
    config = next((CONFIGS[word] for word in words if word in CONFIGS), "")
    if row.edit is not None:
        assert row.edit[0] in config
        config = config.replace(*row.edit)
    (tmp_path / "C").write_text(config.replace("OUT", str(tmp_path / "out")), encoding="utf-8")
    places = {"C": str(tmp_path / "C"), "OUT": str(tmp_path / "out")}
    with nothing_written(tmp_path):
        status, text = refusal([places.get(word, word) for word in words], capsys)
    assert status in (1, 2)
    message = "\n".join(line for line in text.splitlines() if not line.startswith(("INFO:", "Seed set")))
    verb = f"recsys {words[0]}" if words and words[0] in cli.TRAINING | cli.COMMANDS else "recsys"
    assert message.startswith(f"{verb}: ")
    check_message(message.replace(f"{tmp_path}/", ""), row.value, row.expected, row.step)


def test_the_table_is_long_enough() -> None:
    assert len(ROWS) >= 60
    assert {row.words.split()[0] for row in ROWS if row.words} >= {*cli.TRAINING, "simulate", "evaluate", "recommend"}


# checkpoints and folders of another kind


@pytest.mark.parametrize(
    ("words", "value", "expected", "step"),
    [
        ("fit R --ckpt_path {ranker}", "checkpoint is that of a ranker", "that of a retriever", "give a retriever's"),
        ("fit K --ckpt_path {retriever}", "checkpoint is that of a retriever", "that of a ranker", "give a ranker's"),
        ("fit R --ckpt_path {retriever} --model.dim 32", "dim is 32", "began with 16", "new fit without --ckpt_path"),
        ("fit R --ckpt_path {retriever} --model.encoder HSTU", "is 'HSTU'", "began with 'Transformer'", "new fit"),
        ("fit R --ckpt_path {retriever} --data.max_length 10", "max_length of the data is 10", "with 20", "new fit"),
        ("validate R --ckpt_path {ranker}", "that of a ranker", "that of a retriever", "give a retriever's"),
        ("validate R --output {folder}/retriever --model.dim 32", "dim is 32", "trained with 16", "give the config"),
        ("validate R --output {folder}/ranker", "that of a ranker", "that of a retriever", "give a retriever's"),
        ("fit K --data.path {index}", "holds an index", "expected candidates", "mine-negatives wrote"),
        ("fit R --data.path {index}", "holds an index", "expected a dataset", "prepare-data wrote"),
        ("fit R --output {index}", "holds an index, which would be lost", "a new folder", "another --output"),
        ("fit R --output {folder}/ranker", "holds a ranker, which would be lost", "that of a retriever", "another"),
        ("fit R --output {folder}/retriever.yaml", "is a file", "expected a folder", "another --output"),
        ("fit R --trainer.max_epochs 0", "max_epochs is 0", "would take no step", "set it above 0"),
        ("fit R --checkpoint.monitor val/ndgc@10", "'val/ndgc@10' is not logged", "mean val/ndcg@10", "set --check"),
        ("fit R --trainer.max_time soon", "soon", "DD:HH:MM:SS", "recsys fit --help"),
        ("export-index --retriever {folder}/retriever --data {data} --output O", "is a folder", "a check", "best.ckpt"),
        ("export-index --retriever {ranker} --data {data} --output O", "of a ranker", "of a retriever", "recsys fit"),
        ("export-bundle --ranker {ranker} --index {data} --output O", "holds a dataset", "an index", "export-index"),
        ("export-onnx --bundle {data} --output O", "holds a dataset", "expected an index", "export-index wrote"),
        ("export-onnx --bundle {bundle} --output {index}", "holds an index", "another folder", "name another"),
        ("mine-negatives --data {index} --index {index} --output O", "holds an index", "a dataset", "prepare-data"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_an_artifact_of_another_kind_is_named(
    words: str, value: str, expected: str, step: str, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("folder", "data", "retriever", "index", "candidates", "ranker", "bundle")
    line = words.format(**{name: getattr(trained, name) for name in parts})
    for letter, stage, data in (("R", "retriever", trained.data), ("K", "ranker", trained.candidates)):
        config = f"--config {trained.folder / stage}.yaml --output {tmp_path / 'O'} --data.path {data}"
        line = line.replace(f" {letter} ", f" {config} ")
    with nothing_written(tmp_path, trained.folder):
        status, text = refusal([str(tmp_path / word) if word == "O" else word for word in line.split()], capsys)
    assert status == 1
    message = [one for one in text.splitlines() if one.startswith("recsys ")]
    check_message("\n".join(message), value, expected, step)


# Python


def test_a_config_of_the_estimator_gets_the_same_sentence(tmp_path: Path) -> None:
    (tmp_path / "prepare.yaml").write_text("core: ten\n")
    events = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [1, 2, 3, 1, 2, 3], "timestamp": [1, 2, 3, 4, 5, 6]}
    with pytest.raises(ValueError, match="core") as refused:
        TwoStageRecommender(tmp_path).fit(events)
    check_error(refused.value, r"prepare.yaml: core is 'ten'", "a whole number", "recsys prepare-data --help")


def test_errors_in_python_name_arguments_and_leave_commands_alone() -> None:
    said = without_dashes("--users is empty (--histories too); run: recsys fit --output x, or set --k; a--b")
    assert said == "users is empty (histories too); run: recsys fit --output x, or set k; a--b"
    with pytest.raises(FileNotFoundError, match=r"^histories is gone$"), parsing.python_errors():
        raise FileNotFoundError("--histories is gone")


# interruption and processes


def test_a_further_process_is_silent_if_the_first_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parsing.spoken_by_first_process(os.getppid(), patience=0.1), "this is the first process"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parsing.spoken_by_first_process(os.getppid() + 1, patience=0.1), "its parent is gone"
    assert not parsing.spoken_by_first_process(os.getppid(), patience=0.1), "its parent goes on"


def test_an_interrupted_command_ends_with_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(bundle: Path = Path()) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "evaluate", interrupt)
    status, text = refusal(["evaluate"], capsys)
    assert status == 130
    assert len(text.strip().splitlines()) == 1
    assert "interrupted" in text


@pytest.mark.slow
def test_two_processes_print_a_refusal_once(trained: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recsys2stage.cli.main", "fit", "--config", trained.folder / "retriever.yaml"]
    command += ["--data.path", trained.data, "--output", tmp_path / "out", "--data.batch_size", 4096]
    command += ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("recsys fit: ")]
    assert len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    check_message(
        said[0], "2 processes share 1 training batch", "at least one per process", "trainer.devices to at most 1"
    )


# parts


def test_the_harness_finds_what_is_missing(tmp_path: Path) -> None:
    good = "--k is -3, expected at least 1; give --k 10"
    check_message(good, r"--k is -3", "at least 1", r"--k 10")
    check_error(ValueError(good), "-3", "at least 1", "give")
    for wrong in ("\n".join([good] * 4), f"{good} object at 0x7f", "--k is -3; give --k 10", "", good * 50):
        with pytest.raises(AssertionError):
            check_message(wrong, "-3", "at least 1", "--k 10")
    with pytest.raises(AssertionError):
        check_error(KeyError(good), "-3", "at least 1", "give")
    with pytest.raises(AssertionError, match="left"), nothing_written(tmp_path):
        (tmp_path / ".left.partial").touch()


def test_types_are_told_in_words() -> None:
    assert type_words(int | None) == "a whole number or null"
    assert type_words(list[str | int]) == "a list of text or whole numbers"
    assert type_words(dict[str, float]) == "a mapping of numbers"
    assert type_words(EncoderFactory) == "an Encoder"
    assert type_words(tuple[int, Path]) == "a list of 2 (a whole number, a path)"
    assert nearest("HTSU", ["HSTU", "SASRec"]) == "HSTU"
    assert nearest("zzz", ["HSTU", "SASRec"]) is None


def test_a_class_of_the_user_is_among_the_names() -> None:
    (base,) = families(EncoderFactory)
    before = class_names([base])
    mine = type("MyEncoder", (base,), {"__module__": "my_module", "forward": lambda *_: torch.zeros(1)})
    assert set(class_names([base])) == {*before, "MyEncoder"}
    del mine


def test_what_no_walk_finds_is_told_by_the_parsers_line() -> None:
    message = 'Parser key "k":\n  Does not validate against any of the Union subtypes\n  - Expected a prime.\n  Got 4'
    assert informative_line(message) == "Expected a prime; RECSYS_DEBUG=1 shows the whole error"


def test_a_walk_of_what_is_right_finds_nothing() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--encoder", type=EncoderFactory, required=True)
    walk = Diagnosis(parser, "verb")
    walk.words(["--k", "3", "--encoder", "HSTU", "--encoder.heads=4", "--encoder", '{"class_path": "SASRec"}'])
    with pytest.raises(UsageError, match="--encoder is missing"):
        Diagnosis(parser, "verb").words(["--k=3"])


def test_the_parsers_own_text_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECSYS_DEBUG", "1")
    status, text = refusal(["evaluate", "--ouptut", "x"], capsys)
    assert status == 2
    assert "usage: " in text
    assert "unrecognized arguments: --ouptut x" in text
