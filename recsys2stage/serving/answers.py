"""Answers: the lists of a computed batch as fields of their schemas."""

from typing import Any, NamedTuple

import numpy as np

from recsys2stage.ranking.beyond import RetrievedItems
from recsys2stage.recommender import Recommender
from recsys2stage.serving.diversity import mmr
from recsys2stage.serving.explain import explain, input_groups
from recsys2stage.serving.filters import ItemFeatures
from recsys2stage.serving.queries import Query
from recsys2stage.serving.schemas import RankRequest, RecommendRequest
from recsys2stage.shapes import CandidateBatch

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # items, scores and retriever scores, best first


class Found(NamedTuple):
    """What was computed of a batch."""

    searched: RetrievedItems  # the candidates of the search
    ranked: RetrievedItems  # these and the items that requests give
    score: np.ndarray  # (B, K) of the last stage for `ranked`
    batch: CandidateBatch | None  # what the second stage read of them


class Answers:
    """Builds answers.

    Args:
        model: the recommender.
        features: the catalogue.
        identity: of the bundle.
        units: (V + 1, D) the retriever's vectors at unit length.
    """

    def __init__(self, model: Recommender, features: ItemFeatures, identity: str, units: np.ndarray) -> None:
        self.model, self.features, self.identity, self.units = model, features, identity, units
        self.groups = [] if model.reranker is None else input_groups(model.reranker, model.signal_names)

    def build(self, query: Query, row: int, lists: Lists, found: Found, new: bool) -> dict[str, Any]:
        """The fields of an answer but the request's id.

        Args:
            query: the request.
            row: its row in the batch.
            lists: what is recommended to it, padded with −1.
            found: what was computed.
            new: whether the list is by popularity, as nothing is known of the user.
        """
        body, model = query.body, self.model
        if isinstance(body, RankRequest):
            lists = self._given(query, row, found, new)
        real = lists[0] > 0
        items, score, retriever_score = (values[real] for values in lists)
        searched, offset = found.searched.items[row], 0
        if isinstance(body, RecommendRequest):
            count, offset = min(query.need, len(items)), body.offset
            if body.diversity > 0:
                chosen = self._diversified(query, items, score, count)
                items, score, retriever_score = items[chosen], score[chosen], retriever_score[chosen]
            part = slice(offset, count)
            items, score, retriever_score = items[part], score[part], retriever_score[part]
        place = dict(zip(searched.tolist(), range(1, len(searched) + 1), strict=True))
        rows: list[dict[str, Any]] = [
            {
                "item_id": self.features.ids[item - 1],
                "title": self.features.titles[item - 1],
                "score": one,
                "rank": rank,
                "retriever_score": None if new else other,
                "retriever_rank": None if new else place.get(item),
            }
            for rank, (item, one, other) in enumerate(
                zip(items.tolist(), score.tolist(), retriever_score.tolist(), strict=True), start=1 + offset
            )
        ]
        if body.explain:
            for fields, reasons in zip(rows, self._reasons(items, row, found, new), strict=True):
                fields["reasons"] = reasons
        answer: dict[str, Any] = {
            "bundle": self.identity,
            "user_id": body.user_id,
            "known_events": len(query.events.known),
            "request_time": query.request_time if model.needs_times else None,
            "fallback": "popularity" if new else None,
            "items": rows,
        }
        if isinstance(body, RankRequest):
            numbers = model.catalogue.numbers(body.items)
            answer["unknown"] = [item for item, number in zip(body.items, numbers, strict=True) if not number]
        elif body.stages:
            answer["retrieved"] = [] if new else self._retrieved(found.searched, row, body)
        return answer

    def _diversified(self, query: Query, items: np.ndarray, score: np.ndarray, count: int) -> np.ndarray:
        """Indices of the first `count` items: candidates by maximal marginal relevance, then the others in order."""
        body, pool = query.body, self.model.num_candidates
        assert isinstance(body, RecommendRequest)
        chosen = mmr(score[:pool], self.units[items[:pool]], count, body.diversity, self.units[query.shown])
        return np.concatenate([chosen, np.arange(len(chosen), count)])

    def _reasons(self, items: np.ndarray, row: int, found: Found, new: bool) -> list[list[dict[str, Any]]]:
        """The reasons of each item; none for items that the second stage did not score."""
        reasons: list[list[dict[str, Any]]] = [[] for _ in items]
        if found.batch is None or self.model.reranker is None or new:
            return reasons
        column = {int(item): place for place, item in enumerate(found.ranked.items[row]) if item > 0}
        known = [place for place, item in enumerate(items) if int(item) in column]
        if known:
            columns = np.array([column[int(items[place])] for place in known])
            explained = explain(self.model.reranker, found.batch, row, columns, self.groups)
            for place, own in zip(known, explained, strict=True):
                reasons[place] = own
        return reasons

    def _retrieved(self, searched: RetrievedItems, row: int, body: RecommendRequest) -> list[dict[str, Any]]:
        """The page of the retriever's own list."""
        items, score = searched.items[row], searched.score[row]
        real = np.flatnonzero(items > 0)[body.offset : body.offset + body.k]
        return [
            {
                "item_id": self.features.ids[items[place] - 1],
                "title": self.features.titles[items[place] - 1],
                "score": float(score[place]),
                "rank": int(place) + 1,
            }
            for place in real
        ]

    def _given(self, query: Query, row: int, found: Found, new: bool) -> Lists:
        """The items that a request gives, ranked; by popularity for a new user."""
        if new:
            counts = self.model.popularity[query.given].astype(np.float32)
            order = np.argsort(-counts, kind="stable")
            return query.given[order], counts[order], np.full(len(order), np.nan, dtype=np.float32)
        items, score = found.ranked.items[row], found.score[row]
        columns = np.flatnonzero(np.isin(items, query.given))
        columns = columns[np.argsort(-score[columns], kind="stable")]
        return items[columns], score[columns], found.ranked.score[row, columns]
