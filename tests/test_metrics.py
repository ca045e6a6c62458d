"""Metrics: ranks count against us, values are arithmetic, and means agree with torchmetrics."""

import itertools
import math

import numpy as np
import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from recsys2stage.metrics import (
    KS,
    bootstrap,
    compute_basket_metrics,
    compute_calibration,
    compute_exposure,
    compute_metrics,
    compute_rank,
    interval,
    randomization_test,
)
from recsys2stage.retrieval.rank_metrics import RankMetrics

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
    assert compute_rank(torch.tensor([scores]), torch.tensor([target])).tolist() == [rank]


def test_rank_of_a_constant_scorer_is_the_last() -> None:
    assert compute_rank(torch.zeros(4, 30), torch.arange(4)).tolist() == [30] * 4


def test_metrics_are_arithmetic() -> None:
    values = compute_metrics(np.array([1, 2, 3, 10, 11]), ks=(1, 3, 10))
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
    for name, values in compute_metrics(ranks).items():
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
    metric.update(compute_rank(scores, target))
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
    np.testing.assert_allclose(means[:, 0], means[:, 1], rtol=0, atol=1e-15)  # columns of one product, in other lanes
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


# the randomization test


def test_p_is_the_share_of_all_sign_flips_that_are_as_large(rng: np.random.Generator) -> None:
    """Ten users have 1,024 signs, few enough to count."""
    differences = rng.normal(0.3, 1.0, size=(10, 3))
    signs = np.array(list(itertools.product((-1, 1), repeat=10)))
    exact = (np.abs(signs @ differences) >= np.abs(differences.sum(0)) - 1e-9).mean(0)
    assert 0.05 < exact.min() < exact.max() < 0.95
    p = randomization_test(differences, resamples=20_000)
    np.testing.assert_allclose(p, exact, atol=4 * np.sqrt(0.25 / 20_000))


def test_p_is_two_sided_and_never_zero(rng: np.random.Generator) -> None:
    gain = rng.random((200, 1)) + 0.1
    assert randomization_test(gain, resamples=99).tolist() == [1 / 100]
    assert randomization_test(-gain, resamples=99).tolist() == [1 / 100]


def test_p_of_equal_models_is_one() -> None:
    assert randomization_test(np.zeros((30, 2)), resamples=50).tolist() == [1, 1]
    one = np.zeros((30, 1))
    one[3] = 0.7  # a single user can differ either way
    assert randomization_test(one, resamples=50).tolist() == [1]
    cancelling = np.array([[0.1], [0.2], [-0.3], [0.3], [-0.2], [-0.1]])  # the sum is 0, but for rounding
    assert randomization_test(cancelling, resamples=50).tolist() == [1]


def test_p_does_not_look_at_users_who_do_not_differ(rng: np.random.Generator) -> None:
    differences = rng.normal(0.2, 1.0, size=(40, 1))
    diluted = np.concatenate([np.zeros((500, 1)), differences])
    assert randomization_test(diluted, 300, seed=3) == randomization_test(differences, 300, seed=3)


def test_of_models_that_are_alike_p_falls_below_a_level_as_often_as_it_says() -> None:
    low = 0
    for seed in range(400):
        differences = np.random.default_rng(seed).standard_t(3, size=(60, 1))
        low += bool(randomization_test(differences, 199, seed=seed)[0] <= 0.1)
    assert 0.06 <= low / 400 <= 0.14


# what is shown


# several targets per user


def test_with_one_target_per_user_nothing_changes(rng: np.random.Generator) -> None:
    values, users = rng.standard_normal((50, 3)), np.arange(50) * 3
    assert np.array_equal(bootstrap(values, 40, 1), bootstrap(values, 40, 1, users))
    assert np.array_equal(randomization_test(values, 40, 1), randomization_test(values, 40, 1, users))


def test_equal_targets_of_a_user_give_the_interval_of_users(rng: np.random.Generator) -> None:
    """Ten copies of each user's value are no more evidence than one."""
    values, users = rng.random((60, 2)), np.arange(60)
    copies, owners = np.repeat(values, 10, axis=0), np.repeat(users, 10)
    assert bootstrap(copies, 200, 3, owners) == pytest.approx(bootstrap(values, 200, 3, users))
    assert np.array_equal(randomization_test(copies - 0.4, 200, 3, owners), randomization_test(values - 0.4, 200, 3))
    order = rng.permutation(len(owners))
    assert bootstrap(copies[order], 200, 3, owners[order]) == pytest.approx(bootstrap(values, 200, 3, users))


