"""The parts of the engine against naive ones: filters, diversity, reasons, and batches."""

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from http_client import served
from pipeline_fixtures import Run

from recsys2stage.artifacts import write_json
from recsys2stage.ranking.histories import pad_events
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.inputs import ActionEmbedding, NextAction, RatingEmbedding
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.retrieval.users import UserTower
from recsys2stage.serving.batching import Batcher
from recsys2stage.serving.diversity import mmr
from recsys2stage.serving.engine import Engine, Result, ragged, read_metrics
from recsys2stage.serving.explain import ITEM, POPULARITY, RETRIEVER, SOURCE
from recsys2stage.serving.filters import ItemFeatures
from recsys2stage.serving.problems import Problem
from recsys2stage.serving.schemas import Filter, RecommendRequest, SimilarRequest

CLASSES = ["red", "green", "blue", "a|b"]


@pytest.fixture(scope="module")
def engine(informed: Run) -> Engine:
    return Engine.load(informed.bundle)


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


# filters


def catalogue(rng: np.random.Generator, count: int = 80) -> pl.DataFrame:
    """Items with missing values of each feature."""
    tags = [None if rng.random() < 0.2 else rng.choice(CLASSES, rng.integers(0, 4)).tolist() for _ in range(count)]
    years = [None if rng.random() < 0.2 else float(rng.integers(1990, 2000)) for _ in range(count)]
    return pl.DataFrame(
        {
            "item": np.arange(1, count + 1),
            "item_id": [f"i{n}" for n in range(count)],
            "tags": pl.Series(tags, dtype=pl.List(pl.String)),
            "colour": [None if rng.random() < 0.2 else str(rng.choice(CLASSES)) for _ in range(count)],
            "year": years,
        }
    )


def test_filters_are_those_of_the_definition(rng: np.random.Generator) -> None:
    table = catalogue(rng)
    features = ItemFeatures(table, {"tags": "multi", "colour": "categorical", "year": "numeric"}, np.arange(81))
    for _ in range(150):
        filters: dict[str, Filter] = {}
        for name in ("tags", "colour"):
            lists = {
                kind: rng.choice(CLASSES, rng.integers(1, 3), replace=False).tolist()
                for kind in ("any", "all", "none")
                if rng.random() < 0.3
            }
            if lists:
                filters[name] = Filter(**lists)
        if rng.random() < 0.4:
            low, high = sorted(rng.integers(1989, 2001, 2).tolist())
            filters["year"] = Filter(min=low if rng.random() < 0.7 else None, max=float(high))
        mask = features.mask(filters)
        if not filters:
            assert mask is None
            continue
        expected = []
        for row in table.iter_rows(named=True):
            passes = True
            for name, condition in filters.items():
                if name == "year":
                    year = row["year"]
                    passes &= year is not None and (condition.min or -1e9) <= year <= (condition.max or 0)
                else:
                    own = set(row["tags"] or []) if name == "tags" else {row["colour"]} - {None}
                    passes &= condition.any is None or bool(own & set(condition.any))
                    passes &= condition.all is None or own >= set(condition.all)
                    passes &= condition.none is None or not own & set(condition.none)
            expected.append(passes)
        assert mask is not None
        assert mask.tolist() == expected


def test_items_have_their_features_and_queries_find_ranges(rng: np.random.Generator) -> None:
    table = catalogue(rng)
    features = ItemFeatures(table, {"tags": "multi", "year": "numeric"}, np.arange(81))
    total, rows = features.search("", {"year": features.condition("year", ["1993..1995"])}, 100, 0)
    years = dict(table.select("item_id", "year").iter_rows())
    assert total == len(rows) == sum(year is not None and 1993 <= year <= 1995 for year in years.values())
    assert all(row["features"]["year"] == years[row["item_id"]] for row in rows)
    assert features.search("I7", {}, 100, 0)[0] == 11  # without titles, ids are searched
    for text, message in (("x", "expected a number or a range"), ("9..1", "that ascends"), ("..", "expected a number")):
        with pytest.raises(Problem, match=message):
            features.condition("year", [text])
    described = {feature["name"]: feature for feature in features.describe()}
    assert described["year"]["min"] == min(year for year in years.values() if year is not None)
    assert described["tags"]["values"] == sorted(CLASSES)


# diversity


def naive_mmr(relevance: np.ndarray, vectors: np.ndarray, count: int, weight: float, shown: np.ndarray) -> list[int]:
    scaled = (relevance - relevance.min()) / (np.ptp(relevance) or 1)
    chosen: list[int] = []
    while len(chosen) < min(count, len(relevance)):
        best, value = -1, -np.inf
        for item in range(len(relevance)):
            if item in chosen:
                continue
            near = [float(vectors[item] @ vectors[other]) for other in chosen]
            near += [float(vectors[item] @ other) for other in shown]
            gain = (1 - weight) * scaled[item] - weight * max(near, default=0.0)
            if gain > value + 1e-9:
                best, value = item, gain
        chosen.append(best)
    return chosen


