"""A table of wrong inputs of the Python API, the YAML classes and data files, with the message that each gets.

All rows run in one process of their own, as a user would run them: here beartype would refuse many before the package.
"""

import contextlib
import gzip
import json
import math
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from wrong_inputs import check_message, nothing_written

from recsys2stage import TwoStageRecommender
from recsys2stage.cli.evaluate import evaluate
from recsys2stage.cli.export import export_bundle, export_index
from recsys2stage.cli.recommend import recommend
from recsys2stage.data.ids import given_ids
from recsys2stage.data.prepare import prepare
from recsys2stage.data.simulate import simulate
from recsys2stage.data.sources import Feature, MovieLens, SideTable, Table, Vectors
from recsys2stage.data.split import Baskets, GlobalTime, LeaveOneOut, SessionStarts
from recsys2stage.evaluation import baselines
from recsys2stage.mining.mine import mine_negatives
from recsys2stage.mining.miners import Mixture, Popular, RankBand, Uniform
from recsys2stage.optim import RecsysAdamW, RowwiseAdagrad, SparseAdamW
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.losses import LambdaRank
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.ranking.scorers import DCN, DIN, GBDT, MLP, Blend, ListAttention, MoL
from recsys2stage.ranking.signals import (
    EASE,
    SLIT,
    Affinity,
    Content,
    Demographics,
    ItemKNN,
    Neighbours,
    PopularityAsOf,
    Ratings,
    Session,
    TransitionGraph,
    Transitions,
)
from recsys2stage.retrieval import losses
from recsys2stage.retrieval.encoders import HSTU, BERT4Rec, FuXi, LiGR, Mamba4Rec, SASRec, Transformer
from recsys2stage.retrieval.encoders.layers import LayerNorm, SwiGLU
from recsys2stage.retrieval.encoders.positions import Rotary, Sinusoidal, T5Buckets
from recsys2stage.retrieval.encoders.times import Calendar, HybridTimestamp, LogBuckets, LogSpaced, RequestGap
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.inputs import RatingEmbedding
from recsys2stage.retrieval.items import ItemTable, ItemTower
from recsys2stage.retrieval.objectives import Cloze, NextItem
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.users import UserTower
from recsys2stage.shapes import Shape

NOW, HEADER = 1_600_000_000, "user_id,item_id,timestamp\n"
LINES = "".join(f"u{user},i{(user + 3 * j) % 7},{NOW + 100 * j + user}\n" for user in range(4) for j in range(5))
SHAPE = Shape(dim=8, max_length=4, heads=2)
FEATURES = [{"name": "genre", "kind": "categorical", "size": 3, "values": 1}]
NOWHERE = Path("nowhere")
NAN, INF, HUGE = math.nan, math.inf, 10**12


class Row(NamedTuple):
    """A wrong input.

    Attributes:
        name: unique.
        call: called with a new folder.
        value: regular expression of the value given in the message.
        expected: regular expression of what is expected.
        step: regular expression of the next step.
    """

    name: str
    call: Callable[[Path], Any]
    value: str
    expected: str
    step: str


def number(name: str, option: str, value: Any, make: Callable[..., Any], expected: str) -> Row:
    """A row for one option of a class or function, whose next step is to set it."""
    shown = rf"\b{option} is {value!r}".replace("[", r"\[").replace("(", r"\(").replace(")", r"\)").replace("]", r"\]")
    return Row(f"{name}-{option}-{value}", lambda _: make(**{option: value}), shown, expected, f"set {option} to ")


def encoder(kind: Any) -> Callable[..., Any]:
    return lambda **options: kind(**{"dim": 8, "max_length": 4, **options})


def csv(folder: Path, text: str, name: str = "events.csv") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def prepared(text: str = HEADER + LINES, name: str = "events.csv", **options: Any) -> Callable[[Path], Any]:
    """Prepares a file of events; options of `prepare` and of a Table."""

    def call(folder: Path) -> Any:
        path = csv(folder, text, name)
        own = {key: options[key] for key in ("core", "min_rating", "cold_items", "seed", "repeats") if key in options}
        return prepare(Table(path, **{k: v for k, v in options.items() if k not in own}), folder / "data", **own)

    return call


def side(text: str, owner: str = "items") -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        csv(folder, text, "side.csv")
        return prepared(**{owner: SideTable("side.csv", "id", {"c": Feature("categorical")})})(folder)

    return call


