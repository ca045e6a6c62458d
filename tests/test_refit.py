"""Refits: the chosen retriever and the signals learn again from later events, and the ranker stays."""

import json
from pathlib import Path

import pytest
from pipeline_fixtures import Run, recsys

from recsys2stage.columns import MANIFEST


def manifest(folder: Path) -> dict[str, object]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def refitted(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained.refit()


def test_smoke(trained: Run, refitted: Run, tmp_path: Path) -> None:
    recsys("evaluate", "--bundle", refitted.bundle, "--data", trained.data, "--output", tmp_path, "--plots", "false")
    print(manifest(refitted.bundle))
    print((tmp_path / "report.md").read_text()[:1500])
