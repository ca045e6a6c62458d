"""The baselines against counting by hand, on training events only."""

from collections import Counter
from collections.abc import Callable
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
from recsys2stage.evaluation import baselines
from recsys2stage.evaluation.baselines import (
    EASE,
    Baseline,
    ItemKNN,
    Markov,
    PersonalTopFrequency,
    Popularity,
    Scored,
    TransitionGraph,
    fit_baselines,
    specify_baseline,
)

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


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A user of 2 1 3 1 2 4 | 2 | 1, with repeats."""
    folder = tmp_path_factory.mktemp("repeats")
    events: list[Event] = [(1, item, 4.0, 10**9 + n) for n, item in enumerate([2, 1, 3, 1, 2, 4, 2, 1])]
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data", repeats="keep")
    return Dataset(folder / "data")


def ragged(*histories: list[int]) -> Ragged:
    return Ragged(
        np.array([item for own in histories for item in own], dtype=np.int64), np.cumsum([0, *map(len, histories)])
    )


def scores(baseline: Baseline, history: list[int]) -> dict[int, float]:
    """The scored items of one history."""
    found = baseline.score(ragged(history))
    assert (found.rows == 0).all()
    assert len(set(found.items.tolist())) == len(found.items)
    return dict(zip(found.items.tolist(), found.scores.tolist(), strict=True))


def levels(baseline: Baseline, history: list[int]) -> np.ndarray:
    """Numbers of items 0..V in a baseline's order: scored items first, then ties and others by popularity."""
    scored = scores(baseline, history)
    keys = [(item in scored, scored.get(item, 0.0), float(baseline.popularity[item])) for item in range(baseline.size)]
    return np.array([sorted(set(keys)).index(key) for key in keys], dtype=float)


def test_popularity_is_the_training_count(dataset: Dataset) -> None:
    counts = Counter(item for items in TRAIN for item in items)
    baseline = Popularity().fit(dataset)
    assert baseline.popularity.tolist() == [0] + [counts[item] for item in range(1, V + 1)]
    assert scores(baseline, [3, 6]) == scores(baseline, []) == {}


def test_markov_counts_what_came_right_after_within_a_users_training_events(dataset: Dataset) -> None:
    pairs = Counter(pair for items in TRAIN for pair in pairwise(items))
    baseline = Markov().fit(dataset)
    for last in range(1, V + 1):
        want = {after: count for (before, after), count in pairs.items() if before == last}
        assert scores(baseline, [5, last]) == want
    assert scores(baseline, []) == {}


def test_popularity_never_outweighs_a_transition_and_orders_what_is_tied(dataset: Dataset) -> None:
    baseline = Markov().fit(dataset)
    best = baseline.best(ragged([2], [6], []), ragged([], [], []), 3).tolist()
    assert best[0] == [4, 3, 1]  # 2 -> 4 twice, 2 -> 3 once, then by count
    assert best[1][0] == 5  # seen once, before items seen three times
    assert best[2] == Popularity().fit(dataset).best(ragged([]), ragged([]), 3)[0].tolist()


def test_a_dataset_without_any_transition_leaves_popularity(tmp_path: Path) -> None:
    events: list[Event] = [
        (user, item, 4.0, 1_000_000_000 + item) for user in (1, 2, 3) for item in (user, user + 1, user + 2)
    ]
    prepare(MovieLens(write_movielens(tmp_path / "raw", events)), tmp_path / "data")
    dataset = Dataset(tmp_path / "data")  # each user trains on one event
    for kind in (Markov, TransitionGraph, ItemKNN, EASE):
        baseline: Baseline = kind().fit(dataset)
        order = levels(baseline, [1, 5])
        want = dataset.train_counts.astype(float)
        if kind is EASE:  # items without another item in common have the score 0, and rank before cold ones
            want = np.minimum(want, 1)
            assert set(scores(baseline, [1, 5]).values()) <= {0.0}
        else:
            assert scores(baseline, [1, 5]) == {}
        assert (np.argsort(-order, kind="stable") == np.argsort(-want, kind="stable")).all()


def test_the_graph_baseline_adds_the_scores_of_the_newest_items(trained: Run) -> None:
    dataset = Dataset(trained.data)
    both, one = TransitionGraph(items=2, decay=0.25).fit(dataset), TransitionGraph(items=1).fit(dataset)
    for history in ([7, 3, 9], [3], [11, 11]):
        want = Counter(scores(one, history))
        for item, score in scores(one, history[:-1]).items():
            want[item] += 0.25 * score  # type: ignore[assignment]  # floats
        assert scores(both, history) == pytest.approx(dict(want), rel=1e-6)


def test_neighbours_add_up_over_the_distinct_items_of_the_whole_history(dataset: Dataset) -> None:
    baseline = ItemKNN(shrink=1.0).fit(dataset)
    users = {item: {user for user, items in enumerate(TRAIN) if item in items} for item in range(1, V + 1)}

    def cosine(a: int, b: int) -> float:
        together = len(users[a] & users[b])
        return together / ((len(users[a]) * len(users[b])) ** 0.5 + 1)

    for history in ([1, 2, 1], [4, 6], [3]):
        want = {b: sum(cosine(a, b) for a in set(history) - {b}) for b in range(1, V + 1)}
        assert scores(baseline, history) == pytest.approx({b: s for b, s in want.items() if s}, rel=1e-5)


