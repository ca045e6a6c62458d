"""Serving both stages from one folder, without the training data and without Lightning.

recommender = Recommender.load("runs/ml-1m/bundle")
recommender.recommend(["1193", "661", "914"], k=10)
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from recsys2stage import columns as c
from recsys2stage.data.batches import Padded, Ragged, as_history, left_aligned, recent_events
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.options import RequestTime, Seen, check_least, check_option
from recsys2stage.data.request_inputs import as_seconds, check_ascending, encode_users, known_ratings, request_seconds
from recsys2stage.ranking.beyond import Recommendations, RetrievedItems, beyond
from recsys2stage.ranking.bundle import SPEC, check_split, read_bundle
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import Proposer, Requests, Signal
from recsys2stage.ranking.signals.merge import merge, nearness
from recsys2stage.retrieval.index import Index
from recsys2stage.retrieval.inputs import Field, check_inputs, fields_read
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import CandidateBatch

logger = logging.getLogger("recsys2stage")

NOT_TOLD = (
    "this model is not told what kind of action is asked for; leave the action out, or train a model with the input "
    "NextAction on data with next_action: target"
)


class Recommender:
    """Retrieves candidates from an index and, where there is a second stage, ranks them anew.

    Args:
        towers: the retriever.
        index: over the retriever's item vectors.
        reranker: the second stage, or None.
        catalogue: columns item (1..V), item_id and, where known, title.
        popularity: training events of each item, (V + 1,): what a user without a history is given.
        request_time: what the retriever was told of the time of a request.
        next_action: what it was told of the kind of action that is asked for.
        actions: kinds of events, from 1.
        candidates: how many candidates the second stage ranks.
        signals: what the second stage is told beside the retriever's opinion; some name candidates of their own.
        recent: how many of the newest events it looks at.
        has_time: whether times are seconds, not just an order.
        seen: whether seen items may be recommended where a request does not say: keep or filter.
        newest_time: seconds of the newest training event; None: not known.
        user_features: the declared user features with their classes, as `side_tables.user_specs` gives them.
    """

    def __init__(
        self,
        towers: TwoTower,
        index: Index,
        reranker: Reranker | None,
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
        check_least("candidates", candidates)
        self.towers, self.index, self.reranker = towers.eval(), index, reranker.eval() if reranker else None
        self.catalogue, self.popularity = Catalogue(catalogue, actions), popularity
        self.request_time, self.next_action, self.actions = request_time, next_action, list(actions)
        self.num_candidates, self.signals = candidates, list(signals)
        self.recent, self.has_time = recent, has_time
        self.seen, self.newest_time, self.user_features = seen, newest_time, list(user_features)
        self.warned = False  # that nobody says what kind of action is asked for

    @functools.cached_property
    def reads(self) -> set[Field]:
        """What both stages look at besides items and times: ratings, actions, the action asked for."""
        rated: set[Field] = {"ratings"} if any(signal.reads_ratings for signal in self.signals) else set()
        return fields_read(self.towers.inputs) | rated

    @property
    def reads_actions(self) -> bool:
        """Whether the kinds of a history's events matter, for themselves or as what was asked for before."""
        return bool(self.reads & {"actions", "target_action"})

    @property
    def default_action(self) -> int:
        """The kind of action asked for where nobody says: the one that next_action names; for target, 0, unknown."""
        return c.UNKNOWN if self.next_action == "target" else 1 + self.actions.index(self.next_action)

    @property
    def needs_times(self) -> bool:
        """Whether the model looks at when events and requests happen."""
        first = self.request_time != "none" or self.towers.encoder.reads_times
        return first or any(signal.reads_times for signal in self.signals) or self.reads_ages

    @property
    def reads_ages(self) -> bool:
        """Whether the second stage looks at how long ago the newest events were."""
        return bool(self.has_time and self.recent and self.reranker and self.reranker.reads_ages)

    @property
    def reads_user(self) -> bool:
        """Whether the model looks at the user's features."""
        return self.towers.user is not None or any(signal.reads_user for signal in self.signals)

    @functools.cached_property
    def vectors(self) -> np.ndarray:
        """The retriever's item vectors by item number, row 0 zero, (V + 1, D) float32."""
        return np.concatenate([np.zeros_like(self.index.vectors[:1]), self.index.vectors])

    @property
    def proposers(self) -> list[Proposer]:
        """Signals that name candidates of their own."""
        return [signal for signal in self.signals if isinstance(signal, Proposer) and signal.candidates]

    @property
    def signal_names(self) -> list[dict[str, Any]]:
        """What each number of the signals is, and of the sources of candidates where there are several.

        {"name", "by_id", "counted"}, as a Signal has them.
        """
        named = [
            {"name": f"{type(signal).__name__}.{name}", "by_id": signal.by_id, "counted": name in signal.counted}
            for signal in self.signals
            for name in signal.names
        ]
        sources = ["index", *(type(signal).__name__ for signal in self.proposers)] if self.proposers else []
        return named + [{"name": f"source.{name}", "by_id": True, "counted": False} for name in sources]

    @classmethod
    def load(cls, path: str | Path, trust: Sequence[str] | str | None = ()) -> "Recommender":
        """Loads a bundle (both stages) or an index folder (the first stage alone).

        Every file is checked against the checksum that the manifest lists, and no code runs that the folder brings or
        names, except that of the modules in `trust`.

        Args:
            path: folder written by export-bundle or export-index.
            trust: modules outside this package whose classes the folder may name, such as "my_signals".

        Raises:
            ValueError: for a folder that is damaged, of another format, or names other classes.
        """
        recommender = cls(**read_bundle(path, trust))
        numbers, reranker = len(recommender.signal_names), recommender.reranker
        if reranker is not None and numbers != len(reranker.signal_mean):
            raise ValueError(
                f"{path} has signals of {numbers} numbers and a ranker of {len(reranker.signal_mean)}; are both of one "
                "run? Export it again: recsys export-bundle"
            )
        return recommender

    @torch.inference_mode()
    def queries(
        self, padded: Padded, request: np.ndarray | None, target_action: np.ndarray | None = None
    ) -> np.ndarray:
        """Query vectors of histories, whose products with item vectors are scores, (B, D) float32.

        Args:
            padded: histories, newest `max_length` events at most.
            request: (B,) seconds at which each request is made; None: at the newest event.
            asked: (B,) the kind of action asked for, 0 for unknown; None: the usual kind, and a word of warning where
                that is unknown.
        """
        if target_action is not None and self.next_action == "none":
            raise ValueError(NOT_TOLD)
        if target_action is None and self.next_action != "none":
            target_action = np.full(len(padded.lengths), self.default_action)
            if self.default_action == c.UNKNOWN and not self.warned:
                self.warned = True
                logger.warning(
                    "nobody says what kind of action to recommend for, as this model is used to; it knows %s",
                    ", ".join(self.actions),
                )
        return self.towers.queries(as_history(padded, self.request_time, request, target_action)).float().numpy()

    def request_seconds_of(self, padded: Padded, request: np.ndarray | None) -> np.ndarray:
        """When the second stage takes requests to be made: as told, or at the newest event, (B,) int64 seconds."""
        if self.request_time == "target" and request is not None:
            return request
        last = np.maximum(np.asarray(padded.lengths) - 1, 0)
        return padded.times[np.arange(len(last)), last]

    def candidates(
        self, queries: np.ndarray, known: Ragged, padded: Padded, request: np.ndarray | None, k: int | None = None
    ) -> RetrievedItems:
        """The candidates that are not known: the nearest items, merged with those that signals name.

        Args:
            queries: (B, D) of the retriever.
            known: items that are not to be recommended.
            padded: histories.
            request: (B,) seconds, as in `queries`.
            k: how many; None: as many as the second stage orders.
        """
        depth = self.num_candidates if k is None else k
        score, items = self.index.search(queries, depth, exclude=(known.values, known.offsets))
        if not self.proposers:
            return RetrievedItems(items, score, [items])
        nothing = np.zeros((len(queries), 0), dtype=np.int64)
        requests = Requests(nothing, padded, self.request_seconds_of(padded, request), self.vectors, queries)
        named = [items, *(signal.propose(requests, known) for signal in self.proposers)]
        items = merge(named, depth)
        score = np.einsum("bd,bkd->bk", queries, self.vectors[np.maximum(items, c.PAD)])
        score[items < 0] = -np.inf
        order = np.argsort(-score, axis=1, kind="stable")
        return RetrievedItems(np.take_along_axis(items, order, axis=1), np.take_along_axis(score, order, axis=1), named)

    def measure_signals(
        self, items: np.ndarray, queries: np.ndarray, found: RetrievedItems, padded: Padded, request: np.ndarray | None
    ) -> np.ndarray:
        """What the signals say of any items at each request, (B, C, S) float32.

        Args:
            items: (B, C), 0 or −1 where there is none.
            queries: (B, D) of the retriever.
            found: the requests' candidates, whose sources count too.
        """
        items = np.maximum(items, c.PAD).astype(np.int64)
        requests = Requests(items, padded, self.request_seconds_of(padded, request), self.vectors, queries)
        numbers = [signal(requests) for signal in self.signals]
        if self.proposers:
            numbers.append(nearness(items, found.named, len(self.vectors)))
        return np.concatenate(numbers, axis=2) if numbers else np.zeros((*items.shape, 0), dtype=np.float32)

    def listed(
        self, queries: np.ndarray, found: RetrievedItems, padded: Padded, request: np.ndarray | None
    ) -> CandidateBatch:
        """All that the second stage is told of candidates."""
        real = torch.from_numpy(found.items > 0)
        recent, ages = recent_events(padded, self.request_seconds_of(padded, request), self.recent, self.has_time)
        return CandidateBatch(
            state=torch.from_numpy(queries),
            items=torch.from_numpy(found.items).clamp(min=c.PAD),
            score=torch.from_numpy(found.score).masked_fill(~real, 0),
            rank=torch.arange(1, found.items.shape[1] + 1).expand(found.items.shape),
            signals=torch.from_numpy(self.measure_signals(found.items, queries, found, padded, request)),
            recent=recent,
            ages=ages,
        )

    @torch.inference_mode()
    def rerank(self, listed: CandidateBatch, ids_masked: bool = False) -> np.ndarray:
        """The second stage's scores of candidates, (B, C) float32; −inf for no candidate."""
        assert self.reranker is not None
        real = listed.items != c.PAD
        return self.reranker(listed, torch.full_like(real, ids_masked)).masked_fill(~real, -torch.inf).numpy()

    def rank(
        self, padded: Padded, known: Ragged, request: np.ndarray | None, k: int, target_action: np.ndarray | None = None
    ) -> Recommendations:
        """Both stages for B requests, with request times and actions as in `queries`; known items are left out.

        The first k items are the same however many are requested: the last stage orders the candidates, as many as the
        bundle has, and all other items follow in the retriever's order, as in an evaluation. Users without a history
        get the most popular items, without a retriever score.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        queries = self.queries(padded, request, target_action)
        found = self.candidates(queries, known, padded, request)
        score = found.score if self.reranker is None else self.rerank(self.listed(queries, found, padded, request))
        order = np.argsort(-score, axis=1, kind="stable")
        ranking = Recommendations(*(np.take_along_axis(x, order, axis=1) for x in (found.items, score, found.score)))
        if k > ranking.items.shape[1]:
            scale = None if self.reranker is None else float(self.reranker.log_scale.detach().exp())
            rest = beyond(queries, self.vectors, known, ranking, k - ranking.items.shape[1], scale)
            ranking = Recommendations(*(np.concatenate(both, axis=1) for both in zip(ranking, rest, strict=True)))
        items, score, retriever_score = (part[:, :k] for part in ranking)
        new = np.asarray(padded.lengths) == 0
        if new.any():
            items[new], score[new], retriever_score[new] = -1, -np.inf, np.nan
            popular = 1 + np.argsort(-self.popularity[1:], kind="stable")
            for row in np.flatnonzero(new):
                best = popular[~np.isin(popular, known.values[known.offsets[row] : known.offsets[row + 1]])][:k]
                items[row, : len(best)], score[row, : len(best)] = best, self.popularity[best]
        return Recommendations(items, score, retriever_score)

    def recommend(
        self,
        history: Sequence[Any],
        k: int = 10,
        times: Sequence[int] | None = None,
        request_time: int | None = None,
        exclude: Sequence[Any] = (),
        ratings: Sequence[float | int | None] | None = None,
        actions: Sequence[str | None] | None = None,
        action: str | None = None,
        user: Mapping[str, Any] | None = None,
        seen: Seen | None = None,
    ) -> list[dict[str, Any]]:
        """The k best items for one user, best first.

        Args:
            history: item ids as in the raw data, oldest first. Ids the model does not know are passed over.
            k: how many.
            times: whole seconds since 1970 of each event, ascending; needed where the model has a clock.
            request_time: seconds of the request, no earlier than the newest event, for models with request time; None:
                now or, with a warning, the newest event's time if that lies in the future.
            exclude: further item ids not to recommend.
            ratings: of each event, None where there is none; looked at by models with an input for them.
            actions: name of the kind of each event, None where it is not known; looked at in the same way.
            action: name of the kind of action to recommend for, where the model is told; None: the one that its
                next_action names, else an unknown one.
            user: features of the user under their declared names, such as {"gender": "F", "age": 25}: a class, a list
                of classes or a number each; looked at by models with a user tower or the signal Demographics. What is
                missing is unknown, and so, with a warning, is a class that no user of the training data had.
            seen: whether items of the history may be recommended, keep or filter; None: as the data were prepared,
                keep with `repeats: keep`, else filter.

        Returns:
            One {"item_id", "title" (where known), "score", "rank", "retriever_score"} an item.
        """
        if isinstance(history, str):
            raise ValueError(f"history is the text {history!r}, expected a sequence of item ids, oldest first")
        seen = self.seen_rule(seen)
        if self.needs_times and times is None and len(history):
            raise ValueError("this model has a clock, so it needs times: seconds, one for each event")
        for name, given in (("time", times), ("rating", ratings), ("action", actions)):
            if given is not None and len(given) != len(history):
                raise ValueError(
                    f"history has {len(history)} events but {name}s has {len(given)}; give one {name} for each"
                )
        seconds = np.zeros(len(history), np.int64) if times is None else as_seconds(times, "times", self.newest_time)
        check_ascending(seconds)
        now = request_seconds(
            request_time, int(seconds.max(initial=0)), self.newest_time, self.has_time, self.request_time == "target"
        )
        numbers = self.catalogue.numbers(history)
        met = np.flatnonzero(numbers)
        newest = met[-self.towers.max_length :]
        padded = left_aligned(
            numbers[newest],
            seconds[newest],
            np.array([0]),
            np.array([len(newest)]),
            known_ratings(ratings)[newest] if ratings is not None and "ratings" in self.reads else None,
            self.catalogue.action_numbers(actions, "history")[newest]
            if actions is not None and self.reads_actions
            else None,
        )
        if user is not None:
            padded = padded._replace(user=encode_users(self.user_features, [user], "user"))
        if isinstance(exclude, str):
            raise ValueError(f"exclude is the text {exclude!r}, expected a sequence of item ids: [{exclude!r}]")
        excluded = self.catalogue.numbers(exclude)
        known = np.unique(np.concatenate([numbers[met if seen == "filter" else met[:0]], excluded[excluded > 0]]))
        target_action = None if action is None else np.array([self.target_action_number(action)])
        ranking = self.rank(padded, Ragged(known, np.array([0, len(known)])), np.array([now]), k, target_action)
        return self.catalogue.rows(ranking)[0]

    def seen_rule(self, seen: Seen | None) -> Seen:
        """Whether seen items may be recommended: as requested, else as the data were prepared."""
        if seen is None:
            return self.seen
        check_option("seen", seen, Seen)
        return seen

    def target_action_number(self, name: str) -> int:
        """The number of a kind of action that is asked for by its name."""
        if self.next_action == "none":
            raise ValueError(NOT_TOLD)
        if name not in self.actions:
            raise ValueError(f"the action asked for is {name!r}, expected one of {', '.join(self.actions)}")
        return 1 + self.actions.index(name)

    def check(self, dataset: Dataset) -> None:
        """Refuses data that do not say of events and users what the model was trained to read."""
        check_inputs(self.towers.inputs, dataset, self.next_action)
        ours, theirs = (
            [tuple(feature[part] for part in SPEC) for feature in features]
            for features in (self.user_features, dataset.manifest["features"]["users"])
        )
        if self.reads_user and ours != theirs:
            raise ValueError(
                f"the model reads the user features (name, kind, classes) {ours}, but {dataset.path} has {theirs}; use "
                "the data it was trained on"
            )
        if self.reads_actions and dataset.action_names != self.actions:
            raise ValueError(
                f"the model knows the kinds of events {', '.join(self.actions)}, but {dataset.path} has "
                f"{', '.join(dataset.action_names)}; use the data it was trained on"
            )


def load_for(dataset: Dataset, folder: Path) -> Recommender:
    """A bundle or index that was made from this dataset, split as it is."""
    check_split(dataset, folder)
    recommender = Recommender.load(folder)
    recommender.check(dataset)
    return recommender
