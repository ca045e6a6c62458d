"""Harness of the tables of wrong inputs: a message says what was given, what is expected and what to do next."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_LINES, MAX_CHARACTERS = 3, 700
INTERNALS = (  # of Python, jsonargparse and torch
    *("Traceback (most recent call last)", "Does not validate against any of the Union subtypes", "Parser key"),
    *("Problem with given class_path", "Subtypes:", "Given value type:", "object at 0x", "size mismatch for"),
)


def check_message(text: str, value: str, expected: str, next_step: str) -> None:
    """Asserts that a message is short, shows no internals and holds three parts.

    Args:
        text: the message, as the user reads it.
        value: regular expression of the value that was given, and where.
        expected: regular expression of what is expected instead.
        next_step: regular expression of what to do next.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    assert 1 <= len(lines) <= MAX_LINES, f"{len(lines)} lines, expected 1 to {MAX_LINES}:\n{text}"
    assert len(text.strip()) <= MAX_CHARACTERS, f"{len(text.strip())} characters, expected {MAX_CHARACTERS}:\n{text}"
    shown = [words for words in INTERNALS if words in text]
    assert not shown, f"shows internals {shown}:\n{text}"
    joined = " ".join(text.split())
    for part, pattern in (("value", value), ("expectation", expected), ("next step", next_step)):
        assert re.search(pattern, joined), f"no {part} {pattern!r} in:\n{text}"


def check_error(error: BaseException, value: str, expected: str, next_step: str) -> None:
    """Asserts that an error of the Python API is one that a user can read: a ValueError, TypeError or OSError."""
    assert isinstance(error, ValueError | TypeError | OSError), repr(error)
    check_message(str(error), value, expected, next_step)


@contextmanager
def nothing_written(*folders: Path) -> Iterator[None]:
    """Asserts that the body neither adds, removes nor changes a file of these folders, also not a partial one."""
    before = [_files(folder) for folder in folders]
    yield
    for folder, held in zip(folders, before, strict=True):
        now = _files(folder)
        changed = sorted(str(path) for path in held.keys() | now.keys() if held.get(path) != now.get(path))
        assert not changed, f"written or changed in {folder}: {changed[:5]}"


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path: (status.st_mtime_ns, status.st_size) for path, status in found}
