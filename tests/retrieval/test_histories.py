"""The data modules: batches equal a loop, every window comes once an epoch, and an epoch can be taken up midway."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from worlds import write_movielens

from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens, Table
from recsys2stage.retrieval.histories import BatchLoader, Histories, shuffled
from recsys2stage.shapes import History

LENGTH = 5


def small(path: Path, **options: Any) -> Histories:
    return Histories(path, **{"max_length": LENGTH, "batch_size": 4, "eval_batch_size": 7, **options})


def events(data: Histories) -> list[tuple[list[int], list[int], int, int]]:
    """Items, times, train end and val end of each user, as lists."""
    d, found = data.dataset, []
    for user in range(d.num_users):
        a, b = int(d.offsets[user]), int(d.offsets[user + 1])
        found.append(
            (d.items[a:b].tolist(), d.times[a:b].tolist(), int(d.train_ends[user]) - a, int(d.val_ends[user]) - a)
        )
    return found


# --- batches


@pytest.mark.parametrize("request_time", ["none", "last_event", "target"])
def test_windows_of_an_epoch_equal_a_loop(ragged: Path, request_time: Any) -> None:
    data = small(ragged, request_time=request_time)
    got = Counter()
    for window in data.train_dataloader():
        assert window.items.size(1) == window.lengths.max(), "cut to the longest"
        assert window.items.dtype == window.times.dtype == torch.int64
        assert (window.request is None) == (request_time == "none")
        for row, length in enumerate(window.lengths.tolist()):
            assert not window.items[row, length:].any()
            told = () if window.request is None else tuple(window.request[row, : length - 1].tolist())
            got[tuple(window.items[row, :length].tolist()), tuple(window.times[row, :length].tolist()), told] += 1

    want = Counter()
    for items, times, train, _ in events(data):
        end = train
        while end > 1:
            start = max(end - LENGTH - 1, 0)
            inside = times[start:end]
            told = {"none": (), "last_event": tuple(inside[:-1]), "target": tuple(inside[1:])}[request_time]
            want[tuple(items[start:end]), tuple(inside), told] += 1
            end -= LENGTH
    assert got == want
    assert sum(want.values()) > len(events(data)), "the world must have users with several windows"


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("request_time", ["none", "target"])
def test_queries_equal_a_loop(ragged: Path, split: Any, request_time: Any) -> None:
    data = small(ragged, request_time=request_time)
    loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    everyone, seen = events(data), []
    for batch in loader:
        for row, user in enumerate(batch.users.tolist()):
            items, times, train, val = everyone[user]
            place = train if split == "val" else val
            length = int(batch.history.lengths[row])
            assert batch.history.items[row, :length].tolist() == items[:place][-LENGTH:]
            assert not batch.history.items[row, length:].any()
            assert batch.target[row] == items[place]
            assert batch.excluded_items[batch.excluded_rows == row].tolist() == items[:place]
            if batch.history.request is not None:
                assert batch.history.request[row, :length].tolist() == times[: place + 1][-length:]
        seen += batch.users.tolist()
    want = [
        u for u, (items, _, train, val) in enumerate(everyone) if (train < val if split == "val" else val < len(items))
    ]
    assert seen == want
    assert len(loader) == -(-len(want) // 7)


@pytest.mark.parametrize("next_action", ["none", "target", "buy"])
def test_kinds_and_ratings_equal_a_loop(tmp_path: Path, next_action: str) -> None:
    """Beside each event its own; asked for at each place the next event's, and after the newest what is asked for."""
    rng, rows, known = np.random.default_rng(6), ["user_id,item_id,rating,action,timestamp"], {}
    for user in range(20):
        for item in range(1, 3 + user % 11):
            stars, kind = int(rng.integers(1, 6)), int(rng.integers(3))  # kind 0 is not said
            known[user, item] = float(stars), kind
            rows.append(f"{user},{item},{stars},{['', 'buy', 'see'][kind]},{item}")
    (tmp_path / "events.csv").write_text("\n".join(rows))
    prepare(Table(tmp_path / "events.csv", rating="rating", action="action"), tmp_path / "data")
    data = small(tmp_path / "data", next_action=next_action)
    assert data.actions == ["buy", "see"]

    def check(history: History, users: list[int], asked: list[int] | None) -> None:
        assert (history.target_action is None) == (next_action == "none")
        for row, user in enumerate(users):
            length = int(history.lengths[row])
            items = history.items[row, :length].tolist()
            said = list(zip(history.ratings[row].tolist(), history.actions[row].tolist(), strict=True))
            assert said == [known[user, item] for item in items] + [(0.0, 0)] * (len(said) - length)
            if history.target_action is not None and length:
                told = [known[user, item][1] for item in items[1:]]
                told += [] if asked is None else [asked[row]]
                assert history.target_action[row, : len(told)].tolist() == told

    plan = data.train_dataloader().plan()
    for batch, window in zip(plan, map(data.read_windows, plan), strict=True):
        check(window, data.window_users[batch].tolist(), None)
    for split in ("val", "test"):
        users = data.dataset.users(split)
        batch = data.read_queries(users, split)
        own = [known[user, item][1] for user, item in zip(users.tolist(), batch.target.tolist(), strict=True)]
        check(batch.history, users.tolist(), {"target": own, "buy": [1] * len(own), "none": None}[next_action])


