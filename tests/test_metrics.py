"""Metrics: ranks count against us, values are arithmetic, and means agree with torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from recsys2stage.metrics import KS, RankMetrics, bootstrap, interval, metrics_of, rank_of

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([0.9, 0.5, 0.1], 0, 1),
        ([0.9, 0.5, 0.1], 1, 2),
        ([0.9, 0.5, 0.1], 2, 3),
        ([0.5, 0.5, 0.1], 0, 2),  # a tie counts against the target, wherever it stands
        ([0.5, 0.5, 0.1], 1, 2),
        ([0.7, 0.7, 0.7], 1, 3),
        ([NAN, 0.5, 0.1], 1, 2),  # so does NaN
        ([0.9, NAN, 0.1], 0, 2),
        ([0.9, NAN, 0.1], 1, 3),  # a target without a score is last
        ([-INF, 0.5, -INF], 1, 1),  # excluded columns never stand above
        ([-INF, 0.5, 0.1], 0, 3),
        ([-INF, -INF, 0.1], 0, 3),
        ([INF, 0.5, INF], 1, 3),
    ],
)
def test_rank_counts_ties_and_nan_against_the_target(scores: list[float], target: int, rank: int) -> None:
    assert rank_of(torch.tensor([scores]), torch.tensor([target])).tolist() == [rank]


def test_rank_of_a_constant_scorer_is_the_last() -> None:
    assert rank_of(torch.zeros(4, 30), torch.arange(4)).tolist() == [30] * 4


def test_metrics_are_arithmetic() -> None:
    values = metrics_of(np.array([1, 2, 3, 10, 11]), ks=(1, 3, 10))
    assert set(values) == {f"{name}@{k}" for name in ("hr", "ndcg", "recall") for k in (1, 3, 10)} | {"mrr"}
    np.testing.assert_array_equal(values["hr@1"], [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(values["hr@3"], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(values["recall@10"], [1, 1, 1, 1, 0])
    np.testing.assert_allclose(values["ndcg@1"], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(values["ndcg@3"], [1, 1 / math.log2(3), 1 / 2, 0, 0])
    np.testing.assert_allclose(values["ndcg@10"], [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(11), 0])
    np.testing.assert_allclose(values["mrr"], [1, 1 / 2, 1 / 3, 1 / 10, 1 / 11])


def test_running_means_are_the_means_over_users(rng: np.random.Generator) -> None:
    ranks = rng.integers(1, 400, size=157)
    metric = RankMetrics()
    for part in np.split(ranks, [1, 50, 51]):  # batches of unequal size: a mean of means would be another number
        metric.update(torch.from_numpy(part))
    computed = metric.compute()
    for name, values in metrics_of(ranks).items():
        if not name.startswith("recall"):
            assert computed[name].item() == pytest.approx(values.mean(), rel=1e-6), name
    assert set(computed) == {f"{name}@{k}" for name in ("hr", "ndcg") for k in KS} | {"mrr"}
    metric.reset()
    metric.update(torch.tensor([1]))
    assert all(value == 1 for value in metric.compute().values())


def test_means_are_those_of_torchmetrics() -> None:
    users, items, k = 60, 40, 10
    scores = torch.rand(users, items)
    target = torch.randint(items, (users,))
    metric = RankMetrics(ks=(k,))
    metric.update(rank_of(scores, target))
    ours = metric.compute()

    relevant = torch.nn.functional.one_hot(target, items).bool().flatten()
    of = torch.arange(users).repeat_interleave(items)
    for name, reference in {
        f"ndcg@{k}": RetrievalNormalizedDCG(top_k=k),
        f"hr@{k}": RetrievalHitRate(top_k=k),
        "mrr": RetrievalMRR(),
    }.items():
        assert ours[name].item() == pytest.approx(reference(scores.flatten(), relevant, indexes=of).item(), abs=1e-6), (
            name
        )
    assert 0 < ours[f"hr@{k}"] < 1, "the comparison must be of something"


def test_counts_stay_exact_beyond_float32() -> None:
    metric = RankMetrics(ks=(1,))
    metric.users += 2**24
    metric.hits += 2**24
    metric.update(torch.tensor([1]))
    assert metric.users.item() == metric.hits.item() == 2**24 + 1


def test_bootstrap_interval_covers_the_mean() -> None:
    """Of 200 samples from a known world about 95 % of the 95 % intervals hold its mean."""
    truth, covered = 0.3, 0
    for seed in range(200):
        sample = (np.random.default_rng(seed).random((150, 1)) < truth).astype(float)
        low, high = interval(bootstrap(sample, resamples=300, seed=seed))
        covered += bool(low[0] <= truth <= high[0])
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_is_as_wide_as_theory(rng: np.random.Generator) -> None:
    values = rng.normal(size=(400, 2))
    means = bootstrap(values, resamples=4000)
    assert means.shape == (4000, 2)
    np.testing.assert_allclose(means.mean(0), values.mean(0), atol=0.005)
    np.testing.assert_allclose(means.std(0), values.std(0) / np.sqrt(400), rtol=0.05)
    low, high = interval(means)
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std(0) / np.sqrt(400), rtol=0.07)


def test_columns_of_a_resample_see_the_same_users(rng: np.random.Generator) -> None:
    """So identical columns never differ, and a constant gain is certain however noisy the users are."""
    noisy = rng.normal(size=200)
    means = bootstrap(np.stack([noisy, noisy, noisy + 0.01, rng.permutation(noisy)], axis=1), resamples=500)
    assert (means[:, 0] == means[:, 1]).all()
    np.testing.assert_allclose(means[:, 2] - means[:, 0], 0.01, atol=1e-12)
    low, high = interval(means[:, [3]] - means[:, [0]])
    assert low[0] < 0 < high[0]


def test_bootstrap_is_a_function_of_its_seed(rng: np.random.Generator) -> None:
    values = rng.normal(size=(50, 1))
    assert (bootstrap(values, 20, seed=1) == bootstrap(values, 20, seed=1)).all()
    assert (bootstrap(values, 20, seed=1) != bootstrap(values, 20, seed=2)).any()


def test_interval_is_of_the_level_asked() -> None:
    means = np.arange(101, dtype=float)[:, None]
    assert interval(means, 0.9) == (pytest.approx(5), pytest.approx(95))
    assert interval(means, 0.5) == (pytest.approx(25), pytest.approx(75))
