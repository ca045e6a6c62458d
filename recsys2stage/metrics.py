"""Ranking metrics of targets and of baskets, bootstrap intervals, significance tests, exposure and calibration.

Ranking metrics are computed from the rank of the relevant item; ties count against the model. With one relevant item
HR@k and Recall@k are equal; both names are reported. Several targets of a user are not independent: intervals and tests
resample users with all of their targets.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

KS = (10, 50, 100, 200)


def compute_rank(scores: Float[Tensor, "B W"], target: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Rank of each row's target column, from 1.

    Every column whose score is not below the target's counts against it: ties, and NaN. Excluded columns hold −inf.
    A target that is itself −inf or NaN ranks last.
    """
    own = scores.gather(1, target[:, None])
    return (~(scores < own)).sum(1)


def compute_metrics(ranks: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Each target's metrics, (B,) float64: hr@k = [rank ≤ k], ndcg@k = [rank ≤ k] / log2(1 + rank), mrr = 1 / rank."""
    ranks = ranks.astype(np.float64)
    gain = 1 / np.log2(1 + ranks)
    values: dict[str, np.ndarray] = {}
    for k in ks:
        hit = (ranks <= k).astype(np.float64)
        values |= {f"hr@{k}": hit, f"ndcg@{k}": hit * gain, f"recall@{k}": hit}
    return values | {"mrr": 1 / ranks}


def compute_basket_metrics(ranks: np.ndarray, baskets: np.ndarray, ks: Sequence[int] = KS) -> dict[str, np.ndarray]:
    """Metrics of sets of targets, (G,) float64 each, in ascending order of the baskets' numbers.

    As in next-basket recommendation: recall@k is the share of the basket among the first k items, hr@k whether any item
    of it is, ndcg@k the discounted gain over the best possible one, mrr that of the first item found. A basket of one
    target has the values of `compute_metrics`.

    Args:
        ranks: (B,) rank of each target, from 1.
        baskets: (B,) number of each target's basket.
        ks: cut-offs.
    """
    _, basket, sizes = np.unique(baskets, return_inverse=True, return_counts=True)
    single = compute_metrics(ranks, ks)
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(2 + np.arange(max(*ks, 1))))])  # gain of the first n ranks
    values: dict[str, np.ndarray] = {}
    for k in ks:
        hits = np.bincount(basket, single[f"hr@{k}"])
        gains = np.bincount(basket, single[f"ndcg@{k}"])
        values |= {f"hr@{k}": (hits > 0).astype(np.float64), f"ndcg@{k}": gains / best[np.minimum(sizes, k)]}
        values[f"recall@{k}"] = hits / sizes
    first = np.zeros(len(sizes))
    np.maximum.at(first, basket, single["mrr"])
    return values | {"mrr": first}


def bootstrap(values: np.ndarray, resamples: int = 1000, seed: int = 0, users: np.ndarray | None = None) -> np.ndarray:
    """Means of `resamples` samples of users with replacement (Efron 1979), (R, K).

    All K columns of one resample use the same users, so the difference of two columns is a paired bootstrap. A user
    with several rows is sampled with all of them (clustered bootstrap; Field & Welsh 2007), and a mean is over the rows
    of the sampled users.

    Args:
        values: (B, K) values.
        resamples: samples R.
        seed: of the samples.
        users: (B,) user of each row; None: each row is another user.
    """
    rng = np.random.default_rng(seed)
    values, rows = sum_by_user(values, users)
    users_sampled = len(values)
    means = np.empty((resamples, values.shape[1]))
    for r in range(resamples):
        counts = np.bincount(rng.integers(users_sampled, size=users_sampled), minlength=users_sampled)
        means[r] = counts @ values / (counts @ rows)
    return means


