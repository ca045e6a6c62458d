"""Every index gives min(k, items not excluded) items with their true scores, best first, and never an excluded one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recsys2stage.retrieval.index import Approximate, Exact, Exclude, Faiss, Index, measure
from recsys2stage.retrieval.index import rows as index_rows
from recsys2stage.trust import trusting

MEMBERS: dict[str, Callable[[], Index]] = {
    "exact": Exact,
    "flat": lambda: Faiss("Flat"),
    "hnsw": lambda: Faiss("HNSW8", {"efSearch": 16}),
    "ivf": lambda: Faiss("IVF16,Flat", {"nprobe": 1}),
    "pq": lambda: Faiss("PQ4x4", ""),
    "ivf,pq": lambda: Faiss("IVF8,PQ4x4", "nprobe=2"),
    "blind": lambda: Blind(),
}


class Blind(Approximate):
    """Finds nothing but item 1, so everything else has to be filled in."""

    def candidates(self, queries: np.ndarray, n: int) -> np.ndarray:
        found = np.full((len(queries), n), -1, np.int64)
        found[:, 0] = 1
        return found


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def built(name: str, vectors: np.ndarray) -> Index:
    index = MEMBERS[name]()
    index.build(vectors)
    return index


def excluded(lists: list[list[int]]) -> Exclude:
    flat = np.array([item for own in lists for item in own], np.int32)
    return flat, np.cumsum([0, *map(len, lists)])


def expected(vectors: np.ndarray, query: np.ndarray, k: int, own: list[int]) -> np.ndarray:
    """Items by definition."""
    scores = vectors.astype(np.float64) @ query
    return np.array([item for item in np.argsort(-scores, kind="stable") + 1 if item not in set(own)][:k], np.int64)


def test_exact_is_the_definition() -> None:
    vectors, queries = normal(0, 60, 8), normal(1, 5, 8)
    lists = [[], [3, 3, 60], list(range(1, 58)), list(range(1, 61)), [1]]
    scores, items = built("exact", vectors).search(queries, 7, excluded(lists))
    for row, own in enumerate(lists):
        want = expected(vectors, queries[row], 7, own)
        np.testing.assert_array_equal(items[row], np.pad(want, (0, 7 - len(want)), constant_values=-1))
        np.testing.assert_allclose(scores[row, : len(want)], vectors[want - 1] @ queries[row], rtol=1e-5)
        assert np.isneginf(scores[row, len(want) :]).all()


@pytest.mark.parametrize("exclusions", [False, True])
def test_exact_equals_faiss_flat(exclusions: bool) -> None:
    vectors, queries = normal(0, 500, 16), normal(1, 64, 16)
    rng = np.random.default_rng(2)
    exclude = excluded([rng.integers(1, 501, rng.integers(0, 120)).tolist() for _ in queries]) if exclusions else None
    scores, items = built("exact", vectors).search(queries, 20, exclude)
    flat_scores, flat_items = built("flat", vectors).search(queries, 20, exclude)
    np.testing.assert_array_equal(items, flat_items)
    np.testing.assert_allclose(scores, flat_scores, rtol=1e-5, atol=1e-6)


def test_faiss_searches_by_inner_product() -> None:
    vectors = (
        normal(0, 200, 8) * np.linspace(0.1, 5, 200, dtype=np.float32)[:, None]
    )  # lengths differ, so L2 would differ
    queries = normal(1, 32, 8)
    for name in ("flat", "hnsw"):
        assert measure(built(name, vectors), queries, 5)["recall@5"] > 0.9


@pytest.mark.parametrize("name", MEMBERS)
def test_never_an_excluded_item_nor_fewer_than_can_be(name: str) -> None:
    count = 300
    vectors = normal(0, count, 16)
    index = built(name, vectors)
    rng = np.random.default_rng(3)
    for trial in range(12):
        queries = normal(100 + trial, 17, 16)
        k = int(rng.choice([1, 5, 40, count, count + 9]))
        # from nothing to everything, with repeats and padding among them, and often just the best items
        lists = []
        for query in queries:
            number = int(rng.choice([0, 1, 10, 100, count - 5, count]))
            best = np.argsort(-(vectors @ query))[:number] + 1
            chosen = best if rng.random() < 0.5 else rng.permutation(count)[:number] + 1
            lists.append([*chosen.tolist(), *chosen[:3].tolist(), 0])
        scores, items = index.search(queries, k, excluded(lists))
        assert scores.shape == items.shape == (17, k)
        assert [str(scores.dtype), str(items.dtype)] == ["float32", "int64"]
        for row, own in enumerate(lists):
            wanted = min(k, count - len(set(own) - {0}))
            got = items[row, :wanted]
            assert (got >= 1).all()
            assert (got <= count).all()
            assert len(set(got.tolist())) == wanted
            assert not set(got.tolist()) & set(own)
            assert (items[row, wanted:] == -1).all()
            assert np.isneginf(scores[row, wanted:]).all()
            assert (np.diff(scores[row, :wanted]) <= 0).all()
            np.testing.assert_allclose(scores[row, :wanted], vectors[got - 1] @ queries[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "a mask each"])
def test_a_mask_that_leaves_n_items_gives_k_or_n_of_them(name: str, shared: bool) -> None:
    """The best by definition where the index is exact, and as many, with true scores, where it is not."""
    count = 300
    vectors = normal(0, count, 16)
    index, rng = built(name, vectors), np.random.default_rng(4)
    for trial in range(8):
        queries, k = normal(200 + trial, 9, 16), int(rng.choice([1, 10, count + 5]))
        shares = np.full(9, rng.choice([0.01, 0.3, 1])) if shared else rng.choice([0, 0.01, 0.1, 0.5, 1], 9)
        masks = rng.random((9, count)) < shares[:, None]
        masks = np.tile(masks[:1], (9, 1)) if shared else masks
        lists = [(rng.permutation(count)[: rng.choice([0, 5, 200])] + 1).tolist() for _ in queries]
        scores, items = index.search(queries, k, excluded(lists), masks[0] if shared else masks)
        for row, own in enumerate(lists):
            eligible = set((1 + np.flatnonzero(masks[row])).tolist()) - set(own)
            wanted = min(k, len(eligible))
            got = items[row, :wanted]
            assert set(got.tolist()) <= eligible
            assert len(set(got.tolist())) == wanted
            assert (items[row, wanted:] == -1).all()
            np.testing.assert_allclose(scores[row, :wanted], vectors[got - 1] @ queries[row], rtol=1e-4, atol=1e-5)
            if name in ("exact", "flat"):
                others = [item for item in range(1, count + 1) if item not in eligible]
                assert got.tolist() == expected(vectors, queries[row], k, others).tolist()


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"allowed has the shape \(29,\), expected \(30,\) for all queries or \(2, 30\)"
    ):
        built("exact", normal(0, 30, 4)).search(normal(1, 2, 4), 3, allowed=np.ones(29, bool))


@pytest.mark.parametrize("name", MEMBERS)
def test_no_exclusions_and_empty_exclusions_are_the_same(name: str) -> None:
    index = built(name, normal(0, 300, 16))
    queries = normal(1, 9, 16)
    for left, right in zip(index.search(queries, 10), index.search(queries, 10, excluded([[]] * 9)), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", MEMBERS)
def test_no_queries_no_rows(name: str) -> None:
    scores, items = built(name, normal(0, 300, 16)).search(np.zeros((0, 16), np.float32), 4)
    assert scores.shape == items.shape == (0, 4)


def test_a_row_short_of_items_is_answered_exactly() -> None:
    vectors, queries = normal(0, 300, 16), normal(1, 20, 16)
    want = built("exact", vectors).search(queries, 10)
    for left, right in zip(built("blind", vectors).search(queries, 10), want, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name", ["exact", "flat"])
def test_among_equals_the_lower_item_comes_first(name: str) -> None:
    vectors = np.ones((50, 4), np.float32)
    vectors[[6, 30]] = 2
    scores, items = built(name, vectors).search(np.ones((3, 4), np.float32), 5, excluded([[], [1, 2], [7]]))
    if name == "exact":  # faiss hands out any of those that tie for the last place
        np.testing.assert_array_equal(items, [[7, 31, 1, 2, 3], [7, 31, 3, 4, 5], [31, 1, 2, 3, 4]])
    assert (np.diff(scores) <= 0).all()
    assert all(np.diff(items[row][scores[row] == 4]).min() > 0 for row in range(3))


@pytest.mark.parametrize("name", ["exact", "ivf"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = built(name, normal(0, 300, 16))
    queries = normal(1, 50, 16)
    exclude = excluded([list(range(1, 1 + 3 * row)) for row in range(50)])
    whole = index.search(queries, 10, exclude)
    monkeypatch.setattr(index_rows, "CELLS", 1000)
    parts = index.search(queries, 10, exclude)
    np.testing.assert_array_equal(parts[1], whole[1])
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_load_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    index = built(name, normal(0, 300, 16))
    index.save(tmp_path / "index")
    with trusting([__name__]):
        loaded = Index.load(tmp_path / "index")
    assert type(loaded) is type(index)
    queries, exclude = normal(1, 30, 16), excluded([list(range(1, 1 + row)) for row in range(30)])
    for left, right in zip(loaded.search(queries, 10, exclude), index.search(queries, 10, exclude), strict=True):
        np.testing.assert_array_equal(left, right)


def test_an_index_for_a_gpu_is_searched_on_the_cpu_where_there_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index, plain = Exact(device="cuda:99"), Exact()
    for one in (index, plain):
        one.build(normal(0, 30, 4))
    index.save(tmp_path)
    loaded = Index.load(tmp_path)
    assert vars(loaded)["device"] == "cuda:99"  # for a machine that has it
    assert caplog.text.count("the device cuda:99, which this machine does not have; searching on the CPU") == 2
    for left, right in zip(loaded.search(normal(1, 3, 4), 5), plain.search(normal(1, 3, 4), 5), strict=True):
        np.testing.assert_array_equal(left, right)  # the same sums on the same device


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:", "cuda:x", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}', expected cpu, cuda"):
        Exact(device=device)


def test_a_class_outside_the_package_is_loaded_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_index.py").write_text(
        "from recsys2stage.retrieval.index import Exact\n"
        "class Backwards(Exact):\n"
        "    def __init__(self, sign: float = 1.0) -> None:\n"
        "        super().__init__()\n"
        "        self.sign = sign\n"
        "    def search(self, queries, k, exclude=None):\n"
        "        return super().search(self.sign * queries, k, exclude)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from their_index import Backwards

    index = Backwards(sign=-1.0)
    index.build(normal(0, 30, 4))
    index.save(tmp_path / "index")
    with pytest.raises(ValueError, match=r"index.json names their_index.Backwards, .*--trust their_index"):
        Index.load(tmp_path / "index")
    with trusting(["their_index"]):
        loaded = Index.load(tmp_path / "index")
    assert vars(loaded)["sign"] == -1.0
    np.testing.assert_array_equal(loaded.search(normal(1, 3, 4), 5)[1], index.search(normal(1, 3, 4), 5)[1])
    monkeypatch.undo()
    del sys.modules["their_index"]
    with pytest.raises(ValueError, match="PYTHONPATH"), trusting("their_index"):
        Index.load(tmp_path / "index")


def test_the_description_is_plain(tmp_path: Path) -> None:
    index = Faiss("Flat", {"nprobe": 3})
    index.factory = "IVF4,Flat"
    index.build(normal(0, 300, 16))
    index.save(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "class": "Faiss",
        "options": {"factory": "IVF4,Flat", "parameters": {"nprobe": 3}, "train_on": None, "k_factor": 1},
    }


def test_parameters_reach_faiss() -> None:
    vectors, queries = normal(0, 1000, 16), normal(1, 100, 16)

    def recall(nprobe: int) -> int | float:
        index = Faiss("IVF32,Flat", {"nprobe": nprobe})
        index.build(vectors)
        return measure(index, queries, 10)["recall@10"]

    assert recall(1) < recall(8) < recall(32) == 1.0


def test_measure() -> None:
    vectors, queries = normal(0, 300, 16), normal(1, 40, 16)
    exclude = excluded([list(range(1, 300))] * 40)  # one item is left, and every index must find it
    measured = measure(built("ivf", vectors), queries, 10, exclude)
    assert set(measured) == {"k", "queries", "recall@10", "median_ms", "p95_ms", "batch_ms"}
    assert measured["recall@10"] == 1.0
    assert 0 < measured["median_ms"] <= measured["p95_ms"]
    assert measure(built("exact", vectors), queries, 10)["recall@10"] == 1.0
    assert measure(built("exact", vectors), queries, 10, excluded([list(range(1, 301))] * 40))["recall@10"] == 1.0
    json.dumps(measured)


def test_what_cannot_be_answered_says_why(tmp_path: Path) -> None:
    index = built("exact", normal(0, 30, 4))
    for k, expected in ((0, "at least 1"), (-3, "at least 1"), (True, "an integer")):
        with pytest.raises(ValueError, match=f"k is {k}, expected {expected}.*set k to 10"):
            index.search(normal(1, 2, 4), k)
    with pytest.raises(ValueError, match="queries have shape"):
        index.search(normal(1, 2, 5), 3)
    with pytest.raises(ValueError, match="not finite"):
        index.search(np.full((2, 4), np.nan, np.float32), 3)
    with pytest.raises(ValueError, match="2 offsets and 1 items, expected 3 offsets"):
        index.search(normal(1, 2, 4), 3, excluded([[1]]))
    with pytest.raises(ValueError, match=r"items are in 1\.\.31, expected 1\.\.30"):
        index.search(normal(1, 2, 4), 3, excluded([[1], [31]]))
    with pytest.raises(ValueError, match="no queries"):
        measure(index, normal(1, 0, 4), 3)
    with pytest.raises(ValueError, match="were any exported"):
        Exact().build(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="1 of 30 item vectors are not finite, first item 8"):
        Exact().build(np.where(np.arange(30)[:, None] == 7, np.nan, normal(0, 30, 4)).astype(np.float32))
    with pytest.raises(FileNotFoundError, match="recsys export-index"):
        Index.load(tmp_path)


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("IVF64,Flat", None, "'IVF64,Flat' cannot be trained on 50 item vectors .*use a smaller one"),
        ("PQ4", None, "cannot be trained on 50 item vectors"),
        ("Nonsense", None, r"cannot build 'Nonsense' for vectors of width 16 \(could not parse .*Nonsense\)"),
        ("PQ7", None, "multiple"),
        ("IDMap,HNSW8", None, "is 'IDMap,HNSW8', expected one without IDMap, .*; use 'HNSW8'"),
        ("HNSW8,PQ4x4", None, "only for L2 distance"),
        ("Flat", {"efSearch": 4}, "does not accept the parameters 'efSearch=4'"),
        ("IVF4,Flat", "many", "expected, for example, nprobe=16"),
    ],
)
def test_a_factory_that_cannot_be_built_says_why(
    factory: str, parameters: dict[str, int | float] | str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Faiss(factory, parameters).build(normal(0, 50, 16))
