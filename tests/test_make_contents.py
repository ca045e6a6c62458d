"""Make runs a stage again if the contents of what it reads have changed, whatever the dates of the files."""

import os
import shutil
import time
from pathlib import Path

import pytest
from make_project import ALL, REFITTED, Project, verbs

WORDS = ("pipeline", "DATASET=ml-1m", "RAW=raw.zip")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def touch_everything(project: Project) -> None:
    """Gives all configs, raw data and artifacts the date of now, in an order unlike that in which they were made."""
    for path in sorted(project.folder.rglob("*"), reverse=True):
        if path.is_file():
            path.touch()


def forget(project: Project) -> None:
    """Removes all notes, as if an earlier version had made the run."""
    for path in [*project.folder.rglob(".*.inputs"), project.folder / "data/.ml-1m.raw"]:
        path.unlink()
    (project.folder / "data/.ml-1m.raw").write_text("raw.zip\n")  # all that it noted


def test_new_dates_of_equal_contents_redo_nothing(project: Project) -> None:
    project.make(*WORDS, "WITH=hstu")
    (project.folder / "raw.zip").unlink()
    (project.folder / "raw.zip").touch()  # as if copied anew
    assert project.make(*WORDS, "WITH=hstu") == []
    touch_everything(project)
    assert project.make(*WORDS, "WITH=hstu", "--dry-run") == []
    assert "[" not in project.said.partition("echo")[0], "no stage is left"
    assert project.make(*WORDS, "WITH=hstu") == []
    shutil.copytree(project.folder / "runs", project.folder / "copy")  # with dates in any order
    shutil.rmtree(project.folder / "runs")
    (project.folder / "copy").rename(project.folder / "runs")
    assert project.make(*WORDS, "WITH=hstu") == []


def test_one_byte_redoes_what_depends_on_it_however_old_the_file_is(project: Project) -> None:
    words = (*WORDS, "WITH=hstu")
    project.make(*words)
    for changed, redone in {
        "configs/ml-1m/ranker.yaml": ALL[3:],
        "configs/ml-1m/mine.yaml": ALL[2:],
        "configs/with/hstu.yaml": ALL,
        "configs/ml-1m/retriever.yaml": ALL,
        "configs/ml-1m/prepare.yaml": ["prepare-data", *ALL],
        "raw.zip": ["prepare-data", *ALL],
    }.items():
        project.change(changed, "x")
        os.utime(project.folder / changed, (1, 1))
        if changed.endswith("mine.yaml"):
            assert project.make(*words, "--dry-run") == []
            assert project.said.count(".venv/bin/recsys ") == len(redone) + 1, "it lists the commands, and what is next"
        assert verbs(project.make(*words)) == redone
        assert f"(changed: {changed})" in project.said
    assert project.make(*words) == []


def test_a_new_file_in_the_raw_folder_is_another_dataset(project: Project) -> None:
    (project.folder / "raw").mkdir()
    (project.folder / "raw/ratings.dat").write_text("1::2\n")
    words = (*WORDS[:2], "RAW=raw")
    project.make(*words)
    for path in (project.folder / "raw/ratings.dat", project.folder / "raw"):
        path.touch()
    assert project.make(*words) == []
    (project.folder / "raw/users.dat").write_text("1\n")
    assert verbs(project.make(*words)) == ["prepare-data", *ALL]


def test_data_that_are_prepared_again_with_the_same_content_redo_nothing_else(project: Project) -> None:
    project.make(*WORDS)
    manifest = (project.folder / "data/ml-1m/manifest.json").read_bytes()
    project.change("configs/ml-1m/prepare.yaml", "# a comment\n")
    assert verbs(project.make(*WORDS)) == ["prepare-data"]
    assert "The prepared data are the same as before." in project.said
    shutil.copy(project.folder / "raw.zip", project.folder / "copy.zip")
    assert verbs(project.make(*WORDS[:2], "RAW=copy.zip")) == ["prepare-data"]
    assert project.make(*WORDS[:2], "RAW=copy.zip") == project.make(*WORDS[:2]) == []
    assert (project.folder / "data/ml-1m/manifest.json").read_bytes() == manifest, "its hash is in those made from it"


def test_runs_of_earlier_versions_are_up_to_date_by_their_dates_once(project: Project) -> None:
    project.make(*WORDS)
    forget(project)
    assert project.make(*WORDS, "--dry-run") == []
    assert "[" not in project.said.partition("echo")[0]
    assert not [*project.folder.rglob(".*.inputs")], "a dry run writes nothing"
    assert project.make(*WORDS) == []
    touch_everything(project)
    assert project.make(*WORDS) == [], "noted by now"


