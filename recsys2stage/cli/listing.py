"""The command list: what can be named in configs, a line each."""

import inspect
from abc import ABC
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from recsys2stage.cli import configs
from recsys2stage.data import sources
from recsys2stage.evaluation import baselines
from recsys2stage.ranking import losses as ranking_losses
from recsys2stage.ranking import scorers, signals
from recsys2stage.retrieval import encoders
from recsys2stage.retrieval import losses as retrieval_losses

Lines = dict[str, str]  # name -> what it is


def classes(module: ModuleType, base: type) -> Lines:
    """The concrete subclasses of a base class that a module exports, with the first lines of their docstrings."""
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and not inspect.isabstract(value) and value is not base
    }
    return {
        name: first_line(value)
        for name, value in sorted(found.items(), key=lambda pair: pair[0].lower())
        if not name.startswith("_") and ABC not in value.__bases__
    }


def first_line(value: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(value) or "").partition("\n")[0]


def describe_configs() -> Lines:
    """The datasets of ./configs and the shipped ones."""
    folders = [folder for folder in (Path("configs"), configs.shipped_configs()) if folder.is_dir()]
    lines: Lines = {}
    for folder in folders:
        for name in configs.datasets(folder):
            path = next(
                path for path in (folder / name / "prepare.yaml", folder / name / "retriever.yaml") if path.is_file()
            )
            lines.setdefault(name, configs.headline(path))
    return lines


def describe_overlays() -> Lines:
    """The overlays of ./configs and the shipped ones."""
    lines: Lines = {}
    for folder in (Path("configs"), configs.shipped_configs()):
        for name in configs.overlays(folder):
            text = configs.headline(folder / configs.OVERLAYS / f"{name}.yaml").removeprefix("Overlay")
            order, _, what = text.partition(": ")
            lines.setdefault(name, what + (" (put last)" if "last" in order else ""))
    return lines


def describe_optimizers() -> Lines:
    """The optimizers of this package; those of torch can be named too."""
    from recsys2stage import optim  # imports Lightning

    return {"RecsysAdamW": first_line(optim.RecsysAdamW)} | classes(optim, optim.RecsysAdamW)


KINDS: dict[str, tuple[str, Callable[[], dict[str, Lines]]]] = {
    "configs": (
        "datasets: make pipeline DATASET=NAME, recsys init DIR --template NAME",
        lambda: {"": describe_configs()},
    ),
    "overlays": (
        'changes to a retriever: make pipeline WITH="NAME NAME", --config configs/with/NAME.yaml',
        lambda: {"": describe_overlays()},
    ),
    "encoders": ("model.init_args.encoder of retriever.yaml", lambda: {"": classes(encoders, encoders.Encoder)}),
    "losses": (
        "model.init_args.loss of retriever.yaml and ranker.yaml",
        lambda: {
            "retriever": classes(retrieval_losses, retrieval_losses.Loss),
            "ranker": classes(ranking_losses, ranking_losses.ListLoss),
        },
    ),
    "optimizers": ("model.init_args.optimizer of retriever.yaml and ranker.yaml", lambda: {"": describe_optimizers()}),
    "signals": (
        "signals of mine.yaml: features and candidates of the ranker",
        lambda: {"": classes(signals, signals.Signal)},
    ),
    "baselines": (
        "baselines of evaluate: models that a report compares with the two stages",
        lambda: {"": classes(baselines, baselines.Baseline)},
    ),
    "scorers": ("model.init_args.scorer of ranker.yaml", lambda: {"": classes(scorers, scorers.Scorer)}),
    "sources": ("source of prepare.yaml: readers of raw data", lambda: {"": classes(sources, sources.Source)}),
}


def list_parts(kind: str | None = None) -> None:
    """List what configs can name, a line each.

    Args:
        kind: configs, overlays, encoders, losses, optimizers, signals, baselines, scorers or sources; recsys list
            KIND. None: these kinds.
    """
    if kind is None:
        print_lines({name: what for name, (what, _) in KINDS.items()})
        print("\nrecsys list KIND lists one of them.")
        return
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, 1)
        question = f"; did you mean {near[0]}?" if near else "; choose one of them"
        raise ValueError(f"kind is {kind!r}, expected {', '.join([*KINDS][:-1])} or {[*KINDS][-1]}{question}")
    what, groups = KINDS[kind]
    print(f"{what}\n")
    for title, lines in groups().items():
        if title:
            print(f"{title}:")
        print_lines(lines)


def print_lines(lines: Lines) -> None:
    width = max(map(len, lines), default=0)
    for name, what in lines.items():
        print(f"  {name:<{width}}  {what}".rstrip())
