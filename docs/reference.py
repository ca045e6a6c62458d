"""The reference pages, made from the code: commands and classes from their parsers, the Python API from docstrings.

Nothing of it is committed. `python -m docs.reference` lists the pages, and with the name of one prints it.
"""

import inspect
import re
import sys
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from docs.families import FAMILIES, PAGE_OF, Family, identifier
from docs.tables import escaped, table
from recsys2stage.cli import classes, training
from recsys2stage.cli.commands import COMMANDS
from recsys2stage.cli.completion import POSITIONAL
from recsys2stage.cli.main import TRAINING
from recsys2stage.cli.messages import members


def help_text(text: str | None) -> str:
    """The help of an option; roles and double backticks of other packages' docstrings as plain code."""
    if not text or text == SUPPRESS:
        return ""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return escaped(re.sub(r"\bNone:", "null:", text))


def docstring(thing: Any) -> tuple[str, str, str]:
    """The first line of a docstring, the text below it, and its section of errors."""
    text = inspect.getdoc(thing) or ""
    body, *sections = re.split(r"^(Args|Returns|Raises|Attributes|Yields):\n", text, flags=re.MULTILINE)
    first, _, rest = body.strip().partition("\n")
    if rest and rest[0] not in "\n ":  # a first sentence of more than one line
        first, _, rest = body.strip().partition("\n\n")
    raised = dict(zip(sections[::2], sections[1::2], strict=True)).get("Raises", "")
    return " ".join(first.split()), rest.strip("\n"), " ".join(raised.split())


# --- types and defaults


def type_text(hint: Any, up: str) -> str:
    """A type hint for readers: values of a Literal, classes as links to their page, null where it is allowed."""
    parts = [_one_type(part, up) for part in members(hint)]
    parts = [*dict.fromkeys(part for part in parts if part != "null"), *(["null"] if "null" in parts else [])]
    return " or ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 2 else " or ".join(parts)


def _one_type(hint: Any, up: str) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if classes.is_factory(hint):
        return type_text(arguments[-1], up)
    if origin is tuple and arguments and Ellipsis not in arguments:
        return f"({', '.join(type_text(one, up) for one in arguments)})"
    if arguments and (origin is dict or getattr(origin, "__name__", "") in ("Mapping", "Dict")):
        return f"mapping of {type_text(arguments[-1], up)}"
    if arguments and (classes.is_sequence(hint) or origin in (tuple, set)):
        return f"list of {type_text(arguments[0], up)}"
    if hint in PAGE_OF:
        family = PAGE_OF[hint]
        anchor = f"#{hint.__name__.lower()}" if hint in family.concrete() and len(family.bases) > 1 else ""
        return f"[{hint.__name__}]({up}config/{family.page}.md{anchor})"
    if is_dataclass(hint):
        return f"mapping with {', '.join(f'`{field.name}`' for field in fields(hint))}"
    name = getattr(hint, "__name__", str(hint))
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}
    names |= {"Any": "anything", "dict": "mapping", "timedelta": "time span", "path_type": "path"}
    return names.get(name, "path" if name.startswith("Path_") else f"`{name}`")


def default_text(action: Action) -> str:
    """The default of an option; "required" if it has none."""
    value = action.default
    if isinstance(value, list) and value and all(hasattr(one, "__dict__") for one in value):
        return ", ".join(f"`{type(one).__name__}`" for one in value)
    path = value.get("class_path") if isinstance(value, dict) or hasattr(value, "class_path") else None
    if isinstance(path, str):
        return f"`{path.rpartition('.')[2]}`"
    if value is None or (isinstance(value, str) and value == SUPPRESS):
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if inspect.isclass(value):
        return f"`{value.__name__}`"
    return f"`{value}`" if str(value) else "empty"


def option_rows(parser: ArgumentParser, prefix: str, up: str, only: Callable[[str], bool]) -> Iterator[list[str]]:
    for name, action in classes.options(parser).items():
        if only(name):
            hint = getattr(action, "_typehint", None) or action.type or (bool if action.nargs == 0 else str)
            default = "required" if classes.is_required(parser, action) else default_text(action)
            if "(set by the " in (action.help or ""):
                default = "set for you"
            kind = type_text(hint, up).removesuffix(" or null" if default == "required" else "\0")
            yield [f"`{prefix}{name}`", kind, default, help_text(action.help)]


HEAD = ("option", "type", "default", "what it is")


# --- commands


class _Parser(Exception):
    def __init__(self, parser: Any) -> None:
        super().__init__()
        self.parser = parser


def training_parser(verb: str) -> ArgumentParser:
    """The parser of fit, validate or test, which Lightning makes."""

    def stop(_: Any, parser: Any, __: Any) -> None:
        raise _Parser(parser)

    original = training.RecsysCLI.parse_arguments
    training.RecsysCLI.parse_arguments = stop  # type: ignore[assignment, method-assign]  # only the parser is wanted
    try:
        training.train(verb, [])
    except _Parser as found:
        return next(one.choices[verb] for one in found.parser._actions if getattr(one, "choices", None))
    finally:
        training.RecsysCLI.parse_arguments = original  # type: ignore[method-assign]  # as it was
    raise AssertionError(f"the parser of {verb} was not made")


