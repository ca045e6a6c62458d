"""Imports point one way: a module sees its own folder and the rows above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "recsys2stage"
ROWS = """
    __init__ columns shapes hashing options trust
    layers ids
    artifacts metrics positions times losses objectives split download features
    checkpoints checks
    dataset items users index encoders sources simulate request_inputs event_times
    inputs events frames optim lists
    towers miners side_tables scorers baselines cohorts compare report
    signals prepare
    data reranker
    candidates
    retriever ranker callbacks recommend
    evaluate training people mine plots
    commands
    cli estimator
"""
ROW = {noun: number for number, row in enumerate(ROWS.strip().splitlines()) for noun in row.split()}
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


def noun(module: str) -> str:
    """The row entry of a dotted name: a top module or a folder."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(source: str, own: str) -> Iterator[str]:
    """Nouns of this package that a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (noun(name.name) for name in node.names if name.name.split(".")[0] == "recsys2stage")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{own} imports relatively; name the module in full"
            if node.module == "recsys2stage":  # from recsys2stage import losses, __version__
                yield from (name.name if name.name in ROW else "__init__" for name in node.names)
            elif node.module and node.module.split(".")[0] == "recsys2stage":
                yield noun(node.module)


def against_the_direction(source: str, own: str) -> list[str]:
    return sorted({other for other in imported(source, own) if other != own and ROW[other] >= ROW[own]})


def test_every_module_has_its_row() -> None:
    assert {path.parts[0] for path in MODULES} == set(ROW)


@pytest.mark.parametrize("path", [path for path in MODULES if str(path) != "__init__"], ids=str)  # it opens onto all
def test_a_module_imports_from_rows_above_only(path: Path) -> None:
    source = (PACKAGE / path).with_suffix(".py").read_text(encoding="utf-8")
    assert against_the_direction(source, path.parts[0]) == []


@pytest.mark.parametrize(
    "line",
    [
        "from recsys2stage.retrieval.retriever import Retriever",
        "from recsys2stage import columns, ranker",
        "import recsys2stage.cli.main",
        "def f():\n    from recsys2stage.retrieval.encoders.transformer import Transformer",
    ],
)
def test_an_import_against_the_direction_would_be_found(line: str) -> None:
    assert against_the_direction(line, "items")


def test_what_computes_knows_nothing_of_lightning_files_or_configs() -> None:
    """So it can be tested, and served, with bare arrays."""
    computes = "metrics losses miners positions times towers reranker items users features inputs objectives"
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
