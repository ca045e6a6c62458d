"""Make after kills, races, links and removed files: nothing stale counts as up to date, nothing trained is lost."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from make_project import STAND_IN, Project, verbs

WORDS = ("pipeline", "DATASET=ml-1m", "RAW=raw.zip")
DATA, RUN = "data/ml-1m/manifest.json", "runs/ml-1m"
RETRIEVER, INDEX = f"{RUN}/retriever/manifest.json", f"{RUN}/index/manifest.json"
CONFIG = "configs/ml-1m/retriever.yaml"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def replace(project: Project, verb: str, recipe: str) -> None:
    """Lets the stand-in do something else before what a verb does."""
    (project.folder / ".venv/bin/recsys").write_text(
        STAND_IN.replace("case $verb in\n", f"case $verb in\n    {verb}) {recipe} ;;\nesac\ncase $verb in\n")
    )


def interrupt(project: Project, *words: str) -> None:
    """Presses Ctrl-C when the stand-in waits."""
    command = ["env", "--default-signal=INT", "make", *words]
    with subprocess.Popen(
        command, cwd=project.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        for _ in range(600):
            if (project.folder / "waits").exists():
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)


def test_a_raw_file_behind_a_link_counts_by_its_contents(project: Project) -> None:
    (project.folder / "far.zip").write_text("rows\n")
    (project.folder / "raw.zip").unlink()
    (project.folder / "raw.zip").symlink_to("far.zip")
    words = (DATA, *WORDS[1:])
    project.make(*words)
    assert project.make(*words) == project.make(*words) == []
    project.change("far.zip")
    assert verbs(project.make(*words)) == ["prepare-data"]


def test_raw_data_that_change_while_they_are_read_are_read_again(project: Project) -> None:
    words = (DATA, *WORDS[1:])
    recsys = project.folder / ".venv/bin/recsys"
    recsys.write_text(STAND_IN + "[ $verb != prepare-data ] || { sleep 0.05; echo late >> raw.zip; }\n")
    project.make(*words)
    recsys.write_text(STAND_IN)
    assert verbs(project.make(*words)) == ["prepare-data"]
    assert project.make(*words) == []


def test_a_stage_that_is_interrupted_between_its_artifact_and_its_note_is_run_again(project: Project) -> None:
    """The config was changed while it ran; the artifact is newer than the config, and yet was made with the old one."""
    words = (INDEX, *WORDS[1:])
    project.change("configs/ml-1m/index.yaml", "a: 1\n")
    recsys = project.folder / ".venv/bin/recsys"
    waits = "[ $verb != export-index ] || { trap 'exit 130' INT; touch waits; while :; do sleep 0.05; done; }\n"
    changes = (
        "export-index) sleep 0.05; echo b: 1 >> configs/ml-1m/index.yaml; sleep 0.05; mkdir -p $output; manifest ;;"
    )
    recsys.write_text(STAND_IN.replace("    *) mkdir", f"    {changes}\n    *) mkdir") + waits)
    interrupt(project, *words)
    assert (project.folder / INDEX).exists(), "recsys refuses a folder whose manifest is gone"
    recsys.write_text(STAND_IN)
    assert verbs(project.make(*words)) == ["export-index"]
    assert project.make(*words) == []


def test_a_failed_stage_leaves_what_it_would_have_replaced_up_to_date(project: Project) -> None:
    words = (INDEX, *WORDS[1:])
    config = project.folder / "configs/ml-1m/index.yaml"
    config.write_text("a: 1\n")
    project.make(*words)
    replace(project, "export-index", "exit 1")
    config.write_text("wrong: 1\n")
    assert verbs(project.make(*words)) == verbs(project.make(*words)) == ["export-index"]
    config.write_text("a: 1\n")
    assert project.make(*words) == []


def test_a_fit_without_checkpoints_is_kept_as_well(project: Project) -> None:
    """Its manifest would count as that of the next fit, were that killed."""
    words = (RETRIEVER, *WORDS[1:])
    text = (project.folder / CONFIG).read_text()
    project.make(*words)
    for name in ("best.ckpt", "last.ckpt"):
        (project.folder / RUN / "retriever" / name).unlink()
    made = (project.folder / RETRIEVER).read_text()
    project.change(CONFIG)
    replace(project, "fit", "exit 1")
    assert verbs(project.make(*words)) == verbs(project.make(*words)) == ["fit"]
    assert (project.folder / RUN / "retriever.before/manifest.json").read_text() == made
    (project.folder / CONFIG).write_text(text)
    assert project.make(*words) == []
    assert (project.folder / RETRIEVER).read_text() == made


def test_what_replaces_a_fit_that_is_back_is_kept_without_its_last_checkpoint(project: Project) -> None:
    words = (RETRIEVER, *WORDS[1:])
    text = (project.folder / CONFIG).read_text()
    project.make(*words)
    project.change(CONFIG)
    project.make(*words)
    other = (project.folder / RETRIEVER).read_text()
    (project.folder / RUN / "retriever/last.ckpt").unlink()
    (project.folder / CONFIG).write_text(text)
    assert project.make(*words) == []
    assert (project.folder / RUN / "retriever.before/manifest.json").read_text() == other


@pytest.mark.parametrize(("host", "runs"), [("another", True), (os.uname().nodename, False)], ids=["other", "own"])
def test_a_lock_is_of_a_host_and_of_a_process_not_only_of_its_number(project: Project, host: str, runs: bool) -> None:
    """The process of another host cannot be seen; a number of this host may be another process's by now."""
    words = (RETRIEVER, *WORDS[1:])
    (project.folder / "kill").touch()
    project.make(*words)
    lock = f'{{"pid": {os.getpid() if not runs else 4194303}, "host": "{host}", "started": "1", "since": "then"}}'
    (project.folder / RUN / ".retriever.running").write_text(lock)
    project.change(CONFIG)
    project.make(*words)
    assert (project.folder / RUN / "retriever.before").exists() != runs


def test_two_makes_that_prepare_the_same_data_lose_none(project: Project) -> None:
    """The second is refused by recsys while the first runs, and must leave the first's copy of the manifest alone."""
    words = (DATA, *WORDS[1:])
    project.make(*words)
    manifest = (project.folder / DATA).read_text()
    project.change("configs/ml-1m/prepare.yaml", "# a comment\n")
    replace(project, "prepare-data", "[ ! -e first ] || exit 1; touch first; sleep 0.5")
    with subprocess.Popen(["make", *words], cwd=project.folder, stdout=subprocess.DEVNULL) as first:
        time.sleep(0.25)
        project.make(*words)
    assert first.returncode == 0
    assert (project.folder / DATA).read_text() == manifest
    assert not list((project.folder / "data").glob(".ml-1m.manifest*"))


def test_a_damaged_note_of_the_raw_data_is_no_note(project: Project) -> None:
    words = (DATA, *WORDS[1:])
    project.make(*words)
    (project.folder / "data/.ml-1m.raw").write_text("raw.zip\ndamaged\n")
    assert verbs(project.make(*words)) == ["prepare-data"]
    assert "(changed: data/.ml-1m.raw)" in project.said
    assert project.make(*words) == []


def test_a_run_without_a_folder_is_refused(project: Project) -> None:
    """Its artifacts would lie in the root folder."""
    assert project.make(*WORDS, "RUN=") == []
    assert "RUN is empty, expected a folder of your own" in project.said
    assert len(project.said.splitlines()) == 1