def command_parser(command: Callable[..., Any]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(command, fail_untyped=False)
    return parser


GROUPS = {  # of the options of fit
    "trainer": "Options of the trainer, which Lightning defines.",
    "checkpoint": "Options of `best.ckpt`, which Lightning's ModelCheckpoint defines.",
    "last": "Options of `last.ckpt`, from which an interrupted fit resumes.",
    "early_stopping": "Options of Lightning's EarlyStopping.",
}


def command_page(verb: str) -> str:
    command = (TRAINING | COMMANDS)[verb]
    parser = training_parser(verb) if verb in TRAINING else command_parser(command)
    first, rest, raised = docstring(command)
    options = classes.options(parser)
    required = [name for name, action in options.items() if classes.is_required(parser, action)]
    named = POSITIONAL.get(verb)
    words = [f"{named.upper()}" if name == named else f"--{name} {name.upper()}" for name in required]
    if named and named not in required:
        words = [f"[{named.upper()}]", *words]
    usage = " ".join([f"recsys {verb}", *(["[--config FILE]"] if verb not in ("init", "list") else []), *words])
    groups = [name for name in GROUPS if any(option.startswith(f"{name}.") for option in options)]
    rows = option_rows(parser, "--", "../", lambda name: name.partition(".")[0] not in groups)
    parts = [f"# recsys {verb}", escaped(first), f"```text\n{usage} [options]\n```", rest, table(HEAD, rows)]
    if verb in TRAINING:
        parts.append(
            "`--model` and `--data` name classes: [the retriever's](../config/retriever.md) or "
            "[the ranker's](../config/ranker.md). Their options follow with dots: `--model.init_args.dim 128`, "
            "`--data.init_args.batch_size 64`."
        )
    for group in groups:
        # the default binds the group of this turn, which mypy cannot type
        inside = option_rows(parser, "--", "../", lambda name, group=group: name.startswith(f"{group}."))  # type: ignore[misc]
        parts += [f"## {group}", GROUPS[group], table(HEAD, inside)]
    if raised:
        parts += ["## Errors", help_text(raised)]
    return "\n\n".join(part for part in parts if part) + "\n"


def command_index() -> str:
    verbs = TRAINING | COMMANDS
    order = [*(name for name in COMMANDS if name in ("init", "list", "simulate", "prepare-data")), *TRAINING]
    order += [name for name in COMMANDS if name not in order]
    rows = [[f"[`{verb}`]({verb}.md)", escaped(docstring(verbs[verb])[0])] for verb in order]
    return "\n\n".join(
        [
            "# Command line",
            "`recsys VERB [options]`, or `python -m recsys2stage VERB [options]`. The verb comes first. These pages "
            "are made from the parsers of the commands.",
            table(("verb", "what it does"), rows),
            "Every verb but `init` and `list` also takes these options:",
            table(
                ("option", "what it does"),
                [
                    [
                        "`--config FILE`",
                        "Reads options from a YAML file. Later files and options override earlier ones.",
                    ],
                    ["`--print_config`", "Prints the options with all defaults as YAML, and ends."],
                    ["`--help`", "Prints the options, and ends."],
                ],
            ),
            "An option that takes a class takes its name, and the class's own options follow with dots: "
            "`--index Faiss --index.factory IVF256,Flat`. [Classes in configs](../config/index.md) lists them. "
            "`+=` adds to a list: `--signals+=Session`.",
            "`recsys --version` prints the version, `recsys --completion bash` (`zsh`, `fish`) a completion script. "
            "The exit status is 0 after success, 2 after a wrong command line or config, 1 after any other error, and "
            "130 after Ctrl-C. `RECSYS_DEBUG=1` shows the traceback of an error.",
        ]
    )


# --- classes in configs

EXAMPLE = """
model:
  class_path: Retriever
  init_args:
    encoder:
      class_path: HSTU
      init_args: {layers: 4}
""".strip()


def config_page(family: Family) -> str:
    parts = [f"# {family.title}", f"Named by {family.where}."]
    for kind, filled_in in family.concrete().items():
        first, rest, _ = docstring(kind)
        parser = classes.class_parser(kind, filled_in)
        rows = list(option_rows(parser, "", "../", lambda _: True))
        options = table(HEAD, rows) if rows else "It has no options."
        link = f"In Python: [`{identifier(kind)}`][{identifier(kind)}]"
        parts += [f"## {kind.__name__}", escaped(first), rest, options, link]
    return "\n\n".join(part for part in parts if part) + "\n"


def config_index() -> str:
    rows = [
        [
            f"[{family.title}]({family.page}.md)",
            family.where,
            ", ".join(f"[{one.__name__}]({family.page}.md#{one.__name__.lower()})" for one in family.concrete()),
        ]
        for family in FAMILIES
    ]
    return "\n\n".join(
        [
            "# Classes in configs",
            "A config names a class by `class_path` and sets its options under `init_args`. Classes of the package "
            "have short names; your own are named by their dotted path (`my_package.MyLoss`).",
            f"```yaml\n{EXAMPLE}\n```",
            table(("classes", "named by", "members"), rows),
            "`recsys list` prints the same names in a terminal.",
        ]
    )


def pages() -> dict[str, str]:
    """The pages in the order of the navigation: name in docs/ -> Markdown."""
    verbs = ["init", "list", "simulate", "prepare-data", *TRAINING]
    verbs += [verb for verb in COMMANDS if verb not in verbs]
    found = {"cli/index.md": command_index()} | {f"cli/{verb}.md": command_page(verb) for verb in verbs}
    found |= {"config/index.md": config_index()}
    return found | {f"config/{family.page}.md": config_page(family) for family in FAMILIES}


if __name__ == "__main__":
    made = pages()
    print(made.get(sys.argv[1] if len(sys.argv) > 1 else "", "\n".join(made)))
