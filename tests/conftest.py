"""One thread, one seed, and the small worlds that several test files share."""

import os

# before polars and torch are imported: on a small machine more threads make small work slower, not faster
os.environ.update(POLARS_MAX_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are of the CPU; a fit whose accelerator is auto would take a GPU

os.environ.update(MAKEFLAGS="", MFLAGS="", MAKEOVERRIDES="", MAKELEVEL="0")  # a make that a test runs starts afresh

from pathlib import Path

import numpy as np
import pytest

# torch and the package are imported by fixtures: pytest-xdist's first process reads this file, too, and runs no test

pytest_plugins = ["pipeline_fixtures"]  # a tiny trained run

LONG_FILES = (  # those of 20 CPU seconds and more, the longest first
    "test_notebooks.py",
    "test_encoders.py",
    "test_estimator.py",
    "test_docs.py",
    "test_gloo.py",
    "test_wheel.py",
    "test_site.py",
    "test_processes.py",
    "test_server.py",
    "test_resume.py",
    "test_pipeline.py",
    "test_cli.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, so that at the end no process waits for another one's."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test draws the same numbers wherever it stands, and leaves the run's seed as it was."""
    import torch

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  what libraries draw from it


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset in which item i is always followed by i + 1; read it, do not write into it."""
    from worlds import cycle_world

    return cycle_world(tmp_path_factory.mktemp("cycle"))


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset with histories of all lengths; read it, do not write into it."""
    from worlds import ragged_world

    return ragged_world(tmp_path_factory.mktemp("ragged"))


@pytest.fixture(scope="session")
def two_walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset in which the last but one item decides; read it, do not write into it."""
    from worlds import two_walks_world

    return two_walks_world(tmp_path_factory.mktemp("two-walks"))
