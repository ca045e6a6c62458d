"""FOLDS: retrievers that leave out a fold of the users each, and a ranker on the lists of all folds."""

import json
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from make_project import ALL, REFITTED, ROOT, Project, verbs
from pipeline_fixtures import recsys

WORDS = ("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "SEED=1")
RUN = "runs/ml-1m-seed1"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_each_fold_has_a_retriever_and_lists_and_the_ranker_reads_them_all(project: Project) -> None:
    plain = project.make(*WORDS)
    calls = project.make(*WORDS, "FOLDS=3")
    assert verbs(calls) == [*(ALL[:3] * 3), *ALL[3:]], "the retriever, index and lists of the run are there"
    for number in range(3):
        (fit, index, mined), folder = calls[3 * number : 3 * number + 3], f"{RUN}/folds-3/{number}"
        of = f"--data.init_args.fold {number}/3 --seed_everything 1 --output {folder}/retriever"
        assert fit == plain[1].replace(f"--seed_everything 1 --output {RUN}/retriever", of)
        assert f"--retriever {folder}/retriever/best.ckpt" in index
        assert f"--output {folder}/index" in index
        assert f"--seed 1 --data data/ml-1m --index {folder}/index --output {folder}/candidates" in mined
        assert mined.endswith(f"--fold {number}/3 --targets 8")
    ranker, bundle, report, lists = calls[9:]
    folds = ",".join(f"{RUN}/folds-3/{number}/candidates" for number in range(3))
    assert f"--data.init_args.path {RUN}/candidates --data.init_args.folds [{folds}] " in ranker
    assert "--model.init_args.without+=state" in ranker
    assert f"--index {RUN}/index --ranker {RUN}/folds-3/ranker/best.ckpt --output {RUN}/folds-3/bundle" in bundle
    assert f"--output {RUN}/folds-3" in report
    assert f"--output {RUN}/folds-3/recommendations.parquet" in lists
    said = [line for line in project.said.splitlines() if line.startswith("[")]
    assert said[0] == f"[5/17] train a retriever without fold 0/3: {RUN}/folds-3/0/retriever"
    assert said[-1] == f"[17/17] recommend for all users: {RUN}/folds-3/recommendations.parquet"
    assert f"  {RUN}/folds-3/ranker/" in project.said
    assert project.make(*WORDS, "FOLDS=3") == project.make(*WORDS) == [], "neither disturbs the other"
    refits = project.make(*WORDS, "FOLDS=3", "REFIT=ranker")
    assert refits[0].startswith(ranker.partition(" --seed_everything")[0])
    assert f"--data.init_args.refit {RUN}/folds-3/ranker " in refits[0]
    refits = project.make(*WORDS, "FOLDS=3", "REFIT=all")
    assert verbs(refits) == REFITTED
    assert f"--output {RUN}/refit-all/retriever" in refits[0], "the run's own retriever"
    assert f"--ranker {RUN}/folds-3/ranker/best.ckpt" in refits[2]
    assert f"--output {RUN}/folds-3/refit-all/bundle" in refits[2]
    assert verbs(project.make(*WORDS, "FOLDS=3", "TARGETS=4")) == ["mine-negatives"] * 3 + ALL[3:]
    project.change("configs/ml-1m/ranker.yaml")
    assert verbs(project.make(*WORDS, "FOLDS=3", "TARGETS=4")) == ALL[3:]


def test_a_killed_fold_resumes(project: Project) -> None:
    project.make("retriever", *WORDS[1:])
    (project.folder / "kill").touch()
    assert verbs(project.make("retriever", *WORDS[1:], "FOLDS=2")) == ["fit"]
    (project.folder / "kill").unlink()
    calls = project.make("retriever", *WORDS[1:], "FOLDS=2")
    assert verbs(calls) == ALL[:2] * 2
    assert f"--ckpt_path {RUN}/folds-2/0/retriever/last.ckpt" in calls[0]


def test_a_second_retriever_is_that_of_the_same_fold(project: Project) -> None:
    """In the results, each run has the folds of both retrievers."""
    words = ("results", *WORDS[1:3], "SEEDS=3 5", "REFIT=", "FOLDS=2")
    calls = project.make(*words)
    assert verbs(calls) == ["prepare-data", *(ALL[:2] * 6), *([*ALL[2:3] * 3, *ALL[3:]] * 2)]
    mined = [call for call in calls if call.startswith("mine-negatives") and "--fold" in call]
    for call, (seed, other, fold) in zip(mined, [(3, 5, 0), (3, 5, 1), (5, 3, 0), (5, 3, 1)], strict=True):
        assert f"--signals.index=runs/ml-1m-seed{other}/folds-2/{fold}/index" in call
        assert f"--index runs/ml-1m-seed{seed}/folds-2/{fold}/index" in call
        assert f"--output runs/ml-1m-pair-seed{seed}/folds-2/{fold}/candidates" in call
    shutil.rmtree(project.folder / "runs/ml-1m-seed5/folds-2/1")
    assert project.make(*WORDS[:3], "SEED=3", "OTHER=runs/ml-1m-seed5/index/", "FOLDS=2") == []
    assert "has no such folds, expected runs/ml-1m-seed5/folds-2/1/index/manifest.json; make that run's" in project.said


def test_another_number_of_folds_is_refused_in_a_sentence(project: Project) -> None:
    for value in ("1", "0", "05", "1001", "2.5", "five", "2 3", "it's"):
        assert project.make(*WORDS, f"FOLDS={value}") == []
        assert f"FOLDS={value}, expected a whole number from 2 to 1000; set FOLDS=5 for example" in project.said
        assert len(project.said.splitlines()) == 1


def test_the_number_of_targets_is_a_number_or_nothing(project: Project) -> None:
    assert project.make(*WORDS, "FOLDS=2", "TARGETS=0") == []
    assert "TARGETS=0, expected a whole number from 1 to 1000; set TARGETS=8, or to nothing" in project.said
    project.make(*WORDS, "FOLDS=2", "TARGETS=", "--dry-run")
    assert "--fold 1/2" in project.said
    assert "--targets" not in project.said


# a program that sends its words to the test, since importing torch for every stage takes longer than the stages
CLIENT = """#!{python} -SE
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect("recsys.socket")
connection.sendall("\\0".join(sys.argv[1:]).encode())
connection.shutdown(socket.SHUT_WR)
sys.exit(connection.recv(1) != b"0")
"""


def make_in_process(*words: str) -> str:
    """Runs make in the working directory, and the commands that its rules call in this process; returns its output."""
    client, path = Path("recsys"), Path("recsys.socket")
    client.write_text(CLIENT.format(python=sys.executable))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(0.1)
        command = ["make", *words, "RECSYS=./recsys", "READY="]
        with Path("said.txt").open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
            while process.poll() is None:
                with suppress(TimeoutError):
                    connection = listener.accept()[0]
                    with connection, connection.makefile("rb") as sent:
                        connection.settimeout(None)
                        status = b"1"
                        try:
                            recsys(*sent.read().decode().split("\0"))
                            status = b"0"
                        finally:
                            connection.sendall(status)
    path.unlink()
    output = Path("said.txt").read_text()
    assert process.returncode == 0, output[-3000:]
    return output


@pytest.mark.slow
def test_folds_of_real_runs(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage accepts what the others wrote, with both kinds of refit; and what make notes disturbs none."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(raw, tmp_path / "data/raw/demo")
    monkeypatch.chdir(tmp_path)
    Path("Makefile").write_text("DATASET ?= demo\ninclude configs/pipeline.mk\n")
    for stage in ("retriever", "ranker"):
        path = Path(f"configs/demo/{stage}.yaml")
        path.write_text(re.sub(r"max_epochs: \d+", "max_epochs: 2", path.read_text()))
    make_in_process("pipeline", "FOLDS=2")
    folds = Path("runs/demo/folds-2")
    made = json.loads((folds / "ranker/manifest.json").read_text())
    assert set(made["parents"]) == {"candidates", "fold 1", "fold 2"}
    for refit in ("ranker", "all"):
        make_in_process("pipeline", "FOLDS=2", f"REFIT={refit}")
        assert json.loads((folds / f"refit-{refit}/report.json").read_text())["users"] > 0
    for path in tmp_path.rglob("*"):
        path.touch()
    assert not re.search(r"^\[\d", make_in_process("pipeline", "FOLDS=2", "REFIT=all"), re.MULTILINE), (
        "nothing is redone"
    )
    with Path("configs/demo/prepare.yaml").open("a") as file:
        file.write("# a comment\n")
    stages = re.findall(r"^\[\d+/\d+\] (.*): ", make_in_process("pipeline", "FOLDS=2"), re.MULTILINE)
    assert stages == ["prepare the data: data/demo (changed"], "the same data, so all lists and models stay"
