"""The transition graph against breadth-first search over the events of each user."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_transitions import ITEMS, NO_VECTORS, asked, histories
from test_transitions import dataset as dataset
from test_transitions import folder as folder

from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals import Signal, TransitionGraph
from recsys2stage.ranking.signals.similarity import FeatureSimilarity

CODES = np.array([0, *([1, 2, 2, 3, 0] * 5)], dtype=np.int32)  # a class of each item; 0: unknown
TAGS = np.stack([CODES % 3, np.where(CODES == 2, 4, 0)], axis=1).astype(np.int32)
TEXT = np.random.default_rng(2).normal(size=(ITEMS + 1, 5)).astype(np.float32)
TEXT[7] = np.nan  # unknown
FEATURES = [
    {"name": "brand", "kind": "categorical", "size": 4, "values": CODES},
    {"name": "tags", "kind": "multi", "size": 5, "values": TAGS},
    {"name": "price", "kind": "numeric", "size": 1, "values": np.arange(ITEMS + 1.0)},
    {"name": "text", "kind": "vector", "size": 5, "values": TEXT},
]


def fitted(dataset: Dataset, signal: Signal) -> Signal:
    signal.fit(dataset, NO_VECTORS)
    return signal


@pytest.fixture
def sparse(dataset: Dataset) -> Dataset:
    """Few events of each user train, so that there are several rings; items have features."""
    dataset.train_ends = np.minimum(dataset.train_ends, dataset.offsets[:-1] + 3)
    dataset.item_features = FEATURES
    return dataset


def cosine(a: int, b: int) -> float:
    """The mean over the features, by loops."""

    def classes(values: np.ndarray, item: int, size: int) -> dict[int, float]:
        rows = values.reshape(len(values), -1).tolist()
        of = Counter(code for row in rows for code in row)
        return {code: float(np.log(ITEMS / of[code]) + 1e-3) for code in rows[item] if code}

    def product(x: dict[int, float], y: dict[int, float]) -> float:
        lengths = [sum(weight**2 for weight in own.values()) ** 0.5 for own in (x, y)]
        return sum(x[code] * y.get(code, 0) for code in x) / (lengths[0] * lengths[1]) if all(lengths) else 0.0

    text = TEXT[a] @ TEXT[b] / np.linalg.norm(TEXT[a]) / np.linalg.norm(TEXT[b])
    brands, tags = (product(classes(v, a, n), classes(v, b, n)) for v, n in ((CODES, 4), (TAGS, 5)))
    return (brands + tags + (0.0 if np.isnan(text) else float(text))) / 3


class Graph:
    """Transitions in dictionaries."""

    def __init__(self, dataset: Dataset) -> None:
        pairs: Counter[tuple[int, int]] = Counter()
        for start, end in zip(dataset.offsets[:-1], dataset.train_ends, strict=True):
            own = dataset.items[start:end].tolist()
            pairs.update(pairwise(own))
        self.next = {a: {b: n for (x, b), n in pairs.items() if x == a} for a in range(ITEMS + 1)}

    def rings(self, item: int, hops: int) -> dict[int, int]:
        """Item -> ring."""
        found = dict.fromkeys(self.next[item], 1)
        last = list(found)
        for ring in range(2, hops + 1):
            last = list({b for a in last for b in self.next[a]} - set(found) - {item})
            found |= dict.fromkeys(last, ring)
        return found

    def scores(self, item: int, hops: int, weight: float) -> dict[int, float]:
        most = np.log1p(max(self.next[item].values(), default=1))
        return {
            b: hops
            - ring
            + ((1 + cosine(item, b)) / 2 + weight * np.log1p(self.next[item].get(b, 0)) / most) / (1 + weight)
            for b, ring in self.rings(item, hops).items()
        }


def test_similarity_is_the_mean_of_the_features_cosines() -> None:
    similarity = FeatureSimilarity(FEATURES, ITEMS + 1)
    others = np.arange(1, ITEMS + 1)
    for item in (1, 5, 7, 12):
        want = [cosine(item, other) for other in others.tolist()]
        np.testing.assert_allclose(similarity(item, others), want, atol=1e-5)
    assert not FeatureSimilarity([], ITEMS + 1)(3, others).any()


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_rings_and_scores_are_those_of_a_search(sparse: Dataset, hops: int) -> None:
    signal, graph = fitted(sparse, TransitionGraph(hops=hops, weight=0.5)), Graph(sparse)
    offsets, tables = signal.tables["offsets"], signal.tables
    for item in range(1, ITEMS + 1):
        own = slice(offsets[item], offsets[item + 1])
        items = tables["neighbours"][own].tolist()
        want = graph.scores(item, hops, 0.5)
        assert dict(zip(items, tables["rings"][own].tolist(), strict=True)) == graph.rings(item, hops)
        assert dict(zip(items, tables["scores"][own].tolist(), strict=True)) == pytest.approx(want, rel=1e-5)
        ordered = [want[other] for other in items]
        assert ordered == sorted(ordered, reverse=True)
    assert {ring for item in range(1, ITEMS + 1) for ring in graph.rings(item, hops).values()} == set(
        range(1, hops + 1)
    )


def test_numbers_and_proposals_come_from_the_rings_of_the_newest_events(sparse: Dataset) -> None:
    signal, graph = fitted(sparse, TransitionGraph(candidates=6, items=2, decay=0.3)), Graph(sparse)
    requests, known = asked(sparse)
    numbers, proposed = signal(requests), signal.propose(requests, known)  # type: ignore[attr-defined]
    for row, events in enumerate(histories(requests)):
        for column, item in enumerate(requests.items[row].tolist()):
            for place in range(2):
                ring = graph.rings(events[place], 3).get(item, 0) if place < len(events) and item else 0
                assert numbers[row, column, place] == pytest.approx(1 / ring if ring else 0)
                want = cosine(events[place], item) if ring else 0
                assert numbers[row, column, 2 + place] == pytest.approx(want, abs=1e-5)
        total: Counter[int] = Counter()
        for place, event in enumerate(events[:2]):
            for item, score in graph.scores(event, 3, 1.0).items():
                total[item] += 0.3**place * score  # type: ignore[assignment]  # floats
        left = {item: score for item, score in total.items() if item not in events}
        found = proposed[row][proposed[row] > 0].tolist()
        assert [left[item] for item in found] == pytest.approx(sorted(left.values(), reverse=True)[:6], rel=1e-5)


def test_only_the_most_frequent_edges_and_the_best_items_are_kept(dataset: Dataset) -> None:
    """Without features the number of transitions orders a ring."""
    dataset.item_features = []
    signal, graph = fitted(dataset, TransitionGraph(hops=1, edges=4, top=3)), Graph(dataset)
    offsets = signal.tables["offsets"]
    for item in range(1, ITEMS + 1):
        counts = graph.next[item]
        edges = sorted(counts, key=lambda other: (-counts[other], other))[:4]
        best = sorted(edges, key=lambda other: (-counts[other], -dataset.train_counts[other], other))[:3]
        assert signal.tables["neighbours"][offsets[item] : offsets[item + 1]].tolist() == best


def test_what_happened_after_training_is_not_counted(sparse: Dataset, tmp_path: Path) -> None:
    tables = fitted(sparse, TransitionGraph()).tables
    own = np.arange(len(sparse.items)) - np.repeat(sparse.offsets[:-1], np.diff(sparse.offsets))
    later = own >= np.repeat(sparse.train_ends - sparse.offsets[:-1], np.diff(sparse.offsets))
    assert later.any()
    sparse.items = np.where(later, 1 + sparse.items % ITEMS, sparse.items)
    again = fitted(sparse, TransitionGraph()).tables
    assert all(np.array_equal(table, again[name]) for name, table in tables.items())


def test_no_pair_of_events_says_nothing(dataset: Dataset) -> None:
    dataset.train_ends = dataset.offsets[:-1] + 1
    signal, (requests, known) = fitted(dataset, TransitionGraph(candidates=5)), asked(dataset)
    assert not signal(requests).any()
    assert (signal.propose(requests, known) == -1).all()  # type: ignore[attr-defined]
