"""TransitionGraph: items within a few hops of the newest ones in the graph of transitions, by feature similarity."""

import numpy as np

from recsys2stage.data.batches import spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import MAX_LENGTH, check_integer, check_number
from recsys2stage.ranking.signals.base import Requests
from recsys2stage.ranking.signals.keys import item_marks
from recsys2stage.ranking.signals.similarity import FeatureSimilarity
from recsys2stage.ranking.signals.stored import StoredNeighbours, locate, pack, rows_per_block

MAX_HOPS = 10


class TransitionGraph(StoredNeighbours):
    """Transition-graph heuristic (Han et al. 2026, arXiv 2605.07125): rings around the newest items, without training.

    The graph has an edge from a to b if b came right after a in a user's training events. Ring h of an item holds the
    items that are h edges away from it and not fewer. The score of b in ring h of a is

        hops − h + ((1 + cos(a, b)) / 2 + weight · log(1 + n(a, b)) / log(1 + max_c n(a, c))) / (1 + weight),

    so that a nearer ring comes first; n(a, b) is the number of transitions, 0 outside ring 1, and cos the similarity of
    the declared item features: classes weighted by rarity, and item vectors. Without features it is 0 and only the
    number of transitions orders a ring. Scores of the k-th newest event are multiplied by decay^(k − 1) and summed.

    The values are, for each of the newest events, 1 / h (`ring_1`, `ring_2`, ...) and the similarity of the features
    (`similarity_1`, ...) of pairs that are stored; 0 for other pairs.

    Args:
        candidates: number of items proposed for each request; 0: none.
        hops: number of rings.
        items: number of newest events whose rings are used.
        weight: of the number of transitions, relative to the similarity of features.
        decay: weight of an event relative to the next newer one.
        edges: most frequent transitions used of each item.
        top: items with the largest scores stored per item.
    """

    def __init__(
        self,
        candidates: int = 0,
        hops: int = 3,
        items: int = 2,
        weight: float = 1.0,
        decay: float = 0.1,
        edges: int = 256,
        top: int = 200,
    ) -> None:
        super().__init__(candidates)
        check_integer("hops", hops, 1, MAX_HOPS, example=3)
        check_integer("items", items, 1, MAX_LENGTH, example=2)
        check_number("weight", weight, low=0, example=1.0)
        check_number("decay", decay, above=0, high=1, example=0.1)
        check_integer("edges", edges, 1, MAX_LENGTH, example=256)
        check_integer("top", top, 1, MAX_LENGTH, example=200)
        self.hops, self.items, self.weight, self.decay, self.edges, self.top = hops, items, weight, decay, edges, top

    @property
    def names(self) -> tuple[str, ...]:
        numbers = range(1, self.items + 1)
        return (*(f"ring_{number}" for number in numbers), *(f"similarity_{number}" for number in numbers))

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        size = dataset.num_items + 1
        offsets, followers, counts = count_transitions(dataset, self.edges)
        similarity = FeatureSimilarity(dataset.item_features, size)
        popularity, sources = np.asarray(dataset.train_counts), np.flatnonzero(np.diff(offsets))
        kinds = (np.int32, np.float32, np.int8, np.float32)  # as stored: the pairs of all items are held here
        kept: list[tuple[np.ndarray, ...]] = [tuple(np.zeros(0, kind) for kind in kinds)]
        with item_marks(size) as marks:
            for item in sources.tolist():
                near, ring = self._rings(item, offsets, followers, marks)
                cosine, strength = similarity(item, near), np.zeros(len(near))
                own = np.log1p(counts[offsets[item] : offsets[item + 1]])
                strength[: len(own)] = own / own.max()
                score = self.hops - ring + ((1 + cosine) / 2 + self.weight * strength) / (1 + self.weight)
                best = np.lexsort((near, -popularity[near], -score))[: self.top]
                best = best[score[best] > 0]
                own_pairs = (near[best], score[best], ring[best], cosine[best])
                kept.append(tuple(part.astype(kind) for part, kind in zip(own_pairs, kinds, strict=True)))
        owners = np.repeat(sources, [len(own[0]) for own in kept[1:]])
        neighbours, scores, rings, cosines = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        self.restore({**pack(owners, neighbours, scores, size), "rings": rings, "similarities": cosines})

    def _rings(
        self, item: int, offsets: np.ndarray, followers: np.ndarray, marks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The items of the rings, and the number of each one's ring; no ring is looked for once `top` items are found.

        The items of ring 1 come first, as in `followers`.
        """
        ring = followers[offsets[item] : offsets[item + 1]]
        found, numbers = [ring], [np.ones(len(ring), dtype=np.int64)]
        marks[ring] = marks[item] = 1
        for number in range(2, self.hops + 1):
            if not len(ring) or sum(map(len, found)) >= self.top:
                break
            reached = followers[spans(offsets[ring], offsets[ring + 1]).values]
            ring = np.unique(reached[marks[reached] == 0])
            marks[ring] = 1
            found.append(ring)
            numbers.append(np.full(len(ring), number))
        near = np.concatenate(found)
        marks[near] = marks[item] = 0
        return near, np.concatenate(numbers)

    def weigh(self, requests: Requests) -> tuple[np.ndarray, np.ndarray]:
        events = requests.newest_items(self.items)
        return events, np.broadcast_to(self.decay ** np.arange(self.items), events.shape)

    def __call__(self, requests: Requests) -> np.ndarray:
        items, (events, _) = requests.items.clip(min=0), self.weigh(requests)
        values = np.zeros((*items.shape, 2 * self.items), dtype=np.float32)
        stored = self.stored(events.reshape(-1))
        lengths = np.diff(stored.offsets[:: self.items])
        rings, similarities = np.asarray(self.tables["rings"]), np.asarray(self.tables["similarities"])
        for rows in rows_per_block(lengths + self.items * items.shape[1]):
            pairs = self.stored(events[rows].reshape(-1))
            index = locate(pairs, self.tables["neighbours"], self.items, items[rows], len(self.tables["offsets"]) - 1)
            at = np.nonzero(index >= 0)
            row, event, column = at[0] + rows.start, at[1], at[2]
            values[row, column, event] = 1 / rings[index[at]]
            values[row, column, self.items + event] = similarities[index[at]]
        return values


def count_transitions(dataset: Dataset, edges: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The most frequent items right after each item in the training events, most frequent first.

    Args:
        edges: number of items kept for each one, ties go to the lower number; None: all.

    Returns:
        offsets (V + 2,) int64, items (n,) int64 and counts (n,) int64; those of item a from offsets[a] on.
    """
    size = dataset.num_items + 1
    starts, ends = np.asarray(dataset.offsets[:-1]), np.asarray(dataset.train_ends)
    first = spans(starts, np.maximum(ends - 1, starts)).values  # every training event but a user's last
    keys, counts = np.unique(
        dataset.items[first].astype(np.int64) * size + dataset.items[first + 1], return_counts=True
    )
    before, after = np.divmod(keys, size)
    order = np.lexsort((after, -counts, before))
    before, after, counts = before[order], after[order], counts[order]
    if edges is not None:
        kept = np.arange(len(before)) - np.searchsorted(before, before) < edges
        before, after, counts = before[kept], after[kept], counts[kept]
    return np.searchsorted(before, np.arange(size + 1)), after, counts
