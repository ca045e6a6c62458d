"""Positions: rotary is relative and keeps norms, learned has a vector for each place, the base says nothing."""

import pytest
import torch
from torch import Tensor

from recsys2stage.positions import Learned, Position, Rotary
from recsys2stage.shapes import Shape

SHAPE = Shape(dim=16, max_length=40, heads=2)


def scores(position: Position, q: Tensor, k: Tensor) -> Tensor:
    """One query vector and one key vector at every pair of places, (L, L)."""
    spread = torch.ones(1, SHAPE.heads, SHAPE.max_length, 1, dtype=q.dtype)
    return (position.rotate(q * spread) @ position.rotate(k * spread).mT)[0, 0]


def test_rotary_scores_depend_on_the_distance_only() -> None:
    table = scores(Rotary(SHAPE), torch.randn(8), torch.randn(8))
    for distance in range(SHAPE.max_length - 1):
        diagonal = table.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert table[:, 0].std() > 0.1, "distances must be told apart"


def test_position_zero_turns_nothing_and_norms_are_kept() -> None:
    q = torch.randn(3, SHAPE.heads, SHAPE.max_length, 8)
    turned = Rotary(SHAPE).rotate(q)
    torch.testing.assert_close(turned[:, :, 0], q[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert (turned[:, :, 1:] - q[:, :, 1:]).abs().amax(-1).min() > 0.01


def test_rotary_is_equation_34() -> None:
    """Pair (k, k + K/2) turns by place · base^(-2k/K)."""
    base, place, K = 100.0, 7, 8
    q = torch.randn(1, 2, 10, K, dtype=torch.float64)
    got = Rotary(Shape(dim=16, max_length=10, heads=2), base=base).double().rotate(q)[0, 0, place]
    for k in range(K // 2):
        angle = torch.tensor(place * base ** (-2 * k / K), dtype=torch.float64)
        one, two = q[0, 0, place, k], q[0, 0, place, k + K // 2]
        # the table is made in float32
        assert got[k].item() == pytest.approx((one * angle.cos() - two * angle.sin()).item(), abs=1e-5)
        assert got[k + K // 2].item() == pytest.approx((two * angle.cos() + one * angle.sin()).item(), abs=1e-5)


def test_rotary_keeps_the_type_it_is_given() -> None:
    assert Rotary(SHAPE).rotate(torch.randn(1, 2, 5, 8).bfloat16()).dtype == torch.bfloat16


def test_rotary_needs_an_even_head() -> None:
    with pytest.raises(ValueError, match=r"a head is 3 wide \(dim 6 / heads 2\); choose an even head width"):
        Rotary(Shape(dim=6, max_length=4, heads=2))


def test_rotary_leaves_nothing_in_a_checkpoint() -> None:
    assert not Rotary(SHAPE).state_dict()


def test_learned_adds_the_vector_of_each_place() -> None:
    learned, x = Learned(SHAPE), torch.randn(2, 7, 16)
    torch.testing.assert_close(learned.embed(x) - x, learned.table[:7].expand(2, 7, 16), rtol=1e-4, atol=1e-6)
    assert learned.table.shape == (40, 16)
    assert learned.table.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(learned.rotate(q := torch.randn(1, 2, 7, 8)), q)


def test_the_base_says_nothing() -> None:
    x, q = torch.randn(2, 7, 16), torch.randn(2, 2, 7, 8)
    assert Position(SHAPE).embed(x) is x
    assert Position(SHAPE).rotate(q) is q
    assert Rotary(SHAPE).embed(x) is x
