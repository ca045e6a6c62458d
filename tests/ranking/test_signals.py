"""What all signals share: they are kept as they were, look up what they counted, and their lists are merged by rank."""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pipeline_fixtures import K, Run, recsys
from worlds import untrained_index, write_movielens

from recsys2stage.data.batches import Padded, Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens
from recsys2stage.ranking import signals
from recsys2stage.ranking.lists import NONE
from recsys2stage.ranking.signals import (
    EASE,
    SLIT,
    Affinity,
    Content,
    Demographics,
    ItemKNN,
    Neighbours,
    OtherRetriever,
    PopularityAsOf,
    Proposer,
    Ratings,
    Repeats,
    Requests,
    Session,
    Signal,
    TransitionGraph,
    Transitions,
)
from recsys2stage.ranking.signals.base import is_excluded, load_signals, propose_excluding, save_signals, specify
from recsys2stage.ranking.signals.merge import merge, reciprocal_ranks
from recsys2stage.trust import trusting

USERS, ITEMS, D = 40, 30, 6
KINDS: list[tuple[type[Signal], dict[str, Any]]] = [
    (Affinity, {"decay": 0.5, "smoothing": 2.0, "released": None}),
    (Content, {"candidates": 3, "rare": 6, "ridge": 2.0, "classes": 2}),
    (Demographics, {"alpha": 2.0}),
    (EASE, {"candidates": 4, "ridge": 0.5, "history": 4, "items": 28}),
    (ItemKNN, {"candidates": 4, "neighbours": 12, "shrink": 1.0, "history": 4, "decay": 0.7}),
    (Neighbours, {"candidates": 4, "history": 3, "count": 5, "decay": 0.5, "exact": 50_000}),
    (OtherRetriever, {"index": "index", "candidates": 4}),  # as `placed` has it
    (PopularityAsOf, {"candidates": 6, "windows": [86_400, 20 * 86_400], "trending": 86_400}),
    (Ratings, {"prior": 3.0}),
    (Repeats, {"candidates": 3, "half_life": 86_400.0}),
    (Session, {"session": 7_200}),
    (SLIT, {"candidates": 5, "decays": [0.5, 1.0], "ridge": 0.1, "history": 4, "items": 29}),
    (
        TransitionGraph,
        {"candidates": 5, "hops": 2, "items": 3, "weight": 0.5, "decay": 0.4, "edges": 9, "top": 20},
    ),
    (Transitions, {"candidates": 5, "lags": [1, 3], "top": 4, "alpha": 2.0, "history": 4, "window": 2, "decay": 0.5}),
]
every = pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
NAMERS = [pair for pair in KINDS if issubclass(pair[0], Proposer)]
proposers = pytest.mark.parametrize(("kind", "options"), NAMERS, ids=[kind.__name__ for kind, _ in NAMERS])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users of 3 to 14 events over some weeks, rated, with genres; users are of three kinds or unknown."""
    rng, folder = np.random.default_rng(3), tmp_path_factory.mktemp("signals")
    events = [
        (user, int(item) + 1, float(rng.integers(1, 6)), 10**9 + int(time))
        for user in range(USERS)
        for item, time in zip(
            rng.permutation(ITEMS)[: 3 + user % 12], rng.integers(10**6, 3 * 10**6, size=ITEMS), strict=False
        )
    ]
    genres = ["(no genres listed)", "Drama", "Drama|War", "Crime|Drama|War"]
    movies = {item: (f"Movie {item} ({1960 + item})", genres[item % 4]) for item in range(1, ITEMS + 1)}
    prepare(MovieLens(write_movielens(folder / "raw", events, movies)), folder / "data")
    dataset, kinds = Dataset(folder / "data"), np.arange(USERS, dtype=np.int32) % 4
    untrained_index(folder / "index", dataset)
    dataset.user_features = [
        {"name": "kind", "kind": "categorical", "size": 4, "values": kinds}
    ]  # this layout has none
    return dataset


@pytest.fixture(autouse=True)
def placed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second retriever lies beside the data."""
    monkeypatch.chdir(dataset.path.parent)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    table = np.random.default_rng(4).normal(size=(ITEMS + 1, D)).astype(np.float32)
    table[0] = 0
    return table


