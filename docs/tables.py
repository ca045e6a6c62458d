"""Markdown of the generated pages."""

import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """Text as Markdown: everything outside of code is literal."""
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    parts[::2] = [re.sub(r"([\\*_<>\[\]{}#])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def cell(text: str) -> str:
    """Text as one cell of a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [*head], ["---" for _ in head], *rows
    return "\n".join(f"| {' | '.join(cell(one) for one in line)} |" for line in lines)
