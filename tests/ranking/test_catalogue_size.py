"""Only the search of a request may take longer with more items; all else is measured with few and with many."""

import time
import tracemalloc
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from recsys2stage.data.dataset import Dataset
from recsys2stage.options import Seen
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import MLP
from recsys2stage.ranking.signals import (
    EASE,
    SLIT,
    Affinity,
    Content,
    Demographics,
    ItemKNN,
    Neighbours,
    PopularityAsOf,
    Ratings,
    Session,
    Signal,
    TransitionGraph,
    Transitions,
)
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.index import Exact, SearchResult
from recsys2stage.retrieval.towers import TwoTower

SMALL, LARGER, LARGE = 10_000, 200_000, 1_000_000
KNOWN = 1_000  # items with training events, spread over the catalogue; all others are cold
USERS, EVENTS, D, START, DAY = 200, 40, 16, 1_000_000_000, 86_400
SLOWER = 1.2  # at most, with a hundred times as many items
ROUNDS, TRIES = 25, 4


class Stub(Exact):
    """A search that costs nothing: always the same items."""

    found: np.ndarray

    def search(self, queries: np.ndarray, k: int, exclude: Any = None, allowed: Any = None) -> SearchResult:
        items = np.tile(self.found[:k], (len(queries), 1))
        return np.einsum("bd,bkd->bk", queries, self.vectors[items - 1]), items


@cache
def known_items(count: int) -> np.ndarray:
    """The items with training events, ascending."""
    return 1 + np.arange(KNOWN) * (count // KNOWN)


class Log(Dataset):
    """What signals read of a dataset: the same events on any number of items."""

    num_items, has_time, train_counts, item_features, user_features = 0, True, None, (), ()  # type: ignore[assignment]

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.path, self.num_items = Path("synthetic"), count
        self.items = known_items(count)[rng.integers(0, KNOWN, USERS * EVENTS)]
        self.offsets = np.arange(USERS + 1) * EVENTS
        self.train_ends = self.offsets[1:]
        self.times = START + np.sort(rng.integers(0, 300 * DAY, (USERS, EVENTS)), axis=1).ravel()
        self.ratings = rng.integers(1, 6, len(self.items)).astype(np.float32)
        self.train_counts = np.bincount(self.items, minlength=count + 1)
        classes, groups = np.zeros(count + 1, dtype=np.int32), rng.integers(0, 4, USERS).astype(np.int32)
        classes[known_items(count)] = rng.integers(1, 10, KNOWN)
        self.item_features = [{"name": "genre", "kind": "categorical", "size": 10, "values": classes}]
        self.user_features = [{"name": "group", "kind": "categorical", "size": 4, "values": groups}]


@pytest.fixture(scope="module")
def small() -> Recommender:
    return both_stages(SMALL)


@pytest.fixture(scope="module")
def larger() -> Recommender:
    return both_stages(LARGER)


@pytest.fixture(scope="module")
def large() -> Recommender:
    return both_stages(LARGE)


def both_stages(count: int) -> Recommender:
    """Both stages with all signals that need no second retriever."""
    rng, dataset = np.random.default_rng(1), Log(count)
    vectors = np.zeros((count, D), dtype=np.float32)
    vectors[known_items(count) - 1] = rng.standard_normal((KNOWN, D), dtype=np.float32)
    table = np.concatenate([np.zeros_like(vectors[:1]), vectors])
    signals: list[Signal] = [
        *(PopularityAsOf(20, windows=(3_600, 7 * DAY), trending=7 * DAY), Transitions(40), SLIT(20, items=500)),
        *(TransitionGraph(20), ItemKNN(20), EASE(20, items=500)),
        *(Neighbours(20), Content(), Affinity(), Demographics(), Session(), Ratings()),
    ]
    for signal in signals:
        signal.fit(dataset, table)
    torch.manual_seed(0)
    towers = TwoTower(count, 50, D, partial(Transformer, layers=1))
    index = Stub()
    index.build(vectors)
    index.found = known_items(count)[rng.permutation(KNOWN)[:200]]
    catalogue = pl.DataFrame({"item": np.arange(1, count + 1), "item_id": np.arange(1, count + 1).astype(str)})
    options: dict[str, Any] = {"signals": signals, "newest_time": START + 300 * DAY, "recent": 10, "candidates": 200}
    features = [{"name": "genre", "kind": "categorical", "size": 10, "values": 1}]
    model = Recommender(towers, index, None, catalogue, dataset.train_counts, "target", **options)
    model.reranker = Reranker(count, D, features, MLP, signals=model.signal_names).eval()
    model.reranker.load_item_tables(torch.from_numpy(table), dataset.train_counts, dataset.item_features)
    return model


def ask(model: Recommender, length: int, seen: Seen, excluded: int) -> None:
    """A request with a history."""
    items = known_items(model.towers.items.num_items)
    history = [str(item) for item in items[np.arange(length) * 7 % KNOWN]]
    times = [START + 300 * DAY + 60 * event for event in range(length)]
    exclude = [str(item) for item in items[: 3 * excluded : 3]]
    listed = model.recommend(history, 10, times, START + 301 * DAY, exclude, seen=seen)
    assert len(listed) == 10


CASES: dict[str, Callable[[Recommender], None]] = {
    "history": partial(ask, length=40, seen="filter", excluded=0),
    "repeats": partial(ask, length=40, seen="keep", excluded=0),
    "exclude": partial(ask, length=40, seen="filter", excluded=100),
    "no history": partial(ask, length=0, seen="filter", excluded=0),
    "no history, exclude": partial(ask, length=0, seen="filter", excluded=100),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.slow  # 15 seconds to make a million items, and some to measure
@cases
def test_a_request_takes_no_longer_with_more_items(
    case: Callable[[Recommender], None], small: Recommender, large: Recommender
) -> None:
    models, ratios = {SMALL: small, LARGE: large}, []
    for _ in range(TRIES):  # the shortest of some rounds in turn: other processes only make them longer
        best = dict.fromkeys(models, np.inf)
        for number in range(ROUNDS + 1):
            for count, model in models.items():
                start = time.thread_time()
                case(model)
                if number:
                    best[count] = min(best[count], time.thread_time() - start)
        ratios.append(best[LARGE] / best[SMALL])
        if ratios[-1] <= SLOWER:
            return
    pytest.fail(f"with {LARGE // SMALL} times as many items a request takes {min(ratios):.2f} times as long")


@cases
def test_a_request_allocates_nothing_as_long_as_the_catalogue(
    case: Callable[[Recommender], None], small: Recommender, larger: Recommender
) -> None:
    peaks = {}
    for count, model in {SMALL: small, LARGER: larger}.items():
        case(model)
        tracemalloc.start()
        try:
            case(model)
            peaks[count] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peaks[LARGER] < peaks[SMALL] + LARGER / 4  # bytes: a mask of the items alone has LARGER
