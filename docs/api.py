"""The pages of the Python API: which docstrings stand where."""

from importlib import import_module
from typing import NamedTuple

from docs.families import PACKAGE, PAGE_OF, Family, identifier
from docs.tables import table
from recsys2stage.data import sources
from recsys2stage.data.split import Split
from recsys2stage.evaluation.baselines import Baseline
from recsys2stage.mining.miners import Miner
from recsys2stage.ranking import losses as list_losses
from recsys2stage.ranking import scorers, signals
from recsys2stage.retrieval import encoders, index, inputs, items, losses, objectives
from recsys2stage.retrieval.encoders import blocks, layers, positions, times
from recsys2stage.retrieval.losses import Negatives


class Section(NamedTuple):
    """A part of an API page: a heading and the things that it shows."""

    title: str
    names: list[str]
    families: tuple[type, ...] = ()  # bases, shown with all public members

    def identifiers(self) -> list[str]:
        found = [f"{PACKAGE}.{name}" for name in self.names]
        for base in self.families:
            family = PAGE_OF.get(base) or Family("", "", "", {base: 0})
            found += [identifier(base), *(identifier(kind) for kind in family.concrete())]
        return list(dict.fromkeys(found))


API: dict[str, tuple[str, str, list[Section]]] = {
    "estimator": (
        "Estimator",
        "Data frames in, recommendations out: both stages behind one object with `fit`, `recommend` and `evaluate`.",
        [Section("", ["estimator.TwoStageRecommender", "estimator.NotFittedError"])],
    ),
    "recommender": (
        "Recommender",
        "A bundle in memory. It needs neither Lightning nor the data.",
        [Section("", ["recommender.Recommender"])],
    ),
    "data": (
        "Data",
        "Raw events to a prepared dataset, and reading it.",
        [
            Section("Preparing", ["data.prepare.prepare", "data.simulate.simulate"]),
            Section("Reading", ["data.dataset.Dataset", "data.batches.Padded", "data.batches.Ragged"]),
            Section("Sources", ["data.sources.base.Tables"], (sources.Source,)),
            Section("Tables of features", [f"data.sources.table.{name}" for name in ("SideTable", "Feature")]),
            Section("Vectors", ["data.sources.vectors.Vectors"]),
            Section("Splits", [], (Split,)),
        ],
    ),
    "retriever": (
        "Retriever",
        "The first stage: its modules, data module, item tables, inputs and objectives.",
        [
            Section("Model", ["retrieval.retriever.Retriever", "retrieval.towers.TwoTower"]),
            Section("Optimizers", [f"optim.{name}" for name in ("RecsysAdamW", "SparseAdamW", "RowwiseAdagrad")]),
            Section("Data module", ["retrieval.histories.Histories", "shapes.History"]),
            Section("Item tables", [], (items.ItemTable,)),
            Section("Event inputs", [], (inputs.Input,)),
            Section("User features", ["retrieval.users.UserTower"]),
            Section("Training objectives", ["retrieval.objectives.TrainingBatch"], (objectives.Objective,)),
        ],
    ),
    "encoders": (
        "Encoders",
        "Sequence encoders, their positions and times. Each encoder maps (B, L, D) to (B, L, D).",
        [
            Section("Encoders", ["shapes.Shape"], (encoders.Encoder,)),
            Section("Positions", [], (positions.Position,)),
            Section("Times", [], (times.Time,)),
            Section("Blocks", ["retrieval.encoders.blocks.AttentiveEncoder"], (blocks.Block,)),
            Section("Norms and feed-forward layers", [], (layers.Norm, layers.FeedForward)),
        ],
    ),
    "losses": (
        "Losses and negatives",
        "Losses of the retriever, and the samplers of their negatives.",
        [
            Section("Losses", ["retrieval.losses.base.Targets", "retrieval.losses.base.Catalogue"], (losses.Loss,)),
            Section("To write one of your own", ["retrieval.losses.sampled.Sampled"]),
            Section("Negatives", ["retrieval.losses.negatives.SampledNegatives"], (Negatives,)),
            Section("Penalty", ["retrieval.losses.penalty.NormPenalty"]),
        ],
    ),
    "indexes": (
        "Index",
        "Maximum inner product search over item vectors.",
        [
            Section("Indexes", ["retrieval.index.approximate.Approximate"], (index.Index,)),
            Section("Recall", ["retrieval.index.recall.measure"]),
        ],
    ),
    "signals": (
        "Signals",
        "Features and candidate generators of the ranker, counted from training events.",
        [Section("", ["ranking.signals.base.Requests", "ranking.signals.base.Proposer"], (signals.Signal,))],
    ),
    "ranker": (
        "Ranker",
        "The second stage: its module, data module, scorers and losses.",
        [
            Section("Model", ["ranking.ranker.Ranker", "ranking.reranker.Reranker"]),
            Section("Data module", ["ranking.candidates.Candidates"]),
            Section("Scorers", ["ranking.scorers.base.RankerInputs"], (scorers.Scorer,)),
            Section("Losses", [], (list_losses.ListLoss,)),
        ],
    ),
    "mining": (
        "Mining",
        "An index and a dataset to candidate lists.",
        [Section("", ["mining.mine.mine_negatives", "mining.miners.Request"], (Miner,))],
    ),
    "evaluation": (
        "Evaluation",
        "A bundle to a report: ranks, cohorts, baselines and paired tests.",
        [
            Section(
                "Report", ["cli.evaluate.evaluate", "evaluation.evaluate.rank_users", "evaluation.cohorts.cohorts"]
            ),
            Section("Comparing runs", ["evaluation.compare.compare", "evaluation.compare.BaselineRun"]),
            Section("Baselines", ["evaluation.baselines.fit_baselines"], (Baseline,)),
        ],
    ),
    "metrics": (
        "Metrics",
        "Metrics from ranks, with intervals and tests.",
        [
            Section(
                "",
                [
                    "retrieval.rank_metrics.RankMetrics",
                    *(
                        f"metrics.{name}"
                        for name in [
                            "compute_rank",
                            "compute_metrics",
                            "bootstrap",
                            "interval",
                            "randomization_test",
                            "compute_exposure",
                            "compute_calibration",
                        ]
                    ),
                ],
            )
        ],
    ),
}


