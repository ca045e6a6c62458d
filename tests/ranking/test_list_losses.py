"""LambdaRank against its definition, pair by pair; what its weights let a list learn."""

import math

import pytest
import torch
from torch import Tensor

from recsys2stage.ranking.losses import LambdaRank

OPTIONS = [(10, 1.0), (3, 1.0), (1, 2.5), (None, 0.5)]
by_options = pytest.mark.parametrize(("k", "sigma"), OPTIONS)


def ndcg(order: list[int], positive: int, k: int | None) -> float:
    """Of candidates, best first."""
    rank = order.index(positive) + 1
    return 1 / math.log2(1 + rank) if k is None or rank <= k else 0.0


def exchanged(order: list[int], one: int, other: int) -> list[int]:
    return [{one: other, other: one}.get(candidate, candidate) for candidate in order]


def definition(logits: Tensor, positive: Tensor, real: Tensor, k: int | None, sigma: float) -> Tensor:
    """Every exchange of the positive with a negative is made, and its effect on NDCG measured."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(logits)):
        own, scores = int(positive[row]), logits[row].tolist()
        candidates = [j for j in range(logits.size(1)) if real[row, j]]
        order = sorted(candidates, key=lambda j: (-scores[j], j == own, j))
        for j in candidates:
            if j != own:
                delta = abs(ndcg(order, own, k) - ndcg(exchanged(order, own, j), own, k))
                total = total - delta * torch.sigmoid(sigma * (logits[row, own] - logits[row, j])).log()
    return total / len(logits)


def lists(rows: int = 12, candidates: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, of lists from one candidate to all places."""
    lengths = torch.linspace(1, candidates, rows).long()
    logits = torch.randint(-3, 4, (rows, candidates)).double() / 2
    return logits, (torch.rand(rows) * lengths).long(), torch.arange(candidates) < lengths[:, None]


@by_options
def test_it_is_its_definition(k: int | None, sigma: float) -> None:
    logits, positive, real = lists()
    for scores in (logits, logits + 0.1 * torch.randn_like(logits), torch.zeros_like(logits)):
        ours, defined = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        got, want = LambdaRank(k, sigma)(ours, positive, real), definition(defined, positive, real, k, sigma)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        (one,), (other,) = torch.autograd.grad(got, ours), torch.autograd.grad(want, defined)
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@by_options
def test_each_list_is_pulled_up_at_its_positive_and_down_elsewhere(k: int | None, sigma: float) -> None:
    logits, positive, real = lists()
    logits.requires_grad_()
    LambdaRank(k, sigma)(logits, positive, real).backward()
    assert logits.grad is not None
    own = logits.grad.gather(1, positive[:, None])
    assert (own[1:] < 0).all()
    assert own[0] == 0, "a positive alone has nothing to learn"
    assert (logits.grad.scatter(1, positive[:, None], 0) >= 0).all()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(len(logits), dtype=torch.float64))


@by_options
def test_padding_is_never_felt(k: int | None, sigma: float) -> None:
    logits, positive, real = lists()
    loss = LambdaRank(k, sigma)
    noisy = torch.where(real, logits, 1e4 * torch.randn_like(logits)).requires_grad_()
    got = loss(noisy, positive, real)
    assert got == loss(logits, positive, real)
    (gradient,) = torch.autograd.grad(got, noisy)
    assert not gradient[~real].any()
    wider = (torch.nn.functional.pad(logits, (0, 5)), positive, torch.nn.functional.pad(real, (0, 5)))
    torch.testing.assert_close(loss(*wider), got.detach())


@by_options
def test_a_positive_far_ahead_costs_nothing(k: int | None, sigma: float) -> None:
    logits, positive, real = lists()
    logits = logits.scatter(1, positive[:, None], 100.0).requires_grad_()
    loss = LambdaRank(k, sigma)(logits, positive, real)
    loss.backward()
    assert loss < 1e-12
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_a_positive_below_k_is_drawn_up_by_the_top_alone() -> None:
    """Place j of the list is rank j + 1: 30 candidates, the positive last."""
    logits = torch.linspace(2, -2, 30).double()[None].requires_grad_()
    LambdaRank(k=10)(logits, torch.tensor([29]), torch.ones(1, 30, dtype=torch.bool)).backward()
    assert logits.grad is not None
    assert logits.grad[0, 29] < 0
    assert (logits.grad[0, :10] > 0).all()
    assert (logits.grad[0, :10].diff() < 0).all(), "the first place is worth most"
    assert not logits.grad[0, 10:29].any()


@pytest.mark.parametrize("rank", [2, 3, 6, 20])
def test_an_exchange_at_the_top_weighs_most(rank: int) -> None:
    """Scores nearly alike, so that the weights alone differ: what the candidate right ahead of the positive feels."""
    logits = (-1e-9 * torch.arange(30, dtype=torch.float64))[None].requires_grad_()
    LambdaRank(k=None)(logits, torch.tensor([rank - 1]), torch.ones(1, 30, dtype=torch.bool)).backward()
    assert logits.grad is not None
    worth = 1 / math.log2(rank) - 1 / math.log2(1 + rank)
    assert logits.grad[0, rank - 2].item() == pytest.approx(worth / 2, rel=1e-4)


def test_steps_bring_the_positive_to_the_top() -> None:
    logits, positive, real = torch.randn(6, 40), torch.arange(6), torch.ones(6, 40, dtype=torch.bool)
    logits = (logits - 5.0 * torch.nn.functional.one_hot(positive, 40)).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=2.0)
    for _ in range(100):
        optimizer.zero_grad()
        LambdaRank(k=5)(logits, positive, real).backward()
        optimizer.step()
    assert (logits.argmax(dim=1) == positive).all()


@pytest.mark.parametrize(("options", "name"), [({"k": 0}, "k is 0"), ({"sigma": 0.0}, r"sigma is 0\.0")])
def test_options_out_of_range_say_so(options: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        LambdaRank(**options)
