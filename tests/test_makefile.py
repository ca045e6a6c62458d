"""Make's rules, with a stand-in for `recsys` that only touches what each verb would write."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from make_project import ALL, REFITTED, ROOT, STAND_IN, Project, verbs

SLOW = "    fit) trap 'exit 130' INT; echo started > started; while :; do sleep 0.05; done ;;\n    simulate)"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_pipeline_runs_every_stage_once(project: Project) -> None:
    assert verbs(project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip")) == ["prepare-data", *ALL]
    assert project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip") == []


def test_refits_lie_beside_what_was_chosen(project: Project) -> None:
    words = ("pipeline", "DATASET=ml-1m", "RAW=raw.zip")
    chosen, run = project.make(*words), "runs/ml-1m"
    fit, index, bundle, report, lists = project.make(*words, "REFIT=all")
    refit = f"--data.init_args.refit {run}/retriever --data.init_args.until test --output {run}/refit-all/retriever"
    assert fit.endswith(refit)
    assert fit.partition(" --data.init_args.refit")[0] == chosen[1].partition(" --output")[0], "the same options"
    assert f"--retriever {run}/refit-all/retriever/best.ckpt" in index
    assert f"--index {run}/refit-all/index --ranker {run}/ranker/best.ckpt --data data/ml-1m " in bundle
    assert bundle.endswith(f"--output {run}/refit-all/bundle")
    assert f"--bundle {run}/refit-all/bundle --data data/ml-1m --output {run}/refit-all" in report
    assert f"--output {run}/refit-all/recommendations.parquet" in lists
    assert f"  {run}/refit-all/bundle/" in project.said
    production = project.make(*words, "REFIT=production")
    assert verbs(production) == [verb for verb in REFITTED if verb != "evaluate"], "no figures"
    assert f"--data.init_args.until end --output {run}/refit-production/retriever" in production[0]
    assert "No report: the test events are trained on too" in project.said
    fit, bundle, *_ = project.make(*words, "REFIT=ranker")
    assert fit.endswith(f"--data.init_args.refit {run}/ranker --output {run}/refit-ranker/ranker")
    assert f"--index {run}/index --ranker {run}/refit-ranker/ranker/best.ckpt" in bundle
    for refit in ("", "ranker", "all", "production"):
        assert project.make(*words, f"REFIT={refit}") == [], "none disturbs another"
    project.change("configs/ml-1m/ranker.yaml")
    assert verbs(project.make(*words, "REFIT=all")) == ["fit", *REFITTED[2:]], "the refitted retriever stays"


def test_results_pair_each_seed_with_the_next_one_s_retriever(project: Project) -> None:
    refitted = project.make("results", "DATASET=ml-1m", "RAW=raw.zip", "SEEDS=3 5")
    assert verbs(refitted) == ["prepare-data", *(ALL[:2] * 4), *(ALL[2:] * 2), *(REFITTED[2:] * 2)]
    bundles = [call for call in refitted if call.startswith("export-bundle")][2:]
    for call, seed, other in zip(bundles, (3, 5), (5, 3), strict=True):
        assert f"--index runs/ml-1m-seed{seed}/refit-all/index" in call
        assert f"--other runs/ml-1m-seed{other}/refit-all/index --output runs/ml-1m-pair-seed{seed}/refit-all" in call
    shutil.rmtree(project.folder / "runs")
    calls = project.make("results", "DATASET=ml-1m", "RAW=raw.zip", "SEEDS=3 5", "REFIT=")
    assert verbs(calls) == [*ALL[:2], *ALL[:2], *ALL[2:], *ALL[2:]]
    mined = [call for call in calls if call.startswith("mine-negatives")]
    for call, seed, other in zip(mined, (3, 5), (5, 3), strict=True):
        assert f"--signals+=OtherRetriever --signals.index=runs/ml-1m-seed{other}/index" in call
        assert f"--seed {seed} " in call
        assert f"--index runs/ml-1m-seed{seed}/index --output runs/ml-1m-pair-seed{seed}/candidates" in call
    assert all("runs/ml-1m-seed" not in call for call in calls if call.startswith("evaluate"))
    alone = project.make("results", "DATASET=ml-1m", "RAW=raw.zip", "SEEDS=3 5", "PAIR=", "REFIT=")
    assert verbs(alone) == [*ALL[2:], *ALL[2:]], "the first stages are there"
    assert "OtherRetriever" not in "".join(alone)
    one = project.make("results", "DATASET=ml-1m", "RAW=raw.zip", "SEEDS=3", "REFIT=")
    assert verbs(one) == [], "one seed has no other"


def test_the_demo_makes_its_own_world(project: Project) -> None:
    assert verbs(project.make("demo")) == ["simulate", "prepare-data", *ALL]


def test_a_changed_config_redoes_only_what_depends_on_it(project: Project) -> None:
    project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip")
    project.change("configs/ml-1m/ranker.yaml")
    assert verbs(project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip")) == ALL[3:]


def test_another_archive_is_another_dataset_however_old(project: Project) -> None:
    project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip")
    (project.folder / "other.zip").touch()
    os.utime(project.folder / "other.zip", (1, 1))
    assert "--source.path other.zip" in project.make("pipeline", "DATASET=ml-1m", "RAW=other.zip")[0]


def test_new_rows_in_a_file_that_the_manifest_names_make_the_data_anew(project: Project) -> None:
    inputs = ["events of 2026/a.csv", "items.csv", "events of 2026"]
    (project.folder / "events of 2026").mkdir()
    for name in inputs[:2]:
        (project.folder / name).write_text("rows\n")
    (project.folder / "inputs.txt").write_text("\n".join(inputs) + "\n")
    project.make("pipeline", "DATASET=ml-1m")
    assert project.make("pipeline", "DATASET=ml-1m") == []
    for changed in ("events of 2026/a.csv", "items.csv", "events of 2026/new shard.csv"):
        project.change(changed)
        assert verbs(project.make("pipeline", "DATASET=ml-1m")) == ["prepare-data", *ALL]
    (project.folder / "items.csv").unlink()
    assert verbs(project.make("pipeline", "DATASET=ml-1m")) == ["prepare-data", *ALL]


@pytest.mark.parametrize("touched", ["configs/ml-1m/retriever.yaml", "configs/with/request-time.yaml"])
def test_a_fit_whose_config_changed_starts_anew(project: Project, touched: str) -> None:
    words = ("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "WITH=request-time")
    project.make(*words)
    project.change(touched)
    calls = project.make(*words)
    assert verbs(calls) == ALL
    assert "--config configs/with/request-time.yaml" in calls[0]
    assert "--ckpt_path" not in calls[0]


def test_overlays_stack_in_their_order(project: Project) -> None:
    (project.folder / "configs/with/other.yaml").touch()
    calls = project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "WITH=request-time other")
    assert "--config configs/with/request-time.yaml --config configs/with/other.yaml" in calls[1]
    assert "--output runs/ml-1m-request-time-other/retriever" in calls[1]


def test_a_seed_has_runs_of_its_own(project: Project) -> None:
    calls = project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "SEED=3")
    assert "--seed_everything 3 --output runs/ml-1m-seed3/retriever" in calls[1]
    assert "--seed 3" in calls[3]


@pytest.mark.parametrize("words", [("pipeline", "RAW=nowhere.zip"), ("clean", "DATASET=")])
def test_a_wrong_word_stops_at_once(project: Project, words: tuple[str, ...]) -> None:
    assert project.make(*words) == []
    assert "nowhere.zip does not exist" in project.said or "DATASET is empty" in project.said


def test_the_numeric_tests_run_with_the_vector_widths_of_other_processors(project: Project) -> None:
    project.make("--dry-run", "test-portable")
    calls = project.said.split("ATEN_CPU_CAPABILITY=")[1:]
    assert [call.split()[0] for call in calls] == ["default", "avx2"]
    named = [set(re.findall(r"tests/[\w/.]+", call)) for call in calls]
    assert (
        named[0]
        == named[1]
        >= {"tests/retrieval", "tests/ranking/test_scorers.py", "tests/evaluation/test_evaluate.py"}
    )
    assert all((ROOT / path).exists() for path in named[0])


def test_help_lists_every_target_that_has_a_comment(project: Project) -> None:
    project.make("help")
    for target in ("setup", "demo", "pipeline", "test", "test-portable", "lint", "clean"):
        assert f"\n{target} " in "\n" + project.said


def test_every_verb_that_loads_artifacts_gets_trust(project: Project) -> None:
    calls = project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "TRUST=my_signals my_index")
    assert [verb for verb in verbs(calls) if verb != "prepare-data"] == ALL
    assert all("--trust [my_signals,my_index]" in call for call in calls[1:])
    without = project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "SEED=1")
    assert verbs(without) == ALL
    assert not any("--trust" in call for call in without)


def test_each_stage_has_a_number_and_a_path_and_no_shell_is_shown(project: Project) -> None:
    project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip")
    stages = [line for line in project.said.splitlines() if line.startswith("[")]
    assert stages[0] == "[1/8] prepare the data: data/ml-1m"
    assert stages[4] == "[5/8] train the ranker: runs/ml-1m/ranker"
    assert stages[-1] == "[8/8] recommend for all users: runs/ml-1m/recommendations.parquet"
    assert len(stages) == 8
    assert not any(word in project.said for word in ("--config", "trap", "echo", "RECSYS_HINTS"))
    ended = project.said.split("written:\n")[1].splitlines()
    for path in ("data/ml-1m/", "runs/ml-1m/retriever/", "runs/ml-1m/bundle/", "runs/ml-1m/report.md"):
        assert f"  {path}" in ended
    assert ended[-1].startswith("next: ")
    project.change("configs/ml-1m/ranker.yaml")
    project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip")
    assert [line[:5] for line in project.said.splitlines() if line.startswith("[")] == [
        f"[{n}/8]" for n in (5, 6, 7, 8)
    ]
    project.make("demo")
    assert "[1/9] simulate a log: data/raw/demo" in project.said
    project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "REFIT=ranker")
    assert "[6/9] train the ranker on all lists: runs/ml-1m/refit-ranker/ranker" in project.said
    project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "REFIT=all")
    assert "[6/10] train the retriever again: runs/ml-1m/refit-all/retriever" in project.said


def test_two_jobs_and_a_dry_run_are_the_same_pipeline(project: Project) -> None:
    assert project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "--dry-run") == []
    assert "[8/8] recommend" in project.said
    assert "prepare-data --config configs/ml-1m/prepare.yaml" in project.said
    assert sorted(verbs(project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip", "-j2"))) == sorted(
        ["prepare-data", *ALL]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("DATASET=ml1m",),
            "there is no folder configs/ml1m with configs, expected one of: amazon-beauty demo .*; did you mean ml-1m",
        ),
        (
            ("DATASET=nope",),
            "DATASET=nope: there is no folder configs/nope with configs, expected one of: amazon-beauty",
        ),
        (("DATASET=it's",), "DATASET=it's: there is no folder configs/it's"),
        (("DATASET=ml-1m demo",), "DATASET=ml-1m demo has 2 words, expected one of: amazon-beauty"),
        (("pipeline", "WITH=hstuu"), r"configs/with/hstuu.yaml does not exist; WITH takes bce .*; did you mean hstu\?"),
        (("pipeline", "REFIT=1"), "REFIT=1, expected one of: ranker all production; what was REFIT=1 is REFIT=ranker"),
        (("pipeline", "REFIT=alll"), r"REFIT=alll, expected one of: ranker all production; did you mean all\?"),
        (("pipeline", "REFIT=ranker all"), "REFIT=ranker all, expected one of: ranker all production"),
        (("pipeline", "OTHER=gone"), "OTHER=gone has no manifest.json, expected the folder of another run's index"),
    ],
)
def test_a_wrong_name_gets_one_line_with_the_nearest(project: Project, words: tuple[str, ...], message: str) -> None:
    assert project.make(*words) == []
    assert re.search(message, project.said)
    assert len(project.said.splitlines()) == 1


def test_a_missing_config_is_named(project: Project) -> None:
    (project.folder / "configs/ml-1m/ranker.yaml").unlink()
    assert project.make("pipeline", "DATASET=ml-1m", "RAW=raw.zip") == [], "before anything is trained"
    assert (
        "configs/ml-1m/ranker.yaml does not exist, expected configs/ml-1m/{prepare,retriever,ranker}.yaml"
        in project.said
    )


def test_interrupted_it_says_that_the_same_command_goes_on(project: Project) -> None:
    recsys = project.folder / ".venv/bin/recsys"
    recsys.write_text(STAND_IN.replace("    simulate)", SLOW))
    words = ["make", "pipeline", "DATASET=ml-1m", "RAW=raw.zip"]
    # a background job of a shell ignores SIGINT, and so would make
    heard = ["env", "--default-signal=INT"]
    done = subprocess.Popen(
        heard + words,
        cwd=project.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for _ in range(600):
        if (project.folder / "started").exists():
            break
        time.sleep(0.05)
    os.killpg(done.pid, signal.SIGINT)  # as Ctrl-C does
    said, _ = done.communicate(timeout=30)
    assert said.count("Interrupted. The same command continues where it stopped.") == 1
    assert done.returncode != 0
    recsys.write_text(STAND_IN)
    assert verbs(project.make(*words[1:])) == ALL


def test_clean_keeps_the_events_of_a_service(project: Project) -> None:
    bundle = project.folder / "runs/ml-1m/refit-all/bundle"
    bundle.mkdir(parents=True)
    (project.folder / "data/ml-1m").mkdir(parents=True)
    store = bundle.parent / "store.sqlite"
    store.touch()
    project.make("clean", "DATASET=ml-1m")
    said = "runs/ml-1m/refit-all/store.sqlite holds events of the service; export them with recsys export-log --store "
    assert said + "runs/ml-1m/refit-all/store.sqlite, move the file or delete it, then make clean again" in project.said
    assert store.exists()
    assert (project.folder / "data/ml-1m").exists(), "nothing is removed"
    store.unlink()
    project.make("clean", "DATASET=ml-1m")
    assert not (project.folder / "runs/ml-1m").exists()
    assert not (project.folder / "data/ml-1m").exists()


def test_a_project_without_a_checkout_has_the_same_rules(project: Project) -> None:
    (project.folder / "Makefile").write_text(
        "DATASET ?= ml-1m\nRECSYS := .venv/bin/recsys\nREADY :=\ninclude configs/pipeline.mk\n"
    )
    (project.folder / ".venv/ready").unlink()
    assert verbs(project.make("pipeline", "RAW=raw.zip")) == ["prepare-data", *ALL]
    project.make()
    assert [line.split()[0] for line in project.said.splitlines()] == ["help", "pipeline", "clean"]
