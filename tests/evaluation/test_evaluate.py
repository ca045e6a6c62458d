"""Reports against a naive evaluation, one user and one item at a time."""

import json
import shutil
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closeness import ROUNDING, close, ranks_of, same_ranks
from pipeline_fixtures import K, Run, recsys
from test_baselines import levels
from worlds import Event, write_movielens

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens
from recsys2stage.evaluation.baselines import Baseline, Markov, Popularity, fit_baselines
from recsys2stage.evaluation.evaluate import (
    TOP,
    describe,
    protocol_line,
    rank_users,
    second_stage_rank,
    summarise,
    top_items,
    top_probability,
)
from recsys2stage.evaluation.ranked_items import RankedItems, sample_negatives
from recsys2stage.evaluation.report import as_markdown, as_table
from recsys2stage.metrics import KS
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import CandidateBatch

BASELINES = ["popularity", "markov", "transition_graph"]
MODELS = [*BASELINES, "retriever", "ranker", "ranker_ids_masked"]
METRICS = [*(f"{name}@{k}" for k in KS for name in ("hr", "ndcg", "recall")), "mrr"]


def evaluated(*words: object) -> None:
    """`recsys evaluate WORDS`, without figures."""
    recsys("evaluate", "--plots", "false", *words)


@pytest.fixture(scope="module")
def dataset(trained: Run) -> Dataset:
    return Dataset(trained.data)


@pytest.fixture(scope="module")
def recommender(trained: Run) -> Recommender:
    """The trained retriever, and a ranker with an opinion of its own, which so little training need not give it."""
    recommender = Recommender.load(trained.bundle)
    assert recommender.reranker is not None
    recommender.reranker.mask_ids = False  # which so little training may choose
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in recommender.reranker.scorer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=0.3)
    return recommender


