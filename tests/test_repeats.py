"""Seen items: with `repeats: keep` none is filtered anywhere, else all are, however old."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pipeline_fixtures import Run, recsys
from worlds import cycle_world

from recsys2stage import TwoStageRecommender
from recsys2stage.artifacts import read_manifest
from recsys2stage.data.batches import Padded
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Table
from recsys2stage.evaluation.evaluate import rank_users
from recsys2stage.evaluation.ranked_items import RankedItems
from recsys2stage.mining.mine import ListBuilder, mine_negatives
from recsys2stage.mining.miners import Mixture, Popular, RankBand, Uniform
from recsys2stage.ranking.signals import (
    EASE,
    SLIT,
    ItemKNN,
    Neighbours,
    PopularityAsOf,
    Requests,
    TransitionGraph,
    Transitions,
)
from recsys2stage.ranking.signals.base import Proposer
from recsys2stage.recommender import Recommender, load_recommender
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.losses import InfoNCE
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import History

USERS, ITEMS, MET = 300, 60, 10
MAX_LENGTH = 4  # of the model whose users have histories of twelve events


# --- repeats: keep


@pytest.fixture(scope="module")
def returning(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Each user meets 10 of 60 items, then returns to one of the ten at random, 6 times; a model of 16 events."""
    rng, rows = np.random.default_rng(0), []
    for user in range(USERS):
        met = rng.choice(ITEMS, MET, replace=False)
        items = [*met, *rng.choice(met, 6)]
        rows += [(user, int(item), 1_600_000_000 + 1_000 * place) for place, item in enumerate(items)]
    run = Run(tmp_path_factory.mktemp("returning"))
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(run.folder / "e.parquet")
    prepare(Table(run.folder / "e.parquet"), run.data, repeats="keep")
    run.fit_retriever("--trainer.max_epochs", 1, "--data.init_args.max_length", 16)
    run.export_index()
    return run


@pytest.fixture(scope="module")
def keeping(returning: Run) -> Dataset:
    return Dataset(returning.data)


class Oracle(Recommender):
    """Knows which items were seen, and nothing else: of the seen, any is as likely to be first."""

    def queries(self, padded: Padded, request: np.ndarray | None, asked: np.ndarray | None = None) -> np.ndarray:
        queries = seen_vectors(padded.items)
        return queries + np.random.default_rng(0).random(queries.shape, dtype=np.float32) / 2


def seen_vectors(items: np.ndarray) -> np.ndarray:
    """1 for each item of the histories, (B, V) float32."""
    vectors = np.zeros((len(items), ITEMS + 1), dtype=np.float32)
    np.put_along_axis(vectors, items, 1, axis=1)
    return vectors[:, 1:]


def plain_towers() -> TwoTower:
    """Item vectors that are unit vectors, so that a query's numbers are the items' scores."""
    towers = TwoTower(ITEMS, 16, ITEMS, partial(Transformer, layers=1, heads=2), similarity="dot")
    with torch.no_grad():
        towers.items.table.weight[1:] = torch.eye(ITEMS)
    return towers


@pytest.fixture(scope="module")
def oracle(keeping: Dataset) -> Oracle:
    towers, index = plain_towers(), Exact()
    index.build(towers.all_item_vectors().detach().numpy())
    catalogue = pl.read_parquet(keeping.path / "items.parquet")
    return Oracle(towers, index, None, catalogue, keeping.train_counts, "none", candidates=ITEMS, seen="keep")


def is_a_tenth(share: float) -> bool:
    """One of ten seen items, at random: three standard errors of 300 users."""
    return abs(share - 1 / MET) < 3 * np.sqrt(0.1 * 0.9 / USERS)


def test_who_knows_only_what_was_seen_ranks_a_tenth_of_the_targets_first(keeping: Dataset, oracle: Oracle) -> None:
    for split in ("val", "test"):
        users = keeping.users(split)  # type: ignore[arg-type]  # a name of a split
        assert len(users) == USERS
        outcome = rank_users(keeping, oracle, users, split)  # type: ignore[arg-type]
        assert is_a_tenth((outcome.ranks["retriever"] == 1).mean())
        assert is_a_tenth((outcome.candidate_rank == 1).mean()), "among the candidates"
        assert outcome.ranks["retriever"].max() <= MET


