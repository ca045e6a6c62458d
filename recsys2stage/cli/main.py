"""recsys: from a raw log of events to ranked, measured recommendations.

fit, validate and test are Lightning's verbs; the others carry data from stage to stage. Each takes --config FILE,
--print_config and dotted overrides such as --trainer.max_epochs 3.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from recsys2stage.cli.commands import COMMANDS

# short class names in YAML resolve once their module is imported
from recsys2stage.data import ids, sources, split  # noqa: F401
from recsys2stage.mining import miners  # noqa: F401
from recsys2stage.ranking import signals  # noqa: F401
from recsys2stage.retrieval import index  # noqa: F401


def train(verb: str) -> None:
    from recsys2stage.cli import training  # here, because Lightning is long to import and the other verbs do without

    training.train(verb)


def fit() -> None:
    """Train a retriever or a ranker."""
    train("fit")


def validate() -> None:
    """Measure a checkpoint on the validation targets."""
    train("validate")


def test() -> None:
    """Measure a retriever on the test targets; a ranker is tested beside its retriever by `evaluate`."""
    train("test")


TRAINING: dict[str, Any] = {"fit": fit, "validate": validate, "test": test}


def main() -> None:
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    step_out_of_configs(sys.argv)
    sys.path.insert(0, os.getcwd())  # classes of one's own, named in a config, may lie beside it
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    try:
        if verb in TRAINING:
            TRAINING[verb]()
        else:
            if verb == "recommend":
                keep_ids_as_written(sys.argv)
            auto_cli(TRAINING | COMMANDS, as_positional=False, prog="recsys", description=__doc__)
    except (ValueError, FileNotFoundError, OSError) as error:  # what a user can cause; RECSYS_DEBUG=1 shows where
        if os.environ.get("RECSYS_DEBUG"):
            raise
        sys.exit(f"recsys {verb}: {plain_message(error)}")


def plain_message(error: BaseException) -> BaseException:
    """What a class of the config had to say: jsonargparse wraps it into an essay on types."""
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__:
        error = error.__cause__
    return error


def keep_ids_as_written(argv: list[str]) -> None:
    """Puts the ids of --users, and of users in a config, in quotes; to YAML 0012 is 10, and no is false."""
    place = 1
    while place < len(argv):
        option, equals, value = argv[place].partition("=")
        if not equals and option in ("--users", "--users+", "--config") and place + 1 < len(argv):
            place, value = place + 1, argv[place + 1]
        if option in ("--users", "--users+") and (written := ids.as_written(value)) is not None:
            argv[place] = f"{option}{equals}{json.dumps(written)}" if equals else json.dumps(written)
        elif option == "--config" and Path(value).is_file() and (written := ids.written_in(Path(value), "users")):
            argv[place + 1 : place + 1] = ["--users", json.dumps(written)]
            place += 2
        place += 1


def step_out_of_configs(argv: list[str]) -> None:
    """Inside `configs/`, works from the folder that holds it, where the configs' own paths start.

    So `recsys fit --config retriever.yaml` means the same in `configs/ml-1m/` as its full name does outside.
    """
    here = Path.cwd()
    root = next((folder.parent for folder in (here, here.parent) if folder.name == "configs"), None)
    if root is None:
        return
    for place, word in enumerate(argv):  # the program, too: Lightning starts it again for further processes
        option, equals, value = word.rpartition("=")
        if value and not value.startswith("-") and (here / value).exists():
            argv[place] = f"{option}{equals}{here / value}"
    os.chdir(root)
    print(f"recsys: working from {root}", file=sys.stderr)


if __name__ == "__main__":
    main()
