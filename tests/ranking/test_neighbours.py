"""Cosines and neighbourhoods against loops over pairs of vectors in double."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from recsys2stage.data.batches import Ragged, left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.base import Requests, load_signals, save_signals, specify
from recsys2stage.ranking.signals.neighbours import Neighbours

V, D, B, C = 60, 6, 30, 12
ZERO = [17, 60]  # items whose vectors are zero


@pytest.fixture
def vectors(rng: np.random.Generator) -> np.ndarray:
    """Of all lengths."""
    vectors = (rng.standard_normal((V + 1, D)) * rng.uniform(0.1, 5, (V + 1, 1))).astype(np.float32)
    vectors[[0, *ZERO]] = 0
    return vectors


@pytest.fixture
def asked(rng: np.random.Generator, vectors: np.ndarray) -> tuple[Requests, Ragged]:
    """Histories of 0 to 30 events with repeats, as many as there are known items."""
    lengths = np.append([0, 1, 2, 3, 30], rng.integers(0, 31, B - 5))
    offsets = np.cumsum([0, *lengths])
    events = rng.integers(1, V + 1, offsets[-1])
    history = left_aligned(events, np.arange(len(events)), offsets[:-1], offsets[1:])
    items, now = rng.integers(0, V + 1, (B, C)), np.zeros(B, np.int64)
    return Requests(items, history, now, vectors, vectors), Ragged(events, offsets)


@pytest.fixture
def dataset(ragged: Path) -> Dataset:
    return Dataset(ragged)  # nothing of it is looked at


def cosine(vectors: np.ndarray, a: int, b: int) -> float:
    x, y = vectors[a].astype(np.float64), vectors[b].astype(np.float64)
    length = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / length if length else 0.0


def nearest(vectors: np.ndarray, item: int, count: int) -> list[int]:
    if item in (0, *ZERO):
        return []
    others = [other for other in range(1, V + 1) if other not in (item, *ZERO)]
    return sorted(others, key=lambda other: -cosine(vectors, item, other))[:count]


def histories(requests: Requests) -> list[list[int]]:
    rows = zip(requests.history.items, requests.history.lengths, strict=True)
    return [items[:length][::-1].tolist() for items, length in rows]  # newest first


def fitted(dataset: Dataset, vectors: np.ndarray, **options: object) -> Neighbours:
    signal = Neighbours(**options)  # type: ignore[arg-type]  # options of all sorts
    signal.fit(dataset, vectors)
    return signal


@pytest.mark.parametrize("options", [{}, {"history": 1, "count": 1}, {"history": 2, "count": 7}, {"history": 99}])
def test_the_numbers_equal_a_loop_over_pairs(
    dataset: Dataset, asked: tuple[Requests, Ragged], options: dict[str, int]
) -> None:
    requests, _ = asked
    signal = fitted(dataset, requests.vectors, **options)
    numbers = signal(requests)
    assert numbers.dtype == np.float32
    assert numbers.shape == (B, C, len(signal.names))
    for row, events in enumerate(histories(requests)):
        for column, item in enumerate(requests.items[row].tolist()):
            if item == 0 or not events:
                assert not numbers[row, column].any()
                continue
            cosines = [cosine(requests.vectors, item, event) for event in events[: signal.history]]
            three = sorted(cosines)[-3:]
            near = nearest(requests.vectors, item, signal.count)
            want = [cosines[0], max(cosines), sum(three) / len(three), sum(cosines) / len(cosines)]
            want.append(len(set(near) & set(events)) / signal.count)
            assert numbers[row, column] == pytest.approx(want, abs=1e-6)
    assert (numbers[..., 4] > 0).any()


@pytest.mark.parametrize("history", [1, 4])
@pytest.mark.parametrize("count", [3, 20])
def test_proposals_are_near_the_newest_items_and_not_known(
    dataset: Dataset, asked: tuple[Requests, Ragged], history: int, count: int
) -> None:
    requests, known = asked
    signal = fitted(dataset, requests.vectors, candidates=8, history=history, count=count, decay=0.5)
    proposed = signal.propose(requests, known)
    assert proposed.shape == (B, 8)
    assert proposed.dtype == np.int64
    for row, events in enumerate(histories(requests)):
        scores: dict[int, float] = defaultdict(float)
        for place, event in enumerate(events[:history]):
            for item in nearest(requests.vectors, event, count):
                if (near := cosine(requests.vectors, event, item)) > 0 and item not in events:
                    scores[item] += 0.5**place * near
        want = sorted(scores, key=lambda item: -scores[item])[:8]
        assert proposed[row].tolist() == want + [-1] * (8 - len(want))
    assert (proposed[0] == -1).all(), "nothing is near to no history"
    assert (proposed > 0).any()


def test_blocks_change_nothing(
    dataset: Dataset, asked: tuple[Requests, Ragged], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, known = asked
    whole = fitted(dataset, requests.vectors, candidates=5)
    numbers, proposed = whole(requests), whole.propose(requests, known)
    monkeypatch.setattr("recsys2stage.ranking.signals.neighbours.NUMBERS_IN_FLIGHT", 100)
    monkeypatch.setattr("recsys2stage.ranking.signals.neighbours.ROWS_IN_FLIGHT", 4)
    parts = fitted(dataset, requests.vectors, candidates=5)
    assert np.array_equal(parts.tables["nearest"], whole.tables["nearest"])
    np.testing.assert_allclose(parts(requests), numbers, atol=1e-6)
    assert np.array_equal(parts.propose(requests, known), proposed)


def test_the_tables_hold_the_nearest_first(dataset: Dataset, vectors: np.ndarray) -> None:
    signal = fitted(dataset, vectors, count=9)
    for item in range(V + 1):
        near = nearest(vectors, item, 9)
        assert signal.tables["nearest"][item].tolist() == (near or [0] * 9)
        assert signal.tables["cosines"][item] == pytest.approx(
            [cosine(vectors, item, other) for other in near] or [0.0] * 9, abs=1e-6
        )


def test_fewer_items_than_neighbours_are_wanted(dataset: Dataset) -> None:
    """Two that are alike, one that is not, and one without a vector; then a single item."""
    vectors = np.array([[0, 0], [1, 0], [2, 0.1], [-1, 0], [0, 0]], dtype=np.float32)
    signal = fitted(dataset, vectors, candidates=3)
    history = left_aligned(np.array([1, 3, 4]), np.arange(3), np.array([0, 1, 2]), np.array([1, 2, 3]))
    nothing = Ragged(np.array([1, 3, 4]), np.arange(4))
    requests = Requests(np.tile([2, 4], (3, 1)), history, np.zeros(3, np.int64), vectors, vectors)
    assert signal.propose(requests, nothing).tolist() == [[2, -1, -1], [-1] * 3, [-1] * 3]
    seen = signal(requests)[..., 4]
    assert seen.tolist() == [[0.5, 0], [0.5, 0], [0, 0]]  # 2 has two neighbours, of which each knows one

    signal = fitted(dataset, vectors[:2], candidates=3)
    history = history._replace(items=history.items[:1], times=history.times[:1], lengths=history.lengths[:1])
    requests = Requests(np.array([[1]]), history, np.zeros(1, np.int64), vectors[:2], vectors)
    assert signal(requests).tolist() == [[[1, 1, 1, 1, 0]]]
    assert signal.propose(requests, Ragged(np.array([1]), np.array([0, 1]))).tolist() == [[-1, -1, -1]]


def test_it_looks_at_vectors_and_not_at_how_long_they_are(
    dataset: Dataset, asked: tuple[Requests, Ragged], rng: np.random.Generator
) -> None:
    requests, known = asked
    longer = requests.vectors * np.float32(2) ** rng.integers(-3, 4, (V + 1, 1)).astype(np.float32)
    one, other = (fitted(dataset, vectors, candidates=5) for vectors in (requests.vectors, longer))
    np.testing.assert_allclose(other(requests._replace(vectors=longer)), one(requests), atol=1e-6)
    assert np.array_equal(one.propose(requests, known), other.propose(requests, known))


def test_saved_and_loaded_it_says_the_same(dataset: Dataset, asked: tuple[Requests, Ragged], tmp_path: Path) -> None:
    requests, known = asked
    signal = fitted(dataset, requests.vectors, candidates=4, count=5)
    save_signals([signal], tmp_path / "signals")
    (loaded,) = load_signals(tmp_path / "signals")
    assert specify(loaded) == specify(signal)
    assert np.array_equal(loaded(requests), signal(requests))
    assert isinstance(loaded, Neighbours)
    assert np.array_equal(loaded.propose(requests, known), signal.propose(requests, known))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"history": 0}, "history is 0"), ({"count": 0}, "count is 0"), ({"decay": 0.0}, "decay is 0.0")],
)
def test_options_that_cannot_be_are_an_error(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Neighbours(**options)  # type: ignore[arg-type]  # options of all sorts