@pytest.mark.parametrize("repeats", ["keep", "first"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_filtered_does_not_depend_on_the_target(
    returning: Run, tmp_path: Path, repeats: Any, split: Any
) -> None:
    """Change every target, in the log as prepared, to another item: the filter, and with it the candidates, stays."""
    prepare(Table(returning.folder / "e.parquet"), tmp_path / "data", repeats=repeats)
    dataset = Dataset(tmp_path / "data")
    users = dataset.users(split)
    before = dataset.filtered_items(users, split)
    items, places = np.array(dataset.items), dataset.target_indices(split)[users]
    items[places] = items[dataset.offsets[users]]  # an item that was seen
    dataset.items = items
    after = dataset.filtered_items(users, split)
    assert before.values.tolist() == after.values.tolist()
    assert before.offsets.tolist() == after.offsets.tolist()


def test_baselines_rank_seen_items_too(keeping: Dataset, oracle: Oracle) -> None:
    users = keeping.users("test")
    outcome = rank_users(keeping, oracle, users, "test")
    targets = keeping.targets(users, "test")
    counts = keeping.train_counts[1:]
    naive = (counts >= counts[targets - 1][:, None]).sum(1)
    assert outcome.ranks["popularity"].tolist() == naive.tolist()


def test_sampled_negatives_are_any_items_but_the_target(keeping: Dataset) -> None:
    users = keeping.users("test")
    target, seen = keeping.targets(users, "test"), keeping.seen(users, "test")
    pool = RankedItems.of(keeping.filtered_items(users, "test"), target, ITEMS, users, 20, seed=0)
    assert pool.negatives is not None
    assert pool.negatives.shape == (len(users), 20)
    ranked = np.zeros((len(users), ITEMS + 1), dtype=bool)
    np.put_along_axis(ranked, pool.negatives, values=True, axis=1)
    assert (ranked.sum(1) == 20).all()
    assert not ranked[np.arange(len(users)), target].any()
    is_seen = np.zeros_like(ranked)
    is_seen[seen.rows, seen.values] = True
    share = (ranked & is_seen).sum() / (20 * len(users))
    assert share == pytest.approx((MET - 1) / (ITEMS - 1), abs=0.02), "as often as others"


def test_early_stopping_ranks_seen_items_too(keeping: Dataset) -> None:
    model = Retriever(ITEMS, 16, dim=ITEMS, similarity="dot").eval()
    model.towers = plain_towers()
    noise = torch.rand(USERS, ITEMS, generator=torch.Generator().manual_seed(0)) / 2

    def queries(history: History) -> torch.Tensor:
        return torch.from_numpy(seen_vectors(history.items.numpy())) + noise

    model.towers.queries = queries  # type: ignore[method-assign, assignment]
    data = Histories(keeping.path, max_length=16)
    batch = data.read_queries(keeping.users("val"), "val")
    with torch.no_grad():
        assert is_a_tenth((model.ranks(batch) == 1).double().mean().item())


def test_in_mined_lists_the_target_is_one_of_the_seen(keeping: Dataset, oracle: Oracle) -> None:
    users, places = keeping.val_targets()
    seen, target = keeping.seen(users, places), keeping.targets(users, places)
    pairs = set(zip(seen.rows.tolist(), seen.values.tolist(), strict=True))
    miner = Mixture([RankBand(), Uniform(10), Popular(10)])
    _, table, _ = ListBuilder(keeping, oracle, miner, 0.3, seed=0).build(users, places)
    rows = pl.DataFrame(table)
    positive, negative = rows.filter(pl.col("label") == 1), rows.filter(pl.col("label") == 0)
    assert is_a_tenth((positive["retriever_rank"] == 1).mean())  # type: ignore[arg-type]  # a share
    assert positive.sort("request")["item"].to_list() == target.tolist()
    for fold in ("train", "select"):
        own = negative.filter(pl.col("fold") == fold)
        lists = own["request"].n_unique()
        assert sum(pair in pairs for pair in own.select("request", "item").iter_rows()) == (MET - 1) * lists
    assert not len(negative.join(positive, on=["request", "item"])), "the target is no negative"


@pytest.mark.parametrize(
    "signal",
    [
        *(PopularityAsOf(candidates=40), Transitions(candidates=40), Neighbours(candidates=40), SLIT(candidates=40)),
        *(TransitionGraph(candidates=40), ItemKNN(candidates=40), EASE(candidates=40)),
    ],
)
def test_signals_propose_seen_items_too(keeping: Dataset, returning: Run, signal: Proposer) -> None:
    served = Recommender.load(returning.index)
    signal.fit(keeping, served.vectors)
    users = keeping.users("test")
    padded, known = keeping.histories(users, "test", 16), keeping.filtered_items(users, "test")
    none = np.zeros((len(users), 0), dtype=np.int64)
    requests = Requests(
        none, padded, keeping.request_times(users, "test"), served.vectors, served.queries(padded, None)
    )
    proposed = signal.propose(requests, known)
    share = (seen_vectors(padded.items)[np.arange(len(users))[:, None], proposed.clip(1) - 1] * (proposed > 0)).sum()
    assert share / (proposed > 0).sum() > 0.1


def test_in_training_no_seen_item_is_spared(keeping: Dataset) -> None:
    """`same_sequence` would leave the target as the only one of the seen items."""
    data = Histories(keeping.path, max_length=16)
    window = data.read_windows(np.arange(40))
    losses = []
    for same_sequence in (False, True):
        torch.manual_seed(0)
        model = Retriever(ITEMS, 16, dim=8, loss=InfoNCE(same_sequence=same_sequence)).eval()
        model.load_item_tables(keeping)
        losses.append(model.losses(window)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    model.seen_rule = "filter"
    assert model.losses(window)["loss"].item() < losses[0] - 0.01


def share_of_seen(table: pl.DataFrame, log: pl.DataFrame) -> float:
    seen = log.select("user_id", "item_id").unique()
    return len(table.join(seen, on=["user_id", "item_id"], how="semi")) / len(table)


def test_seen_items_are_served_unless_filtered(returning: Run, tmp_path: Path) -> None:
    log = pl.read_parquet(returning.folder / "e.parquet")
    log.rename({"timestamp": "time"}).write_parquet(tmp_path / "histories.parquet")
    histories = ("--histories", tmp_path / "histories.parquet")

    def served(*words: object) -> pl.DataFrame:
        recsys("recommend", "--bundle", returning.index, "--output", tmp_path / "o.parquet", "--k", ITEMS, *words)
        return pl.read_parquet(tmp_path / "o.parquet")

    for words in ((), histories, ("--seen", "keep"), (*histories, "--seen", "keep")):
        table = served(*words)
        assert len(table) == USERS * ITEMS, words
    for words in (("--seen", "filter"), (*histories, "--seen", "filter")):
        table = served(*words)
        assert share_of_seen(table, log) == 0
        assert len(table) == USERS * (ITEMS - MET)


def test_seen_items_are_served_in_python_unless_filtered(returning: Run) -> None:
    recommender = Recommender.load(returning.index)
    log = pl.read_parquet(returning.folder / "e.parquet").filter(pl.col("user_id") == 7)
    history = log["item_id"].to_list()

    def items(**options: Any) -> set[int]:
        return {row["item_id"] for row in recommender.recommend(history, k=ITEMS, **options)}

    everything = set(range(ITEMS))
    assert items() == items(seen="keep") == everything
    assert items(seen="filter") == everything - set(history)
    assert items(exclude=history[:2]) == everything - set(history[:2])


def test_served_folders_say_how_repeats_were_prepared(returning: Run, short: Run) -> None:
    for folder, kind, repeats in (
        *((returning.index, "index", "keep"), (short.index, "index", "first")),
        (short.bundle, "bundle", "first"),
    ):
        manifest = read_manifest(folder, kind, "")
        assert manifest["repeats"] == repeats
        assert manifest["user_features"] == []
        dataset = Dataset(folder.parent / "data")
        trained = [dataset.times[a:b] for a, b in zip(dataset.offsets[:-1], dataset.train_ends, strict=True)]
        assert manifest["newest_time"] == max(times.max() for times in trained)


def test_a_request_time_that_changes_nothing_is_named(
    short: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = ("recommend", "--bundle", short.index, "--output", tmp_path / "o.parquet", "--users", "[1]")
    recsys(*of, "--request_time", 2 * 10**9)
    assert "trained without request time, so --request_time 2000000000 has no effect" in caplog.text


# --- all seen items are filtered, those beyond the model's max_length too


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages with a max_length of 4; users have twelve events, and no item twice."""
    run = Run(tmp_path_factory.mktemp("short"))
    cycle_world(run.folder, users=60)
    run.fit_retriever("--trainer.max_epochs", 1, "--data.init_args.max_length", MAX_LENGTH)
    run.export_index()
    run.mine()
    run.fit_ranker("--trainer.max_epochs", 1)
    run.export_bundle()
    return run


@pytest.fixture(scope="module")
def long(short: Run) -> Dataset:
    dataset = Dataset(short.data)
    assert (np.diff(dataset.offsets) == 12).all()
    return dataset


@pytest.fixture(scope="module")
def log(short: Run) -> pl.DataFrame:
    ratings = pl.read_csv(short.folder / "raw" / "ratings.csv")
    return ratings.select(user_id="userId", item_id="movieId", time="timestamp")


def unseen_ranks(scores: np.ndarray, dataset: Dataset, split: Any) -> list[int]:
    """Rank of each target among the items of no event before it, by a loop; scores are (B, V)."""
    ranks = []
    for row, user in enumerate(dataset.users(split)):
        end = int(dataset.target_indices(split)[user])
        own, target = set(dataset.items[dataset.offsets[user] : end].tolist()), int(dataset.items[end])
        unseen = [score for item, score in enumerate(scores[row], start=1) if item not in own]
        ranks.append(sum(score >= scores[row, target - 1] for score in unseen))
    return ranks


def scores_of(recommender: Recommender, dataset: Dataset, split: Any) -> np.ndarray:
    """(B, V), of the retriever."""
    padded = dataset.histories(dataset.users(split), split, MAX_LENGTH)
    assert padded.items.shape[1] == MAX_LENGTH == recommender.towers.max_length
    return recommender.queries(padded, None) @ recommender.vectors[1:].T


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_filters_old_seen_items(short: Run, long: Dataset, split: Any) -> None:
    recommender = load_recommender(long, short.bundle)
    users = long.users(split)
    outcome = rank_users(long, recommender, users, split)
    naive = unseen_ranks(scores_of(recommender, long, split), long, split)
    assert outcome.ranks["retriever"].tolist() == naive
    popularity = np.tile(long.train_counts[1:], (len(users), 1))
    assert outcome.ranks["popularity"].tolist() == unseen_ranks(popularity, long, split)
    candidates = recommender.num_candidates
    assert outcome.candidate_rank.tolist() == [min(rank, candidates + 1) for rank in naive]
    unseen = long.num_items - long.filtered_items(users, split).offsets[1]
    assert candidates >= unseen, "all unseen items are candidates"
    assert outcome.ranks["ranker"].max() <= unseen


def test_early_stopping_filters_old_seen_items(short: Run, long: Dataset) -> None:
    model = Retriever.load_from_checkpoint(short.retriever, weights_only=True).eval()
    data = Histories(long.path, max_length=MAX_LENGTH)
    with torch.no_grad():
        ranks = model.ranks(data.read_queries(long.users("val"), "val"))
    recommender = Recommender.load(short.index)
    assert ranks.tolist() == unseen_ranks(scores_of(recommender, long, "val"), long, "val")


def test_mining_filters_old_seen_items(short: Run, long: Dataset, tmp_path: Path) -> None:
    """Neither candidates nor sampled negatives are seen items."""
    miner = Mixture([RankBand(), Uniform(30), Popular(30)])
    mine_negatives(short.data, short.index, tmp_path / "candidates", miner, k=long.num_items)
    table = pl.read_parquet(tmp_path / "candidates" / "candidates.parquet")
    assert set(table["fold"]) == {"train", "select"}
    for (user,), rows in table.group_by("user"):
        seen = long.items[long.offsets[user] : long.train_ends[user]].tolist()
        assert len(seen) > 2 * MAX_LENGTH
        assert set(rows["item"]) == set(range(1, long.num_items + 1)) - set(seen)


def served_without(table: pl.DataFrame, log: pl.DataFrame, user: str, item: str) -> None:
    """All items but those of the log are in the table."""
    every = set(log["item_id"])
    for (one,), rows in log.group_by("user_id"):
        assert set(table.filter(pl.col(user) == one)[item]) == every - set(rows["item_id"])


@pytest.mark.parametrize("kind", ["data", "csv"])
def test_the_verb_filters_old_seen_items(short: Run, log: pl.DataFrame, tmp_path: Path, kind: str) -> None:
    log.write_csv(tmp_path / "histories.csv")
    words = ("--histories", tmp_path / "histories.csv") if kind == "csv" else ("--data", short.data)
    recsys("recommend", "--bundle", short.bundle, "--output", tmp_path / "o.parquet", "--k", 500, *words)
    served_without(pl.read_parquet(tmp_path / "o.parquet"), log, "user_id", "item_id")


def test_in_python_old_seen_items_are_filtered(short: Run, log: pl.DataFrame) -> None:
    recommender = Recommender.load(short.bundle)
    history = log.filter(pl.col("user_id") == 5)["item_id"].to_list()
    rows = recommender.recommend(history, k=500)
    assert {row["item_id"] for row in rows} == set(log["item_id"]) - set(history)
    kept = recommender.recommend(history, k=500, seen="keep")
    assert {row["item_id"] for row in kept} == set(log["item_id"])


@pytest.mark.parametrize("known", [True, False])
def test_the_estimator_filters_old_seen_items(short: Run, log: pl.DataFrame, known: bool) -> None:
    model = TwoStageRecommender(user="user_id", item="item_id", time="time")
    model._fitted = short.folder
    few = log.filter(pl.col("user_id") < 6)
    chosen: dict[str, Sequence[Any] | pl.DataFrame] = {"users": [1, 2, 3, 4, 5]} if known else {"histories": few}
    table = model.recommend(k=500, **chosen)  # type: ignore[arg-type]
    every = set(log["item_id"])
    for (user,), rows in few.group_by("user_id"):
        assert set(table.filter(pl.col("user_id") == user)["item_id"]) == every - set(rows["item_id"])
    kept = model.recommend(k=500, seen="keep", **chosen)  # type: ignore[arg-type]
    assert kept.group_by("user_id").len()["len"].unique().to_list() == [len(every)]
