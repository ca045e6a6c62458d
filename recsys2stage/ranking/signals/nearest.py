"""The nearest vectors of each vector of a table: exactly, or approximately within clusters of a large table."""

from collections.abc import Iterator

import numpy as np

CELLS = 1 << 24  # cosines in memory at once
CLUSTERS_READ = 32  # nearest clusters that are searched for the neighbors of a vector
ITERATIONS, POINTS = 10, 64  # of k-means, and sampled vectors per cluster


def nearest_vectors(vectors: np.ndarray, count: int, exact: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest other vectors of each vector, by cosine.

    The exact search compares all pairs. In a larger table, k-means makes √N clusters, and a vector is compared to those
    of the nearest clusters of its own cluster's center: N^1.5 pairs.

    Args:
        vectors: (N, D) float32, normalized.
        count: below N.
        exact: largest N for an exact search.
        seed: of k-means.

    Returns:
        rows (N, count) int32 and cosines (N, count) float32, best first.
    """
    rows = np.zeros((len(vectors), count), dtype=np.int32)
    cosines = np.zeros((len(vectors), count), dtype=np.float32)
    everything = [(np.arange(len(vectors)), slice(None))]
    parts = everything if len(vectors) <= exact else _neighbourhoods(vectors, count, seed)
    for members, others in parts if count else ():
        compared = vectors[others]
        numbers = np.arange(len(vectors))[others]
        step = max(1, CELLS // len(compared))  # blocks bound the memory
        for begin in range(0, len(members), step):
            own = members[begin : begin + step]
            cosine = vectors[own] @ compared.T
            cosine[np.arange(len(own)), np.searchsorted(numbers, own)] = -np.inf
            near = np.argpartition(cosine, -count, axis=1)[:, -count:]
            near_cosine = np.take_along_axis(cosine, near, axis=1)
            order = np.argsort(-near_cosine, axis=1)
            rows[own] = numbers[np.take_along_axis(near, order, axis=1)]
            cosines[own] = np.take_along_axis(near_cosine, order, axis=1)
    return rows, cosines


def _neighbourhoods(vectors: np.ndarray, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The vectors of each cluster, and those of the nearest clusters, more than `count`, ascending."""
    import faiss

    clusters = max(1, int(len(vectors) ** 0.5))
    options = {"niter": ITERATIONS, "seed": 1 + seed, "spherical": True, "max_points_per_centroid": POINTS}
    means = faiss.Kmeans(vectors.shape[1], clusters, **options)
    means.train(vectors)
    centers = means.centroids
    assert centers is not None
    cluster = means.index.search(vectors, 1)[1][:, 0]
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(np.bincount(cluster, minlength=clusters))[:-1])
    sizes = np.array([len(own) for own in members])
    for number, order in enumerate(means.index.search(centers, clusters)[1]):
        if not sizes[number]:
            continue
        order = np.concatenate([[number], order[order != number]])
        enough = 1 + int(np.searchsorted(np.cumsum(sizes[order]), count, side="right"))
        chosen = order[: max(CLUSTERS_READ, enough)]
        yield members[number], np.sort(np.concatenate([members[near] for near in chosen]))
