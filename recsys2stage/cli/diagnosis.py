"""Finds what is wrong with a command line or a config that its parser refuses.

A parser's own text takes 20 to 90 lines. So once a parser has refused, the words and the YAML files are walked again
beside the options, types and classes that the parser knows, up to the first that does not fit. A command line that the
parser accepts is never walked.
"""

import dataclasses
import inspect
from argparse import Action
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from recsys2stage.cli.classes import (
    LISTED,
    arguments_filled_in,
    class_names,
    class_parser,
    default_class,
    families,
    family_of,
    find_class,
    fits,
    is_required,
    is_sequence,
    linked,
    options,
    set_hint,
)
from recsys2stage.cli.config_files import INSTEAD, load_config, structured
from recsys2stage.cli.messages import (
    MOST_NAMES,
    Place,
    UsageError,
    article,
    capital,
    choices,
    members,
    nearest,
    shown,
    type_words,
    unknown,
)
from recsys2stage.trust import CLASS, PACKAGE
from recsys2stage.trust import OPTIONS as INIT

MORE = "dict_kwargs"
EXAMPLE = dict.fromkeys(("fit", "validate", "test"), "configs/NAME/retriever.yaml") | {
    "prepare-data": "configs/NAME/prepare.yaml"
}
Path_ = tuple[str, ...]  # of an option, without init_args


class AcceptedError(UsageError):
    """A fault that parsers accept: an option without effect, or a class that cannot be built."""


