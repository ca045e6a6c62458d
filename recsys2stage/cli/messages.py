"""Text of error messages: nearest names, types, lists, and the most informative line of a parser's message."""

import dataclasses
import difflib
import inspect
import os
import re
import types
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, Union, get_args, get_origin

MOST_NAMES = 20  # longest list of names that a message shows
MOST_CHARACTERS = 80  # longest value that a message shows in full
INTERRUPTED = 130  # exit status of a program that Ctrl-C ends
WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("a boolean", "booleans"),
    str: ("text", "text"),
    dict: ("a mapping", "mappings"),
    list: ("a list", "lists"),
    tuple: ("a list", "lists"),
    type(None): ("null", "null"),
}


class UsageError(Exception):
    """A command line or a config that cannot be parsed; its text is for the user. Ends a command with status 2.

    Not a ValueError: jsonargparse would catch and wrap it.
    """


@dataclass(frozen=True)
class Place:
    """Where a value was given: a dotted key of a file, or an option of the command line (file "")."""

    file: str
    key: str

    def child(self, name: object) -> "Place":
        return Place(self.file, f"{self.key}.{name}" if self.key else str(name))

    def __str__(self) -> str:
        return f"{self.file}: {self.key}" if self.file else self.key


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar name, without regard to case; None if none is similar."""
    by_lower = {one.lower(): one for one in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def choices(names: Collection[str], last: str = "or") -> str:
    """Names as a text: a, b or c."""
    first = list(names)
    return first[0] if len(first) == 1 else f"{', '.join(first[:-1])} {last} {first[-1]}"


def unknown(given: str, name: str, names: Collection[str], step: str, prefix: str = "", listed: bool = True) -> str:
    """The sentence for an unknown name: the nearest one, and all of a short list.

    Args:
        given: what was given and where, as a clause.
        name: name given.
        names: names that exist.
        step: what to do next, as a clause.
        prefix: text before each name.
        listed: list them also beside the nearest one.
    """
    near, shown_names = nearest(name, names), [prefix + one for one in names]
    if len(shown_names) > MOST_NAMES:
        shown_names = [*shown_names[: MOST_NAMES // 2], f"… ({len(names)} names)"]
    expected = f"expected {'one of ' if len(shown_names) > 1 else ''}{', '.join(shown_names)}"
    if near is None:
        return f"{given}, {expected if names else 'expected no more names'}; {step}"
    question = f"{given}; did you mean {prefix}{near}?"
    if listed and len(names) <= MOST_NAMES:
        return f"{question} E{expected[1:]}; {step}"
    return f"{question} {capital(step)}"


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def capital(clause: str) -> str:
    return clause[0].upper() + clause[1:]


def article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' or noun.startswith(('MLP', 'HSTU')) else 'a'} {noun}"


def members(hint: Any) -> list[Any]:
    """The alternatives of a type hint: those of a union, else the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return [part for one in get_args(hint) for part in members(one)]
    return [hint]


def type_words(hint: Any, many: bool = False) -> str:
    """A type hint as text, such as: a whole number, a list of text or null."""
    return choices(list(dict.fromkeys(_one_type(part, many) for part in members(hint))))


def _one_type(hint: Any, many: bool) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return choices([str(one) for one in arguments])
    if origin is tuple and arguments and Ellipsis not in arguments:
        return f"{WORDS[tuple][many]} of {len(arguments)} ({', '.join(type_words(one) for one in arguments)})"
    if origin in (list, dict, tuple) and arguments:
        of = arguments[-1] if origin is dict else arguments[0]
        return f"{WORDS[origin][many]} of {type_words(of, many=True)}"
    if hint in WORDS:
        return WORDS[hint][many]
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"{WORDS[dict][many]} with {fields}"
    if inspect.isclass(hint) and issubclass(hint, PurePath):
        return "paths" if many else "a path"
    if getattr(origin, "__name__", "") == "Callable":
        return type_words(arguments[-1], many)
    name = getattr(hint, "__name__", str(hint).rpartition(".")[2])
    return f"{name}s" if many else article(name)


def plain_message(error: BaseException) -> str:
    """The message of an error, without the list of types that jsonargparse wraps around the error of a class."""
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__:
        error = error.__cause__
    return str(error)


def informative_line(message: str) -> str:
    """The first line of a parser's text that tells what is wrong, with the way to the whole text."""
    frames = ("Parser key", "Problem with given class_path", "Does not validate", "Subtypes:", "Errors:", "Given value")
    lines = [line.strip(" -") for line in message.splitlines()]
    told = [line for line in lines if line and not line.startswith(frames)] or ["the command line cannot be parsed"]
    return f"{told[0].removesuffix('.')}; RECSYS_DEBUG=1 shows the whole error"


def first_sentences(text: str, most: int = 300) -> str:
    """The first sentences of another library's message, on one line and without its final period."""
    line = " ".join(text.split())
    return (line if len(line) <= most else f"{line[: most - 1]}…").removesuffix(".")


def without_dashes(text: str) -> str:
    """A message with the names of arguments instead of options: users for --users; commands stay as they are."""
    clauses = re.split(r"(recsys [a-z]+[^;,]*|make: [^;,)]*)", text)  # the odd ones are commands
    clauses[::2] = [re.sub(r"(?<![\w-])--([a-z]\w*)", r"\1", clause) for clause in clauses[::2]]
    return "".join(clauses)


def debugging() -> bool:
    """Whether RECSYS_DEBUG=1 asks for whole errors and tracebacks."""
    return bool(os.environ.get("RECSYS_DEBUG"))
