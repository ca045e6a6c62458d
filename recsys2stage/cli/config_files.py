"""Reads YAML files of options, with an error for each way in which a file is none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from recsys2stage.cli.messages import MOST_NAMES, UsageError, choices, nearest, shown

INSTEAD = "expected a YAML file of options"


def load_config(path: str, option: str, verb: str) -> Mapping[Any, Any]:
    """Reads a YAML file of options, or options written as YAML.

    Args:
        path: the file, or a YAML mapping.
        option: text before the path in a message, such as "--config ".
        verb: verb that takes the options, for the next step.

    Raises:
        UsageError: there is no such file, or it holds no mapping.
    """
    file, name = Path(path), f"{option}{path}"
    try:
        exists, folder = file.exists(), file.is_dir()
    except (OSError, ValueError):  # too long, or with a null character
        exists = folder = False
    if not exists:
        if isinstance(content := structured(path), Mapping):
            return content
        raise UsageError(f"{shown_path(name)} does not exist, {INSTEAD}; {_near_file(file)}")
    if folder:
        files = sorted(one.name for one in file.glob("*.y*ml"))[:MOST_NAMES]
        raise UsageError(f"{name} is a folder, {INSTEAD}; give a file{f' of it: {choices(files)}' if files else ''}")
    try:
        content = get_loader("yaml")(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error.reason}), {INSTEAD}; convert it") from error
    except OSError as error:
        raise UsageError(f"{name} cannot be read ({error.strerror}), {INSTEAD}; check its rights") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        reason = problem or str(error).splitlines()[0]
        raise UsageError(f"{name} is not YAML{line} ({reason}), {INSTEAD}; correct that line") from error
    if content is None:
        raise UsageError(f"{name} is empty, {INSTEAD}; start from: recsys {verb} --print_config")
    if not isinstance(content, Mapping):
        kind = "a list" if isinstance(content, list) else shown(content)
        raise UsageError(f"{name} holds {kind}, expected a mapping of options (key: value); see: recsys {verb} --help")
    return content


def structured(word: str) -> Any:
    """A word of the command line; the list or mapping if it is written as one in YAML."""
    if word.lstrip().startswith(("{", "[")) or ": " in word:
        try:
            content = yaml.safe_load(word)
        except yaml.YAMLError:
            return word
        return content if isinstance(content, list | dict) else word
    return word


def shown_path(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:199]}…"


def _near_file(path: Path) -> str:
    """The next step for a file that does not exist."""
    folder = path.parent
    try:
        while not folder.is_dir() and folder != folder.parent:
            path, folder = folder, folder.parent
        names = [one.name for one in folder.iterdir() if one.is_dir() or one.suffix in (".yaml", ".yml", ".json")]
    except (OSError, ValueError):
        names = []
    near = nearest(path.name, names)
    return f"did you mean {folder / near}?" if near else "check the path, which starts from the working directory"