def test_ease_predicts_from_the_set_of_items(dataset: Dataset) -> None:
    baseline = EASE(ridge=0.5).fit(dataset)
    sets = np.array([[item in items for item in range(1, V + 1)] for items in TRAIN], dtype=float)
    gram = sets.T @ sets
    inverse = np.linalg.inv(gram + 0.5 * np.trace(gram) / V * np.eye(V))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    for history in ([1, 2, 1], [6], [3, 4, 5]):
        want = sum(weights[item - 1] for item in set(history))
        found = scores(baseline, history)
        assert [found[item] for item in range(1, V + 1)] == pytest.approx(want.tolist(), abs=2e-3)  # of float16
    assert scores(baseline, []) == {}
    few = EASE(ridge=0.5, items=3).fit(dataset)
    assert set(scores(few, [1, 2])) == set(few.most_popular[:3].tolist())


def test_own_items_rank_by_count_then_by_recency(keeping: Dataset) -> None:
    baseline = PersonalTopFrequency().fit(keeping)
    assert baseline.best(ragged([3, 1, 2, 2, 1]), ragged([]), 4).tolist() == [[1, 2, 3, 4]]
    assert baseline.best(ragged([1, 1, 3, 4, 2]), ragged([2]), 4).tolist() == [[1, 4, 3, -1]]
    newest = PersonalTopFrequency(decay=0.1).fit(keeping)
    assert newest.best(ragged([1, 1, 3, 4, 2]), ragged([]), 4).tolist() == [[2, 4, 3, 1]]
    assert list(fit_baselines(None, keeping)) == ["popularity", "markov", "personal_top_frequency", "transition_graph"]


def test_own_items_need_data_that_keep_repeats(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="has repeats: first, expected repeats: keep; leave it out, or prepare"):
        PersonalTopFrequency().fit(dataset)


class Half(Baseline):
    """A baseline of a user: every other item, three scores."""

    def score(self, history: Ragged) -> Scored:
        items = np.arange(2, self.size, 2)
        rows = np.repeat(np.arange(len(history.offsets) - 1), len(items))
        items = np.tile(items, len(history.offsets) - 1)
        return Scored(rows, items, (items % 3 - 1.0) * (1 + rows % 2))


KINDS: dict[str, Callable[[], Baseline]] = {
    "popularity": Popularity,
    "markov": Markov,
    "graph": TransitionGraph,
    "knn": ItemKNN,
    "ease": lambda: EASE(items=70),
    "half": Half,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_ranks_and_best_items_are_those_of_all_scores(make: Callable[[], Baseline], trained: Run) -> None:
    dataset, rows = Dataset(trained.data), 60
    baseline, rng, count = make().fit(dataset), np.random.default_rng(0), dataset.num_items
    baseline.rows_in_flight = 13  # type: ignore[misc]  # blocks
    histories = [rng.integers(1, count + 1, rng.integers(0, 9)).tolist() for _ in range(rows)]
    excluded = rng.random((rows, count + 1)) < rng.choice([0, 0.1, 0.9], (rows, 1))
    excluded[7, 1:] = True
    excluded[:, 0] = False
    row, values = np.nonzero(excluded)
    left_out = Ragged(values, np.searchsorted(row, np.arange(rows + 1)))
    order = np.stack([levels(baseline, history) for history in histories])
    shown = np.where(excluded, -1, order)
    target = rng.integers(1, count + 1, rows)
    own = shown[np.arange(rows), target]
    assert baseline.ranks(ragged(*histories), target, left_out).tolist() == (
        (shown[:, 1:] >= own[:, None]).sum(1).tolist()
    )
    items = rng.integers(1, count + 1, (rows, 20))
    want = np.take_along_axis(order, items, axis=1) >= np.take_along_axis(order, target[:, None], axis=1)
    assert np.array_equal(baseline.not_below(ragged(*histories), target, items), want)
    for place, found in enumerate(baseline.best(ragged(*histories), left_out, 10).tolist()):
        best = np.lexsort((np.arange(1, count + 1), -shown[place, 1:])) + 1  # ties: the lower number first
        best = [item for item in best.tolist() if not excluded[place, item]][:10]
        assert found == best + [-1] * (10 - len(best)), place


def test_baselines_of_one_class_are_numbered_and_described(dataset: Dataset) -> None:
    fitted = fit_baselines([EASE(), Half(), EASE(ridge=2.0)], dataset)
    assert list(fitted) == ["ease", "half", "ease_2"]
    assert specify_baseline(fitted["ease_2"]) == {"class_path": "EASE", "init_args": {"ridge": 2.0, "items": 8192}}
    assert specify_baseline(fitted["half"])["class_path"] == "test_baselines.Half"
    assert [kind().name for kind in (TransitionGraph, ItemKNN)] == ["transition_graph", "item_knn"]
    assert fit_baselines([], dataset) == {}


def test_a_large_catalogue_has_a_transition_graph_only_if_asked(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(fit_baselines(None, dataset)) == ["popularity", "markov", "transition_graph"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(baselines, "GRAPH_ITEMS", V - 1)
    assert list(fit_baselines(None, dataset)) == ["popularity", "markov"]
    shown = capsys.readouterr().err
    assert f"TransitionGraph is left out: {V} items, by default it is for at most {V - 1}; ask for it with" in shown
    assert "--baselines '[Popularity, Markov, TransitionGraph]'" in shown
    assert list(fit_baselines([TransitionGraph()], dataset)) == ["transition_graph"]