def test_mmr_is_that_of_the_definition(rng: np.random.Generator) -> None:
    for _ in range(30):
        count, weight = int(rng.integers(1, 25)), float(rng.choice([0, 0.2, 0.7, 1]))
        vectors, relevance = unit(rng, count, 5), np.sort(rng.normal(size=count))[::-1]
        shown = unit(rng, int(rng.integers(0, 4)), 5)
        wanted = int(rng.integers(1, 30))
        assert mmr(relevance, vectors, wanted, weight, shown).tolist() == naive_mmr(
            relevance, vectors, wanted, weight, shown
        )
        assert mmr(relevance, vectors, count, 0.0, shown).tolist() == list(range(count))


# reasons


def test_an_effect_is_the_change_of_the_score_at_the_mean_of_the_group(engine: Engine) -> None:
    """The scores are computed anew by the whole second stage, with the inputs of one group changed in its forward."""
    model, ids = engine.recommender, engine.features.ids
    reranker = model.reranker
    assert reranker is not None
    newest = model.newest_time or 0
    history = {"items": ids[20:27], "times": [newest - 50 + n for n in range(7)]}
    request = RecommendRequest.model_validate(
        {"history": history, "request_time": newest + 9, "k": 15, "explain": True, "seen": "keep"}
    )
    (result,) = engine.compute([request])
    assert isinstance(result, Result)
    query = engine.resolver.resolve(request, None)
    padded, when = pad_events([query.events], model.towers.max_length, True, True), np.array([query.request_time])
    queries = model.queries(padded, when)
    found = model.candidates(queries, ragged([query.excluded]), padded, when)
    batch = model.candidate_batch(queries, found, padded, when)
    plain, scorer = model.rerank(batch)[0], reranker.scorer
    column = {int(item): place for place, item in enumerate(found.items[0])}
    declared = reranker.features.width if reranker.features else 0
    names = [signal["name"].partition(".")[0] for signal in model.signal_names]
    columns = {RETRIEVER: [0, 1, 2], POPULARITY: [4], ITEM: [3], "ItemFeatures": list(range(5, 5 + declared))}
    for place, name in enumerate(names):
        columns.setdefault(SOURCE if name == "source" else name, []).append(5 + declared + place)

    class Changed(torch.nn.Module):
        """The scorer with a group of features at their mean over the list."""

        def __init__(self, group: str) -> None:
            super().__init__()
            self.group = group

        def forward(self, inputs: Any) -> torch.Tensor:
            features, own = inputs.features.clone(), columns[self.group]
            features[:, :, own] = features[:, :, own].mean(dim=1, keepdim=True)
            vectors = inputs.vectors
            if self.group == ITEM:
                vectors = vectors.mean(dim=1, keepdim=True).expand_as(vectors)
            return scorer(inputs._replace(features=features, vectors=vectors))

    try:
        changed = {}
        for group in columns:
            reranker.scorer = Changed(group)  # type: ignore[assignment]
            changed[group] = model.rerank(batch)[0]
    finally:
        reranker.scorer = scorer
    base = reranker.log_scale.detach().exp().numpy() * (found.score[0] - reranker.center.numpy())
    assert not reranker.cold[torch.from_numpy(found.items[0])].any()
    changed[RETRIEVER] = changed[RETRIEVER] - base + base.mean()
    assert len(result.fields["items"]) == 15
    for row in result.fields["items"]:
        place = column[1 + ids.index(row["item_id"])]
        effects = {reason["signal"]: reason["effect"] for reason in row["reasons"]}
        assert set(effects) == set(columns)
        for group, effect in effects.items():
            assert effect == pytest.approx(plain[place] - changed[group][place], abs=1e-4), group
        sizes = [abs(reason["effect"]) for reason in row["reasons"]]
        assert sizes == sorted(sizes, reverse=True)
    assert any(abs(r["effect"]) > 1e-3 for row in result.fields["items"] for r in row["reasons"])


def test_what_was_not_ranked_has_no_reasons(engine: Engine) -> None:
    newest = engine.recommender.newest_time or 0
    history = {"items": engine.features.ids[:2], "times": [newest, newest]}
    request = RecommendRequest.model_validate({"history": history, "k": 110, "explain": True})
    (result,) = engine.compute([request])
    assert isinstance(result, Result)
    candidates = engine.recommender.num_candidates
    assert all(row["reasons"] for row in result.fields["items"][:candidates])
    assert not any(row["reasons"] for row in result.fields["items"][candidates:])


