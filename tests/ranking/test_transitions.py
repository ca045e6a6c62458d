"""Transitions against loops over the events of each user, and nothing of validation and test."""

from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path

import numpy as np
import pytest
from closeness import close
from worlds import write_movielens

from recsys2stage.data.batches import Ragged, left_aligned
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens
from recsys2stage.ranking.signals.base import Requests, load_signals, save_signals, specify
from recsys2stage.ranking.signals.keys import batched_searchsorted, slice_rows, top_by_sum
from recsys2stage.ranking.signals.transitions import Transitions

USERS, ITEMS = 50, 25
NO_VECTORS = np.zeros((ITEMS + 1, 1), np.float32)
OPTIONS: dict[str, dict[str, object]] = {
    "default": {},
    "few kept": {"top": 3},
    "one kept": {"top": 1, "lags": [2], "alpha": 0.25, "history": 1, "window": 1},
    "other": {"lags": [4, 1], "alpha": 3.0, "history": 4, "window": 2, "decay": 0.5, "top": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items tend to be followed by the next number; they repeat, and the times of two events are often equal."""
    rng, path, events = np.random.default_rng(4), tmp_path_factory.mktemp("transitions"), []
    for user in range(USERS):
        item, time = int(rng.integers(ITEMS)), 10**9
        for _ in range(int(rng.integers(3, 40))):
            item = (item + 1 if rng.random() < 0.5 else int(ITEMS * rng.random() ** 2)) % ITEMS
            time += int(rng.integers(3))
            events.append((user, item + 1, 4.0, time))
    prepare(MovieLens(write_movielens(path / "raw", events)), path / "data", repeats="keep")
    return path / "data"


@pytest.fixture
def dataset(folder: Path) -> Dataset:
    return Dataset(folder)


def fitted(dataset: Dataset, **options: object) -> Transitions:
    signal = Transitions(**options)  # type: ignore[arg-type]  # options of all sorts
    signal.fit(dataset, NO_VECTORS)
    return signal


def asked(dataset: Dataset, seed: int = 0) -> tuple[Requests, Ragged]:
    """Every user after each number of events from none on, with eight candidates, and the items known by then."""
    rng, starts, ends = np.random.default_rng(seed), [], []
    for user in range(USERS):
        begin, end = int(dataset.offsets[user]), int(dataset.offsets[user + 1])
        for length in {0, 1, 2, 4, end - begin - 1}:
            starts.append(begin)
            ends.append(begin + length)
    history = left_aligned(dataset.items, dataset.times, np.array(starts), np.array(ends))
    items = rng.integers(0, ITEMS + 1, (len(starts), 8))
    met = [np.asarray(dataset.items[start:end]).astype(np.int64) for start, end in zip(starts, ends, strict=True)]
    return (
        Requests(items, history, np.zeros(len(starts), np.int64), NO_VECTORS, NO_VECTORS),
        Ragged(np.concatenate(met), np.cumsum([0, *map(len, met)])),
    )


def histories(requests: Requests) -> list[list[int]]:
    rows = zip(requests.history.items, requests.history.lengths, strict=True)
    return [items[:length][::-1].tolist() for items, length in rows]  # newest first


class Counts:
    """All pairs of training events some places apart, in dictionaries."""

    def __init__(self, dataset: Dataset, steps: Sequence[int], top: int, alpha: float) -> None:
        rows = zip(dataset.offsets[:-1], dataset.train_ends, strict=True)
        users = [dataset.items[start:end].tolist() for start, end in rows]
        pairs = Counter((a, b) for own in users for step in steps for a, b in zip(own, own[step:], strict=False))
        self.events, self.alpha = Counter(item for own in users for item in own), alpha
        self.totals: Counter[int] = Counter()
        for (a, _), count in pairs.items():
            self.totals[a] += count
        ordered = {a: sorted((-n, b) for (other, b), n in pairs.items() if other == a) for a in self.totals}
        self.kept = {a: {b: -n for n, b in followers[:top]} for a, followers in ordered.items()}

    def p(self, item: int) -> float:
        return self.events[item] / self.events.total()

    def count(self, a: int, b: int) -> float:
        kept = self.kept.get(a, {})
        if b in kept:
            return kept[b]
        missing = self.totals[a] - sum(kept.values())
        if not missing:
            return 0.0
        others = sum(self.p(item) for item in range(1, ITEMS + 1) if item not in kept)
        return min(missing * self.p(b) / others, min(kept.values()))

    def lift(self, a: int, b: int) -> float:
        return (self.count(a, b) + self.alpha) / (self.totals[a] * self.p(b) + self.alpha)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_numbers_equal_a_loop_over_all_pairs(dataset: Dataset, options: dict[str, object]) -> None:
    signal, (requests, _) = fitted(dataset, **options), asked(dataset)
    by_lag = {lag: Counts(dataset, [lag], signal.top, signal.alpha) for lag in signal.lags}
    near = Counts(dataset, range(1, signal.window + 1), signal.top, signal.alpha)
    numbers = signal(requests)
    assert numbers.dtype == np.float32
    assert numbers.shape == (*requests.items.shape, len(signal.names))
    for row, events in enumerate(histories(requests)):
        for column, item in enumerate(requests.items[row].tolist()):
            if item == 0:
                assert not numbers[row, column].any()
                continue
            want = [log(by_lag[lag].lift(events[lag - 1], item)) if lag <= len(events) else 0 for lag in signal.lags]
            lifts = [near.lift(before, item) for before in events[: signal.history]]
            weights = [signal.decay**place for place in range(len(lifts))]
            total = sum(weight * lift for weight, lift in zip(weights, lifts, strict=True))
            want += [log(total / sum(weights)), log(max(lifts))] if lifts else [0, 0]
            assert numbers[row, column] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_proposals_have_the_largest_sums_and_are_not_known(dataset: Dataset, options: dict[str, object]) -> None:
    signal, (requests, known) = fitted(dataset, candidates=6, **options), asked(dataset)
    by_lag = {lag: Counts(dataset, [lag], signal.top, signal.alpha) for lag in signal.lags}
    proposed = signal.propose(requests, known)
    assert proposed.shape == (len(requests.request_time), 6)
    assert proposed.dtype == np.int64
    some = False
    for row, events in enumerate(histories(requests)):
        scores: Counter[int] = Counter()
        for lag, counts in by_lag.items():
            if lag <= len(events):
                before = events[lag - 1]
                for after, count in counts.kept.get(before, {}).items():
                    scores[after] += count / counts.totals[before]  # type: ignore[assignment]  # a Counter of shares
        wanted = sorted((score for item, score in scores.items() if item not in events), reverse=True)[:6]
        chosen = proposed[row][proposed[row] > 0].tolist()
        assert (proposed[row][len(chosen) :] == -1).all()
        assert len(set(chosen)) == len(chosen)
        assert not set(chosen) & set(events)
        assert [scores[item] for item in chosen] == pytest.approx(wanted)  # two items may have the same sum
        some |= len(chosen) > 0
    assert some


def test_where_none_are_asked_for_none_are_named(dataset: Dataset) -> None:
    requests, known = asked(dataset)
    assert fitted(dataset).propose(requests, known).shape == (len(requests.request_time), 0)


def test_a_request_gets_the_same_alone_and_among_others(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    signal, (requests, known) = fitted(dataset, candidates=9), asked(dataset)
    together, numbers = signal.propose(requests, known), signal(requests)
    monkeypatch.setattr("recsys2stage.ranking.signals.transitions.ROWS_IN_FLIGHT", 7)
    assert np.array_equal(signal.propose(requests, known), together)
    for row in range(0, len(together), 5):
        one = slice(row, row + 1)
        history = requests.history._replace(
            items=requests.history.items[one], times=requests.history.times[one], lengths=requests.history.lengths[one]
        )
        alone = Requests(requests.items[one], history, requests.request_time[one], NO_VECTORS, NO_VECTORS)
        assert np.array_equal(signal.propose(alone, slice_rows(known, row, row + 1)), together[one])
        close(signal(alone), numbers[one])


def test_what_always_follows_stands_out_in_its_direction(cycle: Path) -> None:
    """On a cycle of 40 items the one k places on always comes k places after, and one k places back never does."""
    dataset = Dataset(cycle)
    signal = fitted(dataset, lags=[1, 2], candidates=2)
    ends = np.asarray(dataset.train_ends)
    history = left_aligned(dataset.items, dataset.times, np.asarray(dataset.offsets[:-1]), ends)
    newest, following = dataset.items[ends - 1].astype(np.int64), dataset.items[ends].astype(np.int64)
    before = dataset.items[ends - 2].astype(np.int64)
    requests = Requests(
        np.stack([following, newest, before], axis=1), history, np.zeros(len(ends), np.int64), NO_VECTORS, NO_VECTORS
    )
    after_one, after_two = np.moveaxis(signal(requests), -1, 0)[:2]
    assert (after_one[:, 0] > 1.5).all()
    assert (after_two[:, 0] > 1.5).all()
    assert (after_one[:, 1:] < 0).all(), "expected, and never seen"
    nothing = Ragged(np.zeros(0, np.int64), np.zeros(len(ends) + 1, np.int64))
    assert np.array_equal(signal.propose(requests, nothing)[:, 0], following)


def test_what_was_never_seen_says_nothing(dataset: Dataset) -> None:
    dataset.items = np.where(np.isin(dataset.items, [7, 9]), 1, dataset.items)
    dataset.__dict__.pop("train_counts", None)
    signal = fitted(dataset, candidates=3)
    history = left_aligned(np.array([7, 7, 3, 7]), np.arange(4), np.array([0, 2, 3]), np.array([2, 3, 3]))
    requests = Requests(np.array([[5, 9], [9, 9], [5, 9]]), history, np.zeros(3, np.int64), NO_VECTORS, NO_VECTORS)
    assert not signal(requests).any()  # 5 after 7, 9 after 3, and 5 after nothing
    proposed = signal.propose(requests, Ragged(np.zeros(0, np.int64), np.zeros(4, np.int64)))
    assert (proposed[[0, 2]] == -1).all()
    assert (proposed[1] > 0).all()


def test_only_training_events_count(dataset: Dataset) -> None:
    signal, (requests, known) = fitted(dataset, candidates=5), asked(dataset)
    train = np.zeros(len(dataset.items), dtype=bool)
    for start, end in zip(dataset.offsets[:-1], dataset.train_ends, strict=True):
        train[start:end] = True
    changed = Dataset(dataset.path)
    changed.items = np.where(train, dataset.items, 1 + np.random.default_rng(1).integers(0, ITEMS, len(train)))
    changed.times = np.where(train, dataset.times, dataset.times + 1)
    again = fitted(changed, candidates=5)
    assert signal.tables.keys() == again.tables.keys()
    assert all(np.array_equal(table, again.tables[name]) for name, table in signal.tables.items())
    assert np.array_equal(signal.propose(requests, known), again.propose(requests, known))


def test_pairs_counted_a_few_at_a_time_are_the_same(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(dataset, top=4).tables
    monkeypatch.setattr("recsys2stage.ranking.signals.transitions.PAIRS_IN_FLIGHT", 50)
    parts = fitted(dataset, top=4).tables
    assert all(np.array_equal(table, parts[name]) for name, table in whole.items())


def test_users_of_one_event_leave_nothing_to_count(dataset: Dataset) -> None:
    requests, known = asked(dataset)
    for kept in (0, 1):
        dataset.train_ends = np.asarray(dataset.offsets[:-1]) + kept
        dataset.__dict__.pop("train_counts", None)
        signal = fitted(dataset, candidates=2)
        assert not signal(requests).any()
        assert (signal.propose(requests, known) == -1).all()


def test_saved_and_loaded_it_says_the_same(dataset: Dataset, tmp_path: Path) -> None:
    signal, (requests, known) = fitted(dataset, candidates=4, top=7), asked(dataset)
    save_signals([signal], tmp_path / "signals")
    (loaded,) = load_signals(tmp_path / "signals")
    assert specify(loaded) == specify(signal)
    assert np.array_equal(loaded(requests), signal(requests))
    assert isinstance(loaded, Transitions)
    assert np.array_equal(loaded.propose(requests, known), signal.propose(requests, known))


def test_tables_of_an_earlier_version_say_the_same(dataset: Dataset) -> None:
    signal, (requests, known) = fitted(dataset, candidates=5, top=3), asked(dataset)
    earlier, size = {"share": signal.tables["share"]}, ITEMS + 1
    for number, name in enumerate(["1", "2", "3", "5", "10", "window"]):
        pairs, facts = signal.tables[f"pairs_{name}"], signal.tables["items"][:, number]
        before = np.arange(size).repeat(facts[:, 4].astype(np.int64))
        earlier |= {
            f"keys_{name}": np.append(before * size + pairs[:, 0], np.iinfo(np.int64).max),
            f"counts_{name}": np.append(pairs[:, 1], np.int32(0)),
            **{f"{part}_{name}": facts[:, place] for place, part in enumerate(("totals", "rest", "least"))},
        }
    other = Transitions(candidates=5, top=3)
    other.restore(earlier)
    np.testing.assert_array_equal(other(requests), signal(requests))
    np.testing.assert_array_equal(other.propose(requests, known), signal.propose(requests, known))


def test_the_best_are_by_sum_and_then_by_number() -> None:
    known = Ragged(np.array([4, 2]), np.array([0, 1, 1, 2]))
    rows, items = np.array([0, 0, 0, 0, 0, 2, 2]), np.array([3, 5, 3, 4, 1, 2, 9])
    scores = np.array([0.5, 1.0, 0.75, 9.0, 1.0, 1.0, 0.1])
    assert top_by_sum(rows, items, scores, known, 10, 3).tolist() == [[3, 1, 5], [-1, -1, -1], [9, -1, -1]]
    assert top_by_sum(rows, items, scores, known, 10, 0).shape == (3, 0)


def test_found_places_are_those_of_searchsorted(rng: np.random.Generator) -> None:
    keys, values = np.sort(rng.integers(0, 50, 40)), rng.integers(-5, 60, (4, 3, 2))
    assert np.array_equal(batched_searchsorted(keys, values), np.searchsorted(keys, values))
    assert batched_searchsorted(keys, values[:0]).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lags": []}, "lags is"),
        ({"lags": [0, 1]}, "lags is"),
        ({"lags": [2, 2]}, "expected distinct positions"),
        ({"top": 0}, "top is 0"),
        ({"history": 0}, "history is 0"),
        ({"window": 0}, "window is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"candidates": -1}, "candidates is -1"),
    ],
)
def test_options_that_cannot_be_are_an_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transitions(**options)  # type: ignore[arg-type]  # options of all sorts
