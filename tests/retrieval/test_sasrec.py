"""SASRec by its equations in RecML's form and in the paper's own, its sizes and its start."""

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
    log_bucket,
    no_bias,
    norm,
    of_each,
    placed,
)
from torch import Tensor, nn

from recsys2stage.retrieval.encoders import SASRec, layers, times

D, L, LAYERS = 8, 6, 2
ORIGINAL: dict[str, Any] = {
    "scale_input": True,
    "input_norm": False,
    "feed_forward": partial(layers.ReLU, expansion=1.0),
}


def sasrec(row: Row, weights: Weights, original: bool = False, heads: int = 1, bias: Bias = no_bias) -> Places:
    """The module's docstring, read aloud."""
    x = placed(row.x, weights["position.table"], scale=math.sqrt(D) if original else 1.0)
    if not original:
        x = of_each(norm, weights, "input_norm")(x)
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        normed = of_each(norm, weights, f"{at}.attention_norm")(x)
        x = added(x, attention(normed, weights, f"{at}.attention", heads, partial(bias, layer)))
        normed = of_each(norm, weights, f"{at}.feed_forward_norm")(x)
        x = added(x, of_each(feed_forward, weights, f"{at}.feed_forward", "ReLU" if original else "GELU")(normed))
    return of_each(norm, weights, "norm")(x)


def build(**options: Any) -> SASRec:
    with float64():
        return enlarged(SASRec(D, L, layers=LAYERS, **options))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_form_of_recml(heads: int) -> None:
    assert_same(build(heads=heads), partial(sasrec, heads=heads), batch([6, 3, 1], D))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_form_of_the_paper(heads: int) -> None:
    assert_same(build(heads=heads, **ORIGINAL), partial(sasrec, original=True, heads=heads), batch([6, 3, 1], D))


def test_a_clock_joins_the_logits() -> None:
    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            return weights["time.tables"][layer, 0, log_bucket(row.request[i] - row.times[j])]

        return sasrec(row, weights, heads=2, bias=bias)

    assert_same(build(heads=2, time=times.LogBuckets), expected, batch([6, 3, 1], D))


# --- sizes


def size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_the_size_that_recml_tests() -> None:
    """Its test's arithmetic, less the items; there the last norm and that of the input are one."""
    width, hidden, places = 32, 64, 20
    block = (
        (width + 1) * width * 3 + (width + 1) * width  # q, k, v and output
        + 2 * width
        + (width + 1) * hidden + (hidden + 1) * width
        + 2 * width
    )  # fmt: skip
    published = places * width + 3 * block + 2 * width
    built = SASRec(width, places, layers=3, heads=4, feed_forward=partial(layers.GELU, expansion=2.0))
    assert size(built) == published + 2 * width == 26_400


def test_the_size_of_the_paper() -> None:
    """MovieLens-1M: two blocks of width 50, 200 places; besides what the paper has, an output map follows attention."""
    width, places = 50, 200
    attention = 4 * (width * width + width)
    feed_forward = 2 * (width * width + width)
    published = places * width + 2 * (attention + feed_forward + 2 * 2 * width) + 2 * width
    assert size(SASRec(width, places, layers=2, heads=1, **ORIGINAL)) == published == 41_100


# --- the start


@pytest.mark.parametrize("options", [{}, ORIGINAL], ids=["RecML", "original"])
def test_it_starts_as_its_docstring_says(options: dict[str, Any]) -> None:
    built = SASRec(64, 60, layers=3, heads=2, **options)
    assert built.position.table.std().item() == pytest.approx(0.02, rel=0.05)
    maps = {name: module for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    assert len(maps) == 3 * 4
    for name, module in maps.items():
        bound = math.sqrt(6 / (module.in_features + module.out_features))
        assert 0.99 * bound < module.weight.abs().max() <= bound * (1 + 1e-6), name
        assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        assert not module.bias.any(), name
    norms = [module for module in built.modules() if isinstance(module, layers.LayerNorm)]
    assert len(norms) == 2 * 3 + 1 + (not options)
    assert all((norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-6 for norm in norms)


def test_dropout_stands_on_the_normed_input() -> None:
    """What is dropped is zero where the blocks begin."""
    built = SASRec(16, L, dropout=0.5).train()
    seen: list[Tensor] = []
    built.blocks[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    nothing = torch.zeros(9, L, dtype=torch.long)
    built(torch.randn(9, L, 16), torch.full((9,), L), nothing, None)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
