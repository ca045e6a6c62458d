"""Candidate lists of the ranker: their rows as they are mined, and the files that hold them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.hashing import splitmix64

CANDIDATES, STATES, REQUESTS = "candidates.parquet", "states.npy", "requests.parquet"  # files of a mined folder
NONE = -1  # "no item" in a row that is not full


def without_repeats(items: np.ndarray) -> np.ndarray:
    """(B, N) items with every later occurrence in a row replaced by −1."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    again = np.zeros_like(items, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(again, NONE, items)


def build_lists(
    candidates: np.ndarray,
    target: np.ndarray,
    scores: np.ndarray,
    negatives: np.ndarray,
    every: np.ndarray,
    selects: np.ndarray,
) -> dict[str, np.ndarray]:
    """The rows of B candidate lists, by row of the batch and retriever rank.

    Args:
        candidates: (B, K) int64 items as they are served, best first, −1 where there is no more.
        target: (B,) int64 items.
        scores: (B, K) the retriever's scores of the candidates.
        negatives: (B, N) what the miner chose.
        every: (B, V + 1) exact scores, −inf for what may not be ranked.
        selects: (B,) whose lists are left as served: all candidates.

    Returns:
        row, item, label, retriever_score, retriever_rank, origin and fold, one value a row. Score and rank of a
        candidate are as it is served; of any other item they are exact, the rank below all candidates.
    """
    row = np.arange(len(target))[:, None]
    listed = candidates != NONE
    place = np.full(every.shape, NONE)  # of each item among the candidates
    place[np.broadcast_to(row, listed.shape)[listed], candidates[listed]] = np.nonzero(listed)[1]

    target = target[:, None]
    trains = np.concatenate([np.where(place[row, target] == NONE, NONE, target), negatives], axis=1)
    items = np.concatenate([without_repeats(trains), candidates], axis=1)
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


def validation_users(users: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which users are kept to select the ranker, by a seeded hash of their number."""
    return splitmix64(users, seed) < np.uint64(int(share * (2**64 - 1)))


class CandidateLists(NamedTuple):
    """The mined lists of n requests, as arrays over all rows."""

    user: np.ndarray  # (n,)
    position: np.ndarray  # (n,) int64, index of the target in the event log
    request_time: np.ndarray  # (n,) int64, seconds
    fold: np.ndarray  # (n,) "train" | "select"
    positive: np.ndarray  # (n,) int64, place of the positive in its list; −1 where it is not there
    offsets: np.ndarray  # (n + 1,) int64
    items: np.ndarray  # (rows,) int32
    score: np.ndarray  # (rows,) float32
    rank: np.ndarray  # (rows,) int32
    signals: np.ndarray  # (rows, S) float32


def read_candidates(folder: Path, signals: Sequence[str], dataset: Dataset) -> CandidateLists:
    """Reads candidates.parquet, in which the rows of a list stand together, and requests.parquet, a row a list.

    Args:
        folder: written by `recsys mine-negatives`.
        signals: columns of numbers to read.
        dataset: whose users, events and items they name.

    Raises:
        ValueError: where the tables do not fit each other or the dataset.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(name: str, file: str = CANDIDATES) -> np.ndarray:  # one at a time: never the whole table twice in memory
        try:
            return pq.read_table(folder / file, columns=[name]).column(0).to_numpy()
        except (pa.ArrowException, IndexError) as error:
            raise ValueError(f"{folder / file} has no column {name} that can be read ({error}); mine again") from error

    def whole_numbers(name: str, low: int, below: int, file: str = CANDIDATES) -> np.ndarray:
        values = column(name, file)
        if values.dtype.kind not in "iu" or (len(values) and not (low <= values.min() and values.max() < below)):
            raise ValueError(f"{folder / file} has values of {name} outside {low} to {below - 1:,}; mine again")
        return values

    counts = whole_numbers(c.ROWS, 0, np.iinfo(np.int32).max, REQUESTS)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    items = whole_numbers(c.ITEM, 1, dataset.num_items + 1)
    if len(items) != offsets[-1]:
        raise ValueError(
            f"{folder / CANDIDATES} has {len(items):,} rows, expected {offsets[-1]:,} as {REQUESTS} counts them; mine "
            "again"
        )
    positive = np.full(len(counts), NONE, dtype=np.int64)
    labelled = np.flatnonzero(column(c.LABEL))
    lists = np.searchsorted(offsets, labelled, side="right") - 1
    positive[lists] = labelled - offsets[lists]
    numbers = np.empty((offsets[-1], len(signals)), dtype=np.float32)
    for place, name in enumerate(signals):
        numbers[:, place] = column(name)
    return CandidateLists(
        user=whole_numbers(c.USER, 0, dataset.num_users, REQUESTS),
        position=whole_numbers(c.PLACE, 0, len(dataset.items), REQUESTS),
        request_time=column(c.TIME, REQUESTS),
        fold=column(c.FOLD, REQUESTS).astype(str),
        positive=positive,
        offsets=offsets,
        items=items,
        score=column(c.RETRIEVER_SCORE),
        rank=column(c.RETRIEVER_RANK),
        signals=numbers,
    )


def concatenate_lists(parts: Sequence[CandidateLists]) -> CandidateLists:
    """Lists of several folders behind each other."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in CandidateLists._fields}
    ends = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    arrays["offsets"] = np.concatenate(
        [[0], *(part.offsets[1:] + before for part, before in zip(parts, ends[:-1], strict=True))]
    )
    return CandidateLists(**arrays)
