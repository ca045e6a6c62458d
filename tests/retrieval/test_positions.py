"""Positions: each encoding is its equation, and biases of pairs hold, and teach, the number of their distance."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from recsys2stage.retrieval.encoders.positions import (
    Combined,
    Learned,
    PerDistance,
    Position,
    PositionFactory,
    Rotary,
    Sinusoidal,
    T5Buckets,
)
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


# --- one vector for each place


def test_sinusoidal_is_the_equation_of_section_3_5() -> None:
    for dim in (16, 7):
        shape, scale = Shape(dim=dim, max_length=30), 0.02
        x = torch.randn(2, 25, dim)
        got = Sinusoidal(shape).embed(x) - x
        for i, d in product(range(25), range(dim)):
            angle = i / 10_000 ** (2 * (d // 2) / dim)
            wave = math.cos(angle) if d % 2 else math.sin(angle)
            assert got[:, i, d].tolist() == pytest.approx(2 * [scale * wave], abs=1e-6)
        torch.testing.assert_close(Sinusoidal(shape, scale=1.0).embed(x) - x, got / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("position", [Sinusoidal, Rotary])
def test_what_is_fixed_has_no_weights_and_leaves_nothing_in_a_checkpoint(position: type[Position]) -> None:
    assert not list(position(SHAPE).parameters())
    assert not position(SHAPE).state_dict()


# --- one number for each pair of places


CAUSAL = Shape(dim=8, max_length=9, heads=2, layers=3)
TWO_SIDED = replace(CAUSAL, causal=False)


def pairs(shape: Shape, length: int) -> list[tuple[int, int]]:
    """The queries and keys that attention looks at; what it is told about others is lost on it."""
    return [(i, j) for i, j in product(range(length), repeat=2) if j <= i or not shape.causal]


@pytest.mark.parametrize("shape", [CAUSAL, TWO_SIDED], ids=["causal", "two-sided"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_per_distance_is_a_number_for_each_distance(shape: Shape, shared: bool, per_head: bool) -> None:
    position = PerDistance(shape, shared=shared, per_head=per_head).double()
    own, heads = 1 if shared else shape.layers, shape.heads if per_head else 1
    distances = shape.max_length if shape.causal else 2 * shape.max_length - 1
    assert position.tables.shape == (own, heads, distances)
    assert position.tables.std().item() == pytest.approx(0.02, rel=0.4)
    first = 0 if shape.causal else 1 - shape.max_length  # the distance of column 0
    for layer, length in product(range(shape.layers), (1, 2, 5, shape.max_length)):
        bias = position.bias(layer, length)
        assert bias.shape == (heads, length, length)
        weights = torch.zeros_like(bias)
        expected = torch.zeros_like(position.tables)
        for head, (i, j) in product(range(heads), pairs(shape, length)):
            number = (0 if shared else layer, head, i - j - first)
            assert bias[head, i, j] == position.tables[number]
            weights[head, i, j] = 1 + head + 10 * i + 100 * j
            expected[number] += weights[head, i, j]
        (got,) = torch.autograd.grad((bias * weights).sum(), position.tables)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def bucket_of(distance: int, buckets: int, max_distance: int, causal: bool) -> int:
    """T5's rule for a query that stands `distance` places after its key, in whole numbers.

    Distances below E = half of the buckets of a side have one each; the others have bucket
    E + floor(log(n / E) / log(M / E) · E), capped. In the floor, the largest b with (M / E)^b <= (n / E)^E.
    """
    ahead = 0
    if causal:
        n = max(distance, 0)
    else:
        buckets //= 2
        ahead, n = buckets if distance < 0 else 0, abs(distance)
    exact = buckets // 2
    if n < exact:
        return ahead + n
    b, logarithmic = 0, buckets - exact
    while b + 1 < logarithmic and max_distance ** (b + 1) * exact**logarithmic <= n**logarithmic * exact ** (b + 1):
        b += 1
    return ahead + exact + b


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (16, 64), (4, 3), (12, 24), (64, 200)])
def test_t5_buckets_are_the_published_rule(causal: bool, buckets: int, max_distance: int) -> None:
    length = max_distance + 20
    shape = Shape(dim=4, max_length=length, heads=2, layers=2, causal=causal)
    position = T5Buckets(shape, buckets, max_distance).double()
    assert position.table.shape == (2, buckets)
    with torch.no_grad():
        position.table.copy_(torch.arange(2 * buckets).view(2, buckets))
    bias = position.bias(0, length)
    assert torch.equal(bias, position.bias(1, length)), "all layers share the table"
    assert torch.equal(bias[:, :5, :5], position.bias(0, 5))
    for head, distance in product(range(2), range(0 if causal else 1 - length, length)):
        number = head * buckets + bucket_of(distance, buckets, max_distance, causal)
        assert (bias[head].diagonal(-distance) == number).all(), f"distance {distance}"
    told = bias[0].tril() if causal else bias[0]
    # a key ahead is at least one place away, so that the bucket of "no places ahead" stays empty, as in T5
    assert set(told.long().unique().tolist()) == set(range(buckets)) - (set() if causal else {buckets // 2})


@pytest.mark.parametrize("shape", [CAUSAL, TWO_SIDED], ids=["causal", "two-sided"])
def test_t5_gradients_land_in_their_bucket(shape: Shape) -> None:
    position, length = T5Buckets(shape, buckets=8, max_distance=6).double(), 7
    bias = position.bias(0, length)
    weights, expected = torch.zeros_like(bias), torch.zeros_like(position.table)
    for head, (i, j) in product(range(2), pairs(shape, length)):
        weights[head, i, j] = 1 + head + 10 * i + 100 * j
        expected[head, bucket_of(i - j, 8, 6, shape.causal)] += weights[head, i, j]
    (got,) = torch.autograd.grad((bias * weights).sum(), position.table)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "buckets", "max_distance", "expected"),
    [
        (CAUSAL, 7, 128, "multiple of 2 buckets and a max_distance above 3"),
        (CAUSAL, 32, 16, "32 buckets and max_distance 16.* above 16"),
        (TWO_SIDED, 30, 128, "multiple of 4 buckets and a max_distance above 7"),
        (TWO_SIDED, 32, 8, "above 8"),
        (CAUSAL, 0, 128, "buckets is 0, expected at least 2"),
    ],
)
def test_t5_buckets_say_what_they_need(shape: Shape, buckets: int, max_distance: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        T5Buckets(shape, buckets, max_distance)


# --- several at once


def test_combined_applies_every_hook_in_turn() -> None:
    torch.manual_seed(1)
    both = Combined(SHAPE, [Rotary, Learned])
    torch.manual_seed(1)
    rotary, learned = Rotary(SHAPE), Learned(SHAPE)
    x, q = torch.randn(2, 7, 16), torch.randn(2, 2, 7, 8)
    assert torch.equal(both.embed(x), learned.embed(x))
    assert torch.equal(both.rotate(q), rotary.rotate(q))
    assert both.bias(0, 7) is None
    twice = Combined(SHAPE, [Rotary, lambda shape: Rotary(shape, base=20.0)])
    assert torch.equal(twice.rotate(q), Rotary(SHAPE, base=20.0).rotate(rotary.rotate(q)))


def test_combined_adds_biases_whatever_their_heads() -> None:
    parts = [PerDistance, T5Buckets, Rotary, lambda shape: PerDistance(shape, per_head=True)]
    position = Combined(CAUSAL, parts)
    for layer in range(CAUSAL.layers):
        expected = sum(position.parts[n].bias(layer, 6).expand(2, 6, 6) for n in (0, 1, 3))
        torch.testing.assert_close(position.bias(layer, 6), expected)
    inner = Combined(CAUSAL, [lambda shape: Combined(shape, [Learned]), T5Buckets])
    assert torch.equal(inner.bias(0, 6), inner.parts[1].bias(0, 6))


@pytest.mark.parametrize(
    ("position", "inside"),
    [
        (Position, False),
        (Learned, False),
        (Sinusoidal, False),
        (Rotary, True),
        (PerDistance, True),
        (T5Buckets, True),
        (lambda shape: Combined(shape, []), False),
        (lambda shape: Combined(shape, [Learned, Sinusoidal]), False),
        (lambda shape: Combined(shape, [Learned, PerDistance]), True),
    ],
)
def test_what_acts_inside_attention_says_so(position: PositionFactory, inside: bool) -> None:
    built = position(SHAPE)
    q = torch.randn(2, 2, 7, 8)
    acts = not torch.equal(built.rotate(q), q) or built.bias(0, 7) is not None
    assert built.in_attention is acts is inside