def test_target_counts_and_last_times_are_their_definitions(ragged: Path) -> None:
    data = small(ragged)
    targets = Counter(item for items, _, train, _ in events(data) for item in items[1:train])
    assert data.dataset.target_counts.tolist() == [targets[item] for item in range(data.num_items + 1)]
    assert len(set(targets.values())) > 2
    dataset, newest = data.dataset, dict.fromkeys(range(data.num_items + 1), 0)
    for user in range(dataset.num_users):
        for place in range(dataset.offsets[user], dataset.train_ends[user]):
            newest[int(dataset.items[place])] = max(newest[int(dataset.items[place])], int(dataset.times[place]))
    assert dataset.last_times.tolist() == list(newest.values())
    asked = Counter()
    for window in data.train_dataloader():
        for row, length in zip(window.items, window.lengths, strict=True):
            asked.update(row[1:length].tolist())
    assert asked == targets, "what the loader asks is what is counted"


# --- the order of batches


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (4, 4), (103, 4), (640, 5), (10, 100)])
def test_an_epoch_covers_everything_exactly_once(n: int, batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=n)
    for epoch in range(3):
        batches = shuffled(lengths, batch_size, epoch, pool=3)
        assert sorted(np.concatenate(batches).tolist()) == list(range(n))
        assert len(batches) == -(-n // batch_size)
        assert max(map(len, batches)) <= batch_size


def order(epoch: int) -> list[int]:
    return np.concatenate(shuffled(np.arange(200) % 17, 8, epoch)).tolist()


def test_an_epochs_order_is_a_function_of_seed_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    first, next_one = order(0), order(1)
    np.random.seed(99)  # noqa: NPY002  no other generator may matter
    torch.manual_seed(99)
    assert order(0) == first
    assert next_one != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert order(0) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert order(0) == first


def test_batches_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=2_000)
    padded = sum(lengths[batch].max() * len(batch) for batch in shuffled(lengths, 20, 0))
    at_random = sum(lengths[part].max() * 20 for part in np.random.default_rng(1).permutation(2_000).reshape(-1, 20))
    assert padded / lengths.sum() < 1.15 < at_random / lengths.sum()


# --- taking an epoch up midway


def loader(epochs: list[int]) -> BatchLoader:
    """Gives [10 · epoch + number]; each plan takes the next of `epochs`, the first is spent on the length."""
    turn = iter([-1, *epochs])

    def plan() -> list[np.ndarray]:
        epoch = next(turn)
        return [np.array([10 * epoch + number]) for number in range(7)]

    return BatchLoader(lambda batch: int(batch[0]), plan)


def test_each_epoch_has_its_own_plan() -> None:
    two = loader([1, 2])
    assert [list(two), list(two)] == [list(range(10, 17)), list(range(20, 27))]


@pytest.mark.parametrize("taken", range(1, 7))
def test_an_epoch_is_taken_up_midway(taken: int) -> None:
    broken = loader([4])
    batches = iter(broken)
    head = [next(batches) for _ in range(taken)]
    state = broken.state_dict()  # while a batch is out, as at a checkpoint
    resumed = loader([4, 5])
    resumed.load_state_dict(state)
    assert head + list(resumed) == list(range(40, 47))
    assert list(resumed) == list(range(50, 57)), "the epoch after it is whole"


def test_an_epoch_that_is_left_early_does_not_shift_the_next() -> None:
    """As with trainer.limit_train_batches or limit_val_batches."""
    limited = loader([1, 2])
    assert [batch for batch, _ in zip(limited, range(3), strict=False)] == [10, 11, 12]
    assert list(limited) == list(range(20, 27))


