"""LiGR, the encoder of eSASRec, by its equations, its sizes and its start."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from naive import (
    Bias,
    Places,
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
    norm,
    of_each,
    placed,
    sigmoid,
)
from torch import Tensor, nn

from recsys2stage.retrieval.encoders import LiGR, layers, times

D, L, LAYERS = 8, 6, 2


def gated(x: Places, branch: Places, weights: Weights, name: str) -> Places:
    """The branch times the sigmoid of a map of the stream itself."""
    return [sigmoid(linear(place, weights, name)) * y for place, y in zip(x, branch, strict=True)]


def ligr(row: Row, weights: Weights, kind: str = "SwiGLU", heads: int = 1, bias: Bias = no_bias) -> Places:
    """The module's docstring, read aloud."""
    x = placed(row.x, weights["position.table"])
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        normed = of_each(norm, weights, f"{at}.attention_norm")(x)
        attended = attention(normed, weights, f"{at}.attention", heads, partial(bias, layer))
        x = added(x, gated(x, attended, weights, f"{at}.attention_gate"))
        normed = of_each(norm, weights, f"{at}.feed_forward_norm")(x)
        widened = of_each(feed_forward, weights, f"{at}.feed_forward", kind)(normed)
        x = added(x, gated(x, widened, weights, f"{at}.feed_forward_gate"))
    return x


def build(**options: Any) -> LiGR:
    with float64():
        return enlarged(LiGR(D, L, layers=LAYERS, **options))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", ["SwiGLU", "GELU"])
def test_it_is_its_equations(kind: str, heads: int) -> None:
    built = build(heads=heads, feed_forward=getattr(layers, kind))
    assert_same(built, partial(ligr, kind=kind, heads=heads), batch([6, 3, 1], D))


def test_a_clock_joins_the_logits() -> None:
    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            return weights["time.tables"][layer, 0, log_bucket(row.request[i] - row.times[j])]

        return ligr(row, weights, heads=2, bias=bias)

    assert_same(build(heads=2, time=times.LogBuckets), expected, batch([6, 3, 1], D))


@pytest.mark.parametrize(
    ("width", "depth", "heads", "expected"), [(256, 4, 8, 4_780_032), (64, 2, 1, 161_536)], ids=["ML-20M", "ML-1M"]
)
def test_the_published_sizes(width: int, depth: int, heads: int, expected: int) -> None:
    """Of eSASRec on MovieLens, less the items."""
    attention = 3 * (width * width + width) + width * width + width
    gates = 2 * (width * width + width)
    feed_forward = 3 * 4 * width * width
    published = 200 * width + depth * (attention + gates + feed_forward + 2 * 2 * width)
    built = LiGR(width, 200, layers=depth, heads=heads)
    assert sum(weight.numel() for weight in built.parameters()) == published == expected


def test_it_starts_as_its_docstring_says() -> None:
    built = LiGR(64, 60, layers=3, heads=2)
    assert built.position.table.std().item() == pytest.approx(0.02, rel=0.05)
    maps = {name: module for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    assert len(maps) == 3 * 7
    for name, module in maps.items():
        std = math.sqrt(2 / (module.in_features + module.out_features))
        assert module.weight.std().item() == pytest.approx(std, rel=0.03), name
        assert module.weight.abs().max() > 3 * std, f"{name} is uniform, expected normal"
        assert (module.bias is None) == (".feed_forward.w" in name), name
        assert module.bias is None or not module.bias.any(), name
    norms = [module for module in built.modules() if isinstance(module, layers.LayerNorm)]
    assert len(norms) == 2 * 3, "there is none at the input and none at the end"


def test_a_closed_gate_leaves_the_stream_alone() -> None:
    built = build()
    with torch.no_grad():
        for block in built.blocks:
            for gate in (block.attention_gate, block.feed_forward_gate):
                gate.weight.zero_()
                gate.bias.fill_(-60.0)
        x, *rest = batch([6, 3], D)
        torch.testing.assert_close(built(x, *rest), x + built.position.table, rtol=0, atol=1e-20)
