"""The transformer by its equations in each of its arrangements, its sizes and its start."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from naive import (
    Bias,
    Branch,
    Places,
    Rotate,
    Row,
    Weights,
    added,
    assert_same,
    attention,
    batch,
    enlarged,
    feed_forward,
    float64,
    linear,
    log_bucket,
    no_bias,
    no_turn,
    norm,
    of_each,
    placed,
    rotary,
    sigmoid,
    t5_bucket,
)
from torch import Tensor, nn

from recsys2stage.retrieval.encoders import Transformer, layers, positions, times
from recsys2stage.retrieval.encoders.blocks import Gated, Parallel, PostNorm, PreNorm

D, H, L, LAYERS = 8, 2, 6, 2


def transformer(
    row: Row,
    weights: Weights,
    block: str = "PreNorm",
    kind: str = "SwiGLU",
    rotate: Rotate = no_turn,
    bias: Bias = no_bias,
    layers: int = LAYERS,
) -> Places:
    """The module's docstring, read aloud."""
    x = row.x
    for layer in range(layers):
        at = f"blocks.{layer}"
        attend: Branch = partial(
            attention, weights=weights, name=f"{at}.attention", heads=H, bias=partial(bias, layer), rotate=rotate
        )
        widen = of_each(feed_forward, weights, f"{at}.feed_forward", kind)
        one, two = of_each(norm, weights, f"{at}.attention_norm"), of_each(norm, weights, f"{at}.feed_forward_norm")
        if block == "PreNorm":
            x = added(x, attend(one(x)))
            x = added(x, widen(two(x)))
        elif block == "PostNorm":
            x = one(added(x, attend(x)))
            x = two(added(x, widen(x)))
        elif block == "Parallel":
            x = added(x, attend(one(x)), widen(two(x)))
        else:
            for name, branch, normed in (("attention", attend, one), ("feed_forward", widen, two)):
                gates = of_each(linear, weights, f"{at}.{name}_gate")(x)
                x = added(x, [sigmoid(gate) * y for gate, y in zip(gates, branch(normed(x)), strict=True)])
    return [linear(norm(place, weights, "norm"), weights, "projection") for place in x]


def build(**options: Any) -> Transformer:
    with float64():
        return enlarged(Transformer(D, L, layers=LAYERS, heads=H, **options))


def test_the_default_by_its_equations() -> None:
    assert_same(build(), partial(transformer, rotate=rotary()), batch([6, 3, 1], D))


@pytest.mark.parametrize("kind", ["ReLU", "GELU", "SwiGLU", "GeGLU"])
@pytest.mark.parametrize(
    ("block", "norm"),
    [
        (PreNorm, layers.RMSNorm),
        (PostNorm, layers.LayerNorm),
        (Parallel, layers.LayerNorm),
        (Gated, layers.RMSNorm),
        (PreNorm, layers.LayerNorm),
    ],
)
def test_arrangements_norms_and_feed_forwards_by_their_equations(block: Any, norm: Any, kind: str) -> None:
    widen = partial(getattr(layers, kind), expansion=1.5)
    built = build(block=block, norm=norm, feed_forward=widen, position=positions.Position)
    assert built.blocks[0].feed_forward.w1.weight.shape == (12, D)
    assert_same(built, partial(transformer, block=block.__name__, kind=kind), batch([4, 2], D))


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_biases_of_distance_and_time_by_their_equations(per_head: bool, shared: bool) -> None:
    options = {"per_head": per_head, "shared": shared}
    built = build(position=partial(positions.PerDistance, **options), time=partial(times.LogBuckets, **options))

    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            n, h = 0 if shared else layer, head if per_head else 0
            elapsed = weights["time.tables"][n, h, log_bucket(row.request[i] - row.times[j])]
            return weights["position.tables"][n, h, i - j] + elapsed

        return transformer(row, weights, bias=bias)

    assert_same(built, expected, batch([6, 3, 1], D))


def test_t5_and_time_by_their_equations() -> None:
    """With few buckets, so that all kinds of them occur; all layers share T5's, each has its own of time."""
    built = build(position=partial(positions.T5Buckets, buckets=4, max_distance=5), time=times.LogBuckets)

    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            distance = weights["position.table"][head, t5_bucket(i - j, True, 4, 5)]
            return distance + weights["time.tables"][layer, 0, log_bucket(row.request[i] - row.times[j])]

        return transformer(row, weights, bias=bias)

    assert_same(built, expected, batch([6, 3, 1], D))


