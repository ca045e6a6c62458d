"""Large catalogues: exact search in blocks, filters inside faiss, training on a sample, and the choice of an index."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys2stage.retrieval.index import Auto, Exact, Faiss, Index, auto, recall_of, top
from tests.wrong_inputs import check_error


def integers(seed: int, count: int, width: int = 8) -> np.ndarray:
    """Vectors of small whole numbers: inner products are exact in any order of adding, and many are equal."""
    return np.random.default_rng(seed).integers(-3, 4, (count, width)).astype(np.float32)


def mixture(count: int, width: int = 16, centres: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around centres, and 60 queries near some of them."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((centres, width))[rng.integers(0, centres, count)]
    vectors += 0.7 * rng.standard_normal(vectors.shape)
    queries = vectors[rng.integers(0, count, 60)] + 0.3 * rng.standard_normal((60, width))
    return tuple((one / np.linalg.norm(one, axis=1, keepdims=True)).astype(np.float32) for one in (vectors, queries))  # type: ignore[return-value]  # two


def built(index: Index, vectors: np.ndarray) -> Any:
    index.build(vectors)
    return index


def best_by_definition(scores: np.ndarray, k: int, out: np.ndarray) -> list[list[int]]:
    """Items by score, then by number, without those of the mask `out`."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[int(item) + 1 for item in row if not own[item]][:k] for row, own in zip(order, out, strict=True)]


# exact search


