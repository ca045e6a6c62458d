"""With few lists the ranker starts from a linear model, and is not beaten by a part of itself."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recsys2stage.ranking.choice import is_gain
from recsys2stage.ranking.linear import PENALTIES, LinearLists, fit_linear, minimise


def sampled(lists: int, weights: list[float], base: float, seed: int = 0, candidates: int = 30) -> LinearLists:
    """Lists whose positive is sampled from the softmax of base · score + features · weights."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(lists, candidates, generator=generator)
    features = torch.randn(lists, candidates, 1 + len(weights), generator=generator)
    features[..., 0] = score
    real = torch.ones(lists, candidates, dtype=torch.bool)
    real[::3, 20:] = False
    logits = base * score + features[..., 1:] @ torch.tensor(weights)
    odds = logits.masked_fill(~real, -torch.inf).softmax(1)
    return LinearLists(score, features * real[..., None], torch.multinomial(odds, 1, generator=generator)[:, 0], real)


def test_the_weights_are_those_that_the_lists_were_sampled_from() -> None:
    truth = torch.tensor([-0.5, 1.0, 0.0, -0.7])
    fitted = fit_linear(sampled(1_500, [1.0, 0.0, -0.7], base=0.5), np.arange(1_500))
    assert fitted.penalty == min(PENALTIES)
    # four standard errors of about 1 / sqrt(1,500 lists), and the pull of the penalty
    assert (fitted.weights - truth).abs().max() < 4 / 1_500**0.5 + 4 * min(PENALTIES)


def test_the_gradient_of_the_penalised_loss_is_zero() -> None:
    lists = sampled(60, [1.0, -1.0], base=1.0)
    weights = minimise(lists, 0.1, 0.0, torch.zeros(3)).requires_grad_()
    prior = torch.tensor([-1.0, 0, 0])
    (lists.loss(weights) + 0.1 * (weights - prior).square().sum()).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-3


def test_where_the_features_are_noise_the_order_is_the_retrievers() -> None:
    lists = sampled(80, [0.0] * 12, base=1.0)
    fitted = fit_linear(lists, np.arange(80))
    assert fitted.base == 1.0
    assert fitted.weights.abs().max() < 0.2
    alone = float(lists.loss(torch.zeros(13)))
    assert fitted.loss < alone + 0.05  # that of twelve weights that say nothing is larger


def test_where_the_retriever_is_noise_its_score_is_unlearned() -> None:
    fitted = fit_linear(sampled(80, [1.5], base=0.0), np.arange(80))
    assert fitted.base == 0.0
    assert abs(1 + float(fitted.weights[0])) < 0.3
    assert fitted.weights[1] > 0.7


def test_a_larger_penalty_holds_the_weights_closer() -> None:
    lists = sampled(50, [1.0], base=1.0)
    norms = [minimise(lists, penalty, 1.0, torch.zeros(2)).norm().item() for penalty in (0.001, 0.1, 10.0)]
    assert norms[0] > norms[1] > norms[2]
    assert norms[2] < 0.1


def test_lists_of_a_user_are_in_one_fold() -> None:
    """Copies of the lists of one user must not tell that the noise of these is a signal."""
    lists = sampled(20, [0.0] * 6, base=1.0)
    copies = LinearLists(*(part.repeat_interleave(8, dim=0) for part in lists))
    grouped, mixed = (fit_linear(copies, users) for users in (np.repeat(np.arange(20), 8), np.arange(160)))
    assert grouped.penalty > mixed.penalty


def test_lists_of_one_user_leave_the_retrievers_order() -> None:
    fitted = fit_linear(sampled(5, [1.0], base=1.0), np.zeros(5, dtype=np.int64))
    assert (fitted.penalty, fitted.base) == (max(PENALTIES), 1.0)
    assert torch.isfinite(fitted.weights).all()


def test_padding_does_not_count() -> None:
    lists = sampled(40, [1.0], base=1.0)
    wider = LinearLists(
        *(F.pad(part, (0, 5), value=3.0) for part in (lists.base,)),
        F.pad(lists.features, (0, 0, 0, 5), value=-2.0),
        lists.positive,
        F.pad(lists.real, (0, 5)),
    )
    one, other = (minimise(part, 0.1, 1.0, torch.zeros(2)) for part in (lists, wider))
    assert torch.allclose(one, other, atol=1e-4)  # sums of 35 and 30 terms round differently


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        (np.full(50, 0.1), True),
        (np.full(50, -0.1), False),
        (np.zeros(50), False),
        (np.append(np.full(49, -0.01), 1.0), False),  # one user makes the difference
        (np.append(np.full(40, 0.1), np.full(10, -0.1)), True),
    ],
    ids=["gain", "loss", "none", "one user", "most"],
)
def test_a_part_is_taken_if_it_gains_on_users_that_did_not_choose_it(gains: np.ndarray, taken: bool) -> None:
    assert is_gain(gains, np.arange(len(gains))) is taken
