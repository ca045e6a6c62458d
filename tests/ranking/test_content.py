"""Content against regressions fitted anew without each item; and what it must not know."""

from typing import Any

import numpy as np
import pytest

from recsys2stage.data.batches import Ragged, left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources.table import Feature, SideTable, Table
from recsys2stage.ranking.signals import Content, Requests
from recsys2stage.ranking.signals.content import columns

ITEMS, D = 40, 5
TOLD = {"kind": Feature("categorical"), "tags": Feature("multi", separator="|"), "price": Feature("numeric")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Items of three kinds with some tags and a price, some unknown; item 40 stands in a test event alone."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("content")
    events = ["user_id,item_id,timestamp"]
    for user in range(60):
        taken = rng.choice(ITEMS - 1, 6, replace=False, p=np.arange(ITEMS - 1, 0, -1) / sum(range(ITEMS))) + 1
        taken[-1] = ITEMS if user == 0 else taken[-1]
        events += [f"{user},{item},{place}" for place, item in enumerate(taken)]
    things = ["item_id,kind,tags,price"]
    for item in range(1, ITEMS + 1):
        tags = "|".join(sorted({"abcd"[item % 4], "abcd"[item % 3]}))
        things.append(f"{item},{('x', 'y', '')[item % 3]},{tags if item % 5 else ''},{item / 7 if item % 6 else ''}")
    (folder / "events.csv").write_text("\n".join([*events, ""]))
    (folder / "items.csv").write_text("\n".join([*things, ""]))
    prepare(Table(folder / "events.csv", items=SideTable("items.csv", "item_id", TOLD)), folder / "data")
    return Dataset(folder / "data")


@pytest.fixture
def vectors(rng: np.random.Generator, dataset: Dataset) -> np.ndarray:
    table = rng.normal(size=(dataset.num_items + 1, D)).astype(np.float32)
    table[0] = 0
    return table


def fitted(dataset: Dataset, vectors: np.ndarray, **options: Any) -> Content:
    signal = Content(**options)
    signal.fit(dataset, vectors)
    return signal


def features_of(dataset: Dataset, popular: bool) -> np.ndarray:
    """A row for each item: a one, its class, its tags, the price over training events, powers of popularity."""
    kinds, tags, price = (np.asarray(feature["values"]) for feature in dataset.item_features)
    counts = np.asarray(dataset.train_counts)
    known = np.isfinite(price.ravel()[1:])
    value, weight = price.ravel()[1:][known].astype(float), counts[1:][known]
    mean = (weight * value).sum() / weight.sum()
    spread = np.sqrt((weight * (value - mean) ** 2).sum() / weight.sum())
    log = np.log1p(counts[1:])
    trained = counts[1:] > 0
    z = (log - log[trained].mean()) / log[trained].std()
    rows = []
    for item in range(1, dataset.num_items + 1):
        row = [1.0]
        row += [float(kinds.ravel()[item] == one) for one in range(1, dataset.item_features[0]["size"])]
        row += [float(one in tags[item]) for one in range(1, dataset.item_features[1]["size"])]
        row.append((price.ravel()[item] - mean) / spread if known[item - 1] else 0.0)
        rows.append(row + ([z[item - 1], z[item - 1] ** 2, z[item - 1] ** 3] if popular else []))
    return np.array(rows)


@pytest.mark.parametrize("popular", [False, True])
def test_vectors_are_what_the_other_items_make_of_features(
    dataset: Dataset, vectors: np.ndarray, popular: bool
) -> None:
    """The regression is fitted once for each item, without it."""
    signal, features = fitted(dataset, vectors, ridge=2.0), features_of(dataset, popular)
    weights = np.log1p(np.asarray(dataset.train_counts)[1:].astype(float))
    got = signal.tables["vectors_popular" if popular else "vectors"]
    assert not got[0].any()
    assert (weights == 0).any()
    for item in range(dataset.num_items):
        w = np.where(np.arange(len(weights)) == item, 0, weights)
        gram = features.T @ (w[:, None] * features) + 2.0 * weights[weights > 0].mean() * np.eye(features.shape[1])
        want = features[item] @ np.linalg.solve(gram, features.T @ (w[:, None] * vectors[1:]))
        np.testing.assert_allclose(got[item + 1], want / np.linalg.norm(want), atol=1e-4)


def test_an_item_s_own_vector_says_nothing_of_it(dataset: Dataset, vectors: np.ndarray) -> None:
    other = vectors.copy()
    other[7] = 100
    one, two = (fitted(dataset, table).tables["vectors"] for table in (vectors, other))
    np.testing.assert_allclose(one[7], two[7], atol=1e-4)
    assert not np.allclose(one[8], two[8], atol=1e-2)


def test_what_no_training_event_shows_has_no_say(
    dataset: Dataset, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items, features and vectors that only later events know change nothing of the others."""
    before = fitted(dataset, vectors).tables
    unseen = np.flatnonzero(np.asarray(dataset.train_counts)[1:] == 0) + 1
    features, other = [dict(feature) for feature in dataset.item_features], vectors.copy()
    for feature in features:
        feature["values"] = np.array(feature["values"])
        feature["values"][unseen] = 1
    other[unseen] = 9
    monkeypatch.setattr(dataset, "item_features", features)
    after, rest = fitted(dataset, other).tables, np.setdiff1d(np.arange(len(vectors)), unseen)
    assert not np.allclose(before["vectors"][unseen], after["vectors"][unseen], atol=1e-3)
    for name in ("vectors", "vectors_popular"):
        np.testing.assert_allclose(before[name][rest], after[name][rest], atol=1e-6)


def test_numbers_are_cosines_of_the_query(dataset: Dataset, vectors: np.ndarray, rng: np.random.Generator) -> None:
    signal = fitted(dataset, vectors)
    queries = 7 * rng.normal(size=(2, D)).astype(np.float32)
    history = left_aligned(np.array([3, 4]), np.arange(2), np.array([0, 2]), np.array([2, 2]))
    items = np.array([[5, 0, 9], [5, 0, 9]])
    said = signal(Requests(items, history, np.zeros(2, np.int64), vectors, queries))
    for number, name in enumerate(("vectors", "vectors_popular")):
        want = signal.tables[name][[5, 9]] @ queries[0] / np.linalg.norm(queries[0])
        np.testing.assert_allclose(said[0, [0, 2], number], want, rtol=1e-5)
    assert not said[0, 1].any()
    assert not said[1].any(), "without a history the query says nothing"


def test_proposals_are_items_that_no_training_event_has_shown(
    dataset: Dataset, vectors: np.ndarray, rng: np.random.Generator
) -> None:
    counts = np.asarray(dataset.train_counts)
    queries = rng.normal(size=(2, D)).astype(np.float32)
    history = left_aligned(np.array([3, 4]), np.arange(2), np.array([0, 1]), np.array([1, 2]))
    requests = Requests(np.zeros((2, 0), np.int64), history, np.zeros(2, np.int64), vectors, queries)
    unseen = set((1 + np.flatnonzero(counts[1:] == 0)).tolist())
    known = Ragged(np.array([min(unseen)]), np.array([0, 1, 1]))
    first, second = fitted(dataset, vectors, candidates=30).propose(requests, known)
    assert set(first[first > 0].tolist()) == unseen - {min(unseen)}
    assert set(second[second > 0].tolist()) == unseen
    rare = fitted(dataset, vectors, candidates=4, rare=5)
    scores = rare.tables["vectors"] @ queries[1]
    scores[0] = scores[counts > 5] = -np.inf
    assert rare.propose(requests, known)[1].tolist() == np.argsort(-scores)[:4].tolist()


def test_rare_classes_are_not_told_apart(dataset: Dataset) -> None:
    kind, tags = dataset.item_features[:2]
    counts = np.append(0, np.ones(dataset.num_items))
    all_tags = columns(tags, counts, classes=1000)
    two = columns(tags, counts, classes=2)
    carried = np.bincount(all_tags[all_tags >= 0])
    assert (np.diff(carried) <= 0).all(), "numbered from the most frequent on"
    assert np.array_equal(two, np.where(all_tags < 2, all_tags, -1))
    known = np.asarray(kind["values"]).ravel() != 0
    assert np.array_equal(columns(kind, counts, classes=5).ravel() >= 0, known)


def test_vectors_are_features_too(dataset: Dataset, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the retriever's vectors are a linear map of declared ones, the other items show it."""
    flat = vectors.copy()
    flat[:, 3:] = 0
    told = flat[:, :3] @ np.array([[1, 2, 0], [0, 1, 0], [3, 0, 1.0]])
    text = {"name": "text", "kind": "vector", "size": None, "values": told.astype(np.float32)}
    monkeypatch.setattr(dataset, "item_features", [text])
    got = fitted(dataset, flat, ridge=1e-6).tables["vectors"]
    want = flat[1:] / np.linalg.norm(flat[1:], axis=1, keepdims=True)
    np.testing.assert_allclose(got[1:], want, atol=1e-3)


def test_wrong_options_and_data_are_refused(
    dataset: Dataset, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"ridge is 0\.0, expected a number of items above 0"):
        Content(ridge=0.0)
    with pytest.raises(ValueError, match="rare is -1, expected at least 0"):
        Content(rare=-1)
    monkeypatch.setattr(dataset, "item_features", [])
    with pytest.raises(ValueError, match=r"the items of .* have no features; declare some when the data are"):
        Content().fit(dataset, vectors)