@pytest.mark.parametrize("count", [4096, 5003], ids=["whole groups", "a part of a group"])
@pytest.mark.parametrize("masked", ["no mask", "one mask", "a mask each"])
def test_blocks_find_the_same_items_as_the_definition(count: int, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among equal scores, of which there are many, the lower item comes first, also across groups and blocks."""
    monkeypatch.setattr(top, "LARGE", 1)
    monkeypatch.setattr(top, "BLOCK", 9 * 64)
    vectors, queries, k, rng = integers(0, count), integers(1, 9), 7, np.random.default_rng(2)
    vectors[100:300] = vectors[17]  # more equal items than groups that are scored again
    queries[3] = vectors[17]
    assert top.block_cells(count, 8, k) is not None
    lists = [rng.integers(0, count + 1, number) for number in (0, 1, 30, 30, 900, 0, 5, 5, count)]
    exclude = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
    masks = rng.random((9, count)) < 0.6
    masks[8] = np.arange(count) < 2000
    allowed = {"no mask": None, "one mask": masks[0], "a mask each": masks}[masked]
    scores, items = built(Exact(), vectors).search(queries, k, exclude, allowed)
    out = np.zeros((9, count + 1), bool)
    for row, own in enumerate(lists):
        out[row, own] = True
    barred = out[:, 1:] | (False if allowed is None else ~allowed)
    products = queries @ vectors.T
    for row, want in enumerate(best_by_definition(products, k, barred)):
        assert items[row].tolist() == want + [-1] * (k - len(want))
        assert scores[row, : len(want)].tolist() == products[row, np.array(want, int) - 1].tolist()


def test_blocks_are_used_for_large_catalogues_alone() -> None:
    assert top.block_cells(1_000_000, 64, 100) is not None
    assert top.block_cells(50_000, 64, 100) is None
    assert top.block_cells(100_000, 64, 1000) is None  # a third of the items would be scored twice


def test_an_approximate_index_shares_its_vectors() -> None:
    vectors = integers(0, 300)
    index = built(Faiss("Flat"), vectors)
    assert np.shares_memory(index.vectors, vectors)
    assert np.shares_memory(index._exact.vectors, vectors)
    assert np.shares_memory(index._exact._table.numpy(), vectors)


# faiss


FILTERED: dict[str, tuple[str, Any, int]] = {
    "ivf": ("IVF64,Flat", {"nprobe": 6}, 1),
    "ivf,pq": ("IVF64,PQ8x4", {"nprobe": 6}, 4),
    "hnsw": ("HNSW16", {"efSearch": 32}, 1),
    "rotated": ("PCA12,IVF64,Flat", {"nprobe": 6}, 2),
    "sq": ("SQ8", None, 1),
}


@pytest.mark.parametrize("name", FILTERED)
def test_recall_with_a_filter_is_that_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the index alone: exact search is taken away."""
    factory, parameters, k_factor = FILTERED[name]
    vectors, queries = mixture(8000)
    index, exact, k = built(Faiss(factory, parameters, k_factor=k_factor), vectors), built(Exact(), vectors), 10
    assert index.filters
    masks = {share: np.random.default_rng(3).random(8000) < share for share in (0.5, 0.1, 0.03)}
    truths = {share: exact.search(queries, k, allowed=mask)[1] for share, mask in masks.items()}
    open_recall = recall_of(index.search(queries, k)[1], exact.search(queries, k)[1])
    assert open_recall > 0.6
    for share, mask in masks.items():
        found = index.search(queries, k, allowed=mask)[1]
        assert mask[found[found > 0] - 1].all()
        assert recall_of(found, truths[share]) > open_recall - 0.05, share
        rows = index.search(queries[:5], k, allowed=np.tile(mask, (5, 1)))[1]
        np.testing.assert_array_equal(rows, index.search(queries[:5], k, allowed=mask)[1])
    with monkeypatch.context() as patch:
        patch.setattr(index, "_exact", None)  # one of these rows would raise if it fell back
        assert (index.search(queries, k, allowed=masks[0.5])[1] > 0).all()


def test_an_index_that_cannot_filter_fetches_more() -> None:
    vectors, queries = mixture(4000)
    index = built(Faiss("PQ4x4"), vectors)
    assert not index.filters
    mask = np.random.default_rng(3).random(4000) < 0.5
    truth = built(Exact(), vectors).search(queries, 10, allowed=mask)[1]
    assert recall_of(index.search(queries, 10, allowed=mask)[1], truth) > 0.5


def test_lists_are_trained_on_a_sample_and_alike_in_two_runs() -> None:
    vectors, queries = mixture(4000)
    one, two = (built(Faiss("IVF16,Flat", {"nprobe": 4}, train_on=1000), vectors) for _ in range(2))
    np.testing.assert_array_equal(one.search(queries, 10)[1], two.search(queries, 10)[1])
    whole = built(Faiss("IVF16,Flat", {"nprobe": 4}), vectors)
    truth = built(Exact(), vectors).search(queries, 10)[1]
    assert recall_of(one.search(queries, 10)[1], truth) > recall_of(whole.search(queries, 10)[1], truth) - 0.1
    assert len(one._sample(_untrained("IVF16,Flat"))) == 1000
    assert len(whole._sample(_untrained("IVF16,Flat"))) == 4000  # no more than 65,536


def test_a_sample_has_enough_for_each_list(monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys2stage.retrieval.index import faiss_index

    monkeypatch.setattr(faiss_index, "PER_CODEBOOK", 500)
    index = Faiss()
    index.vectors = integers(0, 4000, 16)
    assert len(index._sample(_untrained("IVF16,Flat"))) == faiss_index.PER_LIST * 16
    assert len(index._sample(_untrained("IVF2,Flat"))) == max(500, faiss_index.PER_LIST * 2)
    assert len(index._sample(_untrained("PQ4"))) == 500
    assert len(index._sample(_untrained("HNSW8"))) == 4000  # which is not trained


def _untrained(factory: str) -> Any:
    import faiss

    return faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)


def test_a_larger_k_factor_makes_up_for_codes() -> None:
    vectors, queries = mixture(4000)
    index, truth = built(Faiss("PQ4x4"), vectors), built(Exact(), vectors).search(queries, 10)[1]
    recalls = []
    for k_factor in (1, 4, 16):
        index.set_parameters(None, k_factor)
        recalls.append(recall_of(index.search(queries, 10)[1], truth))
    assert recalls[0] < recalls[1] < recalls[2]


@pytest.mark.parametrize(
    ("options", "value", "expected", "step"),
    [
        ({"train_on": 0}, "train_on is 0", "at least 1, or null", "set train_on"),
        ({"k_factor": 0}, "k_factor is 0", "at least 1", "set k_factor to 4"),
        ({"k_factor": 5000}, "k_factor is 5000", "at most 1,000", "set k_factor to 4"),
        ({"factory": "IVF64,Flat", "train_on": 50}, "trained on 50 item", "at least as many", "larger train_on"),
    ],
)
def test_an_option_of_faiss_that_cannot_be_says_why(
    options: dict[str, Any], value: str, expected: str, step: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        Faiss(**options).build(integers(0, 300))
    check_error(refused.value, value, expected, step)


# the choice


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few thousand items count as many."""
    monkeypatch.setattr(auto, "SMALL", 100)


def test_auto_is_exact_for_a_small_catalogue(tmp_path: Path) -> None:
    index = built(Auto(recall=0.5), integers(0, 300))
    assert index.tried == [{"index": "Exact", "recall@100": 1.0}]
    index.save(tmp_path)
    assert isinstance(Index.load(tmp_path), Exact)


@pytest.mark.usefixtures("large")
def test_auto_chooses_the_first_setting_that_reaches_the_recall(tmp_path: Path) -> None:
    vectors, queries = mixture(6000)
    exclude = np.arange(1, 61), np.arange(61)
    first, again = Auto(recall=0.97), Auto(recall=0.97)
    chosen = first.build_for(vectors, queries, exclude)
    assert isinstance(chosen, Faiss)
    assert again.build_for(vectors, queries, exclude) is again.chosen
    assert first.tried == again.tried
    *before, last = [one["recall@100"] for one in first.tried]
    assert before
    assert max(before) < 0.97 <= last
    truth = built(Exact(), vectors).search(queries, 100, exclude)[1]
    assert recall_of(chosen.search(queries, 100, exclude)[1], truth) == pytest.approx(last, abs=1e-4)
    first.save(tmp_path)
    loaded = Index.load(tmp_path)
    assert type(loaded) is Faiss
    assert (loaded.factory, loaded.parameters) == (chosen.factory, chosen.parameters)
    for found in (loaded.search(queries, 5)[1], first.search(queries, 5)[1]):
        np.testing.assert_array_equal(found, chosen.search(queries, 5)[1])


@pytest.mark.usefixtures("large")
def test_auto_makes_queries_from_the_items_where_none_are_given() -> None:
    vectors, queries = mixture(6000)
    index = built(Auto(recall=0.9), vectors)
    assert isinstance(index.chosen, Faiss)
    assert measured(index, vectors, queries) > 0.8  # noisy items are about as hard as the queries


def measured(index: Index, vectors: np.ndarray, queries: np.ndarray) -> float:
    """Recall@100."""
    return recall_of(index.search(queries, 100)[1], built(Exact(), vectors).search(queries, 100)[1])


def test_auto_tries_codes_where_memory_is_short_and_exact_search_last() -> None:
    def factories(memory_gb: float | None) -> list[str]:
        return [one.factory for one in auto.candidates(10_000_000, 64, memory_gb)]

    assert set(factories(None)) == {"IVF8192,Flat", "HNSW32", ""}
    assert set(factories(1.0)) == {"IVF8192,PQ16", ""}  # 0.2 GiB; lists take 2.5, the graph 4.8
    assert set(factories(3.0)) == {"IVF8192,PQ16", "IVF8192,Flat", ""}
    assert factories(0.1) == [""]
    costs = [one.cost for one in auto.candidates(10_000_000, 64, 100.0)]
    assert costs == sorted(costs)
    assert [one.name for one in auto.candidates(10_000_000, 64, None)][-1] == "Exact"


@pytest.mark.parametrize(
    ("options", "value", "expected", "step"),
    [
        ({"recall": 1.5}, r"recall is 1\.5", "above 0 and at most 1", r"set recall to 0\.95"),
        ({"recall": 0.0}, r"recall is 0\.0", "above 0", r"set recall to 0\.95"),
        ({"recall": float("nan")}, "recall is nan", "above 0", r"set recall to 0\.95"),
        ({"memory_gb": -1.0}, r"memory_gb is -1\.0", "above 0, or null", "set memory_gb to 2"),
    ],
)
def test_an_option_of_auto_that_cannot_be_says_why(
    options: dict[str, Any], value: str, expected: str, step: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refused:
        Auto(**options)
    check_error(refused.value, value, expected, step)


def test_auto_searches_only_once_it_has_chosen() -> None:
    with pytest.raises(ValueError, match=r"chosen no index, expected .*; call build\(vectors\) first"):
        Auto().search(integers(0, 2), 3)