def test_vectors_of_other_lengths_are_compared_by_cosine(engine: Engine, rng: np.random.Generator) -> None:
    """An index by inner product would return the longest."""
    model = engine.recommender
    index, vectors = model.index, model.vectors
    try:
        scaled = (vectors[1:] * rng.uniform(0.2, 5, (len(vectors) - 1, 1))).astype(np.float32)
        model.index = type(index)()
        model.index.build(scaled)
        model.__dict__["vectors"] = np.concatenate([vectors[:1], scaled])
        (result,) = Engine(model, engine.features, "x").compute([SimilarRequest(item_id=engine.features.ids[4], k=9)])
    finally:
        model.index, model.__dict__["vectors"] = index, vectors
    (plain,) = engine.compute([SimilarRequest(item_id=engine.features.ids[4], k=9)])
    assert isinstance(result, Result)
    assert isinstance(plain, Result)
    assert [row["item_id"] for row in result.fields["items"]] == [row["item_id"] for row in plain.fields["items"]]


# batches


class Slow:
    """Doubles numbers; the first batch waits until it is let go, and negative ones fail."""

    def __init__(self) -> None:
        self.go, self.sizes, self.threads = threading.Event(), list[int](), set[str]()

    def __call__(self, bodies: Sequence[int], waited: Sequence[float]) -> list[int]:
        self.go.wait(10)
        self.sizes.append(len(bodies))
        self.threads.add(threading.current_thread().name)
        if any(body < 0 for body in bodies):
            raise RuntimeError("negative")
        return [2 * body for body in bodies]


def test_what_waits_is_computed_together_in_order_and_in_one_thread() -> None:
    slow = Slow()
    batcher = Batcher(slow, size=4, queue=100)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit(number)) for number in range(10)]
        await asyncio.sleep(0.05)
        slow.go.set()
        return [result[0] for result in await asyncio.gather(*tasks)]

    assert asyncio.run(main()) == [2 * number for number in range(10)]
    batcher.close()
    assert len(slow.threads) == 1
    assert sum(slow.sizes) == 10
    assert max(slow.sizes) == 4
    assert len(slow.sizes) <= 4


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    slow = Slow()
    batcher = Batcher(slow, size=1, queue=3)

    async def main() -> None:
        tasks = [asyncio.create_task(batcher.submit(0))]
        await asyncio.sleep(0.05)  # that one is computed
        tasks += [asyncio.create_task(batcher.submit(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.05)
        assert batcher.waiting == 3
        with pytest.raises(Problem, match="3 requests wait, expected at most 3; try again") as error:
            await batcher.submit(4)
        assert (error.value.status, error.value.retry_after) == (429, 1)
        slow.go.set()
        assert [result[0] for result in await asyncio.gather(*tasks)] == [0, 2, 4, 6]

    asyncio.run(main())
    batcher.close()


def test_one_that_fails_does_not_fail_the_others() -> None:
    slow = Slow()
    batcher = Batcher(slow, size=8, queue=100)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(batcher.submit(number)) for number in (1, 2, -1, 3)]
        await asyncio.sleep(0.05)
        slow.go.set()
        return [result[0] for result in await asyncio.gather(*tasks)]

    first, second, failed, last = asyncio.run(main())
    assert (first, second, last) == (2, 4, 6)
    assert isinstance(failed, RuntimeError)
    batcher.close()


def test_what_nobody_waits_for_is_not_computed() -> None:
    slow = Slow()
    batcher = Batcher(slow, size=1, queue=100)

    async def main() -> None:
        first = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.05)
        late.cancel()
        await asyncio.sleep(0.05)
        slow.go.set()
        assert await first == [2]
        assert await batcher.submit(5) == [10]

    asyncio.run(main())
    batcher.close()
    assert slow.sizes == [1, 1]

    async def after() -> None:
        with pytest.raises(Problem, match="the service ends") as error:
            await batcher.submit(1)
        assert error.value.status == 503

    asyncio.run(after())


def test_the_server_adds_less_than_two_milliseconds(informed: Run, tmp_path: Path) -> None:
    """CPU time of all threads for a request whose computation is known already: routes, checks, queue, JSON, log."""
    with served(informed.bundle, informed.data, tmp_path / "store.sqlite") as client:
        service: Any = client.app.state.service  # type: ignore[attr-defined]
        (result,) = service.engine.compute([RecommendRequest(user_id="3", k=10)], [service.histories.events("3")])
        service.batcher.compute = lambda bodies, waited: [result] * len(bodies)
        body = b'{"user_id": "3", "k": 10}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        path = {"path": "/v1/recommend", "raw_path": b"/v1/recommend", "root_path": "", "query_string": b""}
        scope = {"type": "http", "method": "POST", "http_version": "1.1", "scheme": "http", "headers": headers, **path}
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        async def requests(count: int) -> float:
            spent = []
            for _ in range(count):
                start = time.process_time()
                await client.app(dict(scope), receive, send)  # type: ignore[arg-type]
                spent.append(time.process_time() - start)
            return float(np.median(spent))

        assert client.portal is not None
        median = client.portal.call(requests, 200)
    assert statuses == [200] * 200
    assert median < 2e-3


