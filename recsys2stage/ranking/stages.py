"""Both stages on arrays: histories to query vectors, candidates, their signals, and the ranking."""

import functools
import logging
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys2stage import columns as c
from recsys2stage.data.batches import Padded, Ragged, as_history, recent_events
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.options import RequestTime, Seen, check_integer, check_option
from recsys2stage.ranking.average import SecondStage
from recsys2stage.ranking.beyond import Recommendations, RetrievedItems, beyond
from recsys2stage.ranking.signals.base import Proposer, Requests, Signal, propose_excluding
from recsys2stage.ranking.signals.merge import merge, reciprocal_ranks
from recsys2stage.retrieval.index import Index
from recsys2stage.retrieval.inputs import Field, fields_read
from recsys2stage.retrieval.states import UserStates
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import CandidateBatch

logger = logging.getLogger("recsys2stage")

NO_TARGET_ACTION = (
    "this model has no target action; leave the action out, or train a model with the input NextAction on data with "
    "next_action: target"
)
PerRequest = np.ndarray | None  # one number for each of B requests, (B,); None: the default
Allowed = np.ndarray | None  # items that may be recommended: (V,) bool for all requests, or (B, V); None: all


class Stages:
    """Retrieves candidates from an index and re-ranks them if there is a second stage.

    Args:
        towers: the retriever.
        index: search index over the retriever's item vectors.
        reranker: the second stage, or None.
        catalogue: columns item (1..V), item_id and optionally title.
        popularity: training events of each item, (V + 1,); ranks items for users without a history.
        request_time: request time that the retriever was trained with.
        next_action: target action that it was trained with.
        actions: names of the action types, numbered from 1.
        candidates: number of candidates that the second stage ranks.
        signals: features of the second stage; some also generate candidates.
        recent: number of newest events that the second stage reads.
        has_time: whether times are seconds, not only an order.
        seen: default for seen items: keep or filter.
        newest_time: seconds of the newest training event; None: unknown.
        user_features: the declared user features with their classes, as returned by `side_tables.user_specs`.
    """

    def __init__(
        self,
        towers: TwoTower,
        index: Index,
        reranker: SecondStage | None,
        catalogue: pl.DataFrame,
        popularity: np.ndarray,
        request_time: RequestTime,
        next_action: str = "none",
        actions: Sequence[str] = (),
        candidates: int = 200,
        signals: Sequence[Signal] = (),
        recent: int = 0,
        has_time: bool = True,
        seen: Seen = "filter",
        newest_time: int | None = None,
        user_features: Sequence[dict[str, Any]] = (),
    ) -> None:
        check_option("request_time", request_time, RequestTime)
        check_option("seen", seen, Seen)
        check_integer("candidates", candidates, example=200)
        self.towers, self.index, self.reranker = towers.eval(), index, reranker.freeze() if reranker else None
        self.catalogue, self.popularity = Catalogue(catalogue, actions), popularity
        self.request_time, self.next_action, self.actions = request_time, next_action, list(actions)
        self.num_candidates, self.signals, self.recent, self.has_time = candidates, list(signals), recent, has_time
        self.seen, self.newest_time, self.user_features = seen, newest_time, list(user_features)
        self.warned = False  # about a missing target action

    @functools.cached_property
    def input_fields(self) -> set[Field]:
        """History fields that either stage reads besides items and times: ratings, actions, target action."""
        rated: set[Field] = {"ratings"} if any(signal.reads_ratings for signal in self.signals) else set()
        return fields_read(self.towers.inputs) | rated

    @property
    def reads_actions(self) -> bool:
        """Whether the model reads the action types of a history, as events or as earlier target actions."""
        return bool(self.input_fields & {"actions", "target_action"})

    @property
    def default_action(self) -> int:
        """Target action of requests that give none: the one named by next_action; with `target`, 0 (unknown)."""
        return c.UNKNOWN if self.next_action == "target" else 1 + self.actions.index(self.next_action)

    @property
    def first_reads_times(self) -> bool:
        """Whether the first stage reads event times or request times."""
        return self.request_time != "none" or self.towers.encoder.reads_times

    @property
    def needs_times(self) -> bool:
        """Whether the model reads event times or request times."""
        return self.first_reads_times or any(signal.reads_times for signal in self.signals) or self.reads_ages

    @property
    def time_readers(self) -> str:
        """Which parts read times, as a clause for messages; empty unless `needs_times`."""
        signals = ", ".join(dict.fromkeys(type(signal).__name__ for signal in self.signals if signal.reads_times))
        first, ages = self.first_reads_times, self.reads_ages
        given = {
            "the retriever reads": first,
            f"signals of the ranker ({signals}) read": signals,
            "the ranker reads": ages,
        }
        return " and ".join(f"{reader} times" for reader, reads in given.items() if reads)

    @property
    def reads_ages(self) -> bool:
        """Whether the second stage reads the ages of the newest events."""
        return bool(self.has_time and self.recent and self.reranker and self.reranker.reads_ages)

    @property
    def reads_user(self) -> bool:
        """Whether the model reads user features."""
        return self.towers.user is not None or any(signal.reads_user for signal in self.signals)

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """The retriever's item vectors by item number, row 0 zero, (V + 1, D) float32."""
        return np.concatenate([np.zeros_like(self.index.vectors[:1]), self.index.vectors])

    @property
    def proposers(self) -> list[Proposer]:
        """Signals that generate candidates."""
        return [signal for signal in self.signals if isinstance(signal, Proposer) and signal.candidates]

    @property
    def signal_names(self) -> list[dict[str, Any]]:
        """The signal values, then the candidate sources if there are several, as {"name", "by_id", "counted"}."""
        named = [
            {"name": f"{type(signal).__name__}.{name}", "by_id": signal.by_id, "counted": name in signal.counted}
            for signal in self.signals
            for name in signal.names
        ]
        sources = ["index", *(type(signal).__name__ for signal in self.proposers)] if self.proposers else []
        return named + [{"name": f"source.{name}", "by_id": True, "counted": False} for name in sources]

    @torch.inference_mode()
    def queries(
        self,
        padded: Padded,
        request: PerRequest,
        target_action: PerRequest = None,
        states: UserStates | None = None,
        users: Sequence[Hashable | None] | None = None,
    ) -> np.ndarray:
        """Query vectors of histories, (B, D) float32; scores are their dot products with the item vectors.

        Args:
            padded: histories, newest `max_length` events at most.
            request: (B,) request times in seconds; None: the time of the newest event.
            target_action: (B,) action types, 0 for unknown; None: `default_action`, with a warning if that is unknown.
            states: of users, so that only new events are computed; as in `TwoTower.queries`.
            users: the user of each history, for `states`.
        """
        if target_action is not None and self.next_action == "none":
            raise ValueError(NO_TARGET_ACTION)
        if target_action is None and self.next_action != "none":
            target_action = np.full(len(padded.lengths), self.default_action)
            if self.default_action == c.UNKNOWN and not self.warned:
                self.warned = True
                logger.warning(
                    "no target action given, using 'unknown'; pass one of those this model was trained with: %s",
                    ", ".join(self.actions),
                )
        history = as_history(padded, self.request_time, request, target_action)
        return self.towers.queries(history, states, users).float().numpy()

    def ranker_request_time(self, padded: Padded, request: PerRequest) -> np.ndarray:
        """Request time for the second stage: the given one, or that of the newest event, (B,) int64 seconds."""
        if self.request_time == "target" and request is not None:
            return request
        last = np.maximum(np.asarray(padded.lengths) - 1, 0)
        return padded.times[np.arange(len(last)), last]

    def candidates(
        self,
        queries: np.ndarray,
        excluded: Ragged,
        padded: Padded,
        request: PerRequest,
        k: int | None = None,
        allowed: Allowed = None,
    ) -> RetrievedItems:
        """Candidates: the nearest items, merged with those that signals generate, without the excluded items.

        Args:
            queries: (B, D) of the retriever.
            excluded: items not to recommend.
            padded: histories.
            request: (B,) seconds, as in `queries`.
            k: number of candidates; None: as many as the second stage ranks.
            allowed: items that may be candidates; where they leave n items, there are min(k, n) candidates.
        """
        depth = self.num_candidates if k is None else k
        score, items = self.index.search(queries, depth, (excluded.values, excluded.offsets), allowed)
        if not self.proposers:
            return RetrievedItems(items, score, [items])
        no_items = np.zeros((len(queries), 0), dtype=np.int64)
        requests = Requests(no_items, padded, self.ranker_request_time(padded, request), self.vectors, queries)
        named = [items, *self._propose(requests, excluded, allowed)]
        return self.retrieved(queries, merge(named, depth), named)

    def retrieved(self, queries: np.ndarray, items: np.ndarray, proposed: list[np.ndarray]) -> RetrievedItems:
        """Candidates, (B, K) with −1 for padding, scored and sorted by the retriever."""
        score = np.matmul(self.vectors.take(np.maximum(items, c.PAD), axis=0), queries[..., None])[..., 0]
        score[items <= c.PAD] = -np.inf
        order = np.arange(len(score))[:, None], np.argsort(-score, axis=1, kind="stable")
        return RetrievedItems(items[order], score[order], proposed)

    def _propose(self, requests: Requests, excluded: Ragged, allowed: Allowed) -> list[np.ndarray]:
        """What the signals propose, (B, up to K) each."""
        if allowed is None:
            return [signal.propose(requests, excluded) for signal in self.proposers]
        masks = np.broadcast_to(allowed, (len(requests.queries), len(self.vectors) - 1))
        requests = requests._replace(allowed=masks)
        return [
            signal.propose(requests, excluded)
            if signal.reads_allowed
            else propose_excluding(signal, requests, excluded)
            for signal in self.proposers
        ]

    def compute_signals(
        self, items: np.ndarray, queries: np.ndarray, found: RetrievedItems, padded: Padded, request: PerRequest
    ) -> np.ndarray:
        """Signal values of the given items for each request, (B, C, S) float32.

        Args:
            items: (B, C), 0 or −1 for padding.
            queries: (B, D) of the retriever.
            found: the candidates of the requests, for their ranks in each candidate source.
        """
        if not self.signals:
            return np.zeros((*items.shape, 0), dtype=np.float32)
        items = np.maximum(items, c.PAD).astype(np.int64, copy=False)
        # the signals look items up in tables: in ascending order, neighbors are near
        order = np.arange(len(items))[:, None], items.argsort(axis=1)
        items = items[order]
        requests = Requests(items, padded, self.ranker_request_time(padded, request), self.vectors, queries)
        numbers = [signal(requests) for signal in self.signals]
        if self.proposers:
            numbers.append(reciprocal_ranks(items, found.proposed, len(self.vectors)))
        values = np.empty((*items.shape, sum(part.shape[2] for part in numbers)), dtype=np.float32)
        values[order] = np.concatenate(numbers, axis=2)
        return values

    def candidate_batch(
        self, queries: np.ndarray, found: RetrievedItems, padded: Padded, request: PerRequest
    ) -> CandidateBatch:
        """The second stage's input for the candidates."""
        real = torch.from_numpy(found.items > 0)
        recent, ages = recent_events(padded, self.ranker_request_time(padded, request), self.recent, self.has_time)
        return CandidateBatch(
            state=torch.from_numpy(queries),
            items=torch.from_numpy(found.items).clamp(min=c.PAD),
            score=torch.from_numpy(found.score).masked_fill(~real, 0),
            rank=torch.arange(1, found.items.shape[1] + 1).expand(found.items.shape),
            signals=torch.from_numpy(self.compute_signals(found.items, queries, found, padded, request)),
            recent=recent,
            ages=ages,
        )

    @torch.inference_mode()
    def rerank(self, batch: CandidateBatch, ids_masked: bool = False) -> np.ndarray:
        """The second stage's scores of the candidates, (B, C) float32; −inf for padding."""
        assert self.reranker is not None
        real = batch.items != c.PAD
        masked = torch.ones_like(real) if ids_masked else None
        return self.reranker(batch, masked).masked_fill(~real, -torch.inf).numpy()

    def rank(
        self,
        padded: Padded,
        excluded: Ragged,
        request: PerRequest,
        k: int,
        target_action: PerRequest = None,
        allowed: Allowed = None,
    ) -> Recommendations:
        """Recommends k items to each of B requests with both stages; arguments as in `queries` and `candidates`.

        The last stage ranks all candidates, whatever k is, and the other items follow in the retriever's order, as in
        an evaluation. Users without a history get the most popular items, scored by their number of training events,
        without a retriever score (NaN). k is capped at the number of items.
        """
        k = self.list_length(k)
        queries = self.queries(padded, request, target_action)
        found = self.candidates(queries, excluded, padded, request, allowed=allowed)
        score = (
            found.score if self.reranker is None else self.rerank(self.candidate_batch(queries, found, padded, request))
        )
        ranking = self.order(found, score, queries, excluded, k, allowed)
        return self.replace_new(ranking, np.asarray(padded.lengths) == 0, excluded, allowed)

    def list_length(self, k: int) -> int:
        """The number of items of a list: k, checked, and no more than there are."""
        check_integer("k", k, example=10)
        return min(int(k), len(self.vectors) - 1)

    def order(
        self,
        found: RetrievedItems,
        score: np.ndarray,
        queries: np.ndarray,
        excluded: Ragged,
        k: int,
        allowed: Allowed = None,
    ) -> Recommendations:
        """The k best candidates by the last stage; where k is larger than their number, the other items follow.

        Args:
            found: the candidates.
            score: (B, K) of the last stage.
            queries: (B, D) of the retriever.
            excluded: items not to recommend.
            k: number of items.
            allowed: items that may be recommended.
        """
        order = np.arange(len(score))[:, None], np.argsort(-score, axis=1, kind="stable")
        ranking = Recommendations(found.items[order], score[order], found.score[order])
        if k > ranking.items.shape[1]:
            scale = None if self.reranker is None else float(self.reranker.log_scale.detach().exp())
            more = k - ranking.items.shape[1]
            rest = beyond(queries, self.vectors, excluded, ranking, more, scale, allowed)
            ranking = Recommendations(*(np.concatenate(both, axis=1) for both in zip(ranking, rest, strict=True)))
        return Recommendations(*(part[:, :k] for part in ranking))

    def replace_new(
        self, ranking: Recommendations, new: np.ndarray, excluded: Ragged, allowed: Allowed = None
    ) -> Recommendations:
        """Gives users without a history the most popular items instead, in place.

        Args:
            ranking: of all users.
            new: (B,) True for users without a history.
            excluded: items not to recommend.
            allowed: items that may be recommended.
        """
        items, score, retriever_score = ranking
        rows = np.flatnonzero(new)
        items[rows], score[rows], retriever_score[rows] = -1, -np.inf, np.nan
        masks = None if allowed is None else np.broadcast_to(allowed, (len(items), len(self.vectors) - 1))
        for row in rows:
            left_out = excluded.values[excluded.offsets[row] : excluded.offsets[row + 1]]
            depth = items.shape[1] + len(left_out)
            while True:  # only the first ones are looked at; where few are allowed, more of them
                first = self.most_popular[:depth]
                eligible = ~np.isin(first, left_out)
                if masks is not None:
                    eligible &= masks[row][first - 1]
                best = first[eligible][: items.shape[1]]
                if len(best) == items.shape[1] or depth >= len(self.most_popular):
                    break
                depth *= 4
            items[row, : len(best)], score[row, : len(best)] = best, self.popularity[best]
        return ranking

    @functools.cached_property
    def most_popular(self) -> np.ndarray:
        """All items, most training events first, (V,) int64."""
        return 1 + np.argsort(-self.popularity[1:], kind="stable")
