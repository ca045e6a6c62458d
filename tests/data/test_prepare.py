"""The prepared dataset on hand-written worlds, and that no test event can be felt in what it is not."""

import json
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import recsys

from recsys2stage import columns as c
from recsys2stage.data.dataset import Dataset, feature_specs
from recsys2stage.data.events import encode_ids, hash_pairs, stable_order
from recsys2stage.data.prepare import prepare, split_hash
from recsys2stage.data.sources import Feature, MovieLens, SideTable, Table, Vectors
from recsys2stage.data.split import GlobalTime
from recsys2stage.retrieval.histories import prepare_dataset

Event = tuple[Any, Any, int, float]  # user, item, time, rating


def write(folder: Path, events: list[Event], items: str = "", form: str = "csv") -> Table:
    folder.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    frame.write_csv(folder / "events.csv") if form == "csv" else frame.write_parquet(folder / "events.parquet")
    side = None
    if items:
        (folder / "items.csv").write_text(items)
        columns = {"tags": Feature("multi"), "price": Feature("numeric"), "colour": Feature("categorical")}
        side = SideTable("items.csv", "id", columns, title="name")
    return Table(folder / f"events.{form}", rating="rating", items=side)


class World(NamedTuple):
    manifest: dict[str, Any]
    histories: dict[Any, list[tuple[list[Any], list[Any], list[Any]]]]  # raw user -> (train, val, test) raw items
    arrays: dict[str, np.ndarray]


def look(folder: Path) -> World:
    arrays = {file.name: np.load(file) for file in sorted(folder.glob("*.npy"))}
    raw = [None, *pl.read_parquet(folder / c.ITEM_TABLE)["item_id"]]
    users = pl.read_parquet(folder / c.USER_TABLE)["user_id"].to_list()
    items = [raw[item] for item in arrays[c.EVENT_ITEMS]]
    offsets, train_end, val_end = arrays[c.USER_OFFSETS], arrays[c.TRAIN_ENDS], arrays[c.VAL_ENDS]
    histories: dict[Any, Any] = {}
    for u, user in enumerate(users):
        a, b, d, e = offsets[u], train_end[u], val_end[u], offsets[u + 1]
        histories[user] = (items[a:b], items[b:d], items[d:e])
    return World(json.loads((folder / c.MANIFEST).read_text()), histories, arrays)


def prepared(tmp_path: Path, events: list[Event], items: str = "", form: str = "csv", **options: Any) -> World:
    manifest = prepare(write(tmp_path / "raw", events, items, form), tmp_path / "data", **options)
    world = look(tmp_path / "data")
    assert manifest == world.manifest
    return world


# neither users nor times in order; user 5 is tied at time 20, user 9 too short
EVENTS: list[Event] = [
    (7, 300, 30, 1.0),
    (5, 100, 10, 5.0),
    (7, 100, 10, 4.0),
    (5, 400, 20, 3.0),
    (7, 200, 20, 2.0),
    (5, 200, 20, 4.5),
    (9, 200, 10, 5.0),
    (5, 300, 20, 2.5),
    (9, 400, 11, 0.5),
]


def test_events_are_sorted_by_user_and_time_and_ties_stay_in_file_order(tmp_path: Path) -> None:
    world = prepared(tmp_path, EVENTS)
    assert world.histories == {5: ([100, 400], [200], [300]), 7: ([100], [200], [300]), 9: ([200, 400], [], [])}
    assert world.arrays[c.EVENT_ITEMS].tolist() == [1, 4, 2, 3, 1, 2, 3, 2, 4]
    assert world.arrays[c.EVENT_TIMES].tolist() == [10, 20, 20, 20, 10, 20, 30, 10, 11]
    assert world.arrays[c.EVENT_RATINGS].tolist() == [5.0, 3.0, 4.5, 2.5, 4.0, 2.0, 1.0, 5.0, 0.5]
    assert not world.arrays[c.ITEM_COLD].any()


def test_the_arrays_have_the_types_of_the_contract(tmp_path: Path) -> None:
    arrays = prepared(tmp_path, EVENTS, cold_items=0.25).arrays
    wanted = {c.EVENT_ITEMS: "int32", c.EVENT_TIMES: "int64", c.EVENT_RATINGS: "float32", c.ITEM_COLD: "bool"}
    wanted |= dict.fromkeys((c.USER_OFFSETS, c.TRAIN_ENDS, c.VAL_ENDS), "int64")
    assert {name: str(array.dtype) for name, array in arrays.items()} == wanted