def test_the_clustered_interval_covers_the_mean_where_that_of_rows_does_not() -> None:
    """Users of 1 to 5 targets whose values share most of their variance; the mean over targets is 0."""
    rng = np.random.default_rng(0)
    covered = {"users": 0, "rows": 0}
    for trial in range(200):
        users = np.repeat(np.arange(80), rng.integers(1, 6, 80))
        values = (rng.standard_normal(80)[users] + 0.3 * rng.standard_normal(len(users)))[:, None]
        for name, owners in (("users", users), ("rows", None)):
            low, high = interval(bootstrap(values, 150, trial, owners))
            covered[name] += int(low[0] <= 0 <= high[0])
    assert 0.90 <= covered["users"] / 200 <= 0.99  # 0.95, a standard error of 0.015, and the few resamples
    assert covered["rows"] / 200 < 0.85


def test_a_resample_takes_all_targets_of_a_user() -> None:
    values = np.array([[1.0], [1.0], [0.0]])  # user 0 has two targets
    means = bootstrap(values, 300, 0, np.array([0, 0, 1]))
    assert set(np.round(means[:, 0], 6)) == {0, round(2 / 3, 6), 1}


def test_metrics_of_baskets_by_hand() -> None:
    ranks, baskets = np.array([1, 4, 11, 3, 60]), np.array([7, 7, 7, 2, 5])  # ascending: 2, 5, 7
    found = compute_basket_metrics(ranks, baskets, [10])
    assert found["recall@10"] == pytest.approx([1, 0, 2 / 3])
    assert found["hr@10"].tolist() == [1, 0, 1]
    best = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert found["ndcg@10"] == pytest.approx([1 / math.log2(4), 0, (1 + 1 / math.log2(5)) / best])
    assert found["mrr"] == pytest.approx([1 / 3, 1 / 60, 1])
    assert compute_basket_metrics(np.arange(1, 21), np.zeros(20, int), [10])["ndcg@10"] == pytest.approx([1])


def test_baskets_of_one_are_targets(rng: np.random.Generator) -> None:
    ranks = rng.integers(1, 300, 40)
    for name, values in compute_basket_metrics(ranks, np.arange(40)).items():
        assert values == pytest.approx(compute_metrics(ranks)[name])


def test_exposure_by_hand() -> None:
    shown, counts = np.array([99, 3, 1, 0, 0]), np.array([0, 6, 2, 0, 4])  # item 0 is padding
    share = (counts[1:] + 1) / 16
    found = compute_exposure(shown, counts)
    assert found["coverage"] == 0.5
    assert found["novelty"] == pytest.approx((3 * -np.log2(share[0]) - np.log2(share[1])) / 4)
    assert found["popularity"] == pytest.approx((3 * 6 + 2) / 4)
    pairs = np.abs(shown[1:, None] - shown[1:]).sum()
    assert found["gini"] == pytest.approx(pairs / (2 * 4 * shown[1:].sum()))  # half the relative mean difference


def test_gini_is_zero_where_all_alike_and_nearly_one_where_one_has_all() -> None:
    counts = np.ones(101, dtype=int)
    alike, one = np.full(101, 7), np.zeros(101, dtype=int)
    one[50] = 7
    assert compute_exposure(alike, counts)["gini"] == pytest.approx(0)
    assert compute_exposure(one, counts)["gini"] == pytest.approx(0.99)
    assert compute_exposure(alike, counts)["novelty"] == pytest.approx(np.log2(100))
    assert compute_exposure(np.zeros(101, dtype=int), counts)["coverage"] == 0  # no item is shown: no NaN
    assert all(np.isfinite(list(compute_exposure(np.zeros(101, dtype=int), counts).values())))


# calibration


def test_calibration_by_hand() -> None:
    confidence = np.array([0.9, 0.2, 0.8, 0.1])
    hit = np.array([True, False, False, True])
    found = compute_calibration(confidence, hit, bins=2)
    assert found["bins"] == [
        {"users": 2, "confidence": pytest.approx(0.15), "hits": 0.5},
        {"users": 2, "confidence": pytest.approx(0.85), "hits": 0.5},
    ]
    assert found["ece"] == pytest.approx(0.35)
    assert (found["users"], found["confidence"], found["hits"]) == (4, pytest.approx(0.5), 0.5)


def test_true_probabilities_have_next_to_no_calibration_error(rng: np.random.Generator) -> None:
    confidence = rng.beta(1, 6, size=100_000)
    true = compute_calibration(confidence, rng.random(100_000) < confidence)
    over = compute_calibration(confidence, rng.random(100_000) < confidence / 2)
    assert true["ece"] < 0.01
    assert over["ece"] == pytest.approx(confidence.mean() / 2, abs=0.01)
    assert [row["users"] for row in true["bins"]] == [6667] * 10 + [6666] * 5
    assert np.all(np.diff([row["confidence"] for row in true["bins"]]) > 0)


def test_fewer_users_than_bins_have_a_bin_each() -> None:
    found = compute_calibration(np.array([0.5, 0.25, 0.5]), np.array([True, False, False]))
    assert [row["users"] for row in found["bins"]] == [1, 1, 1]