def test_a_state_of_another_epoch_starts_a_whole_one() -> None:
    """A fit that is saved at the end of a limited epoch."""
    broken, resumed = loader([4]), loader([5])
    batches = iter(broken)
    next(batches)
    resumed.epoch = lambda: 1
    resumed.load_state_dict(broken.state_dict())
    assert list(resumed) == list(range(50, 57))


def test_an_epoch_of_another_length_is_not_taken_up(ragged: Path) -> None:
    two, one = small(ragged), small(ragged)
    two.trainer = SimpleNamespace(current_epoch=0, global_rank=0, world_size=2)
    broken, resumed = two.train_dataloader(), one.train_dataloader()
    next(iter(broken))
    resumed.load_state_dict(broken.state_dict())
    with pytest.raises(
        ValueError, match=r"saved after 1 of the \d+ batches of an epoch, which now has \d+; resume with"
    ):
        next(iter(resumed))
    with pytest.raises(ValueError, match="older version; start a new run without --ckpt_path"):
        resumed.load_state_dict({"next": 1})


def test_a_state_of_the_last_batch_starts_the_next_epoch() -> None:
    broken = loader([4])
    batches = iter(broken)
    for _ in range(7):
        next(batches)
    resumed = loader([5])
    resumed.load_state_dict(broken.state_dict())
    assert list(resumed) == list(range(50, 57))


# --- what cannot work says so


def test_without_two_training_events_nothing_can_be_learned(tmp_path: Path) -> None:
    raw = [(user, item, 3.0, 1_000 * item) for user in range(4) for item in (1, 2, 3)]  # one trains, one val, one test
    prepare(MovieLens(write_movielens(tmp_path / "raw", raw)), tmp_path / "data")
    data = Histories(tmp_path / "data")
    with pytest.raises(ValueError, match=r"no user with two training events, so there are no targets"):
        data.train_dataloader()
    assert len(next(iter(data.val_dataloader())).users) == 4


def test_without_targets_nothing_can_be_measured(tmp_path: Path) -> None:
    raw = [(user, item, 3.0, 1_000 * item) for user in range(4) for item in (1, 2)]  # too short: only train
    prepare(MovieLens(write_movielens(tmp_path / "raw", raw)), tmp_path / "data")
    data = Histories(tmp_path / "data")
    assert len(data.train_dataloader()) == 1
    with pytest.raises(ValueError, match=r"no user with a val target; see counts in"):
        data.val_dataloader()
    with pytest.raises(ValueError, match=r"no user with a test target; see counts in"):
        data.test_dataloader()


def test_a_next_action_must_be_a_kind_of_the_data(cycle: Path, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id,action\n1,1,see\n1,2,buy\n1,3,see\n1,4,see\n")
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order", action="action"), tmp_path / "data")
    with pytest.raises(ValueError, match="next_action is 'sell', expected none, target or one of buy, see"):
        Histories(tmp_path / "data", next_action="sell")
    with pytest.raises(ValueError, match=r"next_action is 'target' but the events of .* have no action types"):
        Histories(cycle, next_action="target")


def test_request_time_without_times_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("user_id,item_id\n" + "".join(f"1,{item}\n" for item in range(5)))
    prepare(Table(tmp_path / "events.csv", time=None, time_unit="order"), tmp_path / "data")
    with pytest.raises(ValueError, match=r"request_time is 'target' but .* use request_time: none"):
        Histories(tmp_path / "data", request_time="target")
    assert Histories(tmp_path / "data").num_items == 5


@pytest.mark.parametrize("wrong", [{"max_length": 0}, {"batch_size": 0}])
def test_sizes_must_be_positive(cycle: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="is 0, expected at least 1"):
        Histories(cycle, **wrong)


def test_what_is_missing_is_prepared(tmp_path: Path) -> None:
    raw = [(user, item, 3.0, 1_000 * item) for user in range(4) for item in range(1, 6)]
    write_movielens(tmp_path / "raw", raw)
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"source: {{class_path: MovieLens, init_args: {{path: {tmp_path / 'raw'}}}}}\noutput: elsewhere\n"
    )
    assert Histories(tmp_path / "data", prepare=config).num_items == 5
    assert not Path("elsewhere").exists()
    with pytest.raises(FileNotFoundError, match=r"other has no dataset and .*none\.yaml does not exist"):
        Histories(tmp_path / "other", prepare=tmp_path / "none.yaml")
