"""Histories of known users: prepared, packed into a bundle, and merged with new events."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import Run, recsys
from worlds import featured_world, seal

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.data.dataset import Dataset
from recsys2stage.recommender import Recommender
from recsys2stage.serving.histories import USER_COST, Histories, UserEvents
from recsys2stage.serving.packed import KnownUsers, load_known_users, pack
from recsys2stage.serving.store import Event, Store

CATALOGUE = Catalogue(pl.DataFrame({"item": [1, 2, 3], "item_id": ["a", "b", "c"]}), ["look", "buy"])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store.sqlite") as store:
        yield store


@pytest.fixture(scope="module")
def packed(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "bundle"
    of = ("--index", trained.index, "--ranker", trained.ranker, "--output", output)
    recsys("export-bundle", *of, "--with_histories", "true")
    return output


def known(*histories: list[int], ids: list[object] | None = None) -> KnownUsers:
    """Users with the given items, at times 10, 20, ..."""
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])])
    times = np.concatenate([10 * (1 + np.arange(len(history))) for history in histories])
    items = np.concatenate(histories).astype(np.int32)
    return KnownUsers(pl.Series("user_id", ids or [f"u{n}" for n in range(len(histories))]), offsets, items, times)


def facts(events: UserEvents | None) -> list[tuple[int, int]]:
    assert events is not None
    return list(zip(events.items.tolist(), events.times.tolist(), strict=True))


# --- prepared and packed


def test_a_packed_bundle_knows_what_the_dataset_does(trained: Run, packed: Path) -> None:
    dataset, table = Dataset(trained.data), pl.read_parquet(trained.data / "users.parquet")
    for users in (load_known_users(packed), load_known_users(trained.bundle), load_known_users(packed, trained.data)):
        assert users is not None
        assert len(users) == dataset.num_users
        for user, user_id in table.select("user", "user_id").iter_rows():
            number = users.number(str(user_id))
            assert number == user
            events = users.events(number)
            part = slice(dataset.offsets[user], dataset.offsets[user + 1])
            assert events.items.tolist() == dataset.items[part].tolist()
            assert events.times.tolist() == dataset.times[part].tolist()
            assert dataset.ratings is not None
            assert events.ratings is not None
            assert events.ratings.tolist() == dataset.ratings[part].tolist()


def test_a_packed_bundle_recommends_as_before(trained: Run, packed: Path) -> None:
    assert read_manifest(packed, "bundle", "")["histories"] == {"users": 150, "events": 4_500}
    history = Recommender.load(packed).catalogue.items["item_id"][:5].to_list()
    assert Recommender.load(packed).recommend(history) == Recommender.load(trained.bundle).recommend(history)


def test_features_and_actions_are_packed(tmp_path: Path) -> None:
    dataset = Dataset(featured_world(tmp_path / "world"))
    (tmp_path / "bundle").mkdir()
    told = pack(dataset, tmp_path / "bundle")
    manifest = {"kind": "bundle", "format": 1, "items": dataset.num_items, "user_features": [{}, {}]}
    manifest |= {"histories": told, "parents": {"data": {"path": "elsewhere", "hash": None}}}
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    packed, direct = KnownUsers.of_bundle(tmp_path / "bundle"), KnownUsers.of_dataset(dataset)
    for user in (0, 17):
        one, two = packed.events(user), direct.events(user)
        assert one.actions is not None
        assert two.actions is not None
        assert set(one.actions.tolist()) == {1, 2}
        assert one.actions.tolist() == two.actions.tolist()
        assert one.user is not None
        assert two.user is not None
        assert [values.shape for values in one.user] == [(1, 1), (1, 1)]
        assert all(np.array_equal(a, b) for a, b in zip(one.user, two.user, strict=True))


def test_without_data_there_are_no_known_users(trained: Run, tmp_path: Path) -> None:
    shutil.copytree(trained.bundle, tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    manifest["parents"]["data"]["path"] = str(tmp_path / "gone")
    (tmp_path / "bundle/manifest.json").write_text(json.dumps(manifest))
    assert load_known_users(tmp_path / "bundle") is None
    with pytest.raises(FileNotFoundError, match="there is no dataset"):
        load_known_users(tmp_path / "bundle", tmp_path / "gone")


def test_data_of_another_split_are_refused(trained: Run, cycle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split hash"):
        load_known_users(trained.bundle, cycle)
    of = ("--index", trained.index, "--ranker", trained.ranker, "--output", tmp_path / "bundle")
    with pytest.raises(SystemExit, match="split hash"):
        recsys("export-bundle", *of, "--with_histories", "true", "--data", cycle)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("users.offsets.npy", np.full(151, 4_500, dtype=np.int64)),
        ("users.offsets.npy", np.zeros(151, dtype=np.int64)),
        ("events.item.npy", np.full(4_500, 121, dtype=np.int32)),
        ("events.item.npy", np.zeros(4_500, dtype=np.int32)),
        ("events.item.npy", np.ones(4_499, dtype=np.int32)),
        ("events.time.npy", np.zeros(4_500, dtype=np.float64)),
    ],
)
def test_packed_arrays_that_do_not_fit_together_are_refused(
    packed: Path, tmp_path: Path, name: str, array: np.ndarray
) -> None:
    """Whoever made the folder may have sealed it with right checksums."""
    shutil.copytree(packed, tmp_path / "bundle")
    np.save(tmp_path / "bundle/histories" / name, array)
    with pytest.raises(ValueError, match="checksum"):
        Recommender.load(tmp_path / "bundle")
    seal(tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"make .*again"):
        load_known_users(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("ids", "present", "absent"),
    [
        ([3, 7, 70], "70", ["007", "7.0", "-7", "+7", "", "seven", "9" * 30, "٣"]),
        ([-5, 2, 2**62], "-5", ["5", "--5", "- 5", "-05"]),
        (["0012", "12", "é"], "0012", ["012", "e", "\ud800", "13", "\x00"]),
        (["b", "a", "c"], "c", ["d", ""]),  # not in order
    ],
)
def test_ids_compare_as_text(ids: list[object], present: str, absent: list[str]) -> None:
    users = known([1], [2], [3], ids=ids)
    assert users.number(present) == [str(one) for one in ids].index(present)
    assert [users.number(one) for one in absent] == [None] * len(absent)


# --- merged with new events


def test_new_events_are_merged_by_time(store: Store) -> None:
    histories = Histories(store, known([1, 2], [3]), CATALOGUE)
    assert facts(histories.events("u0")) == [(1, 10), (2, 20)]
    store.append([Event("u0", "c", 15), Event("u0", "a", 20), Event("u0", "nowhere", 30, rating=4.0)])
    events = histories.events("u0")
    assert facts(events) == [(1, 10), (3, 15), (2, 20), (1, 20), (0, 30)], "of equal times the old event comes first"
    assert events is not None
    assert events.stored is not None
    assert events.stored.tolist() == [False, True, False, True, True]
    assert events.unknown_ids == {4: "nowhere"}
    assert events.ratings is not None
    assert events.ratings.tolist() == [0, 0, 0, 0, 4]
    assert events.actions is None
    store.append([Event("u0", "b", 5, action="buy"), Event("u0", "c", 40, action="unheard")])
    events = histories.events("u0")
    assert facts(events) == [(2, 5), (1, 10), (3, 15), (2, 20), (1, 20), (0, 30), (3, 40)]
    assert events is not None
    assert events.unknown_ids == {5: "nowhere"}
    assert events.actions is not None
    assert events.actions.tolist() == [2, 0, 0, 0, 0, 0, 0]
    assert facts(histories.events("u1")) == [(3, 10)]


def test_the_merge_does_not_depend_on_when_it_is_asked_for(store: Store, rng: np.random.Generator) -> None:
    asked, late = (Histories(store, known([1, 2, 3] * 5), CATALOGUE) for _ in range(2))
    for _ in range(40):
        count = int(rng.integers(1, 4))
        new = [Event("u0", str(rng.choice(["a", "b", "c", "?"])), int(rng.integers(200))) for _ in range(count)]
        store.append(new)
        if rng.random() < 0.5:
            asked.events("u0")
    one, two = asked.events("u0"), late.events("u0")
    assert facts(one) == facts(two)
    assert one is not None
    assert two is not None
    assert one.unknown_ids == two.unknown_ids
    assert set(one.unknown_ids) == set(np.flatnonzero(one.items == 0).tolist())
    assert (np.diff(one.times) >= 0).all()


def test_without_real_times_new_events_follow_in_the_order_of_arrival(store: Store) -> None:
    histories = Histories(store, known([1, 2]), CATALOGUE, has_time=False)
    store.append([Event("u0", "c", 5), Event("u0", "a", 3)])
    assert facts(histories.events("u0")) == [(1, 10), (2, 20), (3, 21), (1, 22)]
    store.append([Event("u0", "b", 1)])
    assert facts(histories.events("u0"))[-1] == (2, 23)


def test_a_user_of_new_events_only_is_known(store: Store) -> None:
    histories = Histories(store, None, CATALOGUE)
    assert histories.events("new") is None
    store.append([Event("new", "b", 7)])
    assert facts(histories.events("new")) == [(2, 7)]


def test_an_erased_user_is_hidden_for_good(store: Store) -> None:
    histories, other = (Histories(store, known([1, 2], [3]), CATALOGUE) for _ in range(2))
    store.append([Event("u0", "c", 30), Event("new", "a", 1)])
    assert len(facts(other.events("u0"))) == 3
    assert histories.users(10) == (3, ["u0", "u1", "new"])
    histories.delete("u0")
    for each in (histories, other):
        assert each.events("u0") is None
        assert each.users(10) == (2, ["u1", "new"])
    store.append([Event("u0", "b", 40)])
    for each in (histories, other, Histories(store, known([1, 2], [3]), CATALOGUE)):
        assert facts(each.events("u0")) == [(2, 40)], "who comes back begins anew"
    histories.delete("new")
    assert other.events("new") is None


def test_users_are_listed_page_by_page(store: Store) -> None:
    histories = Histories(store, known([1], [2], [3]), CATALOGUE)
    store.append([Event("u1", "a", 1), Event("first", "a", 1), Event("second", "a", 1)])
    pages = [histories.users(2, offset) for offset in range(0, 7, 2)]
    assert [total for total, _ in pages] == [5] * 4
    assert [page for _, page in pages] == [["u0", "u1"], ["u2", "second"], ["first"], []]


def test_memory_is_bounded_by_events(store: Store) -> None:
    histories = Histories(store, None, CATALOGUE, cached=3 * (3 + USER_COST) + 2)
    for user in range(20):
        store.append([Event(f"u{user}", "a", time) for time in range(3)])
        histories.events(f"u{user}")
        assert histories.cached_users <= 3
    assert (histories.cached_users, histories.cached_events) == (3, 9)
    store.append([Event("long", "a", time) for time in range(200)])
    assert len(facts(histories.events("long"))) == 200, "a history beyond the limit is served, but not held"
    assert histories.cached_events == 9
    histories.delete("u19")
    assert (histories.cached_users, histories.cached_events) == (2, 6)
    store.append([Event("u18", "a", 5)])
    histories.events("u18")
    assert histories.cached_events == 7


def test_a_known_user_without_new_events_costs_no_memory(store: Store) -> None:
    histories = Histories(store, known([1, 2], [3]), CATALOGUE)
    histories.events("u0")
    assert histories.cached_users == 0
