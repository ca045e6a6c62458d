"""Serving both stages from one folder, without the training data and without Lightning.

recommender = Recommender.load("runs/ml-1m/bundle")
recommender.recommend(["1193", "661", "914"], k=10)
"""

import functools
import importlib
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from recsys2stage import columns as c
from recsys2stage.artifacts import read_manifest
from recsys2stage.dataset import Dataset, Padded, Ragged, RequestTime, as_history, left_aligned
from recsys2stage.index import Index
from recsys2stage.inputs import Field, check_inputs, fields_read
from recsys2stage.reranker import Reranker
from recsys2stage.towers import TwoTower

logger = logging.getLogger("recsys2stage")

TOWERS, RERANKER, POPULARITY = "towers.pt", "reranker.pt", "popularity.npy"  # files of a served folder
NOT_TOLD = (
    "this model is not told what kind of action is asked for; leave the action out, or train a model with the input "
    "NextAction on data with next_action: target"
)


class Ranking(NamedTuple):
    """The best items of B requests, best first; −1 and −inf past the end of a list."""

    items: np.ndarray  # (B, k) int64
    score: np.ndarray  # (B, k) float32, of the last stage
    retriever_score: np.ndarray  # (B, k) float32


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
    ) -> None:
        self.towers, self.index, self.reranker = towers.eval(), index, reranker.eval() if reranker else None
        self.catalogue, self.popularity = catalogue.sort(c.ITEM), popularity
        self.request_time, self.next_action, self.actions = request_time, next_action, list(actions)
        self.num_candidates = candidates
        self.warned = False  # that nobody says what kind of action is asked for

    @functools.cached_property
    def reads(self) -> set[Field]:
        """What the model looks at besides items and times: ratings, actions, the action asked for."""
        return fields_read(self.towers.inputs)

    @property
    def reads_kinds(self) -> bool:
        """Whether the kinds of a history's events matter, for themselves or as what was asked for before."""
        return bool(self.reads & {"actions", "asked"})

    @property
    def usual_kind(self) -> int:
        """The kind of action asked for where nobody says: the one that next_action names; for target, 0, unknown."""
        return c.UNKNOWN if self.next_action == "target" else 1 + self.actions.index(self.next_action)

    @property
    def needs_times(self) -> bool:
        """Whether the model looks at when events and requests happen."""
        return self.request_time != "none" or self.towers.encoder.reads_times

    @classmethod
    def load(cls, path: str | Path) -> "Recommender":
        """Loads a bundle (both stages) or an index folder (the first stage alone)."""
        path, kind = Path(path), cls.kind(path)
        if not (path / c.MANIFEST).is_file():
            raise FileNotFoundError(
                f"{path} holds neither a bundle nor an index; run: recsys export-bundle --output {path}"
            )
        manifest = read_manifest(path, kind, f"recsys export-{kind} --output {path}")
        return cls(
            towers=build(TwoTower, manifest["towers"], torch.load(path / TOWERS, weights_only=True)),
            index=Index.load(path),
            reranker=build(Reranker, manifest["reranker"], torch.load(path / RERANKER, weights_only=True))
            if kind == "bundle"
            else None,
            catalogue=pl.read_parquet(path / c.ITEM_TABLE),
            popularity=np.load(path / POPULARITY),
            request_time=manifest["request_time"],
            next_action=manifest["next_action"],
            actions=manifest["actions"],
            candidates=manifest.get("candidates", 200),
        )

    @staticmethod
    def kind(path: str | Path) -> str:
        """Whether a folder holds a "bundle" of both stages or an "index", the first alone."""
        return "bundle" if (Path(path) / RERANKER).is_file() else "index"

    @torch.inference_mode()
    def queries(self, padded: Padded, request: np.ndarray | None, asked: np.ndarray | None = None) -> np.ndarray:
        """Query vectors of histories, whose products with item vectors are scores, (B, D) float32.

        Args:
            padded: histories, newest `max_length` events at most.
            request: (B,) seconds at which each request is made; None: at the newest event.
            asked: (B,) the kind of action asked for, 0 for unknown; None: the usual kind, and a word of warning where
                that is unknown.
        """
        if asked is not None and self.next_action == "none":
            raise ValueError(NOT_TOLD)
        if asked is None and self.next_action != "none":
            asked = np.full(len(padded.lengths), self.usual_kind)
            if self.usual_kind == c.UNKNOWN and not self.warned:
                self.warned = True
                logger.warning(
                    "nobody says what kind of action to recommend for, as this model is used to; it knows %s",
                    ", ".join(self.actions),
                )
        return self.towers.queries(as_history(padded, self.request_time, request, asked)).float().numpy()

    def candidates(self, queries: np.ndarray, known: Ragged, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Scores and items of the k nearest items that are not known, (B, k) each; −inf and −1 past the last."""
        depth = self.num_candidates if k is None else k
        return self.index.search(queries, depth, exclude=(known.values, known.offsets))

    @torch.inference_mode()
    def rerank(
        self, queries: np.ndarray, items: np.ndarray, scores: np.ndarray, ids_masked: bool = False
    ) -> np.ndarray:
        """The second stage's scores of candidates in the retriever's order, (B, C) float32; −inf for no candidate."""
        assert self.reranker is not None
        real = torch.from_numpy(items > 0)
        rank = torch.arange(1, items.shape[1] + 1).expand(items.shape)
        logits = self.reranker(
            torch.from_numpy(queries),
            torch.from_numpy(items).clamp(min=c.PAD),
            torch.from_numpy(scores).masked_fill(~real, 0),
            rank,
            torch.full_like(real, ids_masked),
        )
        return logits.masked_fill(~real, -torch.inf).numpy()

    def rank(
        self, padded: Padded, known: Ragged, request: np.ndarray | None, k: int, asked: np.ndarray | None = None
    ) -> Ranking:
        """Both stages for B requests, each made and asked as `queries` has it.

        Users without a history get the most popular items, without a retriever score.
        """
        queries = self.queries(padded, request, asked)
        depth = k if self.reranker is None else max(k, self.num_candidates)
        retriever_score, items = self.candidates(queries, known, depth)
        score = retriever_score if self.reranker is None else self.rerank(queries, items, retriever_score)
        order = np.argsort(-score, axis=1, kind="stable")[:, :k]
        items, score, retriever_score = (np.take_along_axis(x, order, axis=1) for x in (items, score, retriever_score))
        new = np.asarray(padded.lengths) == 0
        if new.any():
            items[new], score[new], retriever_score[new] = -1, -np.inf, np.nan
            popular = 1 + np.argsort(-self.popularity[1:], kind="stable")
            for row in np.flatnonzero(new):
                best = popular[~np.isin(popular, known.values[known.offsets[row] : known.offsets[row + 1]])][:k]
                items[row, : len(best)], score[row, : len(best)] = best, self.popularity[best]
        return Ranking(items, score, retriever_score)

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
    ) -> list[dict[str, Any]]:
        """The k best items for one user, best first; never one of the history.

        Args:
            history: item ids as in the raw data, oldest first. Ids the model does not know are passed over.
            k: how many.
            times: seconds of each event; needed where the model has a clock.
            request_time: seconds of the request; None: now.
            exclude: further item ids not to recommend.
            ratings: of each event, None where there is none; looked at by models with an input for them.
            actions: name of the kind of each event, None where it is not known; looked at in the same way.
            action: name of the kind of action to recommend for, where the model is told; None: the one that its
                next_action names, else an unknown one.

        Returns:
            One {"item_id", "title" (where known), "score", "rank", "retriever_score"} an item.
        """
        if isinstance(history, str):
            raise ValueError(f"history is the text {history!r}, expected a sequence of item ids, oldest first")
        if self.needs_times and times is None and len(history):
            raise ValueError("this model has a clock, so it needs times: seconds, one for each event")
        for name, given in (("time", times), ("rating", ratings), ("action", actions)):
            if given is not None and len(given) != len(history):
                raise ValueError(
                    f"history has {len(history)} events but {name}s has {len(given)}; give one {name} for each"
                )
        numbers = self.numbers(history)
        met = np.flatnonzero(numbers)
        newest = met[-self.towers.max_length :]
        seconds = np.asarray(times if times is not None else np.zeros(len(history)), dtype=np.int64)
        padded = left_aligned(
            numbers[newest],
            seconds[newest],
            np.array([0]),
            np.array([len(newest)]),
            known_ratings(ratings)[newest] if ratings is not None and "ratings" in self.reads else None,
            self.kinds(actions, "history")[newest] if actions is not None and self.reads_kinds else None,
        )
        barred = self.numbers(exclude)
        known = np.unique(np.concatenate([numbers[met], barred[barred > 0]]))
        now = np.array([int(time.time()) if request_time is None else request_time])
        asked = None if action is None else np.array([self.kind_asked(action)])
        ranking = self.rank(padded, Ragged(known, np.array([0, len(known)])), now, k, asked)
        return self.rows(ranking)[0]

    def numbers(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Item numbers of raw item ids, 0 for those the model does not know, (n,) int64. Ids compare as text."""
        return np.array([self._number.get(str(item), 0) for item in item_ids], dtype=np.int64)

    def kinds(self, names: Sequence[str | None], where: str | Path) -> np.ndarray:
        """Numbers of kinds of events by name, 0 for None and, with a warning, for unknown names, (n,) int64.

        Args:
            where: they stand, for the warning.
        """
        number = {None: c.UNKNOWN} | {name: kind for kind, name in enumerate(self.actions, start=1)}
        if strange := [name for name in names if name not in number]:
            logger.warning(
                "%s: %s of %s events are of kinds the model does not know, for example %r; it knows %s",
                *(where, f"{len(strange):,}", f"{len(names):,}", strange[0], ", ".join(self.actions)),
            )
        return np.array([number.get(name, c.UNKNOWN) for name in names], dtype=np.int64)

    def kind_asked(self, name: str) -> int:
        """The number of a kind of action that is asked for by its name."""
        if self.next_action == "none":
            raise ValueError(NOT_TOLD)
        if name not in self.actions:
            raise ValueError(f"the action asked for is {name!r}, expected one of {', '.join(self.actions)}")
        return 1 + self.actions.index(name)

    def check(self, dataset: Dataset) -> None:
        """Refuses data that do not say of events what the model was trained to read."""
        check_inputs(self.towers.inputs, dataset, self.next_action)
        if self.reads_kinds and dataset.action_names != self.actions:
            raise ValueError(
                f"the model knows the kinds of events {', '.join(self.actions)}, but {dataset.path} has "
                f"{', '.join(dataset.action_names)}; use the data it was trained on"
            )

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return dict(zip(self.catalogue[c.ITEM_ID].cast(pl.String), self.catalogue[c.ITEM], strict=True))

    def rows(self, ranking: Ranking) -> list[list[dict[str, Any]]]:
        """Rankings as plain rows, one list a request."""
        ids = self.catalogue[c.ITEM_ID].to_list()
        titles = self.catalogue[c.TITLE].to_list() if c.TITLE in self.catalogue.columns else None
        return [
            [
                {"item_id": ids[item - 1]}
                | ({"title": titles[item - 1]} if titles else {})
                | {"score": float(score), "rank": place + 1, "retriever_score": float(first)}
                for place, (item, score, first) in enumerate(zip(*row, strict=True))
                if item > 0
            ]
            for row in zip(*ranking, strict=True)
        ]


def known_ratings(ratings: Sequence[float | int | None]) -> np.ndarray:
    """Ratings as histories have them, (n,) float32: 0 where there is none."""
    return np.nan_to_num(np.array(ratings, dtype=np.float32))


def in_chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def read_checkpoint(path: Path, part: str, make: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The options a checkpoint was trained with, and the weights of one part of it; needs no Lightning.

    Args:
        path: checkpoint.
        part: attribute of the trained module, such as "towers".
        make: the command that makes such a checkpoint, for the error.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; run: {make}")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a checkpoint, or not a whole one; make it again: {make}") from error
    weights = {
        name.removeprefix(f"{part}."): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith(f"{part}.")
    }
    if not weights:
        raise ValueError(f"{path} holds no {part}; expected a checkpoint made by: {make}")
    return checkpoint["hyper_parameters"], weights


def build(kind: type, options: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """A module from plain options, in which {"class_path", "init_args"} stands for a factory, and its weights."""
    module = kind(**{name: factory(value) for name, value in options.items()})
    module.load_state_dict(weights)
    return module.eval()


def factory(value: Any) -> Any:
    """A description with a class_path becomes that class with its options bound; anything else stays as it is."""
    if isinstance(value, list):
        return [factory(part) for part in value]
    if not (isinstance(value, dict) and "class_path" in value):
        return value
    module, _, name = value["class_path"].rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{value['class_path']} cannot be imported ({error}); put its module on PYTHONPATH") from error
    return functools.partial(kind, **{key: factory(option) for key, option in (value.get("init_args") or {}).items()})