def test_runs_of_earlier_versions_are_out_of_date_by_their_dates(project: Project) -> None:
    project.make(*WORDS)
    forget(project)
    time.sleep(0.01)
    (project.folder / "configs/ml-1m/ranker.yaml").touch()
    assert verbs(project.make(*WORDS)) == ALL[3:]


def test_a_raw_file_that_is_newer_than_data_of_an_earlier_version_retrains_nothing(project: Project) -> None:
    project.make(*WORDS)
    forget(project)
    (project.folder / "raw.zip").touch()
    assert verbs(project.make(*WORDS)) == ["prepare-data"]
    assert project.make(*WORDS) == []


# fits


def killed(project: Project, *words: str) -> None:
    (project.folder / "kill").touch()
    project.make(*words)
    (project.folder / "kill").unlink()


@pytest.mark.parametrize("noted", [True, False])
def test_a_killed_fit_resumes_after_new_dates_of_its_inputs(project: Project, noted: bool) -> None:
    """Without notes, as an earlier version left it, only dates tell, so here they stay."""
    killed(project, *WORDS)
    if noted:
        touch_everything(project)
    else:
        forget(project)
    calls = project.make(*WORDS, "TRUST=my_signals")
    assert verbs(calls) == ALL
    assert "--ckpt_path runs/ml-1m/retriever/last.ckpt" in calls[0]


@pytest.mark.parametrize("changed", ["configs/ml-1m/retriever.yaml", "raw.zip"])
def test_a_fit_whose_inputs_changed_starts_anew_says_so_and_keeps_what_was_trained(
    project: Project, changed: str
) -> None:
    killed(project, *WORDS)
    (project.folder / "runs/ml-1m/retriever/last.ckpt").write_text("hours of training")
    project.change(changed)
    calls = project.make(*WORDS)
    assert "--ckpt_path" not in "".join(calls)
    own = {"raw.zip": "data/ml-1m/manifest.json"}.get(changed, changed)
    assert f"train the retriever: runs/ml-1m/retriever (changed: {own})" in project.said
    assert "is kept in runs/ml-1m/retriever.before until the next change" in project.said
    assert (project.folder / "runs/ml-1m/retriever.before/last.ckpt").read_text() == "hours of training"


def test_a_change_that_is_undone_takes_back_what_was_trained(project: Project) -> None:
    config = project.folder / "configs/ml-1m/retriever.yaml"
    text = config.read_text()
    killed(project, *WORDS)
    (project.folder / "runs/ml-1m/retriever/last.ckpt").write_text("hours of training")
    project.change("configs/ml-1m/retriever.yaml")
    killed(project, *WORDS)
    config.write_text(text)
    calls = project.make(*WORDS)
    assert "back from runs/ml-1m/retriever.before" in project.said
    assert verbs(calls) == ALL
    assert "--ckpt_path runs/ml-1m/retriever/last.ckpt" in calls[0]
    project.change("configs/ml-1m/retriever.yaml")
    killed(project, *WORDS)
    config.write_text(text)
    assert project.make(*WORDS) == [], "the finished run is back, and all that was made from it"


def test_a_refit_resumes_likewise(project: Project) -> None:
    project.make(*WORDS)
    killed(project, *WORDS, "REFIT=all")
    touch_everything(project)
    calls = project.make(*WORDS, "REFIT=all")
    assert verbs(calls) == REFITTED
    assert "--ckpt_path runs/ml-1m/refit-all/retriever/last.ckpt" in calls[0]


def test_a_run_in_progress_keeps_its_folder(project: Project) -> None:
    killed(project, *WORDS)
    (project.folder / "runs/ml-1m/.retriever.running").write_text(f'{{"pid": {os.getpid()}, "host": "here"}}')
    note = project.folder / "runs/ml-1m/retriever/.manifest.json.inputs"
    before = note.read_text()
    project.change("configs/ml-1m/retriever.yaml")
    killed(project, *WORDS)  # recsys would refuse to write there
    assert note.read_text() == before
    assert not (project.folder / "runs/ml-1m/retriever.before").exists()


def test_another_seed_in_the_same_folder_is_another_fit(project: Project) -> None:
    project.make(*WORDS, "RUN=runs/own", "SEED=1")
    assert project.make(*WORDS, "RUN=runs/own", "SEED=1") == []
    assert verbs(project.make(*WORDS, "RUN=runs/own", "SEED=2")) == ALL
    assert "(changed: SEED=1 SEED=2)" in project.said
