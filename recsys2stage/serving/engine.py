"""The computation of the service: batches of requests against one loaded bundle, without HTTP."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.artifacts import fingerprint, read_json
from recsys2stage.data.batches import Ragged
from recsys2stage.ranking.beyond import RetrievedItems
from recsys2stage.ranking.bundle import bundle_manifest
from recsys2stage.ranking.histories import pad_events
from recsys2stage.ranking.signals.base import unit
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.states import UserStates
from recsys2stage.serving.answers import Answers, Found
from recsys2stage.serving.filters import ItemFeatures, unknown_item
from recsys2stage.serving.histories import UserEvents
from recsys2stage.serving.problems import Problem
from recsys2stage.serving.queries import Query, Resolver
from recsys2stage.serving.schemas import RankRequest, RecommendRequest, SimilarRequest

UNIT = 1e-4  # vectors whose lengths differ less from 1 are unit vectors
Stages = dict[str, float]  # stage -> seconds
Computed = RecommendRequest | RankRequest | SimilarRequest


class Result(NamedTuple):
    """The answer to a request, as fields of its schema, and the seconds of each stage."""

    fields: dict[str, Any]
    stages: Stages


class Engine:
    """One loaded bundle.

    Args:
        recommender: both stages, or the first alone.
        features: the catalogue with its declared features.
        identity: of the bundle: the beginning of the hash of its manifest.
        facts: what /v1/info tells of the bundle.

    Attributes:
        states: of users that requests name by id, so that only their new events are computed; None: keeps none.
    """

    states: UserStates | None = None

    def __init__(
        self, recommender: Recommender, features: ItemFeatures, identity: str, facts: Mapping[str, Any] | None = None
    ) -> None:
        self.recommender, self.features, self.identity, self.facts = recommender, features, identity, dict(facts or {})
        vectors = recommender.vectors[1:]
        lengths = np.linalg.norm(vectors, axis=1)
        self.units, self.cosine_index = recommender.vectors, recommender.index
        if np.abs(lengths - 1).max() > UNIT:
            self.units, self.cosine_index = unit(recommender.vectors), Exact()
            self.cosine_index.build(self.units[1:])
        self.resolver = Resolver(recommender, features)
        self.answers = Answers(recommender, features, identity, self.units)

    @classmethod
    def load(cls, bundle: str | Path, trust: Sequence[str] | str | None = ()) -> "Engine":
        """Loads a bundle, or an index (first stage only); every file is checked as by `Recommender.load`."""
        path = Path(bundle)
        recommender = Recommender.load(path, trust)
        manifest = bundle_manifest(path)
        features = ItemFeatures.load(path, recommender.popularity)
        facts = {"created": manifest.get("created"), "path": path.resolve().name, "metrics": read_metrics(path)}
        return cls(recommender, features, str(fingerprint(path))[:12], facts)

    def warm(self) -> None:
        """Computes a request of every kind, so that the first user does not wait for what is made at first use.

        Raises:
            ValueError: if an answer is not finite: the bundle cannot serve.
        """
        item = self.features.ids[0]
        history: dict[str, Any] = {"items": self.features.ids[:3]}
        if self.recommender.needs_times:
            newest = self.recommender.newest_time or 1
            history["times"] = [newest] * len(history["items"])
        body = {"history": history, "k": 3, "explain": True, "stages": True, "diversity": 0.5, "seen": "keep"}
        first, *others = self.compute(
            [
                RecommendRequest.model_validate(body),
                RankRequest.model_validate({"history": history, "items": [item]}),
                SimilarRequest.model_validate({"item_id": item}),
            ]
        )
        for result in (first, *others):
            if isinstance(result, Problem):
                raise ValueError(f"the bundle does not answer a request of its own items: {result}")
        assert isinstance(first, Result)
        scores = [row["score"] for row in first.fields["items"]]
        if not scores or not np.isfinite(scores).all():
            raise ValueError(f"the bundle scores its own items with {scores}, expected finite numbers; train it again")

    def recommend(
        self, requests: Sequence[RecommendRequest], histories: Sequence[UserEvents | None]
    ) -> list[Result | Problem]:
        """Answers one batch; a history is None where the request brings its own, or its user is unknown."""
        return self.compute(requests, histories)

    def compute(
        self,
        bodies: Sequence[Computed],
        histories: Sequence[UserEvents | None] | None = None,
    ) -> list[Result | Problem]:
        """Answers a batch of requests of any kind: an answer or a problem for each.

        Args:
            bodies: the requests.
            histories: of the users that requests name; None: no request names one.
        """
        results: list[Result | Problem | None] = [None] * len(bodies)
        queries: list[tuple[int, Query]] = []
        for place, body in enumerate(bodies):
            try:
                if isinstance(body, SimilarRequest):
                    results[place] = self.similar(body)
                else:
                    queries.append(
                        (place, self.resolver.resolve(body, None if histories is None else histories[place]))
                    )
            except Problem as problem:
                results[place] = problem
        # those that go beyond the candidates score every item, and a filter needs a mask of every item: in batches of
        # their own
        parts: dict[tuple[bool, bool], list[tuple[int, Query]]] = {}
        for place, query in queries:
            kind = query.need > self.recommender.num_candidates, query.allowed is not None
            parts.setdefault(kind, []).append((place, query))
        for part in parts.values():
            for (place, _), result in zip(part, self._answer([query for _, query in part]), strict=True):
                results[place] = result
        return [result for result in results if result is not None]

    def _answer(self, queries: list[Query]) -> list[Result]:
        """Answers searches and rankings of one batch."""
        model, stages = self.recommender, dict[str, float]()
        with timed(stages, "encode"):
            padded = pad_events(
                [query.events for query in queries],
                model.towers.max_length,
                "ratings" in model.input_fields,
                model.reads_actions,
            )
            request = np.array([query.request_time for query in queries], dtype=np.int64)
            users = [query.body.user_id for query in queries]  # None where the request brings its own history
            vectors = model.queries(padded, request, self._target_actions(queries), self.states, users)
        with timed(stages, "search"):
            excluded = ragged([query.excluded for query in queries])
            allowed = self._masks(queries)
            found = model.candidates(vectors, excluded, padded, request, allowed=allowed)
            searched = found
            if any(len(query.given) for query in queries):
                found = add_items(model, vectors, found, [query.given for query in queries])
        batch, score = None, found.score
        if model.reranker is not None:
            with timed(stages, "signals"):
                batch = model.candidate_batch(vectors, found, padded, request)
            with timed(stages, "rank"):
                score = model.rerank(batch)
        with timed(stages, "rank"):
            length = model.list_length(max([found.items.shape[1], *(query.need for query in queries)]))
            ranking = model.order(found, score, vectors, excluded, length, allowed)
            new = np.asarray(padded.lengths) == 0
            ranking = model.replace_new(ranking, new, excluded, allowed)
            computed = Found(searched, found, score, batch)
            return [
                Result(
                    self.answers.build(
                        query,
                        row,
                        (ranking.items[row], ranking.score[row], ranking.retriever_score[row]),
                        computed,
                        bool(new[row]),
                    ),
                    stages,
                )
                for row, query in enumerate(queries)
            ]

    def _target_actions(self, queries: list[Query]) -> np.ndarray | None:
        if all(query.target_action is None for query in queries):
            return None
        default = self.recommender.default_action
        actions = [default if query.target_action is None else query.target_action for query in queries]
        return np.array(actions, dtype=np.int64)

    def _masks(self, queries: list[Query]) -> np.ndarray | None:
        """The items that may be recommended, (B, V); None: all. Either each query of a batch has a mask, or none."""
        masks = [query.allowed for query in queries if query.allowed is not None]
        return masks[0][None] if len(masks) == 1 else np.stack(masks) if masks else None

    def similar(self, body: SimilarRequest) -> Result:
        """Items by the cosine of the retriever's vectors."""
        model, stages = self.recommender, dict[str, float]()
        item = int(model.catalogue.numbers([body.item_id])[0])
        if not item:
            raise unknown_item(body.item_id, model.example_id)
        others = model.catalogue.numbers(body.exclude)
        excluded = ragged([np.unique([item, *others[others > 0]])])
        allowed = self.resolver.allowed(body)
        with timed(stages, "search"):
            score, items = self.cosine_index.search(
                self.units[item : item + 1], model.list_length(body.k), (excluded.values, excluded.offsets), allowed
            )
        rows = [
            {
                "item_id": self.features.ids[other - 1],
                "title": self.features.titles[other - 1],
                "score": float(one),
                "rank": rank,
            }
            for rank, (other, one) in enumerate(zip(items[0], score[0], strict=True), start=1)
            if other > 0
        ]
        return Result({"bundle": self.identity, "item_id": body.item_id, "items": rows}, stages)


