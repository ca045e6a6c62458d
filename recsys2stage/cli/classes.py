"""Classes and options as a parser knows them: families of a type hint, names, and the options of a class."""

import copy
import dataclasses
import functools
import importlib
import inspect
import sys
from argparse import SUPPRESS, Action
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from recsys2stage.cli.messages import members
from recsys2stage.trust import PACKAGE

LISTED = {  # base class -> family of `recsys list`
    "Encoder": "encoders",
    "Loss": "losses",
    "ListLoss": "losses",
    "Signal": "signals",
    "Baseline": "baselines",
    "Scorer": "scorers",
    "Source": "sources",
}


def families(hint: Any, direct: bool = False) -> list[type]:
    """The base classes that a type hint accepts: of instances, of factories, and of the members of a list.

    Args:
        hint: the type hint.
        direct: without those of the members of a list.
    """
    found: list[type] = []
    for part in members(hint):
        origin, arguments = get_origin(part), get_args(part)
        if origin is None and inspect.isclass(part):
            plain = issubclass(
                part, (str, int, float, complex, bytes, list, dict, tuple, set, type(None), PurePath, Enum)
            )
            if not plain and not dataclasses.is_dataclass(part) and part is not object:
                found.append(part)
        elif is_factory(part):
            found += families(arguments[-1])
        elif is_sequence(part) and arguments and not direct:
            found += families(arguments[0])
    return list(dict.fromkeys(found))


def is_factory(hint: Any) -> bool:
    return bool(get_args(hint)) and getattr(get_origin(hint), "__name__", "") == "Callable"


def is_sequence(hint: Any) -> bool:
    return getattr(get_origin(hint), "__name__", "") in ("list", "Sequence", "Iterable")


def arguments_filled_in(hint: Any) -> int:
    """Number of leading arguments that the caller of a factory gives, so that no config sets them."""
    for part in members(hint):
        if is_factory(part) and isinstance(get_args(part)[0], list):
            return len(get_args(part)[0])
        if is_sequence(part) and get_args(part):
            return arguments_filled_in(get_args(part)[0])
    return 0


def subclasses(base: type) -> Iterator[type]:
    """The class and all its subclasses that are imported."""
    yield base
    direct: list[type] = type.__subclasses__(base)
    for kind in direct:
        yield from subclasses(kind)


def class_names(bases: list[type]) -> list[str]:
    """Names of the concrete classes that a config may name for these base classes.

    Of this package and of the user; those of other packages only if there are no others.
    """
    named: dict[str, type] = {}
    for base in bases:
        for kind in subclasses(base):
            if (
                not kind.__name__.startswith("_")
                and not kind.__name__.endswith("Module")
                and not inspect.isabstract(kind)
            ):
                named.setdefault(kind.__qualname__, kind)
    foreign = {_root(base.__module__) for base in bases} | {"lightning", "pytorch_lightning", "torch"}
    own = [
        name
        for name, kind in named.items()
        if _root(kind.__module__) == PACKAGE or _root(kind.__module__) not in foreign
    ]
    return sorted(own or named)


def find_class(name: str, bases: list[type]) -> tuple[type | None, str]:
    """The class of a name, of whatever family, and why there is none.

    Args:
        name: short name of a class of this package or among `bases`, or dotted path.
        bases: expected base classes.
    """
    module, _, short = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), short)
        except ImportError as error:
            return None, f"{error}; is its folder on PYTHONPATH?"
        except AttributeError:
            return None, f"{module} has no {short}"
        return (found, "") if inspect.isclass(found) else (None, f"{short} is not a class")
    for base in bases:
        for kind in subclasses(base):
            if kind.__name__ == name:
                return kind, ""
    for where in [module for title, module in sys.modules.items() if _root(title) == PACKAGE]:
        found = getattr(where, name, None)
        if inspect.isclass(found) and found.__module__.startswith(f"{PACKAGE}."):
            return found, ""
    return None, ""


def family_of(kind: type) -> type | None:
    """The base class of this package that a class belongs to."""
    own = [one for one in kind.__mro__ if _root(one.__module__) == PACKAGE and inspect.isabstract(one)]
    return own[-1] if own else None


def default_class(default: Any, hint: Any) -> type | None:
    """The class that is used where none is named: of the option's default, or a concrete one of the hint."""
    if inspect.isclass(default):
        return default
    path = default.get("class_path") if hasattr(default, "get") else None
    if isinstance(path, str):
        return find_class(path, families(hint))[0]
    return None


@functools.cache
def class_parser(kind: type, filled_in: int = 0) -> ArgumentParser:
    """A parser of the options of a class, without its first `filled_in` arguments."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, as_group=False, fail_untyped=False, skip={filled_in} if filled_in else set())
    return parser


def options(parser: ArgumentParser) -> dict[str, Action]:
    """The options of a parser that a config may set, by name."""
    internal = ("help", "print_config", "config")
    actions = {action.dest: action for action in parser._actions}
    return {
        name: action
        for name, action in actions.items()
        if name not in internal and not name.endswith(".help") and type(action).__name__ != "_ActionConfigLoad"
    }


def is_required(parser: ArgumentParser, action: Action) -> bool:
    """Whether an option has no default and must be given."""
    unset = action.default is None or (isinstance(action.default, str) and action.default == SUPPRESS)
    return (action.required or action.dest in getattr(parser, "_extra_required_keys", ())) and unset


def set_hint(action: Action) -> Any:
    """The type of an option that is set: without null."""
    parts = [part for part in members(getattr(action, "_typehint", str)) if part is not type(None)]
    return Union[tuple(parts)]  # noqa: UP007  # the parts are known at run time only


def linked(parser: ArgumentParser) -> set[tuple[str, ...]]:
    """The options that follow others by links, without init_args in their paths."""
    links = getattr(getattr(parser, "_links_group", None), "_group_actions", ())
    return {tuple(part for part in link.target[0].split(".") if part != "init_args") for link in links}


def fits(hint: Any, value: Any) -> bool:
    """Whether a parser accepts a value for a type hint."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        parser.parse_object({"value": copy.deepcopy(value)})  # which it may change
    except Exception:  # whatever a type's own parsing raises
        return False
    return True


def _root(module: str) -> str:
    return module.partition(".")[0]