def test_the_manifest_counts_and_states_the_protocol(tmp_path: Path) -> None:
    manifest = prepared(tmp_path, EVENTS).manifest
    assert manifest["counts"] == {
        "events_read": 9,
        "removed_by_rating": 0,
        "repeats": 0,
        "removed_by_core": 0,
        "cold_items": 0,
        "cold_events": 0,
        "items_without_metadata": 0,
        "users_without_metadata": 0,
        "events": 9,
        "users": 3,
        "items": 4,
        "users_too_short": 1,
        "rejected": 0,
        "train_events": 5,
        "val_events": 2,
        "test_events": 2,
        "val_users": 2,
        "test_users": 2,
    }
    assert manifest["ties"] == {"events_share": 3 / 9, "last_time_share": 1 / 3}
    assert manifest["max_history"] == 4
    assert manifest["inputs"] == [str(tmp_path / "raw" / "events.csv")]
    assert manifest["has"] == {"time": True, "rating": True, "action": False}
    assert manifest["protocol"] == {
        "split": "LeaveOneOut",
        "val": 1,
        "tie_break": "file_order",
        "min_rating": None,
        "core": 0,
        "repeats": "first",
        "time": "seconds",
        "cold_items": 0.0,
        "seed": 0,
        "candidates": "all rated items",
    }
    assert manifest["options"]["source"]["init_args"]["rating"] == "rating"
    (raw,) = manifest["parents"].values()
    assert len(raw["hash"]) == 64


def test_ties_are_within_a_user(tmp_path: Path) -> None:
    events = [(1, 10, 5, 1.0), (1, 20, 6, 1.0), (2, 10, 6, 1.0), (2, 20, 6, 1.0)]
    assert prepared(tmp_path, events).manifest["ties"] == {"events_share": 0.5, "last_time_share": 0.5}
    assert prepared(tmp_path, events[:3]).manifest["ties"] == {"events_share": 0, "last_time_share": 0}


def test_the_hash_is_that_of_the_split(tmp_path: Path) -> None:
    world = prepared(tmp_path, EVENTS)
    names = (c.USER_OFFSETS, c.EVENT_ITEMS, c.TRAIN_ENDS, c.VAL_ENDS)
    ids = (pl.read_parquet(tmp_path / "data" / f"{one}s.parquet")[f"{one}_id"] for one in ("user", "item"))
    assert world.manifest["split_hash"] == split_hash(*(world.arrays[name] for name in names), *ids)
    assert prepared(tmp_path, EVENTS).manifest["split_hash"] == world.manifest["split_hash"]
    assert prepared(tmp_path, EVENTS, tie_break="item_id").manifest["split_hash"] != world.manifest["split_hash"]
    other = [(user, item + 1_000, *rest) for user, item, *rest in EVENTS]  # numbered alike, but other items
    assert prepared(tmp_path, other).manifest["split_hash"] != world.manifest["split_hash"]


def test_ties_by_item_id(tmp_path: Path) -> None:
    assert prepared(tmp_path, EVENTS, tie_break="item_id").histories[5] == ([100, 200], [300], [400])


def test_ties_by_hash_follow_the_seed_and_not_the_file(tmp_path: Path) -> None:
    orders = set()
    for seed in range(40):
        one = prepared(tmp_path, EVENTS, tie_break="hash", seed=seed).histories
        other = prepared(tmp_path, EVENTS[::-1], tie_break="hash", seed=seed).histories
        assert one == other
        order = [item for run in one[5] for item in run]
        assert sorted(order) == [100, 200, 300, 400]
        assert order[0] == 100  # time comes first
        orders.add(tuple(order))
    assert len(orders) == 6  # every order of three ties turns up


def test_the_hash_gives_two_users_different_orders_of_the_same_items() -> None:
    users, items = np.repeat(np.arange(500), 2), np.tile([1, 2], 500)
    first = hash_pairs(users, items, 0).reshape(500, 2).argmin(1)
    assert 0.4 < first.mean() < 0.6