def asked(dataset: Dataset, vectors: np.ndarray, kind: type[Signal] | None = None) -> tuple[Requests, Ragged]:
    """Of every user's test item: 12 items each, a few of them none; one request comes without a history.

    The histories for Repeats hold some items several times, and only the first of them is excluded.
    """
    users = dataset.users("test")
    padded = dataset.histories(users, "test", 8)
    parts = (padded.items, padded.times, padded.lengths, padded.ratings)
    padded = Padded(*(part.copy() for part in parts), user=padded.user)
    for part in padded[:2]:
        part[5] = 0
    padded.lengths[5], padded.ratings[5] = 0, 0
    items = np.random.default_rng(5).integers(0, ITEMS + 1, size=(len(users), 12))
    queries = np.random.default_rng(6).normal(size=(len(users), D)).astype(np.float32)
    requests = Requests(items, padded, dataset.request_times(users, "test"), vectors, queries)
    if kind is Repeats:
        padded.items[:] = np.where(padded.items > 0, 1 + padded.items % 5, 0)
        return requests, Ragged(np.ones(len(users), np.int64), np.arange(len(users) + 1))
    return requests, dataset.filtered_items(users, "test")


def some(history: Padded, rows: slice) -> Padded:
    """Some of the users."""
    people = tuple(values[rows] for values in history.user or ())
    return Padded(*(part[rows] for part in history[:4]), user=people)


def fitted(kind: type[Signal], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray) -> Signal:
    signal = kind(**options)
    signal.fit(dataset, vectors)
    return signal


# --- what holds for every signal


def test_every_signal_is_tested() -> None:
    kinds = {kind for kind in vars(signals).values() if isinstance(kind, type) and issubclass(kind, Signal)}
    assert kinds - {Signal, Proposer} == {kind for kind, _ in KINDS}


@every
def test_every_option_is_another_than_its_default(kind: type[Signal], options: dict[str, Any]) -> None:
    """Else the tests below would not see an option that is lost."""
    parameters = inspect.signature(kind).parameters
    assert set(options) == set(parameters)
    same = [name for name, value in options.items() if value == parameters[name].default]
    assert same == (["released"] if kind is Affinity else [])


@every
def test_a_signal_is_the_same_after_it_was_kept(
    kind: type[Signal], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray, tmp_path: Path
) -> None:
    signal, (requests, known) = fitted(kind, options, dataset, vectors), asked(dataset, vectors)
    save_signals([fitted(Session, {}, dataset, vectors), signal], tmp_path / "signals")
    first, loaded = load_signals(tmp_path / "signals")
    assert (type(first), type(loaded)) == (Session, kind)
    assert specify(loaded) == specify(signal)
    assert {name: getattr(loaded, name) for name in options} == options
    assert loaded.tables.keys() == signal.tables.keys()
    for name, table in loaded.tables.items():
        assert isinstance(table.base, np.memmap), name  # a plain view of the file
        assert not table.flags.writeable
        assert table.dtype == np.asarray(signal.tables[name]).dtype
        assert np.array_equal(table, signal.tables[name])
    assert loaded.names == signal.names
    assert (loaded.by_id, loaded.reads_times, loaded.reads_ratings) == (
        *(signal.by_id, signal.reads_times),
        signal.reads_ratings,
    )
    assert np.array_equal(loaded(requests), signal(requests))
    if isinstance(signal, Proposer):
        assert isinstance(loaded, Proposer)
        assert np.array_equal(loaded.propose(requests, known), signal.propose(requests, known))


@every
def test_numbers_are_named_finite_and_0_where_no_candidate_is(
    kind: type[Signal], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray
) -> None:
    signal, (requests, _) = fitted(kind, options, dataset, vectors), asked(dataset, vectors, kind)
    numbers = signal(requests)
    assert numbers.shape == (*requests.items.shape, len(signal.names))
    assert numbers.dtype == np.float32
    assert len(set(signal.names)) == len(signal.names)
    assert np.isfinite(numbers).all()
    assert np.abs(numbers).max() < 50, "of moderate size"
    assert not numbers[requests.items == 0].any()
    assert (requests.items == 0).any()
    assert numbers.any(axis=(0, 1)).all(), "every number says something"


