"""Ranks in blocks against the whole matrix of scores.

Vectors have integers of -2 to 2 in 6 dimensions, so a score is an integer of at most 24: float32 sums it exactly in any
order, and equality holds on every processor. Where vectors are real numbers, scores are compared with a bound.
"""

from typing import Any

import numpy as np
import pytest
import torch
from closeness import close
from torch import Tensor

from recsys2stage.retrieval import catalogue_ranks as module
from recsys2stage.retrieval.catalogue_ranks import catalogue_ranks

B, V, D, N = 23, 101, 6, 9


class World:
    """Scores with many ties; each query excludes some items, a few of which are scored."""

    def __init__(self, rng: np.random.Generator, rows: int = B, size: int = V) -> None:
        self.queries = torch.from_numpy(rng.integers(-2, 3, (rows, D)).astype(np.float32))
        self.vectors = torch.from_numpy(rng.integers(-2, 3, (size, D)).astype(np.float32))
        self.excluded = torch.from_numpy(rng.random((rows, size)) < 0.2)
        self.items = torch.from_numpy(rng.integers(-1, size + 1, (rows, N)))
        self.dense = (self.queries @ self.vectors.T).masked_fill(self.excluded, -torch.inf)

    def ranks(self, **options: Any) -> module.CatalogueRanks:
        rows, columns = self.excluded.nonzero().T
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # in any order
        return catalogue_ranks(self.queries, self.vectors, rows[order], columns[order] + 1, self.items, **options)

    def own(self) -> Tensor:
        scores = self.dense.gather(1, (self.items - 1).clamp(min=0))
        return scores.masked_fill(self.items < 1, -torch.inf)


@pytest.fixture(params=[3, 64, 500, 10_000], ids="cells {}".format)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few cells, of many, and of all."""
    monkeypatch.setattr(module, "CELLS", request.param)
    monkeypatch.setattr(module, "ROWS", 5)


@pytest.mark.usefixtures("blocks")
def test_scores_and_ranks_are_those_of_the_whole_matrix(rng: np.random.Generator) -> None:
    world = World(rng)
    own, found = world.own(), world.ranks()
    assert torch.equal(found.scores, own)
    assert torch.equal(found.ranks, (world.dense[:, None] >= own[..., None]).sum(2))
    assert (found.ranks[own == -torch.inf] == V).all()
    assert found.top.shape == (B, 0)
    assert torch.equal(world.ranks(ranked=2).ranks, found.ranks[:, :2])
    assert torch.equal(world.ranks(ranked=0, top=3).scores, own)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("count", [1, 10, V + 5])
def test_the_best_items_are_those_of_the_whole_matrix(rng: np.random.Generator, count: int) -> None:
    world = World(rng)
    world.excluded[3] = True  # all items
    world.dense[3] = -torch.inf
    top = world.ranks(top=count).top
    assert top.shape == (B, count)
    for row, items in enumerate(top.tolist()):
        real = [item for item in items if item > 0]
        available = int((~world.excluded[row]).sum())
        assert items == real + [-1] * (count - len(real))
        assert len(set(real)) == len(real) == min(count, available)
        scores = world.dense[row, torch.tensor(real, dtype=torch.int64) - 1]
        assert torch.equal(scores, world.dense[row].sort(descending=True).values[: len(real)])


@pytest.mark.usefixtures("blocks")
def test_no_query_and_no_exclusion(rng: np.random.Generator) -> None:
    world = World(rng, rows=0)
    assert [field.shape for field in world.ranks(top=4)] == [(0, N), (0, N), (0, 4)]
    world = World(rng)
    world.excluded[:] = False
    world.dense = world.queries @ world.vectors.T
    assert torch.equal(world.ranks().ranks[:, 0], (world.dense >= world.own()[:, :1]).sum(1))


def test_what_cannot_be_compared_counts_against_an_item(rng: np.random.Generator) -> None:
    world = World(rng)
    world.excluded[:] = False
    world.vectors[7] = torch.nan
    world.items[:, 0], world.items[:, 1] = 8, 3
    found = world.ranks(ranked=2)
    assert (found.ranks[:, 0] == V).all()
    below = (world.queries @ world.vectors.T < found.scores[:, 1:2]).sum(1)
    assert torch.equal(found.ranks[:, 1], V - below)


def test_equal_vectors_have_nearly_equal_ranks_in_all_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real numbers, whose products are rounded: a few equal vectors tie, or stand right beside each other."""
    monkeypatch.setattr(module, "CELLS", 1 << 12)
    vectors = torch.from_numpy(rng.standard_normal((2_000, 64), dtype=np.float32))
    vectors[[3, 700, 1_999]] = vectors[1_200].clone()
    queries = torch.from_numpy(rng.standard_normal((60, 64), dtype=np.float32)) / 8
    nothing = torch.zeros(0, dtype=torch.int64)
    found = catalogue_ranks(queries, vectors, nothing, nothing, torch.tensor([[4, 701, 1_201, 2_000]]).expand(60, 4))
    close(found.scores, found.scores[:, :1].expand(60, 4))
    assert ((found.ranks - found.ranks[:, :1]).abs() <= 3).all()


@pytest.mark.parametrize("size", [10_000, 200_000])
def test_memory_does_not_grow_with_batch_times_catalogue(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is larger than its bound, whatever is asked."""
    largest = 0
    iterate = module._Blocks.__iter__

    def watched(blocks: module._Blocks) -> Any:
        nonlocal largest
        for begin, scores in iterate(blocks):
            largest = max(largest, scores.numel())
            yield begin, scores

    monkeypatch.setattr(module._Blocks, "__iter__", watched)
    rng = np.random.default_rng(0)
    queries, vectors = (torch.from_numpy(rng.standard_normal((n, 2), dtype=np.float32)) for n in (300, size))
    nothing = torch.zeros(0, dtype=torch.int64)
    catalogue_ranks(queries, vectors, nothing, nothing, torch.ones((300, 1), dtype=torch.int64), top=10)
    assert 0 < largest <= 1.02 * module.CELLS