# what a model reads besides items and times


def test_unknown_actions_and_classes_are_refused_with_the_nearest() -> None:
    """As is everything else of strangers: a log of warnings would hold parts of their histories."""
    model = with_inputs()
    features = ItemFeatures(model.catalogue.items, {}, model.popularity)
    engine = Engine(model, features, "x")

    def answer(**body: Any) -> Any:
        request = {"history": {"items": ["3", "4"], "times": [5, 6]} | body.pop("history", {}), "k": 3} | body
        return engine.compute([RecommendRequest.model_validate(request)])[0]

    plain = answer(action="look").fields["items"]
    assert len(plain) == 3
    asked = answer(action="look", user={"country": "NL"}, history={"actions": ["buy", None], "ratings": [1, None]})
    assert [row["score"] for row in asked.fields["items"]] != [row["score"] for row in plain]
    for body, message in (
        ({"action": "bye"}, "action: there is no action 'bye'; did you mean 'buy'?"),
        (
            {"history": {"actions": ["look", "lok"]}},
            "history.actions.1: there is no action 'lok'; did you mean 'look'?",
        ),
        ({"user": {"country": "Nl"}}, "user.country: country has no class 'Nl'; did you mean 'NL'?"),
        ({"user": {"land": "NL"}}, "the user features 'land', expected some of country, age"),
        ({"user": {"age": "old"}}, "age is 'old', expected a finite number"),
        ({"user": {"country": ["NL"]}}, r"country is ['NL'], expected one class"),
    ):
        problem = answer(**body)
        assert isinstance(problem, Problem)
        assert message in problem.detail


def with_inputs() -> Recommender:
    """A first stage with random weights that reads ratings, actions, a target action and user features."""
    torch.manual_seed(0)
    specs: list[dict[str, Any]] = [
        {"name": "country", "kind": "categorical", "size": 3, "values": 1, "classes": ["DE", "NL"]},
        {"name": "age", "kind": "numeric", "size": 1, "values": 1, "classes": None},
    ]
    towers = TwoTower(
        *(20, 8, 8, partial(Transformer, layers=1)),
        inputs=(RatingEmbedding, ActionEmbedding, NextAction),
        user=UserTower,
        user_features=specs,
        actions=["buy", "look"],
    )
    for parameter in towers.parameters():
        torch.nn.init.normal_(parameter)
    index = Exact()
    index.build(towers.all_item_vectors().detach().numpy())
    catalogue = pl.DataFrame({"item": np.arange(1, 21), "item_id": [str(n) for n in range(1, 21)]})
    options: dict[str, Any] = {"next_action": "target", "actions": ["buy", "look"], "user_features": specs}
    return Recommender(towers, index, None, catalogue, np.arange(21), "none", **options)


def test_filters_of_a_large_batch_reach_the_generators_in_parts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = engine.recommender.newest_time or 0
    requests = []
    for number in range(7):
        history = {"items": engine.features.ids[number : number + 4], "times": [newest] * 4}
        allow = engine.features.ids[number::2] if number % 3 else None
        requests.append(RecommendRequest.model_validate({"history": history, "request_time": newest, "allow": allow}))
    whole = [result.fields for result in engine.compute(requests) if isinstance(result, Result)]
    monkeypatch.setattr("recsys2stage.ranking.signals.base.MAX_LEFT_OUT", 1)
    for signal in engine.recommender.proposers:  # as one's own signals are
        monkeypatch.setattr(type(signal), "reads_allowed", False)
    parts = [result.fields for result in engine.compute(requests) if isinstance(result, Result)]
    assert len(whole) == 7
    assert parts == whole


def test_metrics_come_with_their_intervals(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "bundle") is None
    row = {"value": 0.25, "low": 0.2, "high": 0.3}
    models = {"retriever": {"ndcg@10": row, "coverage@10": row}, "ranker": {"mrr": row}, "popular": {"mrr": row}}
    write_json(tmp_path / "report.json", {"models": models})
    assert read_metrics(tmp_path / "bundle") == {"retriever": {"ndcg@10": row}, "ranker": {"mrr": row}}
    write_json(tmp_path / "report.json", {"models": {"retriever": {"mrr": {"value": 0.25}}}})
    assert read_metrics(tmp_path / "bundle") is None