@contextmanager
def timed(stages: Stages, name: str) -> Iterator[None]:
    """Adds the seconds of its body to a stage."""
    start = time.perf_counter()
    yield
    stages[name] = stages.get(name, 0.0) + time.perf_counter() - start


def ragged(rows: Sequence[np.ndarray]) -> Ragged:
    """Rows of different lengths."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(np.concatenate(rows).astype(np.int64), offsets)


def add_items(
    model: Recommender, queries: np.ndarray, found: RetrievedItems, given: Sequence[np.ndarray]
) -> RetrievedItems:
    """Adds items to the candidates of each request, so that they are ranked as if they had been found."""
    missing = [own[~np.isin(own, row)] for own, row in zip(given, found.items, strict=True)]
    more = np.full((len(missing), max(map(len, missing))), -1, dtype=np.int64)
    for row, own in zip(more, missing, strict=True):
        row[: len(own)] = own
    return model.retrieved(queries, np.concatenate([found.items, more], axis=1), found.proposed)


def read_metrics(bundle: Path) -> dict[str, dict[str, dict[str, float]]] | None:
    """The main metrics of both stages, {"value", "low", "high"} each, from the report beside a bundle; None without."""
    path = bundle.resolve().parent / "report.json"
    if not path.is_file():
        return None
    try:
        models = read_json(path, dict, "recsys evaluate")["models"]
        return {
            stage: {
                name: {part: float(models[stage][name][part]) for part in ("value", "low", "high")}
                for name in ("hr@10", "ndcg@10", "mrr", "recall@100")
                if name in models[stage]
            }
            for stage in ("retriever", "ranker")
            if stage in models
        }
    except (ValueError, KeyError, TypeError):  # a report is not part of the bundle, and serves no request
        return None