def test_global_time_keeps_whole_runs(tmp_path: Path) -> None:
    world = prepared(tmp_path, EVENTS, split=GlobalTime(val=15, test=25))
    assert world.histories == {5: ([100], [400, 200, 300], []), 7: ([100], [200], [300]), 9: ([200, 400], [], [])}
    assert world.manifest["protocol"]["split"] == "GlobalTime"
    assert world.manifest["protocol"]["test"] == 25


def test_min_rating_drops_events_and_with_them_items_and_users(tmp_path: Path) -> None:
    world = prepared(tmp_path, EVENTS, min_rating=3)
    assert world.histories == {5: ([100], [400], [200]), 7: ([100], [], []), 9: ([200], [], [])}
    assert world.manifest["counts"]["removed_by_rating"] == 4
    assert world.manifest["counts"]["items"] == 3  # 300 has no rating of 3 or more
    assert world.arrays[c.EVENT_ITEMS].tolist() == [1, 3, 2, 1, 2]


def test_one_event_is_a_dataset(tmp_path: Path) -> None:
    assert prepared(tmp_path, [(3, 4, 5, 1.0)]).histories == {3: ([4], [], [])}


def test_core_goes_on_to_the_fixed_point(tmp_path: Path) -> None:
    square = [(user, item, time, 1.0) for user in (1, 2) for time, item in enumerate((10, 20))]
    # 30 has two events, but user 3 loses 40 (one event), then is too short, then 30 has one, then user 4 goes
    chain = [(3, 40, 0, 1.0), (3, 30, 1, 1.0), (4, 30, 0, 1.0), (4, 10, 1, 1.0)]
    world = prepared(tmp_path, square + chain, core=2)
    assert list(world.histories) == [1, 2]
    assert world.manifest["counts"]["removed_by_core"] == 4
    assert world.arrays[c.EVENT_ITEMS].tolist() == [1, 2, 1, 2]
    assert prepared(tmp_path, square + chain, core=1).manifest["counts"]["removed_by_core"] == 0


@pytest.mark.parametrize("core", [2, 3, 5])
def test_core_leaves_only_what_has_enough(tmp_path: Path, core: int) -> None:
    rng = np.random.default_rng(core)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.zipf(1.5, 600) % 60, rng.zipf(1.5, 600) % 40, strict=True)})
    arrays = prepared(tmp_path, [(u, i, t, 1.0) for t, (u, i) in enumerate(pairs)], core=core).arrays
    assert np.bincount(arrays[c.EVENT_ITEMS])[1:].min() >= core
    assert np.diff(arrays[c.USER_OFFSETS]).min() >= core


REPEATED: list[Event] = [
    (1, 10, 1, 1.0),
    (1, 20, 2, 2.0),
    (1, 10, 3, 3.0),
    (1, 30, 4, 4.0),
    (1, 10, 5, 5.0),
    (2, 10, 1, 1.0),
]


@pytest.mark.parametrize(
    ("repeats", "items", "ratings"),
    [
        ("first", [10, 20, 30, 10], [1, 2, 4, 1]),
        ("last", [20, 30, 10, 10], [2, 4, 5, 1]),
        ("keep", [10, 20, 10, 30, 10, 10], [1, 2, 3, 4, 5, 1]),
    ],
)
def test_repeats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, repeats: Any, items: list[int], ratings: list[float]
) -> None:
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        world = prepared(tmp_path, REPEATED, repeats=repeats)
    assert [item for runs in world.histories.values() for run in runs for item in run] == items
    assert world.arrays[c.EVENT_RATINGS].tolist() == ratings
    assert world.manifest["counts"]["repeats"] == 2
    assert f"repeats={repeats}" in caplog.text


def test_repeats_can_be_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 extra events; first \(user 1, item 10\); choose"):
        prepared(tmp_path, REPEATED, repeats="error")
    assert not (tmp_path / "data").exists()


MANY: list[Event] = [(user, (user * 7 + step * 3) % 40, step, 1.0) for user in range(100) for step in range(12)]


