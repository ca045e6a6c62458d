"""Negatives for the ranker, chosen among what the retriever ranks high and drawn from the catalogue. Bare arrays."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recsys2stage import columns as c
from recsys2stage.hashing import splitmix64

CANDIDATES, STATES, REQUESTS = "candidates.parquet", "states.npy", "requests.parquet"  # files of a mined folder
NONE = -1  # "no item" in a row that is not full


class Request(NamedTuple):
    """What is known of B requests when their negatives are chosen."""

    candidates: np.ndarray  # (B, K) int64, as they are served, best first, −1 where there is no more
    target: np.ndarray  # (B,) int64
    known: np.ndarray  # sorted keys row · (V + 1) + item of what is no negative: excluded items, and the target
    counts: np.ndarray  # (V + 1,) training events of each item

    @classmethod
    def of(
        cls, candidates: np.ndarray, target: np.ndarray, rows: np.ndarray, items: np.ndarray, counts: np.ndarray
    ) -> "Request":
        """From the (rows, items) that are excluded from the lists."""
        keys = np.concatenate([rows, np.arange(len(target))]) * len(counts) + np.concatenate([items, target])
        return cls(candidates, target, np.unique(keys), counts)

    def is_known(self, items: np.ndarray) -> np.ndarray:
        """Which of (B, N) items are no negatives in their row: excluded, or the target; also true of −1."""
        keys = np.arange(len(items))[:, None] * len(self.counts) + items
        place = np.searchsorted(self.known, keys).clip(max=max(len(self.known) - 1, 0))
        return (items == NONE) | (self.known[place] == keys if len(self.known) else False)


class Miner(ABC):
    """Chooses negatives: (B, N) item numbers, −1 where there are fewer."""

    @abstractmethod
    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray: ...


class RankBand(Miner):
    """Candidates between two ranks, all of them or some at random.

    Args:
        count: how many; None: the whole band.
        skip_top: leave out this many of the best, which are the likeliest to be unknown positives. Keep it 0 where the
            ranker sees the retriever's rank, or it learns the gap instead.
        last: lowest rank of the band; None: all candidates.
    """

    def __init__(self, count: int | None = None, skip_top: int = 0, last: int | None = None) -> None:
        if skip_top < 0 or (last is not None and last <= skip_top):
            raise ValueError(
                f"the band of ranks above {skip_top} and up to {last} is empty; expected 0 <= skip_top < last"
            )
        self.count, self.skip_top, self.last = count, skip_top, last

    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray:
        band = request.candidates[:, self.skip_top : self.last]
        fit = ~request.is_known(band)
        if self.count is None or self.count >= band.shape[1]:
            return np.where(fit, band, NONE)
        lottery = np.where(fit, rng.random(band.shape), 2.0)
        drawn = np.sort(np.argpartition(lottery, self.count - 1, axis=1)[:, : self.count], axis=1)  # keep rank order
        return np.take_along_axis(np.where(fit, band, NONE), drawn, axis=1)


class _Drawn(Miner):
    """Draws from the catalogue, with a few spare draws in place of positives."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1; leave the miner out to draw nothing")
        self.count = count

    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray:
        drawn = self.draw((len(request.target), 2 * self.count + 8), request.counts, rng)
        drawn = np.where(request.is_known(drawn), NONE, drawn)
        first = np.argsort(drawn == NONE, axis=1, kind="stable")[:, : self.count]
        return np.take_along_axis(drawn, first, axis=1)

    @abstractmethod
    def draw(self, shape: tuple[int, int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


class Uniform(_Drawn):
    """Any item of the catalogue, each alike.

    Args:
        count: how many a user.
    """

    def draw(self, shape: tuple[int, int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(1, len(counts), size=shape)


class Popular(_Drawn):
    """Items in proportion to a power of their training counts.

    Args:
        count: how many a user.
        exponent: 1: as they occur; 0: uniform.
    """

    def __init__(self, count: int, exponent: float = 0.75) -> None:
        super().__init__(count)
        self.exponent = exponent

    def draw(self, shape: tuple[int, int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        weights = np.where(np.arange(len(counts)) > 0, counts, 0) ** self.exponent
        return np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(shape), side="right").clip(
            1, len(counts) - 1
        )


class Mixture(Miner):
    """Several miners one after the other; what an earlier one chose is not repeated.

    Args:
        miners: the parts, in order.
    """

    def __init__(self, miners: list[Miner]) -> None:
        if not miners:
            raise ValueError("Mixture got no miners; name at least one")
        self.miners = miners

    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray:
        return without_repeats(np.concatenate([miner.choose(request, rng) for miner in self.miners], axis=1))


def without_repeats(items: np.ndarray) -> np.ndarray:
    """(B, N) items with every later occurrence in a row replaced by −1."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    again = np.zeros_like(items, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(again, NONE, items)


def lists(
    request: Request, scores: np.ndarray, negatives: np.ndarray, every: np.ndarray, selects: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows of B candidate lists, by row of the batch and retriever rank.

    Args:
        request: candidates and targets.
        scores: (B, K) the retriever's scores of the candidates.
        negatives: (B, N) what the miner chose.
        every: (B, V + 1) exact scores, −inf for what may not be ranked.
        selects: (B,) whose lists are left as served: all candidates.

    Returns:
        row, item, label, retriever_score, retriever_rank, origin and fold, one value a row. Score and rank of a
        candidate are as it is served; of any other item they are exact, the rank below all candidates.
    """
    row = np.arange(len(request.target))[:, None]
    listed = request.candidates != NONE
    place = np.full(every.shape, NONE)  # of each item among the candidates
    place[np.broadcast_to(row, listed.shape)[listed], request.candidates[listed]] = np.nonzero(listed)[1]

    target = request.target[:, None]
    trains = np.concatenate([np.where(place[row, target] == NONE, NONE, target), negatives], axis=1)
    items = np.concatenate([without_repeats(trains), request.candidates], axis=1)
    items[selects, : trains.shape[1]] = NONE
    items[~selects, trains.shape[1] :] = NONE

    real = items != NONE
    where = np.where(real, place[row, items], NONE)
    score = np.where(where != NONE, np.take_along_axis(scores, where.clip(min=0), axis=1), every[row, items])
    rank = where + 1
    for j in np.flatnonzero((real & (where == NONE)).any(0)):  # items that the index did not return
        above = (every >= score[:, j, None]).sum(1)
        rank[:, j] = np.where(where[:, j] == NONE, np.maximum(above, listed.sum(1) + 1), rank[:, j])

    rows = np.broadcast_to(row, items.shape)[real]
    order = np.lexsort((rank[real], rows))
    table = {
        "row": rows,
        c.ITEM: items[real].astype(np.int32),
        c.LABEL: (items == target)[real].astype(np.int8),
        c.RETRIEVER_SCORE: score[real].astype(np.float32),
        c.RETRIEVER_RANK: rank[real].astype(np.int32),
        c.ORIGIN: np.where(where != NONE, "candidate", "drawn")[real],
        c.FOLD: np.where(selects[rows], "select", "train"),
    }
    return {name: column[order] for name, column in table.items()}


def specify_miner(miner: Miner) -> dict[str, Any]:
    """A miner's class and options, for the manifest."""
    options = {k: [specify_miner(m) for m in v] if isinstance(v, list) else v for k, v in vars(miner).items()}
    return {"class_path": f"{type(miner).__module__}.{type(miner).__qualname__}", "init_args": options}


def select_fold(users: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which users are kept to select the ranker, by a seeded hash of their number."""
    return splitmix64(users, seed) < np.uint64(int(share * (2**64 - 1)))


class CandidateLists(NamedTuple):
    """The mined lists of n requests, as arrays over all rows."""

    user: np.ndarray  # (n,)
    place: np.ndarray  # (n,) int64, of the target among all events
    now: np.ndarray  # (n,) int64, seconds of the request
    fold: np.ndarray  # (n,) "train" | "select"
    positive: np.ndarray  # (n,) int64, place of the positive in its list; −1 where it is not there
    offsets: np.ndarray  # (n + 1,) int64
    items: np.ndarray  # (rows,) int32
    score: np.ndarray  # (rows,) float32
    rank: np.ndarray  # (rows,) int32
    signals: np.ndarray  # (rows, S) float32


def read_candidates(folder: Path, signals: Sequence[str] = ()) -> CandidateLists:
    """Reads candidates.parquet, in which the rows of a list stand together, and requests.parquet, a row a list.

    Args:
        folder: written by `recsys mine-negatives`.
        signals: columns of numbers to read.
    """
    import pyarrow.parquet as pq

    def column(name: str, file: str = CANDIDATES) -> np.ndarray:  # one at a time: never the whole table twice in memory
        return pq.read_table(folder / file, columns=[name]).column(0).to_numpy()

    counts = column(c.ROWS, REQUESTS)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    positive = np.full(len(counts), NONE, dtype=np.int64)
    labelled = np.flatnonzero(column(c.LABEL))
    lists = np.searchsorted(offsets, labelled, side="right") - 1
    positive[lists] = labelled - offsets[lists]
    numbers = np.empty((offsets[-1], len(signals)), dtype=np.float32)
    for place, name in enumerate(signals):
        numbers[:, place] = column(name)
    return CandidateLists(
        user=column(c.USER, REQUESTS),
        place=column(c.PLACE, REQUESTS),
        now=column(c.TIME, REQUESTS),
        fold=column(c.FOLD, REQUESTS).astype(str),
        positive=positive,
        offsets=offsets,
        items=column(c.ITEM),
        score=column(c.RETRIEVER_SCORE),
        rank=column(c.RETRIEVER_RANK),
        signals=numbers,
    )


def joined(parts: Sequence[CandidateLists]) -> CandidateLists:
    """Lists of several folders behind each other."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in CandidateLists._fields}
    ends = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    arrays["offsets"] = np.concatenate(
        [[0], *(part.offsets[1:] + before for part, before in zip(parts, ends[:-1], strict=True))]
    )
    return CandidateLists(**arrays)
