"""The served recommender: both stages loaded from one folder, without training data or Lightning.

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
from recsys2stage.data.request_inputs import as_seconds, check_ascending, encode_users, fill_ratings, request_seconds
from recsys2stage.ranking.beyond import Recommendations, RetrievedItems, beyond
from recsys2stage.ranking.bundle import SPEC, check_split, read_bundle
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import Proposer, Requests, Signal
from recsys2stage.ranking.signals.merge import merge, reciprocal_ranks
from recsys2stage.retrieval.index import Index
from recsys2stage.retrieval.inputs import Field, check_inputs, fields_read
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import CandidateBatch

logger = logging.getLogger("recsys2stage")

NO_TARGET_ACTION = (
    "this model has no target action; leave the action out, or train a model with the input NextAction on data with "
    "next_action: target"
)
PerRequest = np.ndarray | None  # one number for each of B requests, (B,); None: the default


class Recommender:
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
    def needs_times(self) -> bool:
        """Whether the model reads event times or request times."""
        first = self.request_time != "none" or self.towers.encoder.reads_times
        return first or any(signal.reads_times for signal in self.signals) or self.reads_ages

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

    @classmethod
    def load(cls, path: str | Path, trust: Sequence[str] | str | None = ()) -> "Recommender":
        """Loads a bundle (both stages) or an index folder (the first stage alone).

        Every file is checked against its checksum in the manifest. No code that the folder contains or names is run,
        except from the modules in `trust`.

        Args:
            path: folder written by export-bundle or export-index.
            trust: modules outside this package whose classes the folder may name, such as "my_signals".

        Raises:
            ValueError: if the folder is damaged, has another format, or names classes of other modules.
        """
        recommender = cls(**read_bundle(path, trust))
        numbers, reranker = len(recommender.signal_names), recommender.reranker
        if reranker is not None and numbers != len(reranker.signal_mean):
            raise ValueError(
                f"{path} has {numbers} signal values but its ranker reads {len(reranker.signal_mean)}; export both "
                "stages of one run: recsys export-bundle"
            )
        return recommender

    @torch.inference_mode()
    def queries(self, padded: Padded, request: PerRequest, target_action: PerRequest = None) -> np.ndarray:
        """Query vectors of histories, (B, D) float32; scores are their dot products with the item vectors.

        Args:
            padded: histories, newest `max_length` events at most.
            request: (B,) request times in seconds; None: the time of the newest event.
            target_action: (B,) action types, 0 for unknown; None: `default_action`, with a warning if that is unknown.
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
        return self.towers.queries(as_history(padded, self.request_time, request, target_action)).float().numpy()

    def ranker_request_time(self, padded: Padded, request: PerRequest) -> np.ndarray:
        """Request time for the second stage: the given one, or that of the newest event, (B,) int64 seconds."""
        if self.request_time == "target" and request is not None:
            return request
        last = np.maximum(np.asarray(padded.lengths) - 1, 0)
        return padded.times[np.arange(len(last)), last]

    def candidates(
        self, queries: np.ndarray, excluded: Ragged, padded: Padded, request: PerRequest, k: int | None = None
    ) -> RetrievedItems:
        """Candidates: the nearest items, merged with those that signals generate, without the excluded items.

        Args:
            queries: (B, D) of the retriever.
            excluded: items not to recommend.
            padded: histories.
            request: (B,) seconds, as in `queries`.
            k: number of candidates; None: as many as the second stage ranks.
        """
        depth = self.num_candidates if k is None else k
        score, items = self.index.search(queries, depth, exclude=(excluded.values, excluded.offsets))
        if not self.proposers:
            return RetrievedItems(items, score, [items])
        no_items = np.zeros((len(queries), 0), dtype=np.int64)
        requests = Requests(no_items, padded, self.ranker_request_time(padded, request), self.vectors, queries)
        named = [items, *(signal.propose(requests, excluded) for signal in self.proposers)]
        items = merge(named, depth)
        score = np.einsum("bd,bkd->bk", queries, self.vectors[np.maximum(items, c.PAD)])
        score[items < 0] = -np.inf
        order = np.argsort(-score, axis=1, kind="stable")
        return RetrievedItems(np.take_along_axis(items, order, axis=1), np.take_along_axis(score, order, axis=1), named)

    def compute_signals(
        self, items: np.ndarray, queries: np.ndarray, found: RetrievedItems, padded: Padded, request: PerRequest
    ) -> np.ndarray:
        """Signal values of the given items for each request, (B, C, S) float32.

        Args:
            items: (B, C), 0 or −1 for padding.
            queries: (B, D) of the retriever.
            found: the candidates of the requests, for their ranks in each candidate source.
        """
        items = np.maximum(items, c.PAD).astype(np.int64)
        requests = Requests(items, padded, self.ranker_request_time(padded, request), self.vectors, queries)
        numbers = [signal(requests) for signal in self.signals]
        if self.proposers:
            numbers.append(reciprocal_ranks(items, found.proposed, len(self.vectors)))
        return np.concatenate(numbers, axis=2) if numbers else np.zeros((*items.shape, 0), dtype=np.float32)

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
        return self.reranker(batch, torch.full_like(real, ids_masked)).masked_fill(~real, -torch.inf).numpy()

    def rank(
        self, padded: Padded, excluded: Ragged, request: PerRequest, k: int, target_action: PerRequest = None
    ) -> Recommendations:
        """Recommends k items to each of B requests with both stages; arguments as in `queries` and `candidates`.

        The last stage ranks all candidates, whatever k is, and the other items follow in the retriever's order, as in
        an evaluation. Users without a history get the most popular items, without a retriever score.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        queries = self.queries(padded, request, target_action)
        found = self.candidates(queries, excluded, padded, request)
        score = (
            found.score if self.reranker is None else self.rerank(self.candidate_batch(queries, found, padded, request))
        )
        order = np.argsort(-score, axis=1, kind="stable")
        ranking = Recommendations(*(np.take_along_axis(x, order, axis=1) for x in (found.items, score, found.score)))
        if k > ranking.items.shape[1]:
            scale = None if self.reranker is None else float(self.reranker.log_scale.detach().exp())
            rest = beyond(queries, self.vectors, excluded, ranking, k - ranking.items.shape[1], scale)
            ranking = Recommendations(*(np.concatenate(both, axis=1) for both in zip(ranking, rest, strict=True)))
        items, score, retriever_score = (part[:, :k] for part in ranking)
        new = np.asarray(padded.lengths) == 0
        if new.any():
            items[new], score[new], retriever_score[new] = -1, -np.inf, np.nan
            popular = 1 + np.argsort(-self.popularity[1:], kind="stable")
            for row in np.flatnonzero(new):
                left_out = excluded.values[excluded.offsets[row] : excluded.offsets[row + 1]]
                best = popular[~np.isin(popular, left_out)][:k]
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
            history: item ids as in the raw data, oldest first. Unknown ids are skipped.
            k: number of items.
            times: whole seconds since 1970 of each event, ascending; required if the model reads times.
            request_time: seconds of the request, no earlier than the newest event, for models with request time; None:
                now or, with a warning, the newest event's time if that lies in the future.
            exclude: further item ids not to recommend.
            ratings: of each event, None where missing; read by models with a rating input.
            actions: action type of each event, None where missing; read by models with an action input.
            action: target action, for models with one; None: the one named by the model's next_action, else unknown.
            user: user features by declared name, such as {"gender": "F", "age": 25}: a class, a list of classes or a
                number; read by models with a user tower or the signal Demographics. Missing features are unknown.
                Classes not in the training data are unknown, too, with a warning.
            seen: keep or filter seen items; None: keep if the data were prepared with repeats: keep, else filter.

        Returns:
            One {"item_id", "title" (if available), "score", "rank", "retriever_score"} per item.
        """
        if isinstance(history, str):
            raise ValueError(f"history is the text {history!r}, expected a sequence of item ids, oldest first")
        seen = self.seen_rule(seen)
        if self.needs_times and times is None and len(history):
            raise ValueError("this model reads event times; pass times: seconds, one for each event")
        for name, given in (("time", times), ("rating", ratings), ("action", actions)):
            if given is not None and len(given) != len(history):
                raise ValueError(
                    f"history has {len(history)} events but {name}s has {len(given)}; give one {name} for each"
                )
        seconds = np.zeros(len(history), np.int64) if times is None else as_seconds(times, "times", self.newest_time)
        check_ascending(seconds)
        request = request_seconds(
            request_time, int(seconds.max(initial=0)), self.newest_time, self.has_time, self.request_time == "target"
        )
        numbers = self.catalogue.numbers(history)
        known = np.flatnonzero(numbers)
        newest = known[-self.towers.max_length :]
        rated = fill_ratings(ratings)[newest] if ratings is not None and "ratings" in self.input_fields else None
        acted = None
        if actions is not None and self.reads_actions:
            acted = self.catalogue.action_numbers(actions, "history")[newest]
        padded = left_aligned(numbers[newest], seconds[newest], np.array([0]), np.array([len(newest)]), rated, acted)
        if user is not None:
            padded = padded._replace(user=encode_users(self.user_features, [user], "user"))
        if isinstance(exclude, str):
            raise ValueError(f"exclude is the text {exclude!r}, expected a sequence of item ids: [{exclude!r}]")
        seen_items, others = numbers[known], self.catalogue.numbers(exclude)
        excluded = np.unique(np.concatenate([seen_items if seen == "filter" else seen_items[:0], others[others > 0]]))
        target_action = None if action is None else np.array([self.target_action_number(action)])
        one = Ragged(excluded, np.array([0, len(excluded)]))
        ranking = self.rank(padded, one, np.array([request]), k, target_action)
        return self.catalogue.rows(ranking)[0]

    def seen_rule(self, seen: Seen | None) -> Seen:
        """The rule of a request, keep or filter seen items: as given, else as the data were prepared."""
        if seen is not None:
            check_option("seen", seen, Seen)
        return seen or self.seen

    def target_action_number(self, name: str) -> int:
        """The number of a target action, from its name."""
        if self.next_action == "none":
            raise ValueError(NO_TARGET_ACTION)
        if name not in self.actions:
            raise ValueError(f"the target action is {name!r}, expected one of {', '.join(self.actions)}")
        return 1 + self.actions.index(name)

    def check(self, dataset: Dataset) -> None:
        """Raises ValueError if the dataset lacks inputs that the model reads or has other user features or actions."""
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
                f"the model was trained with the actions {', '.join(self.actions)}, but {dataset.path} has "
                f"{', '.join(dataset.action_names)}; use the data it was trained on"
            )


def load_recommender(dataset: Dataset, folder: Path) -> Recommender:
    """Loads a bundle or index and checks that it was made from this dataset and its split."""
    check_split(dataset, folder)
    recommender = Recommender.load(folder)
    recommender.check(dataset)
    return recommender
