"""Candidate lists: construction in mining, and reading from files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recsys2stage import columns as c
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.hashing import splitmix64

CANDIDATES, STATES, REQUESTS = "candidates.parquet", "states.npy", "requests.parquet"  # files of a mined folder
NONE = -1  # padding in item rows

ExactRanks = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # see `build_lists`


def without_repeats(items: np.ndarray) -> np.ndarray:
    """(B, N) items with every later occurrence in a row replaced by −1."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    repeated = np.zeros_like(items, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(repeated, NONE, items)


def positions_in(candidates: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The column of each of (B, N) items among the (B, K) distinct candidates of its row, −1 if it is not there."""
    rows, columns = np.nonzero(candidates != NONE)
    if not len(rows):
        return np.full(items.shape, NONE)
    size = int(max(candidates.max(), items.max(initial=0))) + 1
    keys = rows * size + candidates[rows, columns]
    order = np.argsort(keys)
    queries = np.arange(len(items))[:, None] * size + items
    index = order[np.searchsorted(keys, queries, sorter=order).clip(max=len(keys) - 1)]
    return np.where((keys[index] == queries) & (items != NONE), columns[index], NONE)


def build_lists(
    candidates: np.ndarray,
    target: np.ndarray,
    scores: np.ndarray,
    negatives: np.ndarray,
    exact: ExactRanks,
    validation: np.ndarray,
) -> dict[str, np.ndarray]:
    """The rows of B candidate lists, sorted by batch row and retriever rank.

    A training list holds the target and its negatives, a validation list all candidates, as in serving.

    Args:
        candidates: (B, K) int64 items as served, best first, padded with −1.
        target: (B,) int64 items.
        scores: (B, K) the retriever's scores of the candidates.
        negatives: (B, N) items chosen by the miner.
        exact: called with rows (R,) and their items (R, M), padded with −1, for items that are not candidates; returns
            the items' exact scores and their ranks among all items that are not excluded, (R, M) each.
        validation: (B,) bool, True for validation lists.

    Returns:
        Columns row, item, label, retriever_score, retriever_rank, origin and fold, of equal length. Candidates keep
        their served score and rank. Other items have exact scores and ranks; their ranks are below all candidates.
    """
    retrieved = candidates != NONE
    target = target[:, None]
    found = positions_in(candidates, target) != NONE
    training = without_repeats(np.concatenate([np.where(found, target, NONE), negatives], axis=1))
    training[validation] = NONE
    position = np.full((len(target), training.shape[1] + candidates.shape[1]), NONE)
    position[:, : training.shape[1]] = positions_in(candidates, training)
    position[:, training.shape[1] :] = np.where(retrieved, np.arange(candidates.shape[1]), NONE)
    items = np.concatenate([training, np.where(validation[:, None], candidates, NONE)], axis=1)

    real = items != NONE
    score = np.take_along_axis(scores, position.clip(min=0), axis=1)
    rank = position + 1
    rows, columns = np.nonzero(real & (position == NONE))  # items that the index did not return
    if len(rows):
        distinct, row = np.unique(rows, return_inverse=True)
        column = np.arange(len(rows)) - np.searchsorted(rows, rows)
        outside = np.full((len(distinct), column.max() + 1), NONE)
        outside[row, column] = items[rows, columns]
        own, above = (values[row, column] for values in exact(distinct, outside))
        score[rows, columns], rank[rows, columns] = own, np.maximum(above, retrieved.sum(1)[rows] + 1)

    rows = np.nonzero(real)[0]
    order = np.lexsort((rank[real], rows))
    table = {
        "row": rows,
        c.ITEM: items[real].astype(np.int32),
        c.LABEL: (items == target)[real].astype(np.int8),
        c.RETRIEVER_SCORE: score[real].astype(np.float32),
        c.RETRIEVER_RANK: rank[real].astype(np.int32),
        c.ORIGIN: np.where(position != NONE, "candidate", "drawn")[real],
        c.FOLD: np.where(validation[rows], "select", "train"),
    }
    return {name: column[order] for name, column in table.items()}


def validation_users(users: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Boolean mask of the ranker's validation users: a share of them, chosen by a seeded hash of the user number."""
    return splitmix64(users, seed) < np.uint64(int(share * (2**64 - 1)))


class CandidateLists(NamedTuple):
    """The mined lists of n requests; rows of all lists are concatenated."""

    user: np.ndarray  # (n,)
    position: np.ndarray  # (n,) int64, index of the target in the event log
    request_time: np.ndarray  # (n,) int64, seconds
    fold: np.ndarray  # (n,) "train" | "select" (validation); "unused" in lists of other folders
    positive: np.ndarray  # (n,) int64, index of the positive in its list; −1 if it is missing
    offsets: np.ndarray  # (n + 1,) int64
    items: np.ndarray  # (rows,) int32
    score: np.ndarray  # (rows,) float32
    rank: np.ndarray  # (rows,) int32
    signals: np.ndarray  # (rows, S) float32


def read_candidates(folder: Path, signals: Sequence[str], dataset: Dataset) -> CandidateLists:
    """Reads candidates.parquet, with the rows of each list in sequence, and requests.parquet, with one row per list.

    Args:
        folder: written by `recsys mine-negatives`.
        signals: columns of signal features to read.
        dataset: the dataset they were mined from.

    Raises:
        ValueError: if the tables are inconsistent with each other or with the dataset.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(name: str, file: str = CANDIDATES) -> np.ndarray:  # one at a time, to save memory
        try:
            return pq.read_table(folder / file, columns=[name]).column(0).to_numpy()
        except (pa.ArrowException, IndexError) as error:
            raise ValueError(f"column {name} of {folder / file} cannot be read ({error}); mine again") from error

    def integers(name: str, low: int, below: int, file: str = CANDIDATES) -> np.ndarray:
        values = column(name, file)
        if values.dtype.kind not in "iu" or (len(values) and not (low <= values.min() and values.max() < below)):
            raise ValueError(f"{folder / file} has values of {name} outside {low} to {below - 1:,}; mine again")
        return values

    counts = integers(c.ROWS, 0, np.iinfo(np.int32).max, REQUESTS)
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    items = integers(c.ITEM, 1, dataset.num_items + 1)
    if len(items) != offsets[-1]:
        raise ValueError(
            f"{folder / CANDIDATES} has {len(items):,} rows, expected {offsets[-1]:,}, the total in {REQUESTS}; mine "
            "again"
        )
    positive = np.full(len(counts), NONE, dtype=np.int64)
    labelled = np.flatnonzero(column(c.LABEL))
    lists = np.searchsorted(offsets, labelled, side="right") - 1
    positive[lists] = labelled - offsets[lists]
    features = np.empty((offsets[-1], len(signals)), dtype=np.float32)
    for number, name in enumerate(signals):
        features[:, number] = column(name)
    return CandidateLists(
        user=integers(c.USER, 0, dataset.num_users, REQUESTS),
        position=integers(c.PLACE, 0, len(dataset.items), REQUESTS),
        request_time=column(c.TIME, REQUESTS),
        fold=column(c.FOLD, REQUESTS).astype(str),
        positive=positive,
        offsets=offsets,
        items=items,
        score=column(c.RETRIEVER_SCORE),
        rank=column(c.RETRIEVER_RANK),
        signals=features,
    )


def concatenate_lists(parts: Sequence[CandidateLists]) -> CandidateLists:
    """Concatenates the lists of several folders."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in CandidateLists._fields}
    ends = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    arrays["offsets"] = np.concatenate(
        [[0], *(part.offsets[1:] + before for part, before in zip(parts, ends[:-1], strict=True))]
    )
    return CandidateLists(**arrays)
