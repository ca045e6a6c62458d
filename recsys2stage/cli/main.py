"""recsys: two-stage recommendation from a raw event log to evaluated, ranked items.

fit, validate and test are the commands of Lightning; the others prepare data, export, mine, recommend and evaluate.
Each takes --config FILE, --print_config and dotted overrides such as --trainer.max_epochs 3.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from recsys2stage.cli.commands import COMMANDS
from recsys2stage.cli.completion import answer, name_positional
from recsys2stage.cli.messages import INTERRUPTED, UsageError, debugging, plain_message
from recsys2stage.cli.parser import ClearErrors, check_verb, explained, spoken_by_first_process

# short class names in YAML resolve once their module is imported
from recsys2stage.data import ids, sources, split  # noqa: F401
from recsys2stage.data.summary import HINTS
from recsys2stage.mining import miners  # noqa: F401
from recsys2stage.ranking import signals  # noqa: F401
from recsys2stage.retrieval import index  # noqa: F401


def train(verb: str) -> None:
    from recsys2stage.cli import training  # slow import of Lightning, which other commands do not need

    training.train(verb)


def fit() -> None:
    """Train a retriever or a ranker."""
    train("fit")


def validate() -> None:
    """Evaluate a checkpoint on the validation targets."""
    train("validate")


def test() -> None:
    """Evaluate a retriever on the test targets; `evaluate` tests a ranker, together with its retriever."""
    train("test")


TRAINING: dict[str, Any] = {"fit": fit, "validate": validate, "test": test}


def main() -> None:
    if answer(sys.argv[1:]):
        return
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    os.environ.setdefault(HINTS, "1")
    name_positional(sys.argv)
    step_out_of_configs(sys.argv)
    sys.path.insert(0, os.getcwd())  # user classes in configs, relative to the working directory
    verb, parent = sys.argv[1] if len(sys.argv) > 1 else "", os.getppid()
    program = f"recsys {verb}" if verb in TRAINING | COMMANDS else "recsys"
    try:
        check_verb(sys.argv[1:], TRAINING | COMMANDS)
        if verb in TRAINING:
            TRAINING[verb]()
        else:
            if verb == "recommend":
                keep_ids_as_written(sys.argv)
            with explained():
                auto_cli(
                    TRAINING | COMMANDS,
                    as_positional=False,
                    prog="recsys",
                    description=__doc__,
                    parser_class=ClearErrors,
                )
    except KeyboardInterrupt:  # what was being written is removed; a fit prints its own line
        print(f"\n{program}: interrupted, nothing is written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UsageError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, FileNotFoundError, OSError) as error:  # user errors; RECSYS_DEBUG=1 shows the traceback
        if debugging():
            raise
        sys.exit(1 if spoken_by_first_process(parent) else f"{program}: {plain_message(error)}")


def keep_ids_as_written(argv: list[str]) -> None:
    """Quotes the ids of --users, and of users in a config, since YAML reads 0012 as 10 and no as false."""
    number = 1
    while number < len(argv):
        option, equals, value = argv[number].partition("=")
        if not equals and option in ("--users", "--users+", "--config") and number + 1 < len(argv):
            number, value = number + 1, argv[number + 1]
        if option in ("--users", "--users+") and (written := ids.parse_yaml_ids(value)) is not None:
            argv[number] = f"{option}{equals}{json.dumps(written)}" if equals else json.dumps(written)
        elif option == "--config" and Path(value).is_file() and (written := ids.read_yaml_ids(Path(value), "users")):
            argv[number + 1 : number + 1] = ["--users", json.dumps(written)]
            number += 2
        number += 1


def step_out_of_configs(argv: list[str]) -> None:
    """Inside `configs/`, changes to its parent folder, to which the paths in the configs are relative.

    So `recsys fit --config retriever.yaml` in `configs/ml-1m/` equals the full path outside.
    """
    here = Path.cwd()
    root = next((folder.parent for folder in (here, here.parent) if folder.name == "configs"), None)
    if root is None:
        return
    for number, argument in enumerate(argv):  # and argv[0]: Lightning starts more processes with it
        option, equals, value = argument.rpartition("=")
        if value and not value.startswith("-") and (here / value).exists():
            argv[number] = f"{option}{equals}{here / value}"
    os.chdir(root)
    print(f"recsys: working from {root}", file=sys.stderr)


if __name__ == "__main__":
    main()