def test_cold_items_are_only_ever_tested(tmp_path: Path) -> None:
    whole, world = prepared(tmp_path, MANY), prepared(tmp_path, MANY, cold_items=0.2)
    cold = {item for item, is_cold in enumerate(world.arrays[c.ITEM_COLD]) if is_cold}
    assert len(cold) == world.manifest["counts"]["cold_items"] == 8
    raw = {item - 1 for item in cold}  # raw ids are 0..39
    assert world.manifest["counts"]["items"] == 40
    tested = set()
    for user, (train, val, test) in world.histories.items():
        full = whole.histories[user]
        assert test == full[2]
        assert val == [item for item in full[1] if item not in raw]
        assert train == [item for item in full[0] if item not in raw]
        tested |= set(test)
    assert tested & raw
    removed = sum(len(run) for runs in whole.histories.values() for run in runs) - len(world.arrays[c.EVENT_ITEMS])
    assert world.manifest["counts"]["cold_events"] == removed > 0
    assert (
        prepared(tmp_path, MANY, cold_items=0.2, seed=1).arrays[c.ITEM_COLD].tolist()
        != world.arrays[c.ITEM_COLD].tolist()
    )


def test_a_user_who_only_knew_cold_items_is_gone(tmp_path: Path) -> None:
    events = [*MANY, *((1000 + item, item, 0, 1.0) for item in range(40))]
    world = prepared(tmp_path, events, cold_items=0.2)
    assert world.manifest["counts"]["users"] == 100 + 32 == len(world.histories)
    assert all(sum(map(len, runs)) for runs in world.histories.values())


def altered(events: list[Event], seed: int) -> list[Event]:
    """Every user's last event gets another item that others train on, another rating and a later time."""
    rng = np.random.default_rng(seed)
    last = {user: max(time for u, _, time, _ in events if u == user) for user, *_ in events}
    known = {user: {item for u, item, *_ in events if u == user} for user, *_ in events}
    changed = []
    for user, item, time, rating in events:
        if time == last[user]:
            item = int(rng.choice([other for other in range(40) if other not in known[user]]))
            time, rating = time + int(rng.integers(1, 100)), float(rng.integers(2, 6))
        changed.append((user, item, time, rating))
    return changed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cold_items": 0.2},
        {"tie_break": "item_id"},
        {"min_rating": 1.0, "repeats": "keep"},
        {"split": GlobalTime(val=10, test=11)},
        {"split": GlobalTime(val=1 / 12, test=1 / 12), "cold_items": 0.1},
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])  # ids as text and as numbers are numbered in different ways
def test_what_the_test_events_are_cannot_be_felt_anywhere_else(
    tmp_path: Path, form: str, options: dict[str, Any]
) -> None:
    table = "id,name,tags,price,colour\n" + "\n".join(f"{i},N{i},a|b{i % 3},{i},c{i % 4}" for i in range(39))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, events in zip(folders, (MANY, altered(MANY, 0)), strict=True):
        prepared(folder, events, table, form, **options)
    names = sorted(file.name for file in (folders[0] / "data").iterdir())
    assert names == sorted(file.name for file in (folders[1] / "data").iterdir())
    one, other = (look(folder / "data") for folder in folders)
    test = np.concatenate(
        [np.arange(a, b) for a, b in zip(one.arrays[c.VAL_ENDS], one.arrays[c.USER_OFFSETS][1:], strict=True)]
    )
    assert len(test) == 100
    for name in names:
        if name.startswith("events."):
            mine, theirs = one.arrays[name], other.arrays[name]
            assert (mine[test] != theirs[test]).mean() > 0.9, name  # the alteration is there
            assert np.array_equal(np.delete(mine, test), np.delete(theirs, test)), name
        elif name != c.MANIFEST:
            assert (folders[0] / "data" / name).read_bytes() == (folders[1] / "data" / name).read_bytes(), name
    for manifest in (one.manifest, other.manifest):
        for fact in ("created", "split_hash", "parents", "inputs", "options"):  # dates, hashes, folders of this test
            del manifest[fact]
    assert one.manifest == other.manifest


TABLE = """id,name,tags,price,colour
300,Three,b|a|b,3.5,red
100,One,a,,blue
999,Unrated,z,9,green
400,Four,,1,
300,Again,,,
"""


