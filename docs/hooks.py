"""MkDocs hooks: pages that are made at build (changelog, command line, Python API), and relative links in llms.txt."""

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

from docs import api, reference  # noqa: E402  # found through the path that is set above

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)
AT_THE_TOP = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md"}  # files outside docs/ -> their pages
generated: dict[str, str] = {}


def on_startup(command: str, dirty: bool) -> None:
    """Generates the reference once; `mkdocs serve` rebuilds other pages only."""
    generated.update(reference.pages() | api.pages())


@event_priority(100)  # before plugins that ask for the address
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the generated pages into the navigation; anchors are those that GitHub gives the same headings."""
    config.site_url = config.site_url or ""  # SITE_URL that is set and empty is None
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
    """Adds the generated pages, the README and the changelog."""
    top = {page: site_links((ROOT / name).read_text(encoding="utf-8"), "", page) for name, page in AT_THE_TOP.items()}
    for name, text in {**generated, **top}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of pages to files at the top of the repository lead to their pages."""
    if page.file.src_uri in generated or page.file.src_uri in AT_THE_TOP.values():
        return markdown
    return site_links(markdown, posixpath.dirname(f"docs/{page.file.src_uri}"), page.file.src_uri)


def site_links(markdown: str, folder: str, page: str) -> str:
    """Markdown of a file in the repository, with links that hold on a page of the site.

    Args:
        markdown: the text of the file.
        folder: its folder, from the top of the repository.
        page: the page in docs/ that shows it. Links to files of which the site has no page become text.
    """

    def replaced(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups(default="")
        if ":" in target or target.startswith("/"):
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in AT_THE_TOP:
            path = f"docs/{AT_THE_TOP[path]}"
        if not path.startswith("docs/"):
            return text
        return f"{image}[{text}]({posixpath.relpath(path, posixpath.dirname(f'docs/{page}'))}{anchor})"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return re.sub(r'\b(src|srcset|href)="docs/', r'\1="', "".join(parts)) if folder == "" else "".join(parts)


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
