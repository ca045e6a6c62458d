"""SLIT against least squares over one row a training event, and nothing of validation and test."""

from typing import Any

import numpy as np
import pytest
from test_transitions import ITEMS, NO_VECTORS, asked, histories
from test_transitions import dataset as dataset
from test_transitions import folder as folder

from recsys2stage.data.batches import left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals import SLIT, Requests

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one event": {"history": 1, "decays": [1.0]},
    "short": {"history": 3, "decays": [0.9, 0.005], "ridge": 2.0},
    "few items": {"items": 10, "decays": [0.7]},
}


def fitted(dataset: Dataset, **options: Any) -> SLIT:
    signal = SLIT(**options)
    signal.fit(dataset, NO_VECTORS)
    return signal


def marked(events: list[int], decay: float, reach: int, frequent: list[int]) -> np.ndarray:
    """x of a history, its newest event first."""
    x = np.zeros(len(frequent))
    for place, item in enumerate(events[:reach]):
        if item in frequent:
            x[frequent.index(item)] += decay**place
    return x


def model(dataset: Dataset, signal: SLIT, decay: float) -> tuple[list[int], int, np.ndarray]:
    """The items with weights, how many events count, and the weights, by least squares with the penalty as rows."""
    reach = sum(decay**place >= 0.01 for place in range(signal.history))
    counts = np.asarray(dataset.train_counts)
    frequent = sorted(sorted(np.flatnonzero(counts).tolist(), key=lambda item: (-counts[item], item))[: signal.items])
    x, y = [], []
    for start, end in zip(dataset.offsets[:-1], dataset.train_ends, strict=True):
        own = dataset.items[start:end].tolist()
        for place in range(1, len(own)):
            x.append(marked(own[:place][::-1], decay, reach, frequent))
            y.append(marked([own[place]], 1.0, 1, frequent))
    rows, targets = np.array(x), np.array(y)
    penalty = signal.ridge * np.square(rows).sum() / len(frequent)
    rows = np.concatenate([rows, np.eye(len(frequent)) * penalty**0.5])
    targets = np.concatenate([targets, np.zeros((len(frequent), len(frequent)))])
    return frequent, reach, np.linalg.lstsq(rows, targets, rcond=None)[0]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_numbers_equal_least_squares(dataset: Dataset, options: dict[str, Any]) -> None:
    signal, (requests, _) = fitted(dataset, **options), asked(dataset)
    numbers = signal(requests)
    for number, decay in enumerate(signal.decays):
        frequent, reach, exact = model(dataset, signal, decay)
        weights = signal.tables["weights"][1:, 1:, number].astype(np.float64)
        np.testing.assert_allclose(weights, exact, rtol=1e-3, atol=1e-6)  # three digits are kept
        for row, events in enumerate(histories(requests)):
            said = marked(events, decay, reach, frequent) @ weights
            for column, item in enumerate(requests.items[row].tolist()):
                s = said[frequent.index(item)] if item in frequent else 0.0
                want = np.sign(s) * np.log1p(100 * abs(s))
                assert numbers[row, column, number] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_proposals_have_the_largest_sums_and_are_not_known(dataset: Dataset, options: dict[str, Any]) -> None:
    signal, (requests, known) = fitted(dataset, candidates=6, **options), asked(dataset)
    proposed = signal.propose(requests, known)
    assert proposed.shape == (len(requests.request_time), 6)
    models = [(decay, *model(dataset, signal, decay)) for decay in signal.decays]
    frequent = models[0][1]
    for row, events in enumerate(histories(requests)):
        said = sum(marked(events, decay, reach, frequent) @ weights for decay, _, reach, weights in models)
        scores = {item: float(s) for item, s in zip(frequent, said, strict=True) if item not in events and s > 1e-7}
        chosen = proposed[row][proposed[row] > 0].tolist()
        assert [scores[item] for item in chosen] == pytest.approx(sorted(scores.values(), reverse=True)[:6], abs=1e-3)


def test_what_happened_after_training_is_not_counted(dataset: Dataset) -> None:
    tables = fitted(dataset).tables
    own = np.arange(len(dataset.items)) - np.repeat(dataset.offsets[:-1], np.diff(dataset.offsets))
    later = own >= np.repeat(dataset.train_ends - dataset.offsets[:-1], np.diff(dataset.offsets))
    assert later.any()
    dataset.items = np.where(later, 1 + dataset.items % ITEMS, dataset.items)
    again = fitted(dataset).tables
    assert all(np.array_equal(table, again[name]) for name, table in tables.items())


def test_two_events_that_say_the_same_are_not_counted_twice(dataset: Dataset) -> None:
    """3 follows the pair 1, 2; each of them alone is half of what says so."""
    dataset.items, dataset.times = np.tile([1, 2, 3, 4, 5], 1000), np.arange(5000)
    dataset.offsets, dataset.train_ends = np.array([0, 5000]), np.array([5000])
    signal = fitted(dataset, decays=[1.0], history=2, ridge=1e-9)
    history = left_aligned(np.array([1, 2]), np.arange(2), np.array([0, 1, 0]), np.array([2, 2, 1]))
    said = signal(Requests(np.full((3, 1), 3), history, np.zeros(3, np.int64), NO_VECTORS, NO_VECTORS))[:, 0, 0]
    both, two, one = np.expm1(said) / 100
    assert both == pytest.approx(1.0, abs=1e-3)
    assert two + one == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("models", [1, 2, 3, 4])
def test_tables_of_earlier_versions_say_the_same(dataset: Dataset, models: int) -> None:
    """They have a table of weights for each model."""
    signal, (requests, known) = fitted(dataset, candidates=5, decays=[0.4, 0.6, 0.8, 1.0][:models]), asked(dataset)
    old = {f"weights_{number}": signal.tables["weights"][..., number].copy() for number in range(models)}
    other = SLIT(**{name: getattr(signal, name) for name in ("candidates", "decays", "ridge", "history", "items")})
    other.restore({"row": signal.tables["row"], **old})
    assert np.array_equal(other(requests), signal(requests))
    assert np.array_equal(other.propose(requests, known), signal.propose(requests, known))


def test_no_pair_of_events_says_nothing(dataset: Dataset) -> None:
    requests, known = asked(dataset)
    dataset.offsets = np.arange(len(dataset.items) + 1)
    dataset.train_ends = dataset.offsets[1:]
    signal = fitted(dataset, candidates=2)
    assert not signal(requests).any()
    assert (signal.propose(requests, known) == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decays": []}, r"decays is \[\], expected a list"),
        ({"decays": [0.5, 0.501]}, r"decays is \[0.5, 0.501\], expected .*, a hundredth apart"),
        ({"decays": [1.5]}, r"decays is \[1.5\], expected a list of numbers above 0 to 1"),
        ({"ridge": 0.0}, "ridge is 0.0, expected a number above 0"),
        ({"history": 0}, "history is 0, expected at least 1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLIT(**options)