def test_features_are_written_by_item_number_with_a_row_of_nothing_for_padding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        world = prepared(tmp_path, EVENTS, TABLE)
    arrays = world.arrays  # items 100, 200, 300, 400 are 1, 2, 3, 4; nothing is known of 200
    assert arrays["items.tags.offsets.npy"].tolist() == [0, 0, 1, 1, 3, 3]
    assert arrays["items.tags.codes.npy"].tolist() == [1, 2, 1]  # a = 1, b = 2; z is of no rated item
    assert arrays["items.colour.codes.npy"].tolist() == [0, 1, 0, 2, 0]  # blue = 1, red = 2
    np.testing.assert_array_equal(
        arrays["items.price.values.npy"], np.array([np.nan, np.nan, np.nan, 3.5, 1], np.float32)
    )
    types = {
        name: str(array.dtype) for name, array in arrays.items() if name.startswith("items.") and "cold" not in name
    }
    assert types == {
        "items.tags.offsets.npy": "int64",
        "items.tags.codes.npy": "int32",
        "items.colour.codes.npy": "int32",
        "items.price.values.npy": "float32",
    }
    assert world.manifest["features"] == {
        "items": [
            {"name": "tags", "kind": "multi", "size": 3},
            {"name": "price", "kind": "numeric", "size": 1},
            {"name": "colour", "kind": "categorical", "size": 3},
        ],
        "users": [],
    }
    assert world.manifest["counts"]["items_without_metadata"] == 1
    table = pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)
    assert table.columns == ["item", "item_id", "title", "tags", "price", "colour"]
    assert table["item"].to_list() == [1, 2, 3, 4]
    assert table["title"].to_list() == ["One", None, "Three", "Four"]
    assert "1 rows repeat a item_id" in caplog.text
    assert "1 item is not in the item table" in caplog.text
    assert "1 user has too few events" in caplog.text


def test_users_have_features_without_a_padding_row(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", EVENTS)
    (tmp_path / "raw" / "users.csv").write_text("user_id,age\n9,30\n5,40\n")
    source.users = SideTable("users.csv", "user_id", {"age": Feature("numeric")})
    manifest = prepare(source, tmp_path / "data")
    np.testing.assert_array_equal(np.load(tmp_path / "data" / "users.age.values.npy"), [40, np.nan, 30])
    assert manifest["counts"]["users_without_metadata"] == 1


def test_actions_are_numbered(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,did\n1,1,1,see\n1,2,2,buy\n1,3,3,\n")
    manifest = prepare(Table(tmp_path / "e.csv", action="did"), tmp_path / "data")
    assert np.load(tmp_path / "data" / c.EVENT_ACTIONS).tolist() == [2, 1, 0]
    assert manifest["actions"] == ["buy", "see"]
    assert manifest["has"]["action"]


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (["10", "9", "-1"], [-1, 9, 10]),
        (["007", "7", "10"], ["007", "10", "7"]),  # not the same item
        (["b5a1", "7"], ["7", "b5a1"]),
        (["99999999999999999999", "1"], ["1", "99999999999999999999"]),  # beyond 64 bits
    ],
)
def test_ids_of_csv_are_numbers_only_if_nothing_is_lost(tmp_path: Path, ids: list[str], wanted: list[Any]) -> None:
    lines = "".join(f"u-{place},{item},{place}\n" for place, item in enumerate(ids))
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + lines)
    prepare(Table(tmp_path / "e.csv"), tmp_path / "data")
    assert pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["item_id"].to_list() == wanted
    assert pl.read_parquet(tmp_path / "data" / c.USER_TABLE)["user_id"].to_list() == ["u-0", "u-1", "u-2"][: len(ids)]


@pytest.mark.parametrize("dtype", [pl.Int64, pl.UInt32, pl.String, pl.Float64])
def test_ids_of_parquet_keep_their_type_and_meaning(tmp_path: Path, dtype: Any) -> None:
    frame = pl.DataFrame({"user_id": [2, 1, 2], "item_id": [30, 4, 5], "timestamp": [1, 2, 3]})
    frame.with_columns(pl.col("user_id", "item_id").cast(dtype)).write_parquet(tmp_path / "e.parquet")
    prepare(Table(tmp_path / "e.parquet"), tmp_path / "data")
    ids = pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["item_id"]
    assert ids.to_list() == pl.Series([4, 5, 30]).cast(dtype).sort().to_list()
    assert (
        look(tmp_path / "data").histories[pl.Series([2]).cast(dtype)[0]][0] == pl.Series([30, 5]).cast(dtype).to_list()
    )


def test_ids_far_apart_are_numbered_too() -> None:
    codes, ids = encode_ids(pl.Series([2**62, -5, 2**62, 7]), untyped=False)
    assert codes.tolist() == [2, 0, 2, 1]
    assert ids.to_list() == [-5, 7, 2**62]


