"""The notebooks run from the first cell to the last."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = [  # of jupyter_client and zmq
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def kernel() -> Iterator[AsyncKernelManager]:
    """One for all notebooks: it imports torch once, which takes longer than most of their cells."""
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:  # what the kernel is started with
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        yield manager
    run_sync(manager.shutdown_kernel)(now=True)


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_runs(path: Path, tmp_path: Path, kernel: AsyncKernelManager) -> None:
    """All cells, with fits of one epoch."""
    notebook, shortened = nbformat.read(path, as_version=4), 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, count = re.subn(r"(\bmax_epochs=|\bEPOCHS = \d+, \d+, )\d+", r"\g<1>1", cell.source)
            shortened += count
    assert shortened == 1, "a notebook says in one place for how many epochs it trains"
    run(notebook, tmp_path, kernel)


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_as_it_stands(path: Path, tmp_path: Path, kernel: AsyncKernelManager) -> None:
    run(nbformat.read(path, as_version=4), tmp_path, kernel)


def run(notebook: nbformat.NotebookNode, folder: Path, kernel: AsyncKernelManager) -> None:
    """In a folder of its own, and without a name that another notebook has defined."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}"))
    client = NotebookClient(notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(folder)}})
    try:
        client.execute()
    finally:
        client.kc.stop_channels()  # the kernel goes on
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_notebooks_and_they_carry_no_outputs() -> None:
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs")
            assert not cell.get("execution_count")
