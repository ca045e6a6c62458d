"""MkDocs hooks: pages that are made at build (changelog, command line, Python API), and relative links in llms.txt."""

import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]  # the package of this checkout, and docs

from docs import api, reference  # noqa: E402

LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
logger = logging.getLogger("mkdocs.hooks")
generated: dict[str, str] = {}


def on_startup(command: str, dirty: bool) -> None:
    """Generates the reference once; `mkdocs serve` rebuilds other pages only."""
    generated.update(reference.pages() | api.pages())


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the generated pages into the navigation; anchors are those that GitHub gives the same headings."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    if not generated:
        generated.update(reference.pages() | api.pages())
    _fill(config.nav or [])
    return config


def _fill(nav: list[dict[str, Any]]) -> None:
    """Replaces the folders of a navigation by the generated pages in them."""
    for entry in nav:
        for title, pages in entry.items() if isinstance(entry, dict) else ():
            if isinstance(pages, list):
                _fill(pages)
            elif pages.endswith("/"):
                entry[title] = [name for name in generated if name.startswith(pages)]


@event_priority(100)  # before plugins that look for pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and the changelog."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name, text in {**generated, "changelog.md": LINK.sub(_from_the_root, changelog)}.items():
        files.append(File.generated(config, name, content=text))
    return files


def _from_the_root(link: re.Match[str]) -> str:
    """A link of a file in the root, as one of a page in docs/."""
    before, target, after = link.groups()
    return link[0] if ":" in target else f"{before}{posixpath.relpath(target, 'docs')}{after}"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to README.md lead to the home page: the README is not a page of the site, and the home page opens it."""
    home = posixpath.relpath("index.md", posixpath.dirname(page.file.src_uri) or ".")
    return re.sub(r"\]\((?:\.\./)+README\.md(?:#[^)]*)?\)", f"]({home})", markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Without SITE_URL, makes the links of llms.txt and of the Markdown pages relative: they work in any folder."""
    if config.site_url:
        return
    site = Path(config.site_dir)
    for path in [*site.rglob("*.md"), *site.glob("llms*.txt")]:
        up = "../" * (len(path.relative_to(site).parts) - 1)
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"\]\(/(?!/)", f"]({up}", text), encoding="utf-8")


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Any) -> dict[str, Any]:
    """Generated pages have no source to edit."""
    if page.file.generated_by is not None:
        page.edit_url = None
    return context
