"""The documentation as a site: links, navigation, generated reference, figures, and a build without a warning."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import pytest
import yaml

from recsys2stage.cli.commands import COMMANDS
from recsys2stage.cli.completion import KINDS, options
from recsys2stage.cli.listing import KINDS as LISTED

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
VERBS = ["fit", "validate", "test", *COMMANDS]


def docs(module: str) -> ModuleType:
    """A module of the folder docs, which is no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"docs.{module}")


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    """The pages that are made at build: name in docs/ -> Markdown."""
    top = {name.lower(): (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CHANGELOG.md")}
    return docs("reference").pages() | docs("api").pages() | top


# --- links of README.md and docs/


def prose(markdown: str) -> str:
    """Markdown without its code."""
    markdown = re.sub(r"^( *)(```|~~~).*?^\1\2 *$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", markdown)


def links_of(markdown: str) -> list[str]:
    """The targets of links, images and reference definitions."""
    text = prose(markdown)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    defined = re.findall(r"^\[[^\]]+\]:\s+(\S+)", text, re.MULTILINE)
    return [
        *inline,
        *defined,
        *re.findall(r"<(https?://[^>]+)>", text),
        *re.findall(r"\b(?:src|href)=\"([^\"]+)\"", text),
    ]


def anchors_of(markdown: str) -> set[str]:
    """The anchors of headings, as GitHub and the site make them."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2 *$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)?$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if number == 0 else f"{slug}-{number}" for slug, count in found.items() for number in range(count + 1)}


def broken(page: Path, markdown: str) -> list[str]:
    """The links of a page that lead nowhere."""
    wrong = []
    for link in links_of(markdown):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            parts = urlparse(link)
            if parts.scheme not in ("https", "http", "mailto") or (
                parts.scheme != "mailto" and "." not in parts.netloc
            ):
                wrong.append(f"{link}: not the form of an address")
            continue
        path = (page.parent / unquote(target)).resolve() if target else page
        if not path.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and (path.suffix != ".md" or anchor not in anchors_of(path.read_text(encoding="utf-8"))):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings exist in the repository, which is read without the pages that only the site has."""
    assert broken(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("[a](nothing.md)", "no such file"),
        ("[a](results.md#nothing)", "no such heading"),
        ("[a](#nothing)", "no such heading"),
        ("![a](figures/nothing.svg)", "no such file"),
        ("[a](cli/fit.md)", "no such file"),  # made at build: dead where the repository is read
        ("[a](https:/example)", "not the form"),
        ('<img src="nothing.png">', "no such file"),
    ],
)
def test_a_wrong_link_is_found(link: str, reason: str) -> None:
    (found,) = broken(DOCS / "index.md", f"# Title\n\n{link}, `[a](in_code.md)` and [b](results.md#losses)\n")
    assert reason in found


# --- navigation


class Config(yaml.SafeLoader):
    """YAML with the tags of MkDocs, whose values are not needed here."""


Config.add_multi_constructor("", lambda loader, tag, node: None)


def nav() -> list[str]:
    """The pages in the navigation of mkdocs.yml, and the folders of generated pages."""

    def flat(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from flat(part)

    return list(flat(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Config)["nav"]))


def test_every_page_is_in_the_navigation_once(generated: dict[str, str]) -> None:
    names = nav()
    folders = {name for name in names if name.endswith("/")}
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(names) == len(set(names))
    assert pages | {"readme.md", "changelog.md"} == set(names) - folders
    assert {name.partition("/")[0] + "/" for name in generated if "/" in name} == folders


def test_every_page_has_a_title_and_a_text() -> None:
    for page in DOCS.rglob("*.md"):
        title, _, text = page.read_text(encoding="utf-8").partition("\n")
        assert re.match(r"# \S", title), page
        assert len(text) > 40, page


# --- the generated reference


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_its_options(verb: str, generated: dict[str, str]) -> None:
    page = generated[f"cli/{verb}.md"]
    assert f"({verb}.md)" in generated["cli/index.md"]
    expected = set(options()[verb]) - {"config", "print_config", "help"}
    shown = set(re.findall(r"^\| `--([\w.]+)`", page, re.MULTILINE))
    of_classes = {name for name in expected if ".init_args." in name}  # of the model's and the data's class
    assert expected - of_classes <= shown
    for row in re.findall(r"^\| `--.*$", page, re.MULTILINE):
        assert len(re.split(r"(?<!\\)\|", row)) == 6, row
        assert re.search(r"\|[^|]*\w[^|]*\|$", row.replace("\\|", "")), f"no help: {row}"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("configs", "overlays")])
def test_every_class_that_is_listed_is_in_both_references(kind: str, generated: dict[str, str]) -> None:
    names = [name for lines in LISTED[kind][1]().values() for name in lines]
    assert names
    config = "".join(text for page, text in generated.items() if page.startswith("config/"))
    api = "".join(text for page, text in generated.items() if page.startswith("api/"))
    for name in names:
        assert re.search(rf"^## {name}$", config, re.MULTILINE), name
        assert re.search(rf"^::: recsys2stage\.[\w.]+\.{name}$", api, re.MULTILINE), name