@pytest.fixture(scope="module")
def report(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    evaluated("--bundle", trained.bundle, "--output", folder, "--resamples", 200)
    return folder


def rank_by_hand(scores: dict[int, float], target: int, rounding: float = ROUNDING) -> range:
    """How many score at least as high as the target, the target included; several ranks where some are as near."""
    return ranks_of((score for item, score in scores.items() if item != target), scores[target], rounding)


def told_of(query: np.ndarray, items: list[int], scores: list[float]) -> CandidateBatch:
    """What a ranker without signals and newest events is told of one user's candidates."""
    return CandidateBatch(
        state=torch.from_numpy(query),
        items=torch.tensor([items]),
        score=torch.tensor([scores]),
        rank=torch.arange(1, len(items) + 1)[None],
        signals=torch.zeros(1, len(items), 0),
        recent=torch.zeros(1, 0, dtype=torch.int64),
        ages=torch.zeros(1, 0),
    )


def ranks_by_hand(
    dataset: Dataset, recommender: Recommender, user: int, baselines: dict[str, Baseline]
) -> dict[str, range]:
    """The ranks that one user's test target may have by each model, from the definitions."""
    start, place = int(dataset.offsets[user]), int(dataset.val_ends[user])
    history, target = dataset.items[start:place].tolist(), int(dataset.items[place])
    unmet = sorted(set(range(1, dataset.num_items + 1)) - set(history))
    ranks = {}
    for name, baseline in baselines.items():
        scores = levels(baseline, history)
        ranks[name] = rank_by_hand({item: float(scores[item]) for item in unmet}, target, rounding=0)

    one = np.array([user])
    padded = dataset.histories(one, "test", recommender.towers.max_length)
    query = recommender.queries(padded, dataset.request_times(one, "test"))
    similar = (query @ recommender.index.vectors.T)[0]
    first = {item: float(similar[item - 1]) for item in unmet}
    ranks["retriever"] = rank_by_hand(first, target)

    listed = sorted(unmet, key=lambda item: -first[item])[:K]
    assert recommender.reranker is not None
    for name, masked in (("ranker", False), ("ranker_ids_masked", True)):
        with torch.inference_mode():
            told = told_of(query, listed, [first[item] for item in listed])
            logits = recommender.reranker(told, torch.full((1, len(listed)), masked))
        second = dict(zip(listed, logits[0].tolist(), strict=True))
        ranks[name] = rank_by_hand(second, target) if target in second else ranks["retriever"]
    return ranks


def test_every_rank_is_that_of_a_naive_evaluation(dataset: Dataset, recommender: Recommender) -> None:
    users = dataset.users("test")[::2]
    outcome = rank_users(dataset, recommender, users, "test", batch_size=32)
    ranks, found = outcome.ranks, outcome.candidate_rank <= K
    assert list(ranks) == MODELS
    baselines = fit_baselines(None, dataset)
    for row, user in enumerate(users.tolist()):
        expected = ranks_by_hand(dataset, recommender, user, baselines)
        assert all(int(ranks[name][row]) in expected[name] for name in MODELS), user
    same_ranks(outcome.candidate_rank[found], ranks["retriever"][found])  # the index is exact
    assert (outcome.candidate_rank[~found] == K + 1).all()
    assert 0.2 < found.mean() < 0.9  # both sides are put to the test
    assert (ranks["ranker"] != ranks["retriever"]).any()
    assert (ranks["ranker"] != ranks["ranker_ids_masked"]).any()


def test_a_target_outside_the_candidates_keeps_the_retrievers_rank(dataset: Dataset, recommender: Recommender) -> None:
    users = dataset.users("test")
    outcome = rank_users(dataset, recommender, users, "test")
    ranks, outside = outcome.ranks, outcome.candidate_rank > K
    assert outside.any()
    for name in ("ranker", "ranker_ids_masked"):
        assert (ranks[name][outside] == ranks["retriever"][outside]).all()
        assert (ranks[name][~outside] <= K).all()


def test_ranks_do_not_depend_on_who_else_is_ranked(dataset: Dataset, recommender: Recommender) -> None:
    users = dataset.users("test")
    whole, parts = (rank_users(dataset, recommender, users, "test", size) for size in (256, 7))
    some = rank_users(dataset, recommender, users[5::10], "test")
    for name in MODELS:
        same_ranks(whole.ranks[name], parts.ranks[name])
        same_ranks(whole.ranks[name][5::10], some.ranks[name])
        assert (
            np.abs(whole.top_counts[name] - parts.top_counts[name]).sum() <= 0.01 * whole.top_counts[name].sum()
        )  # near ties
    same_ranks(whole.candidate_rank, parts.candidate_rank)
    close(whole.confidence, parts.confidence)
    assert (whole.hit != parts.hit).mean() <= 0.02


@pytest.mark.parametrize(
    ("logits", "target", "first", "before", "expected"),
    [
        ([0.5, 0.9, 0.1], 5, 1, 0, 2),
        ([0.5, 0.9, 0.1], 3, 2, 1, 1),
        ([0.5, 0.9, 0.1], 9, 3, 2, 3),
        ([0.5, 0.5, 0.1], 5, 1, 0, 2),  # a tie counts against the target
        ([0.5, 0.5, 0.5], 9, 3, 2, 3),
        ([0.5, 0.9, 0.1], 7, 4, 3, 4),  # the best of those outside
        ([0.5, 0.9, 0.1], 7, 6, 3, 6),
        ([0.5, 0.9, 0.1], 7, 6, 1, 8),  # an approximate index missed better ones: now all candidates are above it
    ],
)
def test_the_second_rank_by_hand(logits: list[float], target: int, first: int, before: int, expected: int) -> None:
    """Candidates 5, 3, 9 of an index that found three."""
    items, padded = np.array([[5, 3, 9, -1]]), np.array([[*logits, -np.inf]], dtype=np.float32)
    rank = second_stage_rank(items, padded, np.array([target]), np.array([first]), np.array([before]))
    assert rank.tolist() == [expected]


def test_the_second_ranks_of_all_items_are_a_permutation(rng: np.random.Generator) -> None:
    count, k = 30, 8
    retrieved = rng.permutation(count) + 1  # in the retriever's order
    listed = retrieved[[0, 1, 3, 4, 5, 8, 9, 20]]  # as an approximate index finds them
    logits = rng.standard_normal(k).astype(np.float32)
    ranks = []
    for place, item in enumerate(retrieved):
        before = sum(candidate in retrieved[:place] for candidate in listed)
        rank = second_stage_rank(
            listed[None], logits[None], np.array([item]), np.array([place + 1]), np.array([before])
        )
        ranks.append(int(rank[0]))
    assert sorted(ranks) == list(range(1, count + 1))
    assert sorted(ranks[list(retrieved).index(item)] for item in listed) == list(range(1, k + 1))


# sampled


N = 30  # of 120 items, so that the lists of both stages lie partly outside the sample


def sampled_ranks_by_hand(
    dataset: Dataset,
    recommender: Recommender,
    user: int,
    negatives: int,
    seed: int,
    baselines: dict[str, Baseline],
) -> dict[str, range]:
    """Each model's whole order of the unmet items, of which only the sampled ones are counted; as `ranks_by_hand`."""
    start, place = int(dataset.offsets[user]), int(dataset.val_ends[user])
    history, target = dataset.items[start:place].tolist(), int(dataset.items[place])
    unmet = sorted(set(range(1, dataset.num_items + 1)) - set(history) - {target})
    drawn = np.random.default_rng([seed, user]).choice(unmet, min(negatives, len(unmet)), replace=False).tolist()
    assert target not in drawn
    assert not set(drawn) & set(history)
    ranks = {}
    for name, baseline in baselines.items():
        scores = levels(baseline, history)
        ranks[name] = ranks_of((float(scores[item]) for item in drawn), float(scores[target]), rounding=0)

    one = np.array([user])
    padded = dataset.histories(one, "test", recommender.towers.max_length)
    query = recommender.queries(padded, dataset.request_times(one, "test"))
    similar = (query @ recommender.index.vectors.T)[0]
    ranks["retriever"] = ranks_of((float(similar[item - 1]) for item in drawn), float(similar[target - 1]))

    listed = sorted([*unmet, target], key=lambda item: -similar[item - 1])[:K]
    assert recommender.reranker is not None
    for name, masked in (("ranker", False), ("ranker_ids_masked", True)):
        with torch.inference_mode():
            told = told_of(query, listed, [float(similar[item - 1]) for item in listed])
            logits = recommender.reranker(told, torch.full((1, len(listed)), masked))
        second = dict(zip(listed, logits[0].tolist(), strict=True))
        if target in second:
            ranks[name] = ranks_of((second[item] for item in drawn if item in second), second[target])
        else:  # below all that are listed, and among the others where the retriever put it
            ranks[name] = ranks["retriever"]
    return ranks


@pytest.mark.parametrize("negatives", [N, 500])
def test_every_sampled_rank_is_that_of_a_naive_evaluation(
    dataset: Dataset, recommender: Recommender, negatives: int
) -> None:
    users = dataset.users("test")[::2]
    outcome = rank_users(dataset, recommender, users, "test", batch_size=32, negatives=negatives, seed=5)
    ranks = outcome.ranks
    baselines = fit_baselines(None, dataset)
    for row, user in enumerate(users.tolist()):
        expected = sampled_ranks_by_hand(dataset, recommender, user, negatives, 5, baselines)
        assert all(int(ranks[name][row]) in expected[name] for name in MODELS), user
    full = rank_users(dataset, recommender, users, "test")
    same_ranks(outcome.candidate_rank, full.candidate_rank)  # the candidates are those of the whole catalogue
    assert 0 < (outcome.candidate_rank <= K).mean() < 1
    assert outcome.top_counts == {}  # nobody is shown a sample
    for name in MODELS:
        assert (ranks[name] <= full.ranks[name]).all()
        assert np.array_equal(ranks[name], full.ranks[name]) == (negatives == 500)  # fewer are left: all of them


def test_a_sample_depends_on_the_seed_and_the_user_alone(dataset: Dataset, recommender: Recommender) -> None:
    users = dataset.users("test")
    once, again = (rank_users(dataset, recommender, users, "test", size, N, seed=1) for size in (256, 7))
    some = rank_users(dataset, recommender, users[5::10], "test", 256, N, seed=1)
    other = rank_users(dataset, recommender, users, "test", 256, N, seed=2)
    for name in MODELS:
        same_ranks(once.ranks[name], again.ranks[name])
        same_ranks(once.ranks[name][5::10], some.ranks[name])
        assert not np.array_equal(once.ranks[name], other.ranks[name])


def test_a_sample_holds_so_many_of_the_unmet_each_as_often(rng: np.random.Generator) -> None:
    count, items, negatives = 3000, 40, 10
    met = [rng.choice(np.arange(1, items + 1), 8, replace=False) for _ in range(count)]
    target = np.array([items_met[0] for items_met in met])
    known = Ragged(np.concatenate([items_met[1:] for items_met in met]), np.arange(0, 7 * count + 1, 7))
    sampled = RankedItems.of(known, target, items, np.arange(count), negatives, seed=0).negatives
    assert sampled is not None
    assert sampled.shape == (count, negatives)
    ranked = np.zeros((count, items + 1), dtype=bool)
    np.put_along_axis(ranked, sampled, values=True, axis=1)
    assert (ranked.sum(1) == negatives).all()  # none twice
    unmet = np.ones((count, items + 1), dtype=bool)
    unmet[:, 0] = unmet[known.rows, known.values] = unmet[np.arange(count), target] = False
    assert not (ranked & ~unmet).any()
    share = ranked.sum(0)[1:] / unmet.sum(0)[1:]
    assert share == pytest.approx(np.full(items, negatives / 32), abs=5 * np.sqrt(0.25 / (count * 32 / items)))


def test_samples_are_those_that_choice_draws_from_the_unmet_items() -> None:
    """As ever, so that reports with the same seed stay comparable."""
    known = Ragged(np.array([1, 2, 5, 9, 3]), np.array([0, 4, 4, 5]))
    target, users = np.array([7, 1, 3]), np.array([4, 0, 17])  # the last one's target was seen before
    for count in (3, 100):
        found = sample_negatives(known, target, 12, users, count, seed=3)
        for row, user in enumerate(users.tolist()):
            own = known.values[known.offsets[row] : known.offsets[row + 1]]
            pool = np.setdiff1d(np.arange(1, 13), [*own, target[row]])
            drawn = np.random.default_rng([3, user]).choice(pool, min(count, len(pool)), replace=False).tolist()
            assert found[row].tolist() == drawn + [-1] * (count - len(drawn))


def test_a_random_scorer_finds_ten_of_a_hundred_and_one(rng: np.random.Generator) -> None:
    count, items = 4000, 300
    target = rng.integers(1, items + 1, count)
    nothing = Ragged(np.zeros(0, dtype=np.int64), np.zeros(count + 1, dtype=np.int64))
    pool = RankedItems.of(nothing, target, items, np.arange(count), 100, seed=0)
    queries, vectors = rng.standard_normal((count, items)), torch.eye(items, dtype=torch.float64)  # any order
    ranks, _, _ = pool.retriever_ranks(queries, vectors, np.zeros((count, 0), dtype=np.int64), TOP)
    assert (ranks <= 10).mean() == pytest.approx(10 / 101, abs=4 * np.sqrt(0.09 / count))


@pytest.mark.parametrize("negatives", [None, 100])
def test_memory_does_not_grow_with_batch_times_catalogue(negatives: int | None) -> None:
    """The ranks of 256 targets among 200,000 items, where (batch, catalogue) would be 51 million numbers."""
    rows, size, rng = 256, 200_000, np.random.default_rng(0)
    offsets = np.arange(0, 21 * 1_000, 20)
    dataset = Dataset.__new__(Dataset)  # all that baselines read
    dataset.manifest, dataset.offsets, dataset.train_ends = {"counts": {"items": size}}, offsets, offsets[1:]
    dataset.items = rng.integers(1, size + 1, offsets[-1]).astype(np.int32)
    last, target, users = rng.integers(1, size, rows), rng.integers(1, size + 1, rows), np.arange(rows)
    seen = Ragged(rng.integers(1, size + 1, 50 * rows), np.arange(0, 50 * rows + 1, 50))
    candidates, vectors = rng.integers(1, size + 1, (rows, 200)), torch.randn(size, 2)
    queries = rng.standard_normal((rows, 2)).astype(np.float32)
    tracemalloc.start()
    try:
        pool = RankedItems.of(seen, target, size, users, negatives, seed=0)
        for kind in (Popularity, Markov):
            baseline, newest = kind().fit(dataset), Ragged(last, np.arange(rows + 1))
            assert pool.baseline_ranks(baseline, newest).shape == (rows,)
            assert (baseline.best(newest, pool.excluded, TOP) > 0).all()
        pool.retriever_ranks(queries, vectors, candidates, TOP)
        assert pool.holds(candidates).any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20  # of NumPy; torch holds a block of scores


def test_a_sampled_report_stands_beside_the_full_one_and_warns(
    trained: Run, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    evaluated("--bundle", trained.bundle, "--output", tmp_path, "--resamples", 10, "--protocol", f"sampled-{N}")
    printed = capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    new = {f"report-sampled-{N}.json", f"report-sampled-{N}.md", f"ranks-sampled-{N}.parquet"}
    assert {file.name for file in tmp_path.iterdir()} - set(before) == new
    warning = (
        f"sampled: 1 positive and {N} random negatives; sampled metrics are not comparable to full ranking and "
        "may order models differently (Krichene & Rendle 2020)"
    )
    assert warning in printed
    assert "full ranking of" not in printed
    assert warning in (tmp_path / f"report-sampled-{N}.md").read_text()
    content = json.loads((tmp_path / f"report-sampled-{N}.json").read_text())
    assert content["protocol"]["ranking"] == warning
    ranks = pl.read_parquet(tmp_path / f"ranks-sampled-{N}.parquet")
    assert ranks["retriever"].max() == N + 1
    assert content["models"]["ranker"]["hr@10"]["value"] == pytest.approx((ranks["ranker"] <= 10).mean())


@pytest.mark.parametrize("protocol", ["sampled-0", "sampled", "sampled-1e3", "half"])
def test_a_protocol_that_is_none_is_refused(trained: Run, tmp_path: Path, protocol: str) -> None:
    with pytest.raises(SystemExit, match=f"protocol is '{protocol}', expected full or sampled-N"):
        evaluated(
            "--bundle",
            trained.bundle,
            "--output",
            tmp_path / "out",
            "--protocol",
            protocol,
        )
    assert not (tmp_path / "out").exists()


# the report


def test_the_report_has_its_shape(report: Path, dataset: Dataset) -> None:
    content = json.loads((report / "report.json").read_text())
    parts = ["protocol", "items", "baselines", "users", "targets", "models", "comparison", "cohorts", "by_gap"]
    assert list(content) == [*parts, "candidates", "exposure", "calibration"]
    assert content["items"] == dataset.num_items
    assert content["users"] == len(dataset.users("test")) == 150
    assert list(content["models"]) == MODELS
    for metrics in content["models"].values():
        assert sorted(metrics) == sorted(METRICS)
        for value in metrics.values():
            assert list(value) == ["value", "low", "high"]
            assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
    assert sorted(content["comparison"]) == sorted(METRICS)
    assert {"difference", "low", "high", "ratio", "p"} < content["comparison"]["ndcg@10"].keys()
    assert content["cohorts"].keys() == {"history_length", "target_popularity", "gap_to_request", "target_age"}
    assert list(content["exposure"]) == MODELS[:-1]
    assert content["calibration"].keys() == {"users", "confidence", "hits", "ece", "bins"}


def test_the_report_names_its_protocol(report: Path, dataset: Dataset) -> None:
    protocol = json.loads((report / "report.json").read_text())["protocol"]
    assert dataset.protocol.items() <= protocol.items()
    for key in ("split", "tie_break", "repeats", "candidates", "evaluated", "ranking", "seen_filter", "request_time"):
        assert protocol[key]
    assert protocol["split_hash"] == dataset.manifest["split_hash"]


def test_the_values_are_the_means_over_the_ranks_that_lie_beside(report: Path, dataset: Dataset) -> None:
    content = json.loads((report / "report.json").read_text())
    ranks = pl.read_parquet(report / "ranks.parquet")
    assert ranks.columns == ["user", "place", "target", "gap", *MODELS]
    assert ranks["place"].to_list() == dataset.target_indices("test")[dataset.users("test")].tolist()
    ends = ranks["place"].to_numpy()
    assert ranks["gap"].to_list() == (dataset.times[ends] - dataset.times[ends - 1]).tolist()
    assert ranks["target"].to_list() == dataset.targets(dataset.users("test"), "test").tolist()
    assert ranks["user"].to_list() == dataset.users("test").tolist()
    for name in MODELS:
        rank = ranks[name].to_numpy()
        expected = {f"hr@{k}": np.mean(rank <= k) for k in KS} | {"mrr": np.mean(1 / rank)}
        expected |= {f"ndcg@{k}": np.mean((rank <= k) / np.log2(1 + rank)) for k in KS}
        for metric, value in expected.items():
            assert content["models"][name][metric]["value"] == pytest.approx(value), (name, metric)
    found = content["candidates"]
    assert found["k"] == K
    assert found["recall"] == pytest.approx(np.mean(ranks["ranker"].to_numpy() <= K))


def test_the_table_is_printed_between_the_protocol_and_the_paths(
    trained: Run, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated("--bundle", trained.bundle, "--output", tmp_path, "--resamples", 200)
    printed = capsys.readouterr().out.strip()
    content = json.loads((report / "report.json").read_text())
    table = as_table(content)
    assert table in printed
    before, after = printed.split(table)
    assert before.startswith("protocol: LeaveOneOut split, test targets of 150 users; full ranking of 120 items")
    report_line, *others = [line.strip() for line in after.strip().splitlines()]
    assert report_line == f"{tmp_path / 'report.md'}: 150 users, 120 items"
    assert others[:2] == [str(tmp_path / name) for name in ("report.json", "ranks.parquet")]
    assert table in (report / "report.md").read_text()
    head = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")]
    assert head == ["model", "HR@10", "NDCG@10", "MRR", "Recall@100"]
    value = content["models"]["ranker"]["ndcg@10"]
    assert f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]" in table
    assert json.loads((tmp_path / "report.json").read_text()) == content  # the same seed, the same intervals


def test_the_retriever_is_measured_as_it_was_in_training(trained: Run, tmp_path: Path) -> None:
    evaluated("--bundle", trained.bundle, "--output", tmp_path, "--split", "val", "--resamples", 10)
    value = json.loads((tmp_path / "report.json").read_text())["models"]["retriever"]["ndcg@10"]["value"]
    best = read_manifest(trained.retriever.parent, "retriever", "")["best"]
    assert value == pytest.approx(best, abs=1e-6)


def test_the_first_stage_alone_is_measured_too(trained: Run, report: Path, tmp_path: Path) -> None:
    evaluated("--bundle", trained.index, "--output", tmp_path, "--resamples", 200)
    alone, both = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, report))
    assert list(alone["models"]) == MODELS[:-2]
    assert "comparison" not in alone
    assert "calibration" not in alone
    assert list(alone["exposure"]) == MODELS[:-2]
    for name in MODELS[:-2]:
        values = {metric: value["value"] for metric, value in alone["models"][name].items()}
        assert values == {metric: value["value"] for metric, value in both["models"][name].items()}
    assert "NDCG@10" in (tmp_path / "report.md").read_text()


