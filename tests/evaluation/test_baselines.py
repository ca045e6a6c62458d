"""The baselines against counting by hand, on training events only."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pipeline_fixtures import Run
from worlds import Event, write_movielens

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens
from recsys2stage.evaluation.baselines import Baseline, Markov, Popularity

SEQUENCES = {
    1: [1, 2, 3, 4, 5],  # trains on 1 2 3
    2: [1, 2, 4, 3, 6],  # trains on 1 2 4
    3: [2, 4, 1, 5, 3],  # trains on 2 4 1
    4: [6, 5],  # too short to evaluate: trains on 6 5
    5: [4, 2, 1],  # trains on 4 alone: no transition
}
TRAIN = [[1, 2, 3], [1, 2, 4], [2, 4, 1], [6, 5], [4]]
V = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("baselines")
    events: list[Event] = [
        (user, item, 4.0, 1_000_000_000 + place)
        for user, items in SEQUENCES.items()
        for place, item in enumerate(items)
    ]
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data")
    return Dataset(folder / "data")


def all_scores(baseline: Baseline, last: list[int]) -> np.ndarray:
    """Scores of items 0..V."""
    items = np.arange(baseline.size)
    return baseline.scores(np.array(last), np.broadcast_to(items, (len(last), len(items))))


def test_popularity_is_the_training_count(dataset: Dataset) -> None:
    counts = Counter(item for items in TRAIN for item in items)
    scores = all_scores(Popularity(dataset), [3, 0, 6])
    assert scores.shape == (3, V + 1)
    assert (scores == [0] + [counts[item] for item in range(1, V + 1)]).all()


def test_markov_counts_what_came_right_after_within_a_users_training_events(dataset: Dataset) -> None:
    pairs = Counter(pair for items in TRAIN for pair in pairwise(items))
    counts = Counter(item for items in TRAIN for item in items)
    total = sum(counts.values()) + 1
    scores = all_scores(Markov(dataset), [*range(V + 1)])
    for last in range(V + 1):
        for item in range(1, V + 1):
            expected = pairs[last, item] + counts[item] / total
            assert scores[last, item] == pytest.approx(expected), (last, item)


def test_popularity_never_outweighs_a_transition_and_orders_what_is_tied(dataset: Dataset) -> None:
    scores = all_scores(Markov(dataset), [2, 6, 0])[:, 1:]
    assert (1 + np.argsort(-scores[0], kind="stable")).tolist()[:3] == [
        4,
        3,
        1,
    ]  # 2 -> 4 twice, 2 -> 3 once, then by count
    assert 1 + scores[1].argmax() == 5  # seen once, beside items seen three times
    assert (scores[2] < 1).all()  # nobody's newest item: popularity alone


def test_a_dataset_without_any_transition_leaves_popularity(tmp_path: Path) -> None:
    events: list[Event] = [
        (user, item, 4.0, 1_000_000_000 + item) for user in (1, 2, 3) for item in (user, user + 1, user + 2)
    ]
    prepare(MovieLens(write_movielens(tmp_path / "raw", events)), tmp_path / "data")
    dataset = Dataset(tmp_path / "data")  # each user trains on one event
    scores = all_scores(Markov(dataset), [1, 5])
    assert (np.argsort(-scores, kind="stable") == np.argsort(-dataset.train_counts, kind="stable")).all()


@pytest.mark.parametrize("kind", [Popularity, Markov])
def test_ranks_and_best_items_are_those_of_all_scores(kind: type[Baseline], trained: Run) -> None:
    dataset = Dataset(trained.data)
    baseline, rng, count = kind(dataset), np.random.default_rng(0), dataset.num_items
    last = rng.integers(0, count + 1, 300)
    last[:5] = 0
    excluded = rng.random((300, count + 1)) < rng.choice([0, 0.1, 0.9], (300, 1))
    excluded[7, 1:] = True
    excluded[:, 0] = False
    rows, values = np.nonzero(excluded)
    ragged = Ragged(values, np.searchsorted(rows, np.arange(301)))
    scores = all_scores(baseline, last.tolist())
    scores[excluded] = -np.inf
    target = rng.integers(1, count + 1, 300)
    own = scores[np.arange(300), target]
    assert baseline.ranks(last, target, ragged).tolist() == (scores[:, 1:] >= own[:, None]).sum(1).tolist()
    for row, items in enumerate(baseline.top(last, ragged, 10).tolist()):
        order = np.lexsort((np.arange(1, count + 1), -scores[row, 1:])) + 1  # ties: the lower number first
        best = [item for item in order.tolist() if not excluded[row, item]][:10]
        assert items == best + [-1] * (10 - len(best)), row
