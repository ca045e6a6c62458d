"""One run at a time writes an output, whatever became of earlier runs."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pipeline_fixtures import Run, recsys

from recsys2stage.artifacts import atomic_write
from recsys2stage.data.locks import locked

HOLD = """
import sys
from recsys2stage.data.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_run(output: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of an output until it is told to end."""
    words = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def taken(output: Path) -> bool:
    try:
        with locked(output):
            return True
    except ValueError:
        return False


def test_a_second_run_is_refused_while_the_first_lives_and_not_after_it(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "index"
    with another_run(output) as first:
        message = (
            rf"index is being written by process {first.pid} since 20.* UTC \(-c .*index\), expected no other run; "
        )
        with pytest.raises(ValueError, match=message), locked(output):
            pass
        assert taken(tmp_path / "runs" / "bundle")
        first.communicate("")
        assert first.returncode == 0
    assert taken(output)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    with another_run(tmp_path / "index") as first:
        first.kill()
        first.wait()
        assert (tmp_path / ".index.running").exists()
        with locked(tmp_path / "index"):
            assert json.loads((tmp_path / ".index.running").read_text())["pid"] == os.getpid()
            assert not taken(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_another_host_may_live(tmp_path: Path) -> None:
    lock = tmp_path / ".index.running"
    lock.write_text(json.dumps({"pid": 1, "host": "another", "started": "5", "since": "yesterday", "command": "x"}))
    message = rf"by process 1 on the host another since yesterday, .* if it has ended, remove {lock}"
    with pytest.raises(ValueError, match=message), locked(tmp_path / "index"):
        pass
    lock.unlink()
    assert taken(tmp_path / "index")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"pid": "1", "host": 3}',
        json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": "1"}),  # its id went to this process
    ],
    ids=["empty", "cut", "a list", "other types", "another run's pid"],
)
def test_what_names_no_living_run_is_taken_over(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys2stage.data.locks.PATIENCE", 0.1)
    (tmp_path / ".index.running").write_text(content)
    assert taken(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_dead_run_s_lock_one_takes_it_over(tmp_path: Path) -> None:
    with another_run(tmp_path / "index") as first:
        first.kill()
        first.wait()
    together, tried = threading.Barrier(8), threading.Barrier(8)
    outcomes = []

    def run() -> None:
        together.wait()
        try:
            with locked(tmp_path / "index"):
                outcomes.append("held")
                tried.wait(timeout=30)
        except ValueError:
            outcomes.append("refused")
            tried.wait(timeout=30)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["held", *["refused"] * 7]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_no_lock_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(RuntimeError), locked(tmp_path / "runs" / "new" / "one" / "index"):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


FORK = """
import os, sys
from recsys2stage.data.locks import locked
with locked(sys.argv[1]):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print(os.path.exists(sys.argv[2]))
"""


def test_a_forked_child_leaves_the_lock_to_its_parent(tmp_path: Path) -> None:
    words = [sys.executable, "-c", FORK, str(tmp_path / "index"), str(tmp_path / ".index.running")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "True\n"


def test_the_lock_lies_next_to_the_artifact(tmp_path: Path) -> None:
    with locked(tmp_path / "index"), atomic_write(tmp_path / "index", "index") as folder:
        folder.mkdir()
        (folder / "content").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["index", "index/content"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    message = r"index cannot be written: .*runs is a file, expected a folder that you may write to; choose another"
    with pytest.raises(OSError, match=message), locked(tmp_path / "runs" / "index"):
        pass


# the verbs


def commands(run: Run, raw: Path, output: Path) -> dict[str, tuple[object, ...]]:
    """Each verb that writes, to `output`."""
    fit = ("--output", output, "--data.init_args.path")
    return {
        "simulate": ("--users", 100, "--items", 80, "--events", 2000, "--output", output),
        "prepare-data": ("--source", "MovieLens", "--source.path", raw, "--output", output),
        "fit": ("--config", run.folder / "retriever.yaml", *fit, run.data),
        "export-index": ("--retriever", run.retriever, "--data", run.data, "--output", output),
        "mine-negatives": ("--data", run.data, "--index", run.index, "--output", output),
        "export-bundle": ("--index", run.index, "--ranker", run.ranker, "--output", output),
        "recommend": ("--bundle", run.bundle, "--output", output),
        "evaluate": ("--bundle", run.bundle, "--output", output.parent, "--resamples", 5, "--users", 5),
    }


@pytest.mark.parametrize("verb", commands(Run(Path()), Path(), Path()))
def test_every_verb_that_writes_refuses_a_second_run(verb: str, trained: Run, raw: Path, tmp_path: Path) -> None:
    output = tmp_path / ("report.json" if verb == "evaluate" else "output")
    with (
        locked(output),
        pytest.raises(SystemExit, match=rf"{verb}: .*{output.name} is being written by process {os.getpid()} since"),
    ):
        recsys(verb, *commands(trained, raw, output)[verb])
    assert list(tmp_path.iterdir()) == []