def test_milliseconds_order_events_within_a_second(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n1,1,9900\n1,2,9100\n1,3,9500\n")
    manifest = prepare(Table(tmp_path / "e.csv", time_unit="milliseconds"), tmp_path / "data")
    world = look(tmp_path / "data")
    assert world.histories[1] == ([2], [3], [1])
    assert world.arrays[c.EVENT_TIMES].tolist() == [9, 9, 9]
    assert manifest["ties"]["events_share"] == 0


@pytest.mark.parametrize("time", ["timestamp", None])
def test_an_order_without_times_switches_off_what_needs_them(tmp_path: Path, time: str | None) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n1,30,1\n2,10,1\n1,20,2\n1,10,3\n")
    source = Table(tmp_path / "e.csv", time=time, time_unit="order")
    manifest = prepare(source, tmp_path / "data")
    assert look(tmp_path / "data").histories == {1: ([30], [20], [10]), 2: ([10], [], [])}
    assert manifest["has"]["time"] is False
    assert manifest["protocol"]["time"] == "order"
    with pytest.raises(ValueError, match=r"GlobalTime needs times, but .*e.csv has only an order; use LeaveOneOut"):
        prepare(source, tmp_path / "other", split=GlobalTime())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cold_items": 1.0}, "cold_items is 1.0"),
        ({"core": -1}, "core is -1, expected at least 0"),
        ({"core": 50}, "core is 50, and none of 9 events is left"),
        ({"min_rating": 6}, "no event of .* has a rating of 6 or more"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, EVENTS, **options)
    assert not (tmp_path / "data").exists()


def test_only_a_dataset_is_ever_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", EVENTS)
    with pytest.raises(ValueError, match=r"raw holds other things and would be lost"):
        prepare(source, tmp_path / "raw")
    assert (tmp_path / "raw" / "events.csv").is_file()
    prepare(source, tmp_path / "data")
    (tmp_path / "data" / "leftover").touch()
    prepare(source, tmp_path / "data")
    assert not (tmp_path / "data" / "leftover").exists()


def test_a_rating_threshold_needs_ratings(tmp_path: Path) -> None:
    source = write(tmp_path / "raw", EVENTS)
    source.rating = None
    with pytest.raises(ValueError, match=r"min_rating is 3, but .*events.csv has no ratings"):
        prepare(source, tmp_path / "data", min_rating=3)


@pytest.mark.parametrize("spread", [5, 2**40, 2**62])
def test_stable_order_is_lexsort(spread: int) -> None:
    rng = np.random.default_rng(0)
    user, time = rng.integers(0, 9, 500), rng.integers(-spread, spread, 500)
    time[::3] = time[0]
    assert stable_order(user, time).tolist() == np.lexsort((time, user)).tolist()
    assert stable_order(np.zeros(1, int)).tolist() == [0]


def test_a_random_world_agrees_with_a_naive_preparation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = sorted({(int(u), int(i)) for u, i in rng.integers(0, 50, (900, 2))}, key=lambda _: rng.random())
    events = [(u, i, int(rng.integers(0, 30)), 1.0) for u, i in pairs]
    naive: dict[int, list[int]] = {}
    for user, item, _, _ in sorted(events, key=lambda event: (event[0], event[2])):  # sorted() is stable
        naive.setdefault(user, []).append(item)
    for user, (train, val, test) in prepared(tmp_path, events).histories.items():
        items = naive.pop(user)
        cut = len(items) if len(items) < 3 else len(items) - 2
        assert (train, val, test) == (items[:cut], items[cut : cut + 1], items[cut + 1 :])
    assert not naive


@pytest.mark.parametrize(
    ("name", "events", "users", "items", "tied", "last_tied"),
    [
        # of ml-1m's rows 54 % have the time of the one before; 79 % share theirs with any other
        ("ml-1m", 1_000_209, 6_040, 3_706, 0.794, 0.420),
        ("ml-latest-small", 100_836, 610, 9_724, 0.230, 0.154),
        ("amazon-beauty", 198_502, 22_363, 12_101, 0, 0),
    ],
)
def test_real_data(
    tmp_path: Path, name: str, events: int, users: int, items: int, tied: float, last_tied: float
) -> None:
    if "RECSYS_DATA" not in os.environ:
        pytest.skip("RECSYS_DATA is not set: the folder with ml-1m.zip, ml-latest-small.zip and amazon-beauty.zip")
    path = Path(os.environ["RECSYS_DATA"]) / f"{name}.zip"
    attributes = SideTable("items.csv", "item_id", {"attributes": Feature("multi")})
    amazon = Table(path, member="interactions.csv", time_unit="order", items=attributes)
    manifest = prepare(amazon if name == "amazon-beauty" else MovieLens(path), tmp_path / "data")
    counts = manifest["counts"]
    assert (counts["events"], counts["users"], counts["items"]) == (events, users, items)
    assert counts["items_without_metadata"] == counts["users_too_short"] == counts["repeats"] == 0
    assert counts["test_users"] == users
    assert manifest["ties"] == pytest.approx({"events_share": tied, "last_time_share": last_tied}, abs=6e-4)


# --- vectors made elsewhere

WORDS = {100: [1.0, 0.5], 300: [-2.0, 3.0], 400: [0.0, 7.0], 999: [9.0, 9.0]}  # 200 has none, 999 no events


def parquet(path: Path, ids: list[Any], vectors: Any) -> Vectors:
    pl.DataFrame({"item_id": ids, "vector": vectors}, strict=False).write_parquet(path)
    return Vectors(path)


def array(path: Path, ids: list[Any], vectors: Any) -> Vectors:
    np.save(path, np.array(vectors))
    path.with_suffix(".txt").write_text("".join(f"{item}\n" for item in ids))
    return Vectors(path, path.with_suffix(".txt"))


@pytest.mark.parametrize("write_vectors", [parquet, array])
@pytest.mark.parametrize("as_text", [True, False])
def test_vectors_are_joined_by_the_item_id_as_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, write_vectors: Any, as_text: bool
) -> None:
    ids = [str(item) if as_text else item for item in reversed(WORDS)]
    path = tmp_path / ("text.npy" if write_vectors is array else "text.parquet")
    text = write_vectors(path, ids, list(reversed(WORDS.values())))
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        world = prepared(tmp_path, EVENTS, TABLE, item_vectors={"text": text})
    values = world.arrays["items.text.values.npy"]
    assert values.dtype == np.float32
    nothing = [np.nan, np.nan]
    np.testing.assert_array_equal(values, [nothing, WORDS[100], nothing, WORDS[300], WORDS[400]])
    assert world.manifest["features"]["items"][-1] == {"name": "text", "kind": "vector", "size": 2}
    assert len(world.manifest["features"]["items"]) == 4
    assert world.manifest["counts"]["items_without_text_vector"] == 1
    assert "1 items have no vector in" in caplog.text
    assert set(map(str, text.files)) < set(world.manifest["parents"]), "hashed, as the raw data are"
    assert world.manifest["options"]["item_vectors"]["text"]["path"] == str(path)
    loaded = Dataset(tmp_path / "data").item_features
    assert feature_specs(loaded)[-1] == {"name": "text", "kind": "vector", "size": 2, "values": 2}
    np.testing.assert_array_equal(loaded[-1]["values"], values)


