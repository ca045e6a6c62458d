"""Nearest vectors against all pairs in double; approximate ones against exact ones."""

import numpy as np
import pytest

from recsys2stage.ranking.signals import nearest as module
from recsys2stage.ranking.signals.base import unit
from recsys2stage.ranking.signals.nearest import nearest_vectors

COUNT = 10


def mixture(rng: np.random.Generator, size: int = 4_000, centers: int = 100, width: int = 16) -> np.ndarray:
    """Unit vectors around some centers, of which a few have most of them, as trained ones do."""
    center = np.minimum(centers * rng.random(size) ** 3, centers - 1).astype(np.int64)
    noise = rng.standard_normal((size, width))
    return unit(rng.standard_normal((centers, width))[center] + 0.5 * noise).astype(np.float32)


def test_exact_neighbours_are_those_of_all_pairs(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = mixture(rng, 300)
    monkeypatch.setattr(module, "CELLS", 4_000)  # several blocks
    rows, cosines = nearest_vectors(vectors, COUNT, exact=300)
    pairs = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(pairs, -np.inf)
    best = -np.sort(-pairs, axis=1)[:, :COUNT]
    assert cosines == pytest.approx(best, abs=1e-5)
    assert np.take_along_axis(pairs, rows, axis=1) == pytest.approx(best, abs=1e-5)


def test_approximate_neighbours_are_nearly_the_exact_ones(rng: np.random.Generator) -> None:
    vectors = mixture(rng)
    exact, best = nearest_vectors(vectors, COUNT, exact=len(vectors))
    rows, cosines = nearest_vectors(vectors, COUNT, exact=len(vectors) - 1)
    again, _ = nearest_vectors(vectors, COUNT, exact=0)
    assert np.array_equal(rows, again)
    assert not (rows == np.arange(len(rows))[:, None]).any()
    assert all(len(set(own)) == COUNT for own in rows.tolist())
    assert cosines == pytest.approx(np.einsum("nd,nkd->nk", vectors, vectors[rows]), abs=1e-5)
    assert (np.diff(cosines, axis=1) <= 0).all()
    assert (cosines <= best + 1e-5).all()
    found = np.mean([len({*one} & {*other}) for one, other in zip(exact.tolist(), rows.tolist(), strict=True)])
    assert found >= 0.95 * COUNT  # of 63 clusters, half are read


@pytest.mark.parametrize("size", [COUNT + 1, 200])
def test_clusters_are_read_until_there_are_enough(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(module, "CLUSTERS_READ", 1)
    vectors = np.repeat(mixture(rng, (size + 1) // 2), 2, axis=0)[:size]  # pairs of equal vectors
    rows, cosines = nearest_vectors(vectors, COUNT, exact=0)
    assert all(len({number, *own}) == COUNT + 1 for number, own in enumerate(rows.tolist()))
    assert np.isfinite(cosines).all()
    assert nearest_vectors(vectors, 0, exact=0)[0].shape == (size, 0)