def directive(name: str, level: int) -> str:
    """What mkdocstrings replaces by a docstring; the fields of tuples are shown though they have none of their own."""
    module, _, short = name.rpartition(".")
    thing = getattr(import_module(module), short)
    fields = isinstance(thing, type) and issubclass(thing, tuple)
    options = {"heading_level": level} | ({"show_if_no_docstring": "true"} if fields else {})
    return "\n".join([f"::: {name}", "    options:", *(f"      {key}: {value}" for key, value in options.items())])


def api_page(name: str) -> str:
    title, text, sections = API[name]
    parts = [f"# {title}", text]
    for section in sections:
        level = 3 if section.title else 2
        parts += [f"## {section.title}"] if section.title else []
        parts += [directive(one, level) for one in section.identifiers()]
    return "\n\n".join(parts) + "\n"


def api_index() -> str:
    rows = [
        [
            f"[{title}]({name}.md)",
            text,
            ", ".join(f"[`{one.rpartition('.')[2]}`][{one}]" for section in sections for one in section.identifiers()),
        ]
        for name, (title, text, sections) in API.items()
    ]
    return "\n\n".join(
        [
            "# Python API",
            "Made from the docstrings. `from recsys2stage import TwoStageRecommender, Recommender`; everything else is "
            "imported from its module. Shapes use the letters of `recsys2stage.shapes`: B batch, L history, D width, "
            "H heads, V items, M target positions, C candidates, S signal features.",
            table(("page", "what", "members"), rows),
        ]
    )


def pages() -> dict[str, str]:
    """The pages in the order of the navigation: name in docs/ -> Markdown."""
    return {"api/index.md": api_index()} | {f"api/{name}.md": api_page(name) for name in API}