@every
def test_a_candidate_is_measured_alone(
    kind: type[Signal], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray
) -> None:
    """Whatever else is asked for with it, and whoever else asks."""
    signal, (requests, _) = fitted(kind, options, dataset, vectors), asked(dataset, vectors)
    numbers = signal(requests)
    for row in range(0, len(requests.items), 3):
        history = some(requests.history, slice(row, row + 1))
        now, query = requests.request_time[row : row + 1], requests.queries[row : row + 1]
        alone = Requests(requests.items[row : row + 1, 3:5], history, now, vectors, query)
        np.testing.assert_allclose(signal(alone)[0], numbers[row, 3:5], rtol=1e-5, atol=1e-5)


@every
def test_the_order_and_the_repeats_of_candidates_do_not_matter(
    kind: type[Signal], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray
) -> None:
    signal, (requests, _) = fitted(kind, options, dataset, vectors), asked(dataset, vectors)
    once = np.tile(np.arange(ITEMS + 1), (len(requests.items), 1))
    values = signal(requests._replace(items=once))
    items = np.random.default_rng(7).integers(0, ITEMS + 1, (len(once), 3 * ITEMS))
    want = np.take_along_axis(values, items[..., None], axis=1)
    np.testing.assert_allclose(signal(requests._replace(items=items)), want, rtol=1e-5, atol=1e-6)


@proposers
def test_a_proposer_reads_what_is_allowed_as_it_reads_exclusions(
    kind: type[Proposer], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray
) -> None:
    signal, (requests, known) = fitted(kind, options, dataset, vectors), asked(dataset, vectors, kind)
    assert isinstance(signal, Proposer)
    for share in (0.1, 0.6, 1.0):
        allowed = np.random.default_rng(8).random((len(requests.items), ITEMS)) < share
        own = requests._replace(allowed=allowed)
        proposed = signal.propose(own, known)
        assert np.array_equal(proposed, propose_excluding(signal, own, known))
        assert (proposed > 0).any()


@every
def test_nobody_may_ask(kind: type[Signal], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray) -> None:
    signal, (requests, known) = fitted(kind, options, dataset, vectors), asked(dataset, vectors)
    history, queries = some(requests.history, slice(0)), requests.queries[:0]
    nobody = Requests(requests.items[:0], history, requests.request_time[:0], vectors, queries)
    assert signal(nobody).shape == (0, 12, len(signal.names))
    nothing = requests._replace(items=requests.items[:, :0])
    assert signal(nothing).shape == (len(requests.items), 0, len(signal.names))
    if isinstance(signal, Proposer):
        assert signal.propose(nobody, Ragged(known.values[:0], known.offsets[:1])).shape == (0, signal.candidates)


@proposers
def test_proposals_are_new_to_the_user_and_each_is_made_once(
    kind: type[Proposer], options: dict[str, Any], dataset: Dataset, vectors: np.ndarray
) -> None:
    signal, (requests, known) = fitted(kind, options, dataset, vectors), asked(dataset, vectors, kind)
    assert isinstance(signal, Proposer)
    named = signal.propose(requests, known)
    assert named.shape == (len(requests.items), signal.candidates)
    assert ((named == NONE) | ((named >= 1) & (named <= ITEMS))).all()
    assert (named > 0).mean() > 0.5
    for row in range(len(named)):
        mine = named[row][named[row] > 0].tolist()
        assert named[row, len(mine) :].tolist() == [NONE] * (signal.candidates - len(mine)), "none comes last"
        assert len(set(mine)) == len(mine)
        assert not set(mine) & set(known.values[known.offsets[row] : known.offsets[row + 1]].tolist())
    again = signal.propose(requests._replace(items=requests.items[:, :0]), known)
    assert np.array_equal(again, named), "what is asked for does not matter"