class Diagnosis:
    """Walks words and configs beside the parser of a verb; raises a UsageError at the first fault.

    Args:
        parser: the parser of the verb.
        verb: its name, for the next step.
        values: whether to check values of plain types.
    """

    def __init__(self, parser: ArgumentParser, verb: str, values: bool = True) -> None:
        self.parser, self.verb, self.help = parser, verb, f"see: recsys {verb} --help"
        self.values, self.links = values, linked(parser)
        self.classes: dict[Path_, tuple[type, Place]] = {}  # class in force at an option, and where it was named
        self.hints: dict[Path_, Any] = {}
        self.given: set[Path_] = set()
        self.configs: list[str] = []

    def words(self, words: Sequence[str]) -> None:
        """Walks the words after a verb, then looks for what is missing."""
        flags = {name: action for action in self.parser._actions for name in action.option_strings}
        rest = list(words)
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            if name.startswith("-") and not name.startswith("--") and name not in flags:
                known = [option.lstrip("-") for option in flags if option.startswith("--")]
                raise UsageError(unknown(f"{name} is not an option", name[1:], known, self.help, "--", listed=False))
            if not name.startswith("-"):
                raise UsageError(
                    f"{shown(name + equals + value)} follows no option, expected --option VALUE, a list as one word "
                    f"such as '[1, 2]'; {self.help}"
                )
            if name == "--help" or name == "-h" or name.startswith("--print_config"):
                continue
            config = name in ("-c", "--config")
            path = tuple(name.lstrip("-").split("."))
            if not config and not name.endswith(".help"):
                self._check_known(self.parser, path, Place("", name), ())
            if not equals:
                if not rest or rest[0].startswith("--"):
                    hint = getattr(flags.get(name), "_typehint", None)
                    expected = INSTEAD if config else f"expected {'one' if hint is None else type_words(hint)}"
                    raise UsageError(f"{name} has no value, {expected}; write {name} VALUE, or {self.help}")
                value = rest.pop(0)
            if config:
                self.config(value)
            elif not name.endswith(".help"):
                self._entry(self.parser, path, structured(value), Place("", name), ())
        self._check_complete()

    def config(self, path: str) -> None:
        """Walks a YAML file."""
        content = load_config(path, "--config ", self.verb)
        self.configs.append(path)
        self.mapping(content, path)

    def mapping(self, content: Mapping[Any, Any], file: str) -> None:
        """Walks options that were read from a file."""
        self._mapping(self.parser, content, Place(file, ""), ())

    # names of options

    def _mapping(self, parser: ArgumentParser, content: Mapping[Any, Any], at: Place, path: Path_) -> None:
        for key, value in content.items():
            if not isinstance(key, str):
                raise UsageError(
                    f"{at.child(repr(key))} is a {type(key).__name__} as YAML reads it, expected the name of an "
                    f"option; put it in quotes if it is a name, or {self.help}"
                )
            self._entry(parser, tuple(key.split(".")), value, at.child(key), path)

    def _entry(self, parser: ArgumentParser, key: Path_, value: Any, at: Place, path: Path_) -> None:
        """Walks the value of a key of a parser: an option, a group of options, or an option of a class."""
        append = key[-1].endswith("+")
        key, known = (*key[:-1], key[-1].removesuffix("+")), options(parser)
        for length in range(len(key), 0, -1):
            action = known.get(".".join(key[:length]))
            if action is not None:
                self._option(
                    action,
                    key[length:],
                    [value] if append and not isinstance(value, list) else value,
                    at,
                    (*path, *key[:length]),
                )
                return
        self._check_known(parser, key, at, path)
        if isinstance(value, Mapping):
            for name, part in value.items():
                self._entry(parser, (*key, *str(name).split(".")), part, at.child(name), path)
        elif value is not None and not (isinstance(value, str) and Path(value).is_file()):
            group = f"{'.'.join(key)}."
            names = [name.removeprefix(group) for name in known if name.startswith(group)]
            raise AcceptedError(f"{at} is {shown(value)}, expected a mapping of options ({names[0]}, …); {self.help}")

    def _check_known(self, parser: ArgumentParser, key: Path_, at: Place, path: Path_) -> None:
        """Raises unless a key is that of an option, of a group of options, or of an option of a class."""
        key, known = (*key[:-1], key[-1].removesuffix("+")), [tuple(name.split(".")) for name in options(parser)]
        if any(name == key[: len(name)] or name[: len(key)] == key for name in known):
            return
        depth = max(length for length in range(len(key)) if any(name[:length] == key[:length] for name in known))
        level = sorted({name[depth] for name in known if len(name) > depth and name[:depth] == key[:depth]})
        group, dashes = ".".join(key[:depth]), "" if at.file or depth or path else "--"
        owner, step = self.classes.get(path), self.help
        deeper = [name for name in known if len(name) > 1 and name[-1] == key[-1]]
        if owner is not None and not group:
            of, step = owner[0].__name__, self._class_help(path)
            if owner[1].file not in ("", at.file):
                of += f", the {CLASS} of {owner[1].file}"
        else:
            of = group or f"recsys {self.verb}"
            if deeper and nearest(key[depth], level) is None:
                dotted = f"{dashes}{'.'.join(deeper[0])}"
                raise UsageError(f"{at} is not an option of {of}; did you mean {dotted}? {capital(step)}")
        raise UsageError(unknown(f"{at} is not an option of {of}", key[depth], level, step, dashes, listed=False))

    def _class_help(self, path: Path_) -> str:
        """The command that describes the options of the class in force at a path."""
        steps = [(path[:length], self.classes.get(path[:length])) for length in range(1, len(path) + 1)]
        named = [
            (".".join(part for part in key if not part.isdigit()), owner[0].__name__) for key, owner in steps if owner
        ]
        outer = [f"--{key} {name}" for key, name in named[:-1]]
        return f"see: recsys {' '.join([self.verb, *outer])} --{named[-1][0]}.help {named[-1][1]}"

    def _option(self, action: Action, rest: Path_, value: Any, at: Place, path: Path_) -> None:
        if path in self.links and getattr(action, "source", None) is None:
            raise AcceptedError(f"{at} is {shown(value)}, expected to be unset, as it is set by the data; leave it out")
        source = getattr(action, "source", None)
        if source is not None:  # a link
            follows = choices([str(name) for name, _ in source])
            raise UsageError(f"{at} cannot be set, expected to follow {follows}; set {follows}, or {self.help}")
        hint = getattr(action, "_typehint", None)
        self.given.add(path)
        if hint is None:
            if action.choices is not None and value not in action.choices:
                names = [str(one) for one in action.choices]
                raise UsageError(unknown(f"{at} is {shown(value)}", str(value), names, self.help))
            return
        self.hints[path] = hint
        if path not in self.classes and (default := default_class(action.default, hint)) is not None:
            self.classes[path] = (default, Place("", ""))
        if rest and rest[0] == CLASS:
            self._value(hint, value, at, path)
        elif rest := tuple(part for part in rest if part not in (INIT, MORE)):
            self._nested(hint, rest, value, at, path)
        elif at.key.endswith(f".{INIT}"):
            self._value(hint, {INIT: value}, at, path)
        else:
            self._value(hint, value, at, path)

    def _nested(self, hint: Any, rest: Path_, value: Any, at: Place, path: Path_) -> None:
        """Walks an option of a class that is given with dots, such as --index.factory Flat."""
        if path in self.classes:
            self._entry(self._parser_at(path), rest, value, at, path)
            return
        bases, option = families(hint), at.key.removesuffix("." + ".".join(rest)).removesuffix(f".{INIT}")
        if not bases:
            if any(get_origin(one) is dict or dataclasses.is_dataclass(one) for one in members(hint)):
                return  # a key of a mapping
            raise UsageError(f"{at} is not an option, expected {option} to be {type_words(hint)}; {self.help}")
        names = class_names(bases)
        having = [name for name in names if rest[0] in options(class_parser(find_class(name, bases)[0]))]
        raise UsageError(
            f"{at} is given without a class, expected {option} to name one of {', '.join(names[:MOST_NAMES])}; write "
            f"{option} {(having or names)[0]} before it"
        )

    def _parser_at(self, path: Path_) -> ArgumentParser:
        return class_parser(self.classes[path][0], arguments_filled_in(self.hints.get(path)))

    # values

    def _value(self, hint: Any, value: Any, at: Place, path: Path_) -> None:
        self.given.add(path)
        self.hints[path] = hint
        bases = families(hint)
        if not bases:
            self._leaf(hint, value, at)
        elif value is not None and not isinstance(value, list) and not families(hint, direct=True):
            raise UsageError(
                f"{at} is {shown(value)}, expected a list of {' or '.join(_nouns(bases))}, each a name, or {CLASS} and "
                f"{INIT}; {self._step(bases)}"
            )
        elif isinstance(value, Mapping):
            self._described(bases, value, at, path)
        elif isinstance(value, list):
            inner = [get_args(one)[0] for one in members(hint) if is_sequence(one)]
            if not inner:
                raise UsageError(
                    f"{at} is a list, expected one {choices(_nouns(bases))}; give one {CLASS} with its {INIT}"
                )
            for number, part in enumerate(value):
                self.classes.pop((*path, str(number)), None)
                self._value(inner[0], part, at.child(number), (*path, str(number)))
        elif isinstance(value, str) and any(
            inspect.isclass(one) and issubclass(one, str | PurePath) for one in members(hint)
        ):
            return
        elif isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
            self._described(bases, load_config(value, f"{at} ", self.verb), Place(value, ""), path)
        elif isinstance(value, str):
            self.classes[path] = (self._class(value, bases, at), at)
        elif not fits(hint, value):
            raise UsageError(
                f"{at} is {shown(value)}, expected {_an(bases)}, by {CLASS} and {INIT}; {self._step(bases)}"
            )

    def _described(self, bases: list[type], value: Mapping[Any, Any], at: Place, path: Path_) -> None:
        """Walks a class with its options, as class_path and init_args."""
        if CLASS in value:
            self.classes[path] = (self._class(value[CLASS], bases, at.child(CLASS)), at)
        if path in self.classes and not any(nearest(str(key), (CLASS, INIT, MORE)) for key in value):
            self._mapping(self._parser_at(path), value, at, path)  # init_args may be left out without class_path
            return
        for loose in (str(key) for key in value if key not in (CLASS, INIT, MORE)):
            known = path in self.classes and loose in options(self._parser_at(path))
            near = None if known else nearest(loose, (CLASS, INIT))
            if near is not None:
                raise UsageError(
                    f"{at.child(loose)} is not a key of a class; did you mean {near}? {capital(self.help)}"
                )
            if path not in self.classes:
                names = ", ".join(class_names(bases)[:MOST_NAMES])
                raise UsageError(
                    f"{at} has {loose} but no {CLASS}, expected {CLASS}, one of {names}, and {INIT}; "
                    f"{self._step(bases)}"
                )
            raise UsageError(
                f"{at.child(loose)} is not expected next to {CLASS}, expected {CLASS} and {INIT}; write it as "
                f"{at.child(INIT).child(loose).key}"
            )
        if path not in self.classes:
            names = ", ".join(class_names(bases)[:MOST_NAMES])
            raise UsageError(
                f"{at} has no {CLASS}, expected one of {names}; add {CLASS}, or give the config that names it first"
            )
        content = value.get(INIT)
        if content is not None and not isinstance(content, Mapping):
            raise UsageError(f"{at.child(INIT)} is {shown(content)}, expected a mapping of options; {self.help}")
        self._mapping(self._parser_at(path), content or {}, at.child(INIT), path)

    def _class(self, name: Any, bases: list[type], at: Place) -> type:
        step, names = self._step(bases), class_names(bases)
        if not isinstance(name, str):
            raise UsageError(f"{at} is {shown(name)}, expected the name of {_an(bases)}; {step}")
        kind, reason = find_class(name, bases)
        fitting = kind is not None and issubclass(kind, tuple(bases))
        if kind is None or not (fitting or family_of(kind) or "." in name):
            why = f" ({reason})" if reason else ""
            given = f"{at} is {shown(name)}, which is no {choices(_nouns(bases))}{why}"
            raise UsageError(unknown(given, name.rpartition(".")[2], names, step))
        other = family_of(kind)
        if not fitting:
            what = "another class" if other is None else article(other.__name__)
            names = names[:MOST_NAMES]
            raise UsageError(f"{at} is {shown(name)}, {what}, expected {_an(bases)}, such as {choices(names)}; {step}")
        if inspect.isabstract(kind):
            raise AcceptedError(f"{at} is {shown(name)}, an abstract class, expected {choices(names)}; {step}")
        return kind

    def _step(self, bases: list[type]) -> str:
        for base in bases:
            if base.__name__ in LISTED and base.__module__.startswith(f"{PACKAGE}."):
                return f"see: recsys list {LISTED[base.__name__]}"
        return self.help

    def _leaf(self, hint: Any, value: Any, at: Place) -> None:
        """Walks a value of plain types, down to the part that does not fit."""
        if not self.values or fits(hint, value):
            return
        for part in members(hint):
            self._inside(part, value, at)
        names = [str(one) for part in members(hint) if get_origin(part) is Literal for one in get_args(part)]
        quotes = " as YAML reads it (quotes keep no, off, yes and on)" if isinstance(value, bool) else ""
        if names and isinstance(value, str | bool):
            raise UsageError(unknown(f"{at} is {shown(value)}{quotes}", str(value), names, self.help))
        raise UsageError(f"{at} is {shown(value)}{quotes}, expected {type_words(hint)}; {self.help}")

    def _inside(self, hint: Any, value: Any, at: Place) -> None:
        """Raises for the first wrong part of a list, a mapping or a dataclass."""
        arguments = get_args(hint)
        if is_sequence(hint) and arguments and isinstance(value, list):
            for number, part in enumerate(value):
                self._leaf(arguments[0], part, at.child(number))
        elif get_origin(hint) is dict and arguments and isinstance(value, Mapping):
            for key, part in value.items():
                self._leaf(arguments[1], part, at.child(key))
        elif dataclasses.is_dataclass(hint) and inspect.isclass(hint) and isinstance(value, Mapping):
            known = options(class_parser(hint))
            for key, part in value.items():
                if key not in known:
                    given = f"{at.child(key)} is not an option of {hint.__name__}"
                    raise UsageError(unknown(given, str(key), list(known), self.help))
                self._leaf(getattr(known[key], "_typehint", str), part, at.child(key))
            for name, action in known.items():
                if action.required and name not in value:
                    expected = type_words(getattr(action, "_typehint", str))
                    raise UsageError(f"{at} has no {name}, expected {expected}; add {at.child(name).key}")

    # what is missing

    def _check_complete(self) -> None:
        lacking = [
            name
            for name, action in options(self.parser).items()
            if is_required(self.parser, action) and not any(".".join(path).startswith(name) for path in self.given)
        ]
        if lacking:
            many, named = len(lacking) > 1, choices([f"--{name}" for name in lacking], "and")
            step = f"set {'them' if many else 'it'} in a config or on the command line"
            if not self.configs and len(lacking) > 1:
                step = f"give --config FILE with them, such as {EXAMPLE.get(self.verb, 'configs/NAME/FILE.yaml')}"
            known, where = options(self.parser), f" from {choices(self.configs, 'and')}" if self.configs else ""
            expected = ", ".join(type_words(set_hint(known[name])) for name in lacking)
            raise UsageError(
                f"{named} {'are' if many else 'is'} missing{where}, expected {expected}; {step}, or {self.help}"
            )
        for path, (kind, at) in self.classes.items():
            for name, action in options(self._parser_at(path)).items() if path in self.given else ():
                if action.required and (*path, name) not in self.given | self.links:
                    dotted = ".".join(path)
                    key = f"{at.key}.{INIT}.{name}" if at.file else f"--{dotted}.{name}"
                    raise UsageError(
                        f"{at if at.file else f'--{dotted}'} names {kind.__name__} without {name}, expected "
                        f"{type_words(getattr(action, '_typehint', str))}; set {key}"
                    )


def _nouns(bases: list[type]) -> list[str]:
    return [base.__name__ for base in bases]


def _an(bases: list[type]) -> str:
    return choices([article(noun) for noun in _nouns(bases)])
