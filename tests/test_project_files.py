"""CITATION.cff, the project's metadata and CONTRIBUTING.md agree with the package."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from trove_classifiers import classifiers as known_classifiers

from recsys2stage import __version__

ROOT = Path(__file__).parent.parent
REQUIRED = {"cff-version", "message", "title", "authors"}  # by the schema of the Citation File Format 1.2.0
ALLOWED = REQUIRED | set(
    [
        "abstract",
        "commit",
        "contact",
        "date-released",
        "doi",
        "identifiers",
        "keywords",
        "license",
        "license-url",
        "preferred-citation",
        "references",
        "repository",
        "repository-artifact",
        "repository-code",
        "type",
        "url",
        "version",
    ]
)
PERSON_OR_ENTITY = {"name", "family-names", "given-names", "orcid", "affiliation", "alias", "email", "website"}


@pytest.fixture
def citation() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_this_version_and_has_the_fields_of_the_format(citation: dict[str, Any]) -> None:
    assert REQUIRED <= set(citation) <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert citation["type"] == "software"
    assert all(isinstance(word, str) for word in citation["keywords"])
    assert len(set(citation["keywords"])) == len(citation["keywords"])
    for author in citation["authors"]:
        assert author.keys() <= PERSON_OR_ENTITY
        assert author.get("name") or author.get("family-names")


def test_citation_and_package_name_one_repository_and_licence(
    citation: dict[str, Any], project: dict[str, Any]
) -> None:
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert citation["license"] == project["license"]
    assert project["urls"].keys() >= {"Homepage", "Repository", "Issues", "Changelog", "Documentation"}
    assert all(url.startswith(citation["repository-code"]) for url in project["urls"].values())


def test_classifiers_exist(project: dict[str, Any]) -> None:
    assert set(project["classifiers"]) <= set(known_classifiers)
    assert not [name for name in project["classifiers"] if name.startswith("License")]  # `license` is an expression


def test_contributing_names_targets_and_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert {"setup", "lint", "test"} <= named <= targets | {"and"}
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / link).is_file(), link


def test_each_part_to_add_is_a_class_of_the_package() -> None:
    """The table "To add a part" names base classes by their path below recsys2stage."""
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    table = text[text.index("## To add a part") : text.index("## Where code goes")]
    names = re.findall(r"`((?:data|retrieval|ranking|mining)(?:\.\w+)+)`", table)
    assert len(names) >= 16
    for name in names:
        module, _, cls = name.rpartition(".")
        assert isinstance(getattr(__import__(f"recsys2stage.{module}", fromlist=[cls]), cls), type), name