@proposers
def test_a_number_of_proposals_is_not_negative(kind: type[Proposer], options: dict[str, Any]) -> None:
    assert inspect.signature(kind).parameters["candidates"].default == 0
    with pytest.raises(ValueError, match="candidates is -1, expected at least 0"):
        kind(**options | {"candidates": -1})


def test_signals_are_kept_in_their_order_however_many(dataset: Dataset, vectors: np.ndarray, tmp_path: Path) -> None:
    """The tables of the tenth are not those of the first."""
    many = [fitted(Ratings, {"prior": prior}, dataset, vectors) for prior in map(float, range(1, 13))]
    for number, signal in enumerate(many):
        signal.tables["number"] = np.array([number])
    save_signals(many, tmp_path / "signals")
    loaded = load_signals(tmp_path / "signals")
    assert [signal.prior for signal in loaded] == list(range(1, 13))
    assert [signal.tables["number"].item() for signal in loaded] == list(range(12))
    described = json.loads((tmp_path / "signals/signals.json").read_text())
    assert described[2] == {"class_path": "Ratings", "init_args": {"prior": 3.0}}
    save_signals([], tmp_path / "none")
    assert load_signals(tmp_path / "none") == []


def test_the_newest_events_stand_newest_first() -> None:
    history = Padded(np.array([[7, 8, 9], [4, 0, 0]]), np.array([[1, 2, 5], [9, 0, 0]]), np.array([3, 1]))
    none = np.zeros((1, 1))
    items, times = Requests(np.zeros((2, 0)), history, np.array([6, 9]), none, none).newest(2)
    assert items.tolist() == [[9, 8], [4, 0]]
    assert times.tolist() == [[5, 2], [9, 0]]


def test_known_items_equal_a_loop(rng: np.random.Generator) -> None:
    met = [rng.choice(20, rng.integers(0, 8), replace=False) + 1 for _ in range(30)]
    known = Ragged(np.concatenate(met), np.concatenate([[0], np.cumsum([len(own) for own in met])]))
    items = rng.integers(-1, 21, size=(30, 15))
    want = [[item <= 0 or item in own for item in row] for row, own in zip(items, met, strict=True)]
    assert is_excluded(items, known, 21).tolist() == want
    nobody = Ragged(np.zeros(0, dtype=np.int64), np.zeros(31, dtype=np.int64))
    assert np.array_equal(is_excluded(items, nobody, 21), items <= 0)


# --- what docs/second_stage.md says of them

PAGE = (Path(__file__).parents[2] / "docs/second_stage.md").read_text(encoding="utf-8")


