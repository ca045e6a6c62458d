"""Which classes a file may name: this package's by their short names, others only from modules that the caller allows.

A class is looked up by the type that the place in the file expects (an encoder where an Encoder belongs), so that no
other callable can be reached. Short names come from the subclasses of that type, wherever in the package they stand.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePath
from typing import Any, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

PACKAGE = __name__.partition(".")[0]
CLASS, OPTIONS = "class_path", "init_args"

Trust = list[str] | str | None  # modules, or one

P = ParamSpec("P")
R = TypeVar("R")

_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=())


@contextmanager
def trusting(modules: Iterable[str] | None) -> Iterator[None]:
    """Within it, files may also name classes of these modules and of what lies below them, which are then imported."""
    modules = [modules] if isinstance(modules, str) else list(modules or ())
    token = _allowed.set((*_allowed.get(), *modules))
    try:
        yield
    finally:
        _allowed.reset(token)


def trusts(verb: Callable[P, R]) -> Callable[P, R]:
    """Runs a function `trusting` the modules of its argument `trust`."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(inspect.signature(verb).bind(*args, **kwargs).arguments.get("trust")):
            return verb(*args, **kwargs)

    return run


def name_of(kind: type) -> str:
    """What a file calls a class: the short name of one of this package, the dotted path of any other."""
    return kind.__qualname__ if _root(kind.__module__) == PACKAGE else f"{kind.__module__}.{kind.__qualname__}"


def find_class(name: Any, base: type, where: str | Path) -> type:
    """The class that a file names.

    Args:
        name: short name of a class of this package, or dotted path.
        base: what it must be a subclass of.
        where: the file, for the error.

    Raises:
        ValueError: for other classes, and for modules that are not allowed, before they are imported.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where} names the class {name!r}, expected text")
    module, _, short = name.rpartition(".")
    if _root(module) in ("", PACKAGE):  # wherever in the package it stood when the file was written
        members = dict(_members(base))
        if short not in members:
            raise ValueError(
                f"{where} names the {base.__name__} {name!r}, which this version has not; expected one of "
                f"{', '.join(sorted(members))}"
            )
        return members[short]
    own = _root(module) == _root(base.__module__)  # an optimiser may be any of torch's
    if not own and not any(module == allowed or module.startswith(f"{allowed}.") for allowed in _allowed.get()):
        raise ValueError(
            f"{where} names {name}, which is not of {PACKAGE}, and loading it would run the code of {module}; if you "
            f"trust that code, allow it: --trust {module}, in Python trust=[{module!r}], with make TRUST={module}"
        )
    try:
        kind = getattr(importlib.import_module(module), short)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} of {where} cannot be imported ({error}); put its module on PYTHONPATH") from error
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise ValueError(f"{where} names {name}, expected a subclass of {base.__name__}")
    return kind


def arguments(kind: type, options: Any, where: str | Path) -> dict[str, Any]:
    """Plain options of a class, in which each description of a class becomes that class with its options bound.

    Args:
        kind: the class, whose annotations say where which classes are expected.
        options: by name.
        where: the file they come from, for the error.
    """
    if not (isinstance(options, dict) and all(isinstance(name, str) for name in options)):
        raise ValueError(f"{where} gives {kind.__name__} the options {_short(options)}, expected them by name")
    return {name: _resolved(value, kind, name, where) for name, value in options.items()}


def factory(described: Any, base: type, where: str | Path) -> Callable[..., Any]:
    """A description, {"class_path", "init_args"}, as that class, which is below `base`, with its options bound."""
    if not (isinstance(described, dict) and CLASS in described and described.keys() <= {CLASS, OPTIONS}):
        raise ValueError(
            f"{where} describes a {base.__name__} by {_short(described)}, expected {CLASS} and perhaps {OPTIONS}"
        )
    kind = find_class(described[CLASS], base, where)
    return functools.partial(kind, **arguments(kind, described.get(OPTIONS) or {}, where))


def plainly(value: Any) -> Any:
    """Options in which each class is called as `name_of` does; it must have been imported."""
    if isinstance(value, list | tuple):
        return type(value)(plainly(part) for part in value)
    if not isinstance(value, dict):
        return value
    plain = {name: plainly(part) for name, part in value.items()}
    if isinstance(path := plain.get(CLASS), str) and _root(path) == PACKAGE:
        plain[CLASS] = path.rpartition(".")[2]
    return plain


def _resolved(value: Any, kind: type, option: str, where: str | Path) -> Any:
    if isinstance(value, list):
        return [_resolved(part, kind, option, where) for part in value]
    bases = [] if value is None else list(_bases(_annotation(kind, option)))
    if isinstance(value, str) and any(not issubclass(base, PurePath) for base, _ in bases):
        raise ValueError(f"{where} gives {option} of {kind.__name__} as {value!r}, expected {CLASS} and {OPTIONS}")
    if not isinstance(value, dict):
        return value
    if CLASS not in value:
        return {name: _resolved(part, kind, option, where) for name, part in value.items()}
    if len(bases) != 1:
        raise ValueError(
            f"{where} names a class for {option} of {kind.__name__}, where none is expected; if it is your class, "
            "annotate the argument, for example as TimeFactory"
        )
    (base, called), *_ = bases
    made = factory(value, base, where)
    return made if called else made()


def _annotation(kind: type, option: str) -> Any:
    for owner in kind.__mro__:  # an option may be one of a base, handed on by **kwargs
        if "__init__" in vars(owner):
            hints = get_type_hints(vars(owner)["__init__"])
            if option in hints:
                return hints[option]
    return None


def _bases(annotation: Any) -> Iterator[tuple[type, bool]]:
    """The classes that may be named for an annotation, each with whether they are called later (a factory)."""
    if inspect.isclass(annotation) and get_origin(annotation) is None:
        if annotation.__module__ not in ("builtins", "typing") and annotation is not type(None):
            yield annotation, False
    elif get_origin(annotation) is Callable or getattr(get_origin(annotation), "__name__", "") == "Callable":
        yield from ((base, True) for base, _ in _bases(get_args(annotation)[-1]))
    else:
        for part in get_args(annotation):
            yield from _bases(part)


def _members(base: type) -> Iterator[tuple[str, type]]:
    """The public classes of this package that are `base` or below it and can be made, by short name."""
    if _root(base.__module__) == PACKAGE and not base.__name__.startswith("_") and not inspect.isabstract(base):
        yield base.__qualname__, base
    below: list[type] = base.__subclasses__()
    for kind in below:
        yield from _members(kind)


def _root(module: str) -> str:
    return module.partition(".")[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
