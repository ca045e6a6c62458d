"""A parser whose refusals become one sentence: what was given and where, what is expected, and what to do next."""

import atexit
import os
import tempfile
import time
from argparse import ArgumentError, _SubParsersAction
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from recsys2stage.cli.config_files import load_config
from recsys2stage.cli.diagnosis import AcceptedError, Diagnosis
from recsys2stage.cli.messages import UsageError, debugging, informative_line, unknown, without_dashes


class Refused(Exception):
    """What a parser refused, before it is explained.

    It is explained outside the parser, whose contexts would change how values are checked.
    """

    def __init__(self, parser: ArgumentParser, message: str) -> None:
        super().__init__(message)
        while (parent := getattr(parser, "parent_parser", None)) is not None:
            parser = parent
        self.parser, self.message = parser, message

    def explain(self) -> str:
        """One sentence for the user."""
        words, verbs = _words(self.parser), _verbs(self.parser)
        if not words or words[0] not in verbs:
            return informative_line(self.message)
        try:
            Diagnosis(verbs[words[0]], words[0]).words(words[1:])
        except UsageError as found:
            return str(found)
        return informative_line(self.message)


class ClearErrors(ArgumentParser):
    """A parser that raises Refused where jsonargparse prints its usage and exits; options cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error and not debugging():
            raise Refused(self, message) from ex
        super().error(message, ex)


@contextmanager
def explained() -> Iterator[None]:
    """Context that raises a UsageError of one sentence for whatever a parser refuses.

    Raises:
        UsageError: with the sentence.
    """
    try:
        yield
    except Refused as refused:
        raise UsageError(refused.explain()) from refused


def parse_config(command: Callable[..., Any], verb: str, config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command from its config, if there is one, and given ones, which override it.

    Args:
        command: the function of the verb.
        verb: its name, for the error.
        config: YAML file.
        given: arguments by name.

    Raises:
        UsageError: a value of the config is wrong.
    """
    content = {} if config is None else dict(load_config(str(config), "", verb))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(command)
    try:
        parsed = parser.parse_object({**content, **given})
    except ArgumentError as error:
        own = {name: value for name, value in content.items() if name not in given}
        Diagnosis(parser, verb).mapping(own, str(config))
        Diagnosis(parser, verb).mapping(given, "")
        raise UsageError(f"{config or verb}: {informative_line(str(error))}") from error
    return dict(parser.instantiate(parsed).as_dict())


@contextmanager
def python_errors() -> Iterator[None]:
    """Context for commands that Python code calls: their errors are ValueErrors that name arguments, not options.

    Raises:
        ValueError: for options or configs that cannot be parsed, and for errors that name options.
    """
    try:
        yield
    except UsageError as error:
        raise ValueError(str(error)) from error
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        if (plain := without_dashes(text)) == text:
            raise
        raise type(error)(plain) from error


def check_accepted(parser: ArgumentParser) -> None:
    """Raises a UsageError for what a parser accepts though it has no effect or cannot work.

    Args:
        parser: a parser of verbs, after it has parsed a command line.
    """
    words, verbs = _words(parser), _verbs(parser)
    try:
        Diagnosis(verbs[words[0]], words[0], values=False).words(words[1:])
    except AcceptedError:
        raise
    except UsageError:  # the parser knows better
        pass


def _words(parser: ArgumentParser) -> list[str]:
    return list(getattr(parser, "args", ()))


def _verbs(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    return next((dict(one.choices) for one in parser._actions if isinstance(one, _SubParsersAction)), {})


def spoken_by_first_process(parent: int, patience: float = 10.0) -> bool:
    """Whether the first process of a fit ends with the same error as this one, and so prints it.

    Lightning starts further processes as children of the first, which leaves a mark when it ends with an error. They
    wait for its mark or its end; if it goes on, the error is of this process alone.

    Args:
        parent: id of the parent at the start.
        patience: seconds to wait.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        if "LOCAL_RANK" in os.environ:  # Lightning sets it where it starts further processes
            _mark(os.getpid()).touch()
            atexit.register(_remove_mark, os.getpid())
        return False
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if os.getppid() != parent or _mark(parent).exists():
            return True
        time.sleep(0.05)
    return False


def _mark(process: int) -> Path:
    return Path(tempfile.gettempdir()) / f"recsys-{process}-ended"


def _remove_mark(process: int) -> None:
    time.sleep(1)  # the others look for it
    _mark(process).unlink(missing_ok=True)


def check_verb(words: Sequence[str], verbs: Collection[str]) -> None:
    """Raises a UsageError unless a command line starts with a verb or asks for help.

    Args:
        words: the command line without the name of the program.
        verbs: the verbs that exist.
    """
    listed, step = ", ".join(verbs), "see: recsys --help"
    if not words:
        raise UsageError(f"no verb is given, expected one of {listed}; {step}")
    verb = words[0]
    if verb in verbs or verb in ("-h", "--help", "--version"):
        return
    if verb.startswith("-"):
        first = next((word for word in words if word in verbs), "VERB")
        raise UsageError(f"{verb} comes before the verb, expected the verb first: recsys {first} {verb} ...; {step}")
    raise UsageError(unknown(f"{verb!r} is not a verb", verb, verbs, step))