def zipped(name: str, text: str, **options: Any) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        with zipfile.ZipFile(folder / "raw.zip", "w") as archive:
            archive.writestr(name, text)
        return prepare(Table(folder / "raw.zip", **options), folder / "data")

    return call


def gzipped(text: str, cut: int | None = None) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        (folder / "e.csv.gz").write_bytes(gzip.compress(text.encode())[:cut])
        return prepare(Table(folder / "e.csv.gz"), folder / "data")

    return call


def frame(**changes: Any) -> pl.DataFrame:
    rows = [line.split(",") for line in LINES.splitlines()]
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return events.with_columns(pl.col("timestamp").cast(pl.Int64)).with_columns(**changes)


def fit(events: Any = None, items: Any = None, users: Any = None, **options: Any) -> Callable[[Path], Any]:
    return lambda _: TwoStageRecommender(**options).fit(frame() if events is None else events, items, users)


def to(output: Callable[[Path], Path]) -> Callable[[Path], Any]:
    return lambda folder: prepare(Table(csv(folder, HEADER + LINES)), output(folder))


def vectors(ids: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        np.save(folder / "v.npy", np.ones((2, 3), np.float32))
        source = Table(csv(folder, HEADER + LINES))
        given = {"text": Vectors(folder / "v.npy", csv(folder, ids, "ids.txt"))}
        return prepare(source, folder / "data", item_vectors=given)

    return call


def movielens(**names: str) -> Callable[[Path], Any]:
    def call(folder: Path) -> Any:
        for name, text in names.items():
            csv(folder, text, f"{name}.csv")
        return prepare(MovieLens(folder), folder / "data")

    return call


ENCODERS = (Transformer, SASRec, BERT4Rec, HSTU, FuXi, LiGR, Mamba4Rec)
OPTIMIZED = partial(RecsysAdamW, [torch.nn.Parameter(torch.zeros(1))])
BY_ROWS = partial(SparseAdamW, [torch.nn.Parameter(torch.zeros(1))])
MINED = partial(mine_negatives, NOWHERE, NOWHERE, NOWHERE / "out")
EVALUATED = partial(evaluate, NOWHERE, output=NOWHERE / "out")
RETRIEVER, RANKER = partial(Retriever, 5, 4), partial(Ranker, 5, 4, [])
CLASSES = [
    *(number(kind.__name__, "layers", 0, encoder(kind), "at least 1") for kind in ENCODERS),
    *(number(kind.__name__, "dropout", 1.0, encoder(kind), "a share from 0 to below 1") for kind in ENCODERS),
    *(number(kind.__name__, "dim", -8, encoder(kind), "at least 1") for kind in ENCODERS),
    number("Transformer", "layers", 2.5, encoder(Transformer), "an integer"),
    number("Transformer", "layers", True, encoder(Transformer), "an integer"),
    number("Transformer", "layers", HUGE, encoder(Transformer), "at most 1,000"),
    number("Transformer", "heads", 0, encoder(Transformer), "at least 1"),
    number("Transformer", "heads", "2", encoder(Transformer), "an integer from 1 to 8"),
    number("Transformer", "max_length", 0, encoder(Transformer), "at least 1"),
    number("Transformer", "dropout", NAN, encoder(Transformer), "a share"),
    number("Transformer", "attention_dropout", 1.5, encoder(Transformer), "a share .*, or null"),
    Row("heads-3", lambda _: Transformer(8, 4, heads=3), "dim 8", "multiple of heads 3", "change one of them"),
    number("HSTU", "width", 0, encoder(HSTU), "at least 1, or null"),
    Row("HSTU-scaling", lambda _: HSTU(8, 4, scaling="lenght"), "'lenght'", "length, width or both", "did you mean"),
    number("FuXi", "expansion", INF, encoder(FuXi), "a number above 0"),
    *(
        number("Mamba4Rec", name, 0, encoder(Mamba4Rec), "at least 1")
        for name in ("state", "expand", "ssm_heads", "chunk")
    ),
    number("SwiGLU", "expansion", 0, partial(SwiGLU, 8, 0.0), "a number above 0"),
    number("LayerNorm", "eps", -1e-6, partial(LayerNorm, 8), "a number above 0"),
    number("Rotary", "base", 0.5, partial(Rotary, SHAPE), "at least 1"),
    number("Sinusoidal", "scale", NAN, partial(Sinusoidal, SHAPE), "a number above 0"),
    number("T5Buckets", "buckets", 1, partial(T5Buckets, SHAPE), "at least 2"),
    number("RequestGap", "buckets", 0, partial(RequestGap, SHAPE), "at least 1"),
    number("LogBuckets", "buckets", 147, partial(LogBuckets, SHAPE), "at most 146"),
    number("LogSpaced", "days", 0.0, partial(LogSpaced, SHAPE), "a number of days above"),
    number("HybridTimestamp", "periods", 0, partial(HybridTimestamp, SHAPE), "at least 1"),
    Row("Calendar-of", lambda _: Calendar(SHAPE, of="events"), "of is 'events'", "event or request", "did you mean"),
    number("RatingEmbedding", "levels", 1, partial(RatingEmbedding, 8), "at least 2"),
    number("ItemTable", "std", -0.1, partial(ItemTable, 5, 8), "at least 0"),
    number("ItemTower", "id_dropout", 1.0, partial(ItemTower, 5, 8, FEATURES), "a probability from 0 to below 1"),
    number("ItemTower", "hidden", [8, 0], partial(ItemTower, 5, 8, FEATURES), "a list of integers"),
    number("UserTower", "feature_dim", 0, partial(UserTower, 8, FEATURES), "at least 1"),
    Row("UserTower", lambda _: UserTower(8, []), "the data declare none", "needs user features", "leave user out"),
    number("Cloze", "rate", 0.0, Cloze, "a share above 0"),
    number("Cloze", "newest", 1.5, Cloze, "from 0 to 1"),
    number("NextItem", "session_weight", 0.0, NextItem, "a weight above 0"),
    number("NextItem", "gap", 0, NextItem, "at least 1"),
    number("InfoNCE", "temperature", 0.0, losses.InfoNCE, "a number above 0"),
    number("InfoNCE", "temperature", "0.05", losses.InfoNCE, "a number above 0"),
    number("InfoNCE", "hard", 0, losses.InfoNCE, "at least 1, or null"),
    number("InfoNCE", "near", 2.0, losses.InfoNCE, "a cosine from -1 to 1"),
    Row("schedule", lambda _: losses.InfoNCE(hard=[[0.5, 9]]), r"points at \[0.5\]", "ascending shares", "set it to"),
    Row("schedule-form", lambda _: losses.Mixed(share=[0.5]), r"share is \[0.5\]", "a list of points", "set it to"),
    Row("correct", lambda _: losses.DCL(correct="negative"), "'negative'", "none, negatives or both", "'negatives'"),
    number("Uniform-sampler", "count", HUGE, losses.Uniform, "at most 1,048,576"),
    number("InBatch", "alpha", -1.0, losses.InBatch, "at least 0"),
    Row("active_after", lambda _: losses.Uniform(active_after="May"), "'May'", "an ISO date", "set active_after"),
    number("Mixed", "share", 1.0, losses.Mixed, "from 0 to below 1"),
    number("BCE", "max_rating", 0.0, losses.BCE, "highest rating"),
    number("GBCE", "calibration", 1.5, losses.GBCE, "from 0 to 1"),
    number("NormPenalty", "weight", -1.0, losses.NormPenalty, "at least 0"),
    number("Histories", "max_length", 0, partial(Histories, NOWHERE), "at least 1"),
    number("Histories", "batch_size", 1.5, partial(Histories, NOWHERE), "an integer"),
    number("Histories", "eval_batch_size", False, partial(Histories, NOWHERE), "an integer"),
    Row(
        "request_time", lambda _: Histories(NOWHERE, request_time="now"), "'now'", "last_event or target", "one of them"
    ),
    number("Retriever", "dim", 0, RETRIEVER, "at least 1"),
    number("Retriever", "warmup_steps", -1, RETRIEVER, "at least 0"),
    number("Retriever", "final_lr", 1.5, RETRIEVER, "a share of the learning rate, from 0 to 1"),
    number("Retriever", "recompute_rows", 0, RETRIEVER, "at least 1, or null"),
    Row("similarity", lambda _: RETRIEVER(similarity="cos"), "similarity is 'cos'", "cosine or dot", "one of|mean"),
    number("RecsysAdamW", "lr", -1e-3, OPTIMIZED, "at least 0|from 0"),
    number("RecsysAdamW", "lr", INF, OPTIMIZED, "from 0 to 1000"),
    number("SparseAdamW", "table_lr", -1e-3, BY_ROWS, "from 0 to 1000"),
    number("SparseAdamW", "lr", "fast", BY_ROWS, "from 0 to 1000"),
    number("RowwiseAdagrad", "table_lr", INF, partial(RowwiseAdagrad, OPTIMIZED.args[0]), "from 0 to 1000"),
    Row(
        "by-rows-ranker",
        lambda _: RANKER(optimizer=SparseAdamW).configure_optimizers(),
        "optimizer is SparseAdamW",
        "a ranker has none",
        "use RecsysAdamW",
    ),
    number("RecsysAdamW", "betas", (0.9, 1.0), OPTIMIZED, "two numbers from 0 to below 1"),
    number("Histories", "until", "val", partial(Histories, NOWHERE, refit=NOWHERE), "test or end"),
    Row(
        "until",
        lambda _: Histories(NOWHERE, until="end"),
        "until is 'end' without",
        "a finished retriever",
        "set refit",
    ),
    number("Candidates", "batch_size", 0, partial(Candidates, NOWHERE), "at least 1"),
    number("Candidates", "recent", -1, partial(Candidates, NOWHERE), "at least 0"),
    number("Ranker", "id_dropout", 1.5, RANKER, "a probability from 0 to 1"),
    number("Ranker", "feature_dim", 0, RANKER, "at least 1"),
    number("Ranker", "warmup_steps", 0.5, RANKER, "an integer"),
    Row("without", lambda _: RANKER(without=["skore"]), "without has skore", "expected some of .*score", "leave"),
    number("LambdaRank", "k", 0, LambdaRank, "at least 1, or null"),
    number("LambdaRank", "sigma", NAN, LambdaRank, "a number above 0"),
    number("MLP", "hidden", [], partial(MLP, 8, 5), "a list of integers"),
    number("DCN", "crosses", 0, partial(DCN, 8, 5), "at least 1"),
    number("DIN", "attention_hidden", 0, partial(DIN, 8, 5), "at least 1"),
    number("MoL", "user_parts", -1, partial(MoL, 8, 5), "at least 1"),
    number("GBDT", "trees", 0, partial(GBDT, 8, 5), "at least 1"),
    number("GBDT", "leaves", 1, partial(GBDT, 8, 5), "at least 2"),
    number("GBDT", "learning_rate", NAN, partial(GBDT, 8, 5), "above 0"),
    number("GBDT", "feature_share", 1.5, partial(GBDT, 8, 5), "a share"),
    Row(
        "GBDT-objective", lambda _: GBDT(8, 5, objective="mse"), "objective is 'mse'", "lambdarank or", "set objective"
    ),
    Row("Blend-members", lambda _: Blend(8, 5, [MLP]), "members has 1 scorers", "2 to 16", r"members: \[GBDT, MLP\]"),
    number("ListAttention", "width", 0, partial(ListAttention, 8, 5), "at least 1"),
    number("Affinity", "decay", 0.0, Affinity, "above 0 and at most 1"),
    number("Content", "ridge", 0.0, Content, "a number of items above 0"),
    number("Content", "candidates", HUGE, Content, "at most 1,048,576"),
    number("Demographics", "alpha", INF, Demographics, "a number of events above 0"),
    number("Neighbours", "count", 0, Neighbours, "at least 1"),
    number("Neighbours", "exact", -1, Neighbours, "at least 0"),
    number("PopularityAsOf", "windows", [0], PopularityAsOf, "a list of integers"),
    number("Ratings", "prior", -20.0, Ratings, "a number of ratings above 0"),
    number("Session", "session", -1, Session, "at least 0"),
    number("SLIT", "decays", [1.5], SLIT, "a list of numbers above 0 to 1"),
    number("EASE", "ridge", 0.0, EASE, "a number above 0"),
    number("EASE", "items", 0, EASE, "at least 1"),
    number("ItemKNN", "shrink", -1.0, ItemKNN, "of at least 0"),
    number("ItemKNN", "decay", 0.0, ItemKNN, "above 0 and at most 1"),
    number("TransitionGraph", "hops", 11, TransitionGraph, "at most 10"),
    number("TransitionGraph", "weight", NAN, TransitionGraph, "of at least 0"),
    number("baseline-EASE", "items", 1 << 17, baselines.EASE, "at most 65,536"),
    number("baseline-graph", "decay", 2.0, baselines.TransitionGraph, "above 0 and at most 1"),
    number("PersonalTopFrequency", "decay", 0, baselines.PersonalTopFrequency, "above 0 and at most 1"),
    number("Transitions", "lags", [0, 1], Transitions, "a list of integers"),
    number("Transitions", "candidates", -1, Transitions, "at least 0"),
    number("RankBand", "count", 0, RankBand, "at least 1, or null"),
    Row(
        "RankBand", lambda _: RankBand(skip_top=5, last=5), "above 5 and up to 5", "0 <= skip_top < last", "raise last"
    ),
    number("Uniform", "count", 0, Uniform, "at least 1"),
    number("Popular", "exponent", -1.0, partial(Popular, 5), "from 0 to 10"),
    Row("Mixture", lambda _: Mixture([]), r"miners is \[\]", "at least one miner", "add one"),
    number("LeaveOneOut", "val", 0, LeaveOneOut, "at least 1"),
    number("LeaveOneOut", "val", 0.1, LeaveOneOut, "an integer"),
    *(number("SessionStarts", name, 0, SessionStarts, "at least 1") for name in ("gap", "test", "val")),
    number("SessionStarts", "gap", 0.5, SessionStarts, "an integer"),
    number("Baskets", "val", 0, Baskets, "at least 1"),
    Row("GlobalTime", lambda _: GlobalTime(0.6, 0.5), "val=0.6, test=0.5", "sum is below 1", "set both to 0.1"),
    number("GlobalTime", "val", NAN, GlobalTime, "a share or a time"),
]
VERBS = [
    *(number("mine", name, -3, MINED, "at least 1") for name in ("k", "targets", "users", "batch_size")),
    number("mine", "k", 10.0, MINED, "an integer"),
    number("mine", "gap", -1, MINED, "at least 0"),
    Row("mine-fold", lambda _: MINED(fold="5/5"), "fold is '5/5'", "expected NUMBER/TOTAL", "set fold to 0/5"),
    number("mine", "select", 1.0, MINED, "a share of the users from 0 to below 1"),
    number("mine", "seed", -1, MINED, "at least 0"),
    *(number("evaluate", name, 0, EVALUATED, "at least 1") for name in ("users", "resamples", "batch_size")),
    number("evaluate", "resamples", HUGE, EVALUATED, "at most 1,000,000"),
    number("evaluate", "seed", 0.5, EVALUATED, "an integer"),
    Row("protocol", lambda _: EVALUATED(protocol="sampled"), "'sampled'", "full or sampled-N", "set protocol to"),
    Row("split", lambda _: EVALUATED(split="tset"), "split is 'tset'", "val or test", "did you mean 'test'"),
    number("recommend", "k", 0, partial(recommend, NOWHERE), "at least 1"),
    number("recommend", "batch_size", True, partial(recommend, NOWHERE), "an integer"),
    number("export-index", "measured", -1, partial(export_index, NOWHERE), "at least 0"),
    number("export-bundle", "candidates", 0, partial(export_bundle, NOWHERE), "at least 1, or null"),
    *(number("simulate", name, 0, partial(simulate, NOWHERE), "at least 1") for name in ("users", "items", "events")),
    number("simulate", "seed", 2**32, partial(simulate, NOWHERE), "at most 4,294,967,295"),
    Row("events-of-simulate", lambda f: simulate(f / "x", users=50, items=200, events=9), "9 ratings", "500 to", "set"),
    Row("size", lambda f: simulate(f / "x", size="ml-1m"), "size is 'ml-1m'", "demo or ml-20m", "did you mean"),
    Row("core", prepared(core=2.5), "core is 2.5", "an integer", "set core"),
    Row("core-100", prepared(core=100), "core is 100", "as many events", "lower core"),
    Row("cold_items", prepared(cold_items=1.0), "cold_items is 1.0", "below 1", "set cold_items"),
    Row("min_rating", prepared(min_rating=INF), "min_rating is inf", "finite", "set min_rating"),
    Row("no-ratings", prepared(min_rating=4), "min_rating is 4", "has no ratings", "leave min_rating out"),
    Row("seed", prepared(seed=-1), "seed is -1", "at least 0", "set seed"),
    Row("repeats", prepared(repeats="frist"), "'frist'", "first, last, keep or error", "did you mean 'first'"),
    Row("output-in-file", to(lambda f: f / "events.csv" / "data"), "events.csv", "a folder", "another output"),
    Row("output-is-file", to(lambda f: f / "events.csv"), "is a file", "name of a folder", "choose another"),
    Row("output-read-only", to(lambda _: Path("/proc/none/data")), "/proc", "a folder", "another output"),
]
DATA = [
    Row("empty", prepared(""), r"events.csv is empty \(0 bytes\)", "a line of column names", "write it again"),
    Row("header-only", prepared(HEADER), "events.csv has no rows", "at least one", "write it again"),
    Row("column", prepared(user="usr_id"), "no column 'usr_id'", "did you mean 'user_id'", "name one of these"),
    Row("twice", prepared("user_id,item_id,item_id,timestamp\n1,2,3,4\n"), "2 columns named", "expected one", "remove"),
    Row("one-column", lambda _: Table(NOWHERE, user="x", item="x"), "both 'x'", "different columns", "correct one"),
    Row("no-column", lambda _: Table(NOWHERE, user=""), "user is ''", "the name of a column", "set user"),
    Row("separator", prepared(separator="::"), "separator is '::'", "one ASCII character", "set it to"),
    Row("other-separator", prepared((HEADER + LINES).replace(",", ";")), "one column", "separated by ','", "set sep"),
    Row("time_unit", prepared(time_unit="second"), "'second'", "seconds, milli", "did you mean 'seconds'"),
    Row("rating_range", prepared(rating_range=(5, 1)), r"\[5, 1\]", "smallest and the largest", "set rating_range"),
    Row("kind", lambda _: Feature("categorial"), "'categorial'", "categorical, multi or numeric", "mean 'categorical'"),
    Row("feature", lambda _: SideTable("x", "id", {"c": "numeric"}), "'numeric'", "its kind", "write c:"),
    Row("glob", lambda f: prepare(Table(f / "x*.csv"), f / "data"), r"x\*.csv", "a pattern", "correct source.path"),
    Row("missing", lambda f: prepare(Table(csv(f, HEADER).with_suffix(".cvs")), f / "d"), "events.cvs", "mean", "pass"),
    Row("zip", zipped("readme.md", ""), "raw.zip has no file", r"readme.md", "source.member"),
    Row("member", zipped("a.csv", HEADER, member="b.csv"), "no file b.csv", "among a.csv", "source.member"),
    Row("zip-row", zipped("a.csv", f"{HEADER}u1,i1,x\n"), "raw.zip/a.csv.*line 2: x", "is not seconds", "Correct"),
    Row("gzip", gzipped(HEADER + LINES, 40), r"e.csv.gz \(40 bytes\)", "gunzip reads", "again"),
    Row("gzip-row", gzipped(f"{HEADER}u1,i1,x\n"), r"e\.csv\.gz,.*line 2: x", "is not seconds", "Correct"),
    Row("not-gzip", prepared(name="events.csv.gz"), "not a complete gzip", "gunzip reads", "again"),
    Row("not-parquet", prepared(name="events.pq"), "events.pq cannot be read", "complete Parquet", "write it again"),
    Row("null-id", prepared(f"{HEADER}{LINES},i1,{NOW}\n"), "line 22: missing", "'user_id': 1 bad row", "Correct"),
    Row("fractions", prepared(f"{HEADER}u,i,{NOW}.5\n"), f"{NOW}.5", "is not seconds", "round them"),
    Row("milliseconds", prepared(f"{HEADER}u,i,{NOW}000\n"), f"{NOW}000", "not seconds", "time_unit: milliseconds"),
    Row("text-times", prepared(f"{HEADER}u,i,2020-01-01\n"), "2020-01-01", "not seconds", "set time_unit: iso"),
    Row("future", prepared(HEADER + LINES.replace(",16", ",36")), "3600000000", "a day from now", "Convert the column"),
    Row("unknown-items", side("id,c\nx1,2\n"), "none of the 7 items.*'x1'", "like 'i0'", "correct the id"),
    Row("unknown-users", side("id,c\nx1,2\n", "users"), "none of the 4 users.*'x1'", "like 'u0'", "correct the id"),
    Row("no-side", lambda f: prepared(items=SideTable("no.csv", "id"))(f), "'no.csv'", "expected one", "correct the"),
    Row("vectors", vectors("a\nb\n"), "look like 'a'", "like 'i0'", "correct the ids"),
    Row("vector-ids", vectors("i0\n"), "has 2 rows but .* has 1 lines", "one id per row", "give"),
    Row(
        "movielens",
        movielens(ratings="userId,movieId,rating,timestamp\n"),
        "no movies.csv",
        "in the same folder",
        "put it there",
    ),
    Row("ids", lambda _: given_ids("12"), "ids is '12'", "a list of ids", r"write \['12'\]"),
    Row("one-id", lambda _: given_ids(12), "ids is 12", "a list of ids", r"write \[12\]"),  # type: ignore[arg-type]
    Row("fraction-id", lambda _: given_ids([1.5]), "1.5 is not an id", "an integer", "convert it"),
    Row("missing-id", lambda _: given_ids([1, None]), "id 2 of 2", "expected an id", "leave it out"),
]
ESTIMATOR = [
    Row("fit-path", fit("events.csv"), "'events.csv'", "a polars or pandas frame", "read a file first"),
    Row("fit-empty", fit(frame().head(0)), "events has no rows", "one for each event", "pass a frame"),
    Row(
        "fit-column",
        fit(user="usr"),
        "the frame of events has no column 'usr'",
        "did you mean",
        r"name one of these in TwoStageRecommender\(user=\.\.\.\)",
    ),
    Row(
        "fit-fraction",
        fit(frame(item_id=0.5)),
        "the frame of events, column 'item_id', row 1",
        "integers",
        "convert the column",
    ),
    Row("fit-same", fit(user="item_id"), "user and item are both", "different", "correct one"),
    Row("fit-none", fit(item=None), "item is None", "the name of a column", "set item"),
    Row("fit-unit", fit(time_unit="hours"), "time_unit is 'hours'", "seconds, milliseconds", "set time_unit"),
    Row("fit-kind", fit(item_features={"g": "text"}), r"item_features\['g'\] is 'text'", "categorical", "set item_"),
    Row("fit-features", fit(user_features=["g"]), r"user_features is \['g'\]", "a mapping", "set it to"),
    Row("fit-epochs", fit(max_epochs=0), "max_epochs is 0", "at least 1, or None", "set max_epochs"),
    Row("fit-patience", fit(early_stopping=0), "early_stopping is 0", "at least 1", "set early_stopping"),
    Row("fit-refit", fit(refit="some"), "refit is 'some'", "all or production", "set refit"),
    Row("fit-seed", fit(seed="a"), "seed is 'a'", "an integer", "set seed"),
    Row("fit-overlays", fit(overlays="hstu"), "overlays is 'hstu'", "a list", r"write \['hstu'\]"),
    Row("fit-config", fit(config="nope"), "nope does not exist", "configs/nope", "give a path"),
    Row("fit-folder", fit(folder="/proc/none"), "/proc", "a folder", "another output"),
    Row("fit-items", fit(items={"item_id": ["x"], "c": [1]}), "the frame of items.*'x'", "like 'i0'", "correct the id"),
    Row(
        "fit-time", fit(frame(timestamp=NOW + 0.5)), f"the frame of events.*{NOW}.5", "none .* is seconds", "round them"
    ),
    Row(
        "fit-null", fit(frame(item_id=None)), "the frame of events.*missing", "20 bad rows", "Correct these rows of the"
    ),
    Row("unfitted", lambda _: TwoStageRecommender().recommend(), "not fitted", "fit", "call fit"),
]
ROWS = [*CLASSES, *VERBS, *DATA, *ESTIMATOR]


def main(folder: Path) -> None:
    """Calls each row and prints the messages as JSON: name -> type and text of its error."""
    told = {}
    for position, row in enumerate(ROWS):
        own = folder / str(position)
        own.mkdir()
        try:
            row.call(own)
            told[row.name] = ["nothing", ""]
        except Exception as error:
            told[row.name] = [type(error).__name__, str(error)]
        left = [path.name for path in own.iterdir() if path.name.startswith(".") or path.name in ("data", "d", "x")]
        if left:
            told[row.name] = ["written", str(left)]
    print(json.dumps(told))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder, here = tmp_path_factory.mktemp("wrong"), tmp_path_factory.mktemp("here")
    with nothing_written(here):
        words = [sys.executable, __file__, str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_names_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert len(names) > 150


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_wrong_input_is_refused_with_value_expectation_and_next_step(row: Row, told: dict[str, list[str]]) -> None:
    kind, text = told[row.name]
    assert kind in ("ValueError", "TypeError", "FileNotFoundError", "OSError", "NotFittedError"), f"{kind}: {text}"
    check_message(text, row.value, row.expected, row.step)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]))
