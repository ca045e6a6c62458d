"""Imports point one way: the vocabulary, then the stages in the order in which data flow; and there is no circle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "recsys2stage"
VOCABULARY = ["columns", "options", "shapes", "trust", "artifacts", "checkpoints", "metrics", "processes", "optim"]
ORDER = ["", "data", "retrieval", "ranking", "recommender", "mining evaluation serving", "cli", "estimator"]
FLOOR = {noun: number for number, row in enumerate(ORDER) for noun in row.split()} | dict.fromkeys(VOCABULARY, 0)
FLOOR |= {"__init__": 0, "__main__": len(ORDER)}  # the version; the entry point
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of a file, without the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(path): path for path in MODULES}


def imported(source: str, own: str) -> Iterator[str]:
    """Modules of this package that a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "recsys2stage":
                    yield alias.name.partition(".")[2] or "__init__"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{own} imports relatively; name the module in full"
            package, _, module = (node.module or "").partition(".")
            if package == "recsys2stage":
                for alias in node.names:
                    full = f"{module}.{alias.name}".removeprefix(".")
                    yield full if full in NAMES else module or "__init__"


def against_the_direction(source: str, own: str) -> list[str]:
    """What a module imports from a later stage, or from another one of the same floor."""
    noun = own.split(".")[0]
    others = {other for other in imported(source, own) if other.split(".")[0] != noun and noun not in VOCABULARY}
    if noun in VOCABULARY:
        others = {other for other in imported(source, own) if FLOOR[other.split(".")[0]] > 0}
        return sorted(others)
    return sorted(other for other in others if FLOOR[other.split(".")[0]] >= FLOOR[noun])


def test_the_top_of_the_package_is_small() -> None:
    top = {name.split(".")[0] for name in NAMES}
    assert top == set(FLOOR)
    folders = {noun for noun in top if (PACKAGE / noun).is_dir()}
    assert len(folders) <= 9
    assert len(top - folders - {"__init__", "__main__"}) <= 11


def test_no_module_is_long() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in NAMES.items()}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_every_folder_has_tests_of_its_own() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {path.parent.name for path in Path(__file__).parent.glob("*/test_*.py")}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__init__"])  # it opens onto all
def test_a_module_imports_from_earlier_stages_only(name: str) -> None:
    assert against_the_direction(NAMES[name].read_text(encoding="utf-8"), name) == []


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    """Packages aside: their __init__ gathers the members, which may import one another."""
    modules = {name: path for name, path in NAMES.items() if path.name != "__init__.py"}
    graph = {
        name: {other for other in imported(path.read_text(encoding="utf-8"), name) if other in modules}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "line",
    [
        "from recsys2stage.ranking.ranker import Ranker",
        "from recsys2stage import columns, recommender",
        "import recsys2stage.cli.main",
        "def f():\n    from recsys2stage.evaluation.report import table",
    ],
)
def test_an_import_against_the_direction_would_be_found(line: str) -> None:
    assert against_the_direction(line, "retrieval.items")
    assert against_the_direction(line, "columns")


def test_what_computes_knows_nothing_of_lightning_files_or_configs() -> None:
    """So it can be tested, and served, with bare arrays."""
    computes = (
        "metrics retrieval/features retrieval/losses retrieval/encoders retrieval/towers retrieval/items "
        "retrieval/users retrieval/inputs retrieval/objectives mining/miners ranking/losses ranking/scorers "
        "ranking/reranker"
    )
    for name in computes.split():
        folder = PACKAGE / name
        files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        tree = ast.parse("\n".join(file.read_text(encoding="utf-8") for file in files))
        outside = {
            word.split(".")[0]
            for node in ast.walk(tree)
            for word in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not outside & {"lightning", "jsonargparse", "yaml", "polars", "faiss"}, name
