"""ItemKNN: similarity of items by the users they have in common."""

import itertools
from collections.abc import Iterator

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import MAX_LENGTH, check_integer, check_number
from recsys2stage.ranking.lists import without_repeats
from recsys2stage.ranking.signals.base import Requests
from recsys2stage.ranking.signals.stored import StoredNeighbours, locate, pack, rows_per_block

PAIRS_IN_FLIGHT = 1 << 23  # pairs of a block of counting
CELLS_PER_PAIR = 4  # a dense block of counts may have so many numbers for each pair


class ItemKNN(StoredNeighbours):
    """Item-based nearest neighbors (Sarwar et al., WWW 2001) with the cosine of users: order does not count.

    With n(a) the users who have a among their training events and n(a, b) those who have both,

        cos(a, b) = n(a, b) / (√(n(a) n(b)) + shrink),

    and the `neighbours` items with the largest cosines are stored for each item. An item's score is the sum of
    decay^k · cos(a_k, b) over the events of the history, k = 0 for the newest; a repeated event counts once.

    The values are log(1 + score) and the largest cosine, both over stored pairs; 0 without one.

    Args:
        candidates: number of items proposed for each request; 0: none.
        neighbours: number of neighbors stored per item.
        shrink: added to the divisor; takes weight from items of few users.
        history: number of newest events to use.
        decay: weight of an event relative to the next newer one; 1: all alike, as in the paper.
    """

    names = ("score", "nearest")

    def __init__(
        self, candidates: int = 0, neighbours: int = 100, shrink: float = 10.0, history: int = 100, decay: float = 1.0
    ) -> None:
        super().__init__(candidates)
        check_integer("neighbours", neighbours, 1, MAX_LENGTH, example=100)
        check_number("shrink", shrink, low=0, example=10.0)
        check_integer("history", history, 1, MAX_LENGTH, example=100)
        check_number("decay", decay, above=0, high=1, example=1.0)
        self.neighbours, self.shrink, self.history, self.decay = neighbours, shrink, history, decay

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        size = dataset.num_items + 1
        users, items = distinct_pairs(dataset)
        root = np.sqrt(np.bincount(items, minlength=size))
        kept: list[tuple[np.ndarray, ...]] = []
        for first, second, together in co_occurrences(users, items, size):
            other = first != second
            first, second = first[other], second[other]
            cosine = together[other] / (root[first] * root[second] + self.shrink)
            order = np.lexsort((second, -cosine, first))
            best = order[np.arange(len(order)) - np.searchsorted(first, first) < self.neighbours]
            kept.append((first[best], second[best], cosine[best]))
        owners, neighbours, scores = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        self.restore(pack(owners, neighbours, scores, size))

    def weigh(self, requests: Requests) -> tuple[np.ndarray, np.ndarray]:
        longest = max(1, min(self.history, int(np.max(requests.history.lengths, initial=0))))
        events = without_repeats(requests.newest_items(longest)).clip(min=0)
        return events, (events > 0) * self.decay ** np.arange(longest)

    def __call__(self, requests: Requests) -> np.ndarray:
        items, (events, weights) = requests.items.clip(min=0), self.weigh(requests)
        values, length = np.zeros((*items.shape, 2), dtype=np.float32), events.shape[1]
        lengths = np.diff(self.stored(events.reshape(-1)).offsets[::length])
        cosines = np.asarray(self.tables["scores"])
        for rows in rows_per_block(lengths + length * items.shape[1]):
            pairs = self.stored(events[rows].reshape(-1))
            index = locate(pairs, self.tables["neighbours"], length, items[rows], len(self.tables["offsets"]) - 1)
            near = np.where(index >= 0, cosines[index] if len(cosines) else 0, 0)
            values[rows, :, 0] = np.log1p(np.matmul(weights[rows, None], near)[:, 0])
            values[rows, :, 1] = near.max(axis=1)
        return values


def distinct_pairs(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Users and items of the training events, each pair once, by user, (n,) int64 each."""
    size = dataset.num_items + 1
    train = spans(dataset.offsets[:-1], dataset.train_ends)
    users, items = np.divmod(np.unique(train.rows * size + dataset.items[train.values]), size)
    return users, items


def co_occurrences(
    users: np.ndarray, items: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The number of users of each pair of items, in blocks of first items.

    Args:
        users: of distinct pairs of user and item, ascending.
        items: of the same pairs.
        size: V + 1.

    Yields:
        first item, second item and number of users of each pair that occurs, (n,) each, by first and second item. The
        pairs of an item with itself are included.
    """
    bounds = np.searchsorted(users, np.arange(users.max(initial=-1) + 2))
    order = np.argsort(items, kind="stable")  # the users of each item
    offsets = np.concatenate([[0], np.cumsum(np.bincount(items, minlength=size))])
    pairs = np.bincount(items, np.diff(bounds)[users], size)  # of each item with all items of its users
    edges = np.flatnonzero(np.diff(np.cumsum(pairs) // PAIRS_IN_FLIGHT, prepend=-1, append=-1))
    for begin, end in itertools.pairwise(edges.tolist()):
        own = order[offsets[begin] : offsets[end]]
        partners = spans(bounds[users[own]], bounds[users[own] + 1])
        keys = (items[own] - begin)[partners.rows] * size + items[partners.values]
        cells = (end - begin) * size
        if cells <= CELLS_PER_PAIR * len(keys):
            counts = np.bincount(keys, minlength=cells)
            keys = np.flatnonzero(counts)
            counts = counts[keys]
        else:
            keys, counts = np.unique(keys, return_counts=True)
        first, second = np.divmod(keys, size)
        yield first + begin, second, counts