def test_fixed_size_lists_of_whole_numbers_are_vectors_too(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item_id": ["100", "300"], "vector": [[1, 2, 3], [4, 5, 6]]})
    frame.with_columns(pl.col("vector").cast(pl.Array(pl.Int16, 3))).write_parquet(tmp_path / "v.parquet")
    world = prepared(tmp_path, EVENTS, item_vectors={"text": Vectors(tmp_path / "v.parquet")})
    assert world.arrays["items.text.values.npy"][[1, 3]].tolist() == [[1, 2, 3], [4, 5, 6]]


PAIR = [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["100", "300", "400"], [*PAIR, [5.0]], "row 3: the vector is not of length 2 like most"),
        (["100", "300", "400"], [*PAIR, None], "row 3: the vector is not of length 2"),
        (["100", "300"], [[], []], r"has vectors of type List\(Null\), expected lists of numbers"),
        (["100", "300", "400"], [[], [], [1.0]], "most rows of .* hold no vector; remove them"),
        (["100", "300"], [PAIR[0], [1.0, None]], "row 2: the vector has a value that is not finite"),
        (["100", "300"], [PAIR[0], [1.0, float("inf")]], "row 2: the vector has a value that is not finite"),
        (["100", None], PAIR, "row 2: the item id is missing"),
        (["100", " "], PAIR, "row 2: the item id is missing"),
        (["100", "100"], PAIR, "repeats 1 item ids, first '100'; keep one row each"),
        (["a100", "b300"], PAIR, "vectors of none of the 4 items: its ids look like 'a100', .* like '100'"),
        (["100", "300"], ["1 2", "3 4"], "has vectors of type String, expected lists of numbers"),
    ],
)
def test_a_parquet_of_vectors_that_is_wrong_is_refused_whole(
    tmp_path: Path, ids: Any, vectors: Any, message: str
) -> None:
    text = parquet(tmp_path / "text.parquet", ids, vectors)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, EVENTS, item_vectors={"text": text})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["raw", "text.parquet"], "nothing is half written"


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        ([100, 300, 400], PAIR, "has 2 rows but .*text.txt has 3 lines; give one id per row"),
        ([100, 300], [1.0, 2.0], r"has shape \(2,\) and type float64, expected one row of numbers per item"),
        ([100, 300], [["a", "b"], ["c", "d"]], "expected one row of numbers per item"),
        ([100, 300], [PAIR[0], [np.nan, 1.0]], "text.npy, row 2: the vector has a value that is not finite"),
        ([100, 100], PAIR, "text.txt repeats 1 item ids, first '100'"),
        ([100, ""], PAIR, "text.txt, row 2: the item id is missing"),
    ],
)
def test_an_array_of_vectors_that_is_wrong_is_refused_whole(
    tmp_path: Path, ids: Any, vectors: Any, message: str
) -> None:
    text = array(tmp_path / "text.npy", ids, vectors)
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, EVENTS, item_vectors={"text": text})
    assert not (tmp_path / "data").exists()


