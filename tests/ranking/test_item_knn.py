"""ItemKNN and EASE against sets of users and items, and nothing of validation and test."""

import numpy as np
import pytest
from test_transitions import ITEMS, NO_VECTORS, USERS, asked, histories
from test_transitions import dataset as dataset
from test_transitions import folder as folder

from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals import EASE, ItemKNN, Proposer
from recsys2stage.ranking.signals import item_knn as module


def fitted(dataset: Dataset, signal: Proposer) -> Proposer:
    signal.fit(dataset, NO_VECTORS)
    return signal


def user_sets(dataset: Dataset) -> np.ndarray:
    """(U, V) whether the user has the item among the training events."""
    sets = np.zeros((USERS, ITEMS), dtype=bool)
    for user, (start, end) in enumerate(zip(dataset.offsets[:-1], dataset.train_ends, strict=True)):
        sets[user, dataset.items[start:end] - 1] = True
    return sets


def cosines(dataset: Dataset, shrink: float, count: int) -> np.ndarray:
    """(V, V) cosines of each item's nearest ones, 0 elsewhere."""
    sets = user_sets(dataset).astype(float)
    together, root = sets.T @ sets, np.sqrt(sets.sum(0))
    near = together / (root[:, None] * root + shrink)
    np.fill_diagonal(near, 0)
    for row in near:
        order = sorted(range(ITEMS), key=lambda item: (-row[item], item))
        row[order[count:]] = 0
    return near


@pytest.mark.parametrize("in_flight", [1, 1 << 23])
def test_the_numbers_are_those_of_sets_of_users(
    dataset: Dataset, in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAIRS_IN_FLIGHT", in_flight)
    monkeypatch.setattr(module, "CELLS_PER_PAIR", 0 if in_flight == 1 else 4)
    signal = fitted(dataset, ItemKNN(6, neighbours=5, shrink=2.0, history=4, decay=0.5))
    near, (requests, known) = cosines(dataset, 2.0, 5), asked(dataset)
    numbers, proposed = signal(requests), signal.propose(requests, known)
    for row, events in enumerate(histories(requests)):
        newest = [event if event not in events[:place] else 0 for place, event in enumerate(events[:4])]
        parts = np.array([near[event - 1] * (event > 0) for event in newest]).reshape(-1, ITEMS)
        weighted = (0.5 ** np.arange(len(parts))) @ parts
        for column, item in enumerate(requests.items[row].tolist()):
            want = [np.log1p(weighted[item - 1]), parts[:, item - 1].max(initial=0)] if item else [0, 0]
            assert numbers[row, column].tolist() == pytest.approx(want, abs=1e-5)
        left = sorted((weighted[item - 1] for item in range(1, ITEMS + 1) if item not in events), reverse=True)
        found = [weighted[item - 1] for item in proposed[row] if item > 0]
        assert found == pytest.approx([score for score in left if score > 0][:6], abs=1e-5)


@pytest.mark.parametrize("items", [ITEMS, 9])
def test_ease_is_the_inverse_with_a_zero_diagonal(dataset: Dataset, items: int) -> None:
    signal = fitted(dataset, EASE(6, ridge=0.4, history=5, items=items))
    counts = np.asarray(dataset.train_counts)[1:]
    frequent = np.sort(np.argsort(-counts, kind="stable")[:items])
    frequent = frequent[counts[frequent] > 0]
    sets = user_sets(dataset)[:, frequent].astype(float)
    gram = sets.T @ sets
    gram += 0.4 * np.diag(gram).mean() * np.eye(len(gram))
    # for each item: least squares of its column on the others, with the penalty
    weights = np.zeros((ITEMS, ITEMS))
    for place, item in enumerate(frequent):
        others = np.arange(len(frequent)) != place
        own = np.linalg.solve(gram[others][:, others], gram[others][:, place])
        weights[frequent[others], item] = own
    requests, known = asked(dataset)
    numbers, proposed = signal(requests), signal.propose(requests, known)
    for row, events in enumerate(histories(requests)):
        said = sum((weights[item - 1] for item in set(events[:5])), np.zeros(ITEMS))
        for column, item in enumerate(requests.items[row].tolist()):
            s = said[item - 1] if item else 0.0
            assert numbers[row, column, 0] == pytest.approx(np.sign(s) * np.log1p(100 * abs(s)), abs=0.01)
        found = [said[item - 1] for item in proposed[row] if item > 0]
        left = sorted((said[item - 1] for item in range(1, ITEMS + 1) if item not in events), reverse=True)
        assert found == pytest.approx([score for score in left if score > 0][:6], abs=2e-3)


@pytest.mark.parametrize("kind", [ItemKNN, EASE])
def test_what_happened_after_training_is_not_counted(dataset: Dataset, kind: type[Proposer]) -> None:
    tables = fitted(dataset, kind()).tables
    own = np.arange(len(dataset.items)) - np.repeat(dataset.offsets[:-1], np.diff(dataset.offsets))
    later = own >= np.repeat(dataset.train_ends - dataset.offsets[:-1], np.diff(dataset.offsets))
    assert later.any()
    dataset.items = np.where(later, 1 + dataset.items % ITEMS, dataset.items)
    again = fitted(dataset, kind()).tables
    assert all(np.array_equal(table, again[name]) for name, table in tables.items())


@pytest.mark.parametrize("kind", [ItemKNN, EASE])
def test_no_training_event_says_nothing(dataset: Dataset, kind: type[Proposer]) -> None:
    dataset.train_ends = dataset.offsets[:-1]
    signal, (requests, known) = fitted(dataset, kind(candidates=5)), asked(dataset)
    assert not signal(requests).any()
    assert (signal.propose(requests, known) == -1).all()