def block(language: str, word: str) -> str:
    """The page's one block of code in a language that holds a word."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if word in block]
    return found


@pytest.fixture
def hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Signal]:
    """The signal that the page shows, saved where it says."""
    (tmp_path / "hours.py").write_text(block("python", "HourOfDay"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hours", raising=False)
    return importlib.import_module("hours").HourOfDay


def test_the_page_s_own_signal_counts_hours(
    hours: type[Signal], dataset: Dataset, vectors: np.ndarray, tmp_path: Path
) -> None:
    signal, (requests, _) = fitted(hours, {"smoothing": 4.0}, dataset, vectors), asked(dataset, vectors)
    train = [
        (int(dataset.items[place]), int(dataset.times[place]) // 3600 % 24)
        for user in range(dataset.num_users)
        for place in range(dataset.offsets[user], dataset.train_ends[user])
    ]
    numbers = signal(requests)
    assert numbers.shape == (*requests.items.shape, 1)
    assert numbers.dtype == np.float32
    for row, now in enumerate(requests.request_time.tolist()):
        hour = now // 3600 % 24
        usual = (1 + sum(other == hour for _, other in train)) / (len(train) + 24)
        for place, item in enumerate(requests.items[row].tolist()):
            own = [other for one, other in train if one == item]
            want = np.log((own.count(hour) + 4 * usual) / ((len(own) + 4) * usual))
            assert numbers[row, place, 0] == pytest.approx(want if item else 0, abs=1e-5)
    save_signals([signal], tmp_path / "signals")
    with trusting(["hours"]):
        assert np.array_equal(load_signals(tmp_path / "signals")[0](requests), numbers)


def test_the_page_s_signals_are_mined_beside_one_s_own(hours: type[Signal], trained: Run, tmp_path: Path) -> None:
    named = yaml.safe_load(block("yaml", "signals:"))["signals"]
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump({"signals": [*named, {"class_path": f"hours.{hours.__name__}"}]}))
    of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / "candidates", "--k", K)
    recsys("mine-negatives", "--config", config, *of)
    mined = {signal["name"] for signal in json.loads((tmp_path / "candidates/manifest.json").read_text())["signals"]}
    assert {"HourOfDay.lift", "Session.gap", "Neighbours.cosine_max", "source.index", "source.Transitions"} <= mined
    assert "Transitions.after_5" not in mined


def test_the_page_lists_every_number_of_every_signal_and_what_is_hidden(dataset: Dataset, vectors: np.ndarray) -> None:
    for kind, options in KINDS:
        parameters = inspect.signature(kind).parameters.values()
        needed = {part.name: options[part.name] for part in parameters if part.default is part.empty}
        (row,) = re.findall(rf"^\| `{kind.__name__}` \|(.*?)\|.*\| (0|stays) \|$", PAGE, re.MULTILINE)
        words = re.findall(r"`(\w+)`", row[0])
        for name in fitted(kind, needed, dataset, vectors).names:
            assert name in words or any(word[0] == "_" and name.endswith(word) for word in words), name
        assert (row[1] == "0") == kind.by_id
        (counted,) = re.findall(r"Features that count an item's events \((.*?)\)", PAGE, re.DOTALL)
        assert (f"`{kind.__name__}`" in counted) == bool(fitted(kind, needed, dataset, vectors).counted)


# --- lists of several sources


def merged(named: list[list[int]], k: int) -> list[int]:
    """One user's lists, a turn of each source after the other."""
    found: list[int] = []
    for rank in range(max(map(len, named))):
        for own in named:
            if rank < len(own) and own[rank] > 0 and own[rank] not in found:
                found.append(own[rank])
    return (found + [NONE] * k)[:k]


def sources(rng: np.random.Generator, rows: int = 40) -> list[np.ndarray]:
    """Three lists of each of many users; each repeats nothing, ends early or not, and may be empty."""
    lists = []
    for width in (9, 4, 6):
        own = np.stack([rng.permutation(15)[:width] + 1 for _ in range(rows)])
        own[np.arange(width) >= rng.integers(0, width + 1, size=rows)[:, None]] = NONE
        lists.append(own)
    return lists


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_sources_are_merged_by_rank_and_the_first_mention_counts(k: int, rng: np.random.Generator) -> None:
    named = sources(rng)
    got = merge(named, k)
    assert got.shape == (40, k)
    assert got.tolist() == [merged([own[row].tolist() for own in named], k) for row in range(40)]


def test_a_merge_small_enough_to_see() -> None:
    named = [np.array([[5, 3, 8, 1]]), np.array([[3, 7, -1]]), np.array([[9, 5, 2]])]
    assert merge(named, 6).tolist() == [[5, 3, 9, 7, 8, 2]]
    assert merge(named, 9).tolist() == [[5, 3, 9, 7, 8, 2, 1, -1, -1]]
    assert merge(named[:1], 2).tolist() == [[5, 3]]
    assert merge([named[1], np.zeros((1, 0), dtype=np.int64)], 3).tolist() == [[3, 7, -1]]


def test_nearness_equals_a_loop(rng: np.random.Generator) -> None:
    named = sources(rng)
    items = rng.integers(-1, 16, size=(40, 10))
    got = reciprocal_ranks(items, named, 16)
    assert got.shape == (40, 10, 3)
    assert got.dtype == np.float32
    for row in range(40):
        for place, item in enumerate(items[row].tolist()):
            for source, listed in enumerate(named):
                own = listed[row].tolist()
                want = 1 / (1 + own.index(item)) if item > 0 and item in own else 0
                assert got[row, place, source] == pytest.approx(want)
    assert (got > 0).any()
    empty = [np.full((40, 3), NONE), np.zeros((40, 0), dtype=np.int64)]
    assert not reciprocal_ranks(items, empty, 16).any()
