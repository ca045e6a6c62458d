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
from recsys2stage.dataset import Dataset, Padded, Ragged, RequestTime, as_history, left_aligned, spans
from recsys2stage.index import Index
from recsys2stage.reranker import Reranker
from recsys2stage.towers import TwoTower

logger = logging.getLogger("recsys2stage")

TOWERS, RERANKER, POPULARITY = "towers.pt", "reranker.pt", "popularity.npy"  # files of a served folder


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
            asked: (B,) the kind of action asked for; None: as the model was made to be asked.
        """
        if self.next_action == "none":
            asked = None
        elif asked is None:
            kind = 0 if self.next_action == "target" else 1 + self.actions.index(self.next_action)
            asked = np.full(len(padded.lengths), kind)
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

    def rank(self, padded: Padded, known: Ragged, request: np.ndarray | None, k: int) -> Ranking:
        """Both stages for B requests.

        Users without a history get the most popular items, without a retriever score.
        """
        queries = self.queries(padded, request)
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
    ) -> list[dict[str, Any]]:
        """The k best items for one user, best first; never one of the history.

        Args:
            history: item ids as in the raw data, oldest first. Ids the model does not know are passed over.
            k: how many.
            times: seconds of each event; needed where the model has a clock.
            request_time: seconds of the request; None: now.
            exclude: further item ids not to recommend.

        Returns:
            One {"item_id", "title" (where known), "score", "rank", "retriever_score"} an item.
        """
        if isinstance(history, str):
            raise ValueError(f"history is the text {history!r}, expected a sequence of item ids, oldest first")
        if self.needs_times and times is None and len(history):
            raise ValueError("this model has a clock, so it needs times: seconds, one for each event")
        if times is not None and len(times) != len(history):
            raise ValueError(f"history has {len(history)} events but times has {len(times)}; give one time for each")
        numbers = self.numbers(history)
        met = np.flatnonzero(numbers)
        newest = met[-self.towers.max_length :]
        seconds = np.asarray(times if times is not None else np.zeros(len(history)), dtype=np.int64)
        padded = left_aligned(numbers[newest], seconds[newest], np.array([0]), np.array([len(newest)]))
        barred = self.numbers(exclude)
        known = np.unique(np.concatenate([numbers[met], barred[barred > 0]]))
        now = np.array([int(time.time()) if request_time is None else request_time])
        ranking = self.rank(padded, Ragged(known, np.array([0, len(known)])), now, k)
        return self.rows(ranking)[0]

    def numbers(self, item_ids: Sequence[Any]) -> np.ndarray:
        """Item numbers of raw item ids, 0 for those the model does not know, (n,) int64. Ids compare as text."""
        return np.array([self._number.get(str(item), 0) for item in item_ids], dtype=np.int64)

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


class PreparedUsers:
    """The users of a prepared dataset with all their events.

    Args:
        dataset: the dataset.
        recommender: whose history length counts.
        only: user ids, as text; None: everybody.
    """

    def __init__(self, dataset: Dataset, recommender: Recommender, only: Sequence[str] | None = None) -> None:
        self.dataset, self.max_length = dataset, recommender.towers.max_length
        table = pl.read_parquet(dataset.path / c.USER_TABLE, columns=[c.USER, c.USER_ID]).sort(c.USER)
        if only is not None:
            table = table.filter(pl.col(c.USER_ID).cast(pl.String).is_in(list(only)))
            _all_found(only, table[c.USER_ID], dataset.path)
        self.users, self.user_ids = table[c.USER].to_numpy().astype(np.int64), table[c.USER_ID].to_numpy()

    @property
    def newest(self) -> int:
        """Seconds of the newest event of the log."""
        return int(self.dataset.times.max())

    def read(self, part: slice) -> tuple[Padded, Ragged]:
        users = self.users[part]
        return self.dataset.histories(users, "all", self.max_length), self.dataset.known(users, "all")


class FileUsers:
    """Users whose histories stand in a CSV or Parquet file: user_id, item_id and perhaps time (seconds).

    Args:
        path: the file; rows in order of time where it has no time.
        recommender: whose items and history length count.
        only: user ids, as text; None: everybody.
    """

    def __init__(self, path: Path, recommender: Recommender, only: Sequence[str] | None = None) -> None:
        log = read_log(Path(path))
        needed = [c.USER_ID, c.ITEM_ID] + ([c.TIME] if recommender.needs_times else [])
        if missing := [name for name in needed if name not in log.columns]:
            raise ValueError(f"{path} lacks the columns {missing}; it has {log.columns}")
        for name in (c.USER_ID, c.ITEM_ID, c.TIME):
            if name in log.columns and (nulls := log[name].null_count()):
                raise ValueError(f"{nulls:,} of {len(log):,} rows have no {name} in {path}; fill in or drop them")
        if c.TIME in log.columns and not log[c.TIME].dtype.is_integer() and len(log):
            raise ValueError(f"{path} has the time {log[c.TIME][0]!r}; expected whole seconds since 1970")
        if only is not None:
            log = log.filter(pl.col(c.USER_ID).cast(pl.String).is_in(list(only)))
            _all_found(only, log[c.USER_ID].unique(), Path(path))
        if not len(log):
            raise ValueError(f"{path} holds no events; expected one row for each event of each user")
        if c.TIME in log.columns:
            log = log.sort(c.TIME, maintain_order=True)
        numbers = recommender.numbers(log[c.ITEM_ID].to_list())
        if not numbers.any():
            raise ValueError(
                f"none of the {len(log):,} item ids in {path} is known to the model, for example "
                f"{log[c.ITEM_ID][0]!r}; expected ids as {recommender.catalogue[c.ITEM_ID][0]!r}"
            )
        if not numbers.all():
            logger.warning(
                "%s: %s of %s events are of items the model does not know", path, f"{(numbers == 0).sum():,}", len(log)
            )
        self.max_length = recommender.towers.max_length
        self.user_ids, user = np.unique(log[c.USER_ID].to_numpy(), return_inverse=True)
        order = np.argsort(user[numbers > 0], kind="stable")
        self.items = numbers[numbers > 0][order]
        times = log[c.TIME].to_numpy() if c.TIME in log.columns else np.zeros(len(log), dtype=np.int64)
        self.times = times[numbers > 0][order].astype(np.int64)
        counts = np.bincount(user[numbers > 0], minlength=len(self.user_ids))
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.newest = int(self.times.max())

    def read(self, part: slice) -> tuple[Padded, Ragged]:
        starts, ends = self.offsets[:-1][part], self.offsets[1:][part]
        known = spans(starts, ends)
        padded = left_aligned(self.items, self.times, np.maximum(starts, ends - self.max_length), ends)
        return padded, Ragged(self.items[known.values], known.offsets)


def read_log(path: Path) -> pl.DataFrame:
    """A CSV or Parquet file of events. Ids in a CSV stay as they are written: item 0012 is not item 12."""
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        log = pl.read_csv(path, schema_overrides={c.USER_ID: pl.String, c.ITEM_ID: pl.String}, infer_schema_length=None)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if c.USER_ID in log.columns and log[c.USER_ID].str.contains(c.PLAIN_NUMBER).all():
        return log.with_columns(pl.col(c.USER_ID).cast(pl.Int64))
    return log


def _all_found(wanted: Sequence[str], found: pl.Series, where: Path) -> None:
    if missing := sorted(set(map(str, wanted)) - set(found.cast(pl.String))):
        raise ValueError(f"{len(missing)} of {len(set(wanted))} user ids are not in {where}, for example {missing[:3]}")


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
