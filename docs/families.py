"""The families of interchangeable classes: what a config may name, and where."""

import inspect
from abc import ABC
from typing import NamedTuple

from recsys2stage.cli import classes
from recsys2stage.data import sources
from recsys2stage.data.split import Split
from recsys2stage.evaluation.baselines import Baseline
from recsys2stage.mining.miners import Miner
from recsys2stage.optim import RecsysAdamW
from recsys2stage.ranking import losses as list_losses
from recsys2stage.ranking import scorers, signals
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.retrieval import encoders, index, inputs, items, losses, objectives
from recsys2stage.retrieval.encoders import blocks, layers, positions, times
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.users import UserTower

PACKAGE = "recsys2stage"


def identifier(kind: type) -> str:
    """The dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


class Family(NamedTuple):
    """Classes that one option of a config takes."""

    page: str  # in config/
    title: str
    where: str  # the option that names them
    bases: dict[type, int]  # base class -> leading arguments that the caller gives, so that no config sets them

    def concrete(self) -> dict[type, int]:
        """The classes of this package that a config may name, as `bases`: the bases themselves first, then by name."""
        found = {
            kind: filled
            for base, filled in self.bases.items()
            for kind in classes.subclasses(base)
            if is_public(kind) and kind.__module__.startswith(base.__module__.rpartition(".")[0])
        }
        return dict(sorted(found.items(), key=lambda pair: (pair[0] not in self.bases, pair[0].__name__.lower())))


def is_public(kind: type) -> bool:
    """Whether a class is of this package and can be named in configs."""
    own = kind.__module__.partition(".")[0] == PACKAGE
    return own and not kind.__name__.startswith("_") and not inspect.isabstract(kind) and ABC not in kind.__bases__


RETRIEVER, RANKER = "of retriever.yaml", "of ranker.yaml"
FAMILIES = [
    Family("retriever", "The retriever and its data", f"`model` and `data` {RETRIEVER}", {Retriever: 0, Histories: 0}),
    Family("encoders", "Encoders", f"`model.init_args.encoder` {RETRIEVER}", {encoders.Encoder: 2}),
    Family("positions", "Positions", "`position` of an encoder", {positions.Position: 1}),
    Family("times", "Times", "`time` of an encoder", {times.Time: 1}),
    Family(
        "blocks",
        "Blocks, norms, feed-forward layers",
        "`block`, `norm` and `feed_forward` of an encoder",
        {blocks.Block: 4, layers.Norm: 1, layers.FeedForward: 2},
    ),
    Family("objectives", "Training objectives", f"`model.init_args.objective` {RETRIEVER}", {objectives.Objective: 0}),
    Family("losses", "Losses of the retriever", f"`model.init_args.loss` {RETRIEVER}", {losses.Loss: 0}),
    Family("negatives", "Negative samplers", "`negatives` of a loss", {losses.Negatives: 0}),
    Family("items", "Item tables", f"`model.init_args.items` {RETRIEVER}", {items.ItemTable: 3}),
    Family("inputs", "Event inputs", f"`model.init_args.inputs` {RETRIEVER}, a list", {inputs.Input: 2}),
    Family(
        "others",
        "User tower, norm penalty, optimizer",
        f"`model.init_args.user`, `.norm_penalty` and `.optimizer` {RETRIEVER}",
        {UserTower: 2, losses.NormPenalty: 0, RecsysAdamW: 1},
    ),
    Family("ranker", "The ranker and its data", f"`model` and `data` {RANKER}", {Ranker: 0, Candidates: 0}),
    Family("scorers", "Scorers", f"`model.init_args.scorer` {RANKER}", {scorers.Scorer: 2}),
    Family("list-losses", "Losses of the ranker", f"`model.init_args.loss` {RANKER}", {list_losses.ListLoss: 0}),
    Family("signals", "Signals", "`signals` of mine.yaml, a list", {signals.Signal: 0}),
    Family("baselines", "Baselines", "`baselines` of evaluate, a list", {Baseline: 0}),
    Family("miners", "Miners", "`miner` of mine.yaml", {Miner: 0}),
    Family("indexes", "Indexes", "`index` of index.yaml", {index.Index: 0}),
    Family("sources", "Sources", "`source` of prepare.yaml", {sources.Source: 0}),
    Family("splits", "Splits", "`split` of prepare.yaml", {Split: 0}),
]
PAGE_OF = {base: family for family in FAMILIES for base in family.bases}