def test_a_class_has_its_options_with_type_default_and_help(generated: dict[str, str]) -> None:
    section = generated["config/encoders.md"].partition("## HSTU\n")[2].partition("\n## ")[0]
    assert re.search(r"^\| `heads` \| integer \| `2` \| attention heads\. \|$", section, re.MULTILINE)
    assert "| `scaling` | `length`, `width`, `both` | `length` |" in section
    assert "| `position` | [Position](../config/positions.md) or null | null |" in section
    assert "max_length" not in section, "the retriever gives it"


def test_the_api_names_things_that_exist(generated: dict[str, str]) -> None:
    names = re.findall(r"^::: ([\w.]+)$", "".join(generated.values()), re.MULTILINE)
    assert len(names) > 100
    for name in names:
        module, _, short = name.rpartition(".")
        thing = getattr(importlib.import_module(module), short)
        assert thing.__doc__, f"{name} has no docstring"
        assert thing.__module__ == module, f"{name} is defined elsewhere"


# --- figures


def drawing(svg: str) -> tuple[list[str], list[float]]:
    """What an SVG draws: tags, texts and colours in order, and all numbers."""
    marks, numbers = [], []
    for element in ElementTree.fromstring(svg).iter():
        style = element.get("style", "")
        marks += [element.tag, (element.text or "").strip(), *re.findall(r"#[0-9a-f]{6}", style)]
        if element.tag.endswith("path"):
            numbers += [float(number) for number in re.findall(r"-?\d+\.?\d*", element.get("d", ""))]
        numbers += [float(element.get(name, "nan").removesuffix("pt")) for name in ("x", "y") if element.get(name)]
    return marks, numbers


@pytest.mark.parametrize("name", sorted(path.stem for path in (DOCS / "figures").glob("*.svg")))
def test_a_figure_is_what_the_script_draws(name: str) -> None:
    """To half a pixel, as another matplotlib may measure text a little differently; `make figures` draws them anew."""
    marks, numbers = drawing((DOCS / f"figures/{name}.svg").read_text(encoding="utf-8"))
    drawn = docs("figures").FIGURES[name]().svg()
    assert drawing(drawn)[0] == marks
    assert drawing(drawn)[1] == pytest.approx(numbers, abs=0.5)


def test_all_figures_are_committed_shown_and_follow_the_dark_mode() -> None:
    figures, canvas = docs("figures"), docs("canvas")
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in figures.FIGURES:
        svg = (DOCS / f"figures/{name}.svg").read_text(encoding="utf-8")
        assert f"figures/{name}.svg)" in shown, f"no page shows {name}.svg"
        assert "prefers-color-scheme: dark" in svg
        assert not re.search(r"https?://(?!www\.w3\.org)", svg), "it loads something"
        colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg.partition("</style>")[2]))
        assert colours <= set(canvas.DARK), f"{name}: without a dark counterpart: {colours - set(canvas.DARK)}"


def test_a_drawing_is_the_same_at_each_call() -> None:
    repeats = docs("figures").FIGURES["repeats"]
    assert repeats().svg() == repeats().svg()


def test_the_figure_of_results_shows_what_the_results_say() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    for row in json.loads((DOCS / "measured/ml-1m.json").read_text(encoding="utf-8")):
        assert f"{row['ndcg@10']:.4f}" in text, row
        assert f"{row['hr@10']:.4f}" in text, row
    for row in json.loads((DOCS / "measured/published.json").read_text(encoding="utf-8")):
        assert 0 < row["ndcg@10"] < row["hr@10"] < 1
        assert row["request_time"] in ("none", "target")
        assert row["protocol"], row
        assert row["source"], row
    beauty = {row["name"]: row for row in docs("figures").results_of("amazon-beauty")}
    assert f"{beauty['ranker']['ndcg@10']:.4f}" in text
    assert f"{beauty['retriever']['hr@10']:.4f}" in text


# --- the built site

HAS_MKDOCS = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_llmstxt"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not HAS_MKDOCS:
        pytest.skip("mkdocs is not installed; pip install 'recsys2stage[docs]'")
    folder = tmp_path_factory.mktemp("site")
    words = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {
        **os.environ,
        "NO_MKDOCS_2_WARNING": "1",
        "SITE_URL": "",
    }  # the first: the theme's note on its future
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "with --quiet only warnings are printed"
    return folder


class Tags(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


def test_the_site_is_built_without_a_warning_loads_nothing_from_other_hosts_and_has_no_dead_link(site: Path) -> None:
    pages = {}
    for path in site.rglob("*.html"):
        pages[path] = Tags()
        pages[path].feed(path.read_text(encoding="utf-8"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    dead = []
    for path, tags in pages.items():
        if path.name == "404.html":  # its links are from the root of the host
            continue
        assert [one for one in tags.loads if urlparse(one).scheme in ("http", "https")] == [], path
        for link in {*tags.links, *tags.loads}:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in anchors):
                dead.append(f"{path.name}: {link}")
    assert dead == []


def test_the_site_has_all_pages_for_language_models(site: Path, generated: dict[str, str]) -> None:
    listed = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted({name for name in nav() if not name.endswith("/")} | {*generated})
    assert all((site / name).is_file() for name in listed)
    whole = (site / "llms-full.txt").read_text(encoding="utf-8")
    for words in ("# Glossary", "--early_stopping.patience", "InfoNCE", "TwoStageRecommender"):
        assert words in whole