def test_some_users_are_a_seeded_draw(trained: Run, report: Path, tmp_path: Path) -> None:
    evaluated("--bundle", trained.bundle, "--output", tmp_path, "--users", 20, "--resamples", 10)
    some, every = (pl.read_parquet(folder / "ranks.parquet") for folder in (tmp_path, report))
    assert len(some) == 20
    assert some.equals(every.filter(pl.col("user").is_in(some["user"].to_list())))


def test_a_dataset_of_another_split_is_refused(trained: Run, raw: Path, tmp_path: Path) -> None:
    other = Run(tmp_path)
    other.prepare(raw, "--tie_break", "item_id", "--core", 2)
    assert Dataset(other.data).manifest["split_hash"] != Dataset(trained.data).manifest["split_hash"]
    for verb in ("evaluate", "recommend"):
        with pytest.raises(
            SystemExit, match=f"recsys {verb}: .* split hash .* may have been trained on; make .* again"
        ):
            recsys(verb, "--bundle", trained.bundle, "--data", other.data, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_split_elsewhere_is_welcome(trained: Run, tmp_path: Path) -> None:
    moved = shutil.copytree(trained.data, tmp_path / "moved")
    evaluated("--bundle", trained.bundle, "--data", moved, "--output", tmp_path, "--resamples", 10)
    assert (tmp_path / "report.json").is_file()


# intervals and cohorts


def summary(dataset: Dataset, ranks: dict[str, np.ndarray], resamples: int = 500) -> dict[str, Any]:
    users = dataset.users("test")
    return summarise(dataset, ranks, users, "test", resamples, seed=0)


def test_an_interval_is_where_95_percent_of_resampled_means_lie(dataset: Dataset, rng: np.random.Generator) -> None:
    users = len(dataset.users("test"))
    ranks = rng.integers(1, 30, users)
    found = summary(dataset, {"retriever": ranks}, 2000)["models"]["retriever"]["ndcg@10"]
    gain = (ranks <= 10) / np.log2(1 + ranks)
    low, high = np.quantile([rng.choice(gain, users).mean() for _ in range(2000)], [0.025, 0.975])
    assert found == pytest.approx({"value": gain.mean(), "low": low, "high": high}, abs=0.006)


def test_the_comparison_is_paired(dataset: Dataset, rng: np.random.Generator) -> None:
    """Users differ wildly, but each gains: only a paired interval is clear of zero."""
    users = len(dataset.users("test"))
    retriever = rng.choice([2, 40, 160], users)
    report = summary(dataset, {"retriever": retriever, "ranker": retriever - 1})
    gain = report["comparison"]["mrr"]
    expected = np.mean(1 / (retriever - 1) - 1 / retriever)
    assert gain["difference"] == pytest.approx(expected)
    assert gain["ratio"] == pytest.approx(np.mean(1 / (retriever - 1)) / np.mean(1 / retriever))
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    one, other = (report["models"][name]["mrr"] for name in ("retriever", "ranker"))
    assert gain["high"] - gain["low"] < (other["high"] - other["low"])
    unpaired = np.hypot(one["high"] - one["low"], other["high"] - other["low"])
    assert gain["high"] - gain["low"] < 0.7 * unpaired
    same = summary(dataset, {"retriever": retriever, "ranker": retriever})["comparison"]["mrr"]
    assert (same["difference"], same["low"], same["high"], same["ratio"]) == (0, 0, 0, 1)


def test_a_retriever_that_never_hits_has_no_ratio(dataset: Dataset) -> None:
    never = np.full(len(dataset.users("test")), 1000)
    report = summary(dataset, {"retriever": never, "ranker": never})
    assert report["comparison"]["ndcg@10"]["ratio"] is None  # NaN is no JSON
    text = as_markdown(report | {"candidates": {"recall": 0.0, "k": 9}}, "protocol")
    assert ["NDCG@10", "+0.0000", "[+0.0000, +0.0000]", "", "1.0000"] in [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]


# what is shown, and how sure the ranker is


def test_what_is_shown_is_the_ten_best_of_a_naive_evaluation(dataset: Dataset, recommender: Recommender) -> None:
    """Of the two stages, whose scores are all different."""
    users = dataset.users("test")
    outcome = rank_users(dataset, recommender, users, "test", batch_size=32)
    assert recommender.reranker is not None
    shown = {name: np.zeros(dataset.num_items + 1, dtype=int) for name in ("retriever", "ranker")}
    for row, user in enumerate(users.tolist()):
        start, place = int(dataset.offsets[user]), int(dataset.val_ends[user])
        history, target = dataset.items[start:place].tolist(), int(dataset.items[place])
        one = np.array([user])
        padded = dataset.histories(one, "test", recommender.towers.max_length)
        query = recommender.queries(padded, dataset.request_times(one, "test"))
        similar = (query @ recommender.index.vectors.T)[0]
        unmet = sorted(set(range(1, dataset.num_items + 1)) - set(history), key=lambda item: -similar[item - 1])
        shown["retriever"][unmet[:10]] += 1
        listed = unmet[:K]
        told = told_of(query, listed, [float(similar[item - 1]) for item in listed])
        logits = recommender.rerank(told)[0].astype(np.float64)
        shown["ranker"][np.array(listed)[np.argsort(-logits)[:10]]] += 1
        chances = np.exp(logits) / np.exp(logits).sum()
        assert outcome.confidence[row] == pytest.approx(chances.max(), rel=1e-4)
        assert outcome.hit[row] == (listed[chances.argmax()] == target)
    for name, counts in shown.items():
        assert outcome.top_counts[name].tolist() == counts.tolist()
    for counts in outcome.top_counts.values():
        assert counts.sum() == 10 * len(users)
        assert counts[0] == 0
    assert outcome.top_counts["retriever"].tolist() != outcome.top_counts["ranker"].tolist()
    assert outcome.hit.any()


def test_nobody_is_shown_what_is_not_ranked() -> None:
    scores = torch.tensor([[0.1, 0.9, -torch.inf], [-torch.inf] * 3])
    listed = np.array([[7, 5, -1], [-1, -1, -1]])
    assert top_items(scores, listed).tolist() == [[5, 7] + [-1] * (TOP - 2), [-1] * TOP]
    wide = torch.arange(30.0)[None]
    assert top_items(wide, np.arange(1, 31)[None]).tolist() == [list(range(30, 20, -1))]


def test_the_probability_of_the_first_choice() -> None:
    logits = np.log(np.array([[1, 3, 6], [5, 4, 1]], dtype=np.float32))
    there = np.array([[False, False, True], [False, False, False]])  # the second target is no candidate
    confidence, hit = top_probability(logits, there)
    assert confidence == pytest.approx([0.6, 0.5])
    assert hit.tolist() == [True, False]
    confidence, hit = top_probability(np.full((1, 3), -np.inf, dtype=np.float32), there[1:])
    assert np.isnan(confidence).all()
    assert not hit.any()


def test_who_has_no_history_is_shown_what_is_popular_and_has_no_probability(
    trained: Run, recommender: Recommender, tmp_path: Path
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    starts = np.load(data / "users.offsets.npy")[:-1]
    for name in ("users.train_end.npy", "users.val_end.npy"):  # the first event of users 0 to 4 is their target
        ends = np.load(data / name)
        ends[:5] = starts[:5]
        np.save(data / name, ends)
    dataset = Dataset(data)
    outcome = rank_users(dataset, recommender, np.arange(5), "test")
    least = np.sort(dataset.train_counts[1:])[-10]
    for counts in outcome.top_counts.values():
        assert counts.sum() == 5 * 10
        assert (dataset.train_counts[counts > 0] >= least).all()
    assert np.isnan(outcome.confidence).all()


# repeats


def test_with_repeats_kept_nothing_is_filtered(tmp_path: Path) -> None:
    """User u has met four of six items and comes back to the first of them."""
    events: list[Event] = []
    for user in range(1, 13):
        items = [(user + step) % 6 + 1 for step in range(4)]
        events += [(user, item, 4.0, 1_000_000_000 + place) for place, item in enumerate([*items, items[0]])]
    raw = write_movielens(tmp_path / "raw", events)
    prepare(MovieLens(raw), tmp_path / "keep", repeats="keep")
    dataset = Dataset(tmp_path / "keep")
    users = dataset.users("test")
    assert len(users) == 12
    torch.manual_seed(0)
    towers = TwoTower(6, 8, 8, partial(Transformer, layers=1))
    index = Exact()
    index.build(towers.all_item_vectors().detach().numpy())
    catalogue = pl.read_parquet(dataset.path / "items.parquet")
    served = Recommender(towers, index, None, catalogue, np.append(0, np.ones(6)), "none", candidates=6)
    outcome = rank_users(dataset, served, users, "test")
    queries = served.queries(dataset.histories(users, "test", 8), None)
    scores = queries @ served.vectors[1:].T
    own = scores[np.arange(12), dataset.targets(users, "test") - 1]
    ranks = (scores >= own[:, None]).sum(1)
    assert ranks.max() > 3, "seen items stand above some targets"
    assert outcome.ranks["retriever"].tolist() == outcome.candidate_rank.tolist() == ranks.tolist()
    for name in ("popularity", "markov", "retriever"):
        assert outcome.top_counts[name].sum() == 6 * 12  # there are no ten
    assert np.isnan(outcome.confidence).all()  # there is no ranker
    protocol = describe(dataset, "none", "test")
    assert protocol["seen_filter"] == "none, seen items are ranked too"
    assert "full ranking of 6 items, seen ones included;" in protocol_line(protocol, 12, 6)

    prepare(MovieLens(raw), tmp_path / "first", repeats="first")
    first = Dataset(tmp_path / "first")
    known = first.filtered_items(first.users("test"), "test")
    targets = first.targets(first.users("test"), "test")
    assert not (known.values == targets[known.rows]).any()
    line = protocol_line(describe(first, "none", "test"), 12, 6)
    assert "full ranking of 6 items without seen items;" in line