def test_several_positions_at_once_by_their_equations() -> None:
    parts = [positions.Rotary, positions.Learned, positions.PerDistance]
    built = build(position=partial(positions.Combined, parts=parts))

    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            return weights["position.parts.2.tables"][layer, 0, i - j]

        row = row._replace(x=placed(row.x, weights["position.parts.1.table"]))
        return transformer(row, weights, rotate=rotary(), bias=bias)

    assert_same(built, expected, batch([6, 3, 1], D))


def test_a_history_of_several_blocks_by_its_equations() -> None:
    """Longer than the queries that are at hand at a time."""
    length = 35
    with float64():
        built = enlarged(Transformer(D, length, layers=1, heads=H, time=times.LogBuckets))
    happened = torch.randint(1, 100_000, (2, length)).cumsum(1)
    inputs = torch.randn(2, length, D).double(), torch.tensor([length, 5]), happened, happened + 500

    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            return weights["time.tables"][0, 0, log_bucket(row.request[i] - row.times[j])]

        return transformer(row, weights, rotate=rotary(), bias=bias, layers=1)

    assert_same(built, expected, inputs)


# --- sizes


def size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_published_size() -> None:
    """nanoRecSys on MovieLens-20M."""
    width, hidden = 256, 4 * 256
    attention = width * 3 * width + 3 * width + width * width + width
    block = attention + 3 * width * hidden + 2 * width
    built = Transformer(width, 200, layers=4, heads=8, feed_forward=partial(layers.SwiGLU, expansion=4.0))
    assert size(built) == 4 * block + width + width * width + width == 4_266_496
    assert all(block.attention.heads == 8 for block in built.blocks)


@pytest.mark.parametrize("gated", [layers.SwiGLU, layers.GeGLU])
@pytest.mark.parametrize("dim", [48, 64, 256])
def test_gated_feed_forwards_of_equal_parameters(gated: Any, dim: int) -> None:
    """Within one in a hundred of an ungated one, where they would weigh half as much again."""
    plain = partial(layers.GELU, bias=False)
    sizes = [
        size(Transformer(dim, L, feed_forward=widen).blocks[0].feed_forward)
        for widen in (plain, partial(gated, equal_parameters=True), gated)
    ]
    assert sizes[0] == 2 * 4 * dim * dim
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert sizes[2] == 1.5 * sizes[0]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim 10 is not a multiple of heads 4; change one of them"):
        Transformer(10, 5, heads=4)


def test_the_clock_is_optional() -> None:
    assert type(Transformer(D, L).time) is times.Time
    assert type(Transformer(D, L, time=times.RequestGap).time) is times.RequestGap


# --- the start


@pytest.mark.parametrize("block", [PreNorm, PostNorm, Parallel, Gated])
@pytest.mark.parametrize("widen", [layers.SwiGLU, layers.GELU])
def test_it_starts_as_its_docstring_says(block: Any, widen: Any) -> None:
    built = Transformer(64, 10, layers=4, heads=4, block=block, feed_forward=widen)
    maps = {name: module for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    # qkv, out, w1, w2, w3 where there is a gate, two gates of the branches, and the last projection
    assert len(maps) == 4 * (4 + (widen is layers.SwiGLU) + 2 * (block is Gated)) + 1
    for name, module in maps.items():
        writes_residual = name.endswith((".attention.out", ".feed_forward.w2"))
        # the fused q, k, v are one matrix
        bound = math.sqrt(6 / (module.in_features + module.out_features)) / (math.sqrt(2 * 4) if writes_residual else 1)
        weight = module.weight
        assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6), name  # uniform reaches, and ends at, its bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        assert weight.mean().item() == pytest.approx(0, abs=0.05 * bound), name
        assert (module.bias is None) == (".feed_forward.w" in name and widen is layers.SwiGLU), name
        assert module.bias is None or not module.bias.any(), name
    norms = [module for module in built.modules() if isinstance(module, layers.RMSNorm)]
    assert len(norms) == 2 * 4 + 1
    assert all((norm.weight == 1).all() and norm.eps == 1e-6 for norm in norms)


@pytest.mark.parametrize(("attention_dropout", "share"), [(None, 0.3), (0.0, 0.0), (0.5, 0.5)])
def test_dropout_of_attention_follows_dropout(attention_dropout: float | None, share: float) -> None:
    built = Transformer(D, L, dropout=0.3, attention_dropout=attention_dropout)
    assert {block.attention.dropout for block in built.blocks} == {share}
    others = [module.p for module in built.modules() if isinstance(module, layers.Dropout)]
    assert others == [0.3] * (1 + 2 * 2)  # the input; the branches and the feed-forward of each block