def sum_by_user(values: np.ndarray, users: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of each user's rows, (U, K), and their number, (U,); the rows themselves where no user has several.

    Args:
        values: (B, K).
        users: (B,) user of each row; None: each row is another user.
    """
    if users is None:
        return values, np.ones(len(values), dtype=np.int64)
    _, user, rows = np.unique(users, return_inverse=True, return_counts=True)
    if len(rows) == len(values):
        return values, rows
    return np.stack([np.bincount(user, column) for column in values.T], axis=1), rows


def interval(means: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The central interval of bootstrap means at a confidence level, (K,) low and (K,) high."""
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def randomization_test(
    differences: np.ndarray, resamples: int = 1000, seed: int = 0, users: np.ndarray | None = None
) -> np.ndarray:
    """Two-sided p-values of mean differences by a paired randomization test, (K,).

    If both models are equal, the sign of each user's difference is random. So all signs are sampled `resamples` times
    (Fisher 1935; for retrieval: Smucker, Allan & Carterette 2007). The observed difference counts as one more sample,
    so that p is never 0 (Phipson & Smyth 2010). All rows of a user have the same sign.

    Args:
        differences: (B, K) differences. All K columns of one sample use the same signs.
        resamples: samples R; the smallest p is 1 / (R + 1).
        seed: of the samples.
        users: (B,) user of each row; None: each row is another user.
    """
    rng = np.random.default_rng(seed)
    differences, _ = sum_by_user(differences, users)
    observed = differences.sum(0)
    nonzero = differences[differences.any(1)]  # flipping the sign of 0 changes nothing
    tolerance = 1e-12 * np.abs(nonzero).sum(0)  # sums of the same numbers in other orders count as equal
    as_large = np.ones(differences.shape[1])
    for _ in range(resamples):
        bits = np.unpackbits(np.frombuffer(rng.bytes(len(nonzero) // 8 + 1), np.uint8), count=len(nonzero))
        as_large += np.abs(2 * (bits.astype(np.float64) @ nonzero) - observed) >= np.abs(observed) - tolerance
    return as_large / (1 + resamples)


def compute_exposure(recommended: np.ndarray, train_counts: np.ndarray) -> dict[str, float]:
    """Coverage, novelty, popularity and concentration of the recommended items.

    coverage: share of the catalogue that is recommended to at least one user. novelty: mean −log2 of a recommended
    item's share of the training events, with add-one smoothing (Zhou et al. 2010; Vargas & Castells 2011). popularity:
    mean training events of a recommended item, ARP (Yin et al. 2012). gini: Gini coefficient of the recommendations per
    item of the catalogue, 0 if equal, toward 1 if few items have them all (Fleder & Hosanagar 2009).

    Args:
        recommended: (V + 1,) number of users each item is recommended to; item 0, padding, is ignored.
        train_counts: (V + 1,) training events of each item.
    """
    recommended, counts = recommended[1:], train_counts[1:]
    total = max(int(recommended.sum()), 1)
    share = (counts + 1) / (counts.sum() + len(counts))
    order = np.arange(1, len(recommended) + 1)
    return {
        "coverage": float((recommended > 0).mean()),
        "novelty": float(recommended @ -np.log2(share) / total),
        "popularity": float(recommended @ counts / total),
        "gini": float((2 * order - len(recommended) - 1) @ np.sort(recommended) / (len(recommended) * total)),
    }


def compute_calibration(confidence: np.ndarray, hit: np.ndarray, bins: int = 15) -> dict[str, Any]:
    """Calibration of the probability of the top item: expected calibration error and reliability table.

    The expected calibration error is Σ |B_m| / n · |share of hits in B_m − mean confidence in B_m| (Guo et al. 2017),
    over bins with equal numbers of users (Nixon et al. 2019): with bins of equal width, nearly all users of a
    recommender would fall into the lowest.

    Args:
        confidence: (n,) probability of the top item, n at least 1.
        hit: (n,) bool, whether it is the target.
        bins: number of bins; fewer if there are fewer users.
    """
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    table = [
        {"users": len(part), "confidence": float(confidence[part].mean()), "hits": float(hit[part].mean())}
        for part in parts
    ]
    return {
        "users": len(confidence),
        "confidence": float(confidence.mean()),
        "hits": float(hit.mean()),
        "ece": sum(row["users"] * abs(row["hits"] - row["confidence"]) for row in table) / len(confidence),
        "bins": table,
    }
