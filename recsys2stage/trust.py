"""Class lookup for files: this package's classes by short name, other classes only from trusted modules.

Only subclasses of the expected base class can be named (an Encoder where an encoder belongs), so that no other
callable can be reached. A short name is found among these subclasses, in any module of the package.
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

Trust = list[str] | str | None  # names of modules, or one name

P = ParamSpec("P")
R = TypeVar("R")

_allowed: ContextVar[tuple[str, ...]] = ContextVar("allowed", default=())


@contextmanager
def trusting(modules: Iterable[str] | None) -> Iterator[None]:
    """Context in which files may also name classes of these modules and their submodules, which are then imported."""
    modules = [modules] if isinstance(modules, str) else list(modules or ())
    token = _allowed.set((*_allowed.get(), *modules))
    try:
        yield
    finally:
        _allowed.reset(token)


def trusts(verb: Callable[P, R]) -> Callable[P, R]:
    """Decorator: runs a function in the context `trusting(trust)`, with its own argument `trust`."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(inspect.signature(verb).bind(*args, **kwargs).arguments.get("trust")):
            return verb(*args, **kwargs)

    return run


def class_name(kind: type) -> str:
    """Name of a class in files: the short name for classes of this package, the dotted path for others."""
    return kind.__qualname__ if _root(kind.__module__) == PACKAGE else f"{kind.__module__}.{kind.__qualname__}"


def find_class(name: Any, base: type, where: str | Path) -> type:
    """Finds the class that a file names.

    Args:
        name: short name of a class of this package, or dotted path.
        base: required base class.
        where: the file, for the error.

    Raises:
        ValueError: for other classes, and for modules that are not trusted, before they are imported.
    """
    if not isinstance(name, str):
        raise ValueError(f"{where} names the class {name!r}, expected text")
    module, _, short = name.rpartition(".")
    if _root(module) in ("", PACKAGE):  # in any module: it may have moved since the file was written
        members = dict(_members(base))
        if short not in members:
            raise ValueError(
                f"{where} names the {base.__name__} {name!r}, which this version does not have; expected one of "
                f"{', '.join(sorted(members))}"
            )
        return members[short]
    own = _root(module) == _root(base.__module__)  # such as torch's optimizers
    if not own and not any(module == allowed or module.startswith(f"{allowed}.") for allowed in _allowed.get()):
        raise ValueError(
            f"{where} names {name}, which is not part of {PACKAGE}; loading it would run the code of {module}. If you "
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
    """Resolves plain options of a class: each {"class_path", "init_args"} becomes that class with its options bound.

    Args:
        kind: the class; its annotations give the base class that each option expects.
        options: by name.
        where: the file they come from, for the error.
    """
    if not (isinstance(options, dict) and all(isinstance(name, str) for name in options)):
        raise ValueError(f"{where} gives {kind.__name__} the options {_short(options)}, expected a dictionary by name")
    return {name: _resolved(value, kind, name, where) for name, value in options.items()}


def factory(described: Any, base: type, where: str | Path) -> Callable[..., Any]:
    """Resolves {"class_path", "init_args"} to that subclass of `base`, with its options bound."""
    if not (isinstance(described, dict) and CLASS in described and described.keys() <= {CLASS, OPTIONS}):
        raise ValueError(
            f"{where} describes a {base.__name__} by {_short(described)}, expected {CLASS} and optionally {OPTIONS}"
        )
    kind = find_class(described[CLASS], base, where)
    return functools.partial(kind, **arguments(kind, described.get(OPTIONS) or {}, where))


def shorten_class_paths(value: Any) -> Any:
    """Replaces the path of each class of this package in plain options by its short name, as `class_name` gives it."""
    if isinstance(value, list | tuple):
        return type(value)(shorten_class_paths(part) for part in value)
    if not isinstance(value, dict):
        return value
    plain = {name: shorten_class_paths(part) for name, part in value.items()}
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
    (base, is_factory), *_ = bases
    made = factory(value, base, where)
    return made if is_factory else made()


def _annotation(kind: type, option: str) -> Any:
    for owner in kind.__mro__:  # an option may belong to a base class, passed on by **kwargs
        if "__init__" in vars(owner):
            hints = get_type_hints(vars(owner)["__init__"])
            if option in hints:
                return hints[option]
    return None


def _bases(annotation: Any) -> Iterator[tuple[type, bool]]:
    """The base classes that an annotation allows, each with whether it is annotated as a factory."""
    if inspect.isclass(annotation) and get_origin(annotation) is None:
        if annotation.__module__ not in ("builtins", "typing") and annotation is not type(None):
            yield annotation, False
    elif get_origin(annotation) is Callable or getattr(get_origin(annotation), "__name__", "") == "Callable":
        yield from ((base, True) for base, _ in _bases(get_args(annotation)[-1]))
    else:
        for part in get_args(annotation):
            yield from _bases(part)


def _members(base: type) -> Iterator[tuple[str, type]]:
    """The public, concrete classes of this package among `base` and its subclasses, by short name."""
    if _root(base.__module__) == PACKAGE and not base.__name__.startswith("_") and not inspect.isabstract(base):
        yield base.__qualname__, base
    subclasses: list[type] = base.__subclasses__()
    for kind in subclasses:
        yield from _members(kind)


def _root(module: str) -> str:
    return module.partition(".")[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