def test_files_and_names_of_vectors_must_fit(tmp_path: Path) -> None:
    good = parquet(tmp_path / "text.parquet", ["100"], PAIR[:1])
    np.save(tmp_path / "text.npy", np.array(PAIR))
    (tmp_path / "text.txt").write_text("100\n300\n")
    (tmp_path / "empty.npy").touch()
    pl.DataFrame({"item": ["100"], "vector": PAIR[:1]}).write_parquet(tmp_path / "other.parquet")
    for name, vectors, message in (
        (
            "price",
            good,
            r"item_vectors uses the names \['price'\], which other item features have, expected new ones; rename",
        ),
        ("text", Vectors(tmp_path / "none.parquet"), "none.parquet does not exist"),
        ("text", Vectors(tmp_path / "text.npy", tmp_path / "none.txt"), "none.txt does not exist"),
        ("text", Vectors(tmp_path / "text.npy"), "an array without ids; set ids to a text file"),
        ("text", Vectors(tmp_path / "empty.npy", tmp_path / "text.txt"), "empty.npy cannot be read as an array"),
        ("text", Vectors(tmp_path / "text.parquet", tmp_path / "text.txt"), "has an id column; leave out ids"),
        ("text", Vectors(tmp_path / "text.txt"), "text.txt cannot be read as Parquet"),
        ("text", Vectors(tmp_path / "other.parquet"), r"no column 'item_id' \(did you mean 'item'\?\)"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepared(tmp_path, EVENTS, TABLE, item_vectors={name: vectors})
        assert not (tmp_path / "data").exists()


def test_vectors_are_named_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the verb, and where a fit prepares what is missing."""
    write(tmp_path / "raw", EVENTS)
    parquet(tmp_path / "text.parquet", list(WORDS), list(WORDS.values()))
    array(tmp_path / "look.npy", [100, 200], [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "prepare.yaml").write_text(
        "source: {class_path: Table, init_args: {path: raw/events.csv}}\noutput: data\n"
        "item_vectors: {text: {path: text.parquet}, look: {path: look.npy, ids: look.txt}}\n"
    )
    monkeypatch.chdir(tmp_path)
    recsys("prepare-data", "--config", "prepare.yaml")
    prepare_dataset(Path("prepare.yaml"), Path("again"))
    for folder in ("data", "again"):
        features = Dataset(folder).item_features
        assert [(f["name"], f["kind"], f["size"]) for f in features] == [("text", "vector", 2), ("look", "vector", 3)]
        assert features[1]["values"][2].tolist() == [4, 5, 6]
