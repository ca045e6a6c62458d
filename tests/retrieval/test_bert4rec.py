"""BERT4Rec by its equations, with what it may not see, its sizes and its start."""

from functools import partial
from typing import Any

import pytest
import torch
from naive import (
    Bias,
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
    gelu,
    linear,
    log_bucket,
    no_bias,
    no_turn,
    norm,
    of_each,
    placed,
    rotary,
    t5_bucket,
)
from torch import Tensor, nn

from recsys2stage.retrieval.encoders import BERT4Rec, layers, positions, times

D, H, L, LAYERS = 8, 2, 6, 2  # and one place more, for the question
EPS = 1e-12


def bert4rec(row: Row, weights: Weights, kind: str = "GELU", rotate: Rotate = no_turn, bias: Bias = no_bias) -> Places:
    """The module's docstring, read aloud."""
    x = placed(row.x, weights["position.table"]) if "position.table" in weights else row.x
    if "segment" in weights:
        x = [place + weights["segment"] for place in x]
    x = of_each(norm, weights, "input_norm", EPS)(x)
    for layer in range(LAYERS):
        at = f"blocks.{layer}"
        attended = attention(x, weights, f"{at}.attention", H, partial(bias, layer), rotate, causal=False)
        x = of_each(norm, weights, f"{at}.attention_norm", EPS)(added(x, attended))
        widened = of_each(feed_forward, weights, f"{at}.feed_forward", kind)(x)
        x = of_each(norm, weights, f"{at}.feed_forward_norm", EPS)(added(x, widened))
    return [norm(gelu(linear(place, weights, "dense")), weights, "norm", EPS) for place in x]


def build(**options: Any) -> BERT4Rec:
    with float64():
        return enlarged(BERT4Rec(D, L, layers=LAYERS, heads=H, **options))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of all lengths: the longest and the place of its question, and junk behind the others."""
    return batch([L + 1, 4, 1], D, own_time=True)


@pytest.mark.parametrize("kind", ["GELU", "SwiGLU"])
@pytest.mark.parametrize("type_embedding", [False, True])
def test_it_is_its_equations(type_embedding: bool, kind: str) -> None:
    """The head included; padding is no key, whatever stands there."""
    built = build(type_embedding=type_embedding, feed_forward=getattr(layers, kind))
    assert ("segment" in dict(built.named_parameters())) == type_embedding
    assert_same(built, partial(bert4rec, kind=kind), inputs())


@pytest.mark.parametrize("per_head", [False, True])
def test_biases_of_both_sides_by_their_equations(per_head: bool) -> None:
    """Distances below 0 are those of later places; times between places have no direction."""
    position = partial(positions.PerDistance, per_head=per_head)
    built = build(position=position, time=partial(times.LogBuckets, per_head=per_head))

    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            h = head if per_head else 0
            elapsed = weights["time.tables"][layer, h, log_bucket(row.times[i] - row.times[j])]
            return weights["position.tables"][layer, h, i - j + L] + elapsed

        return bert4rec(row, weights, bias=bias)

    assert_same(built, expected, inputs())


def test_t5_of_both_sides_by_its_equations() -> None:
    built = build(position=partial(positions.T5Buckets, buckets=8, max_distance=5))

    def expected(row: Row, weights: Weights) -> Places:
        def bias(layer: int, head: int, i: int, j: int) -> Tensor:
            return weights["position.table"][head, t5_bucket(i - j, False, 8, 5)]

        rest = {name: weight for name, weight in weights.items() if name != "position.table"}
        return bert4rec(row, rest, bias=bias)

    assert_same(built, expected, inputs())


def test_rotary_by_its_equations() -> None:
    assert_same(build(position=positions.Rotary), partial(bert4rec, rotate=rotary()), inputs())


# --- sizes


def size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    ("width", "heads", "expected"), [(256, 8, 1_698_048), (64, 2, 117_312)], ids=["ML-20M", "ML-1M"]
)
def test_the_published_sizes(width: int, heads: int, expected: int) -> None:
    """The authors' configurations, two blocks and 200 places, less the items and their biases.

    Of their two segments one is ever used; the newest place of the longest history is asked in the 201st of ours.
    """
    attention = 4 * (width * width + width)
    feed_forward = 2 * 4 * width * width + 4 * width + width
    block = attention + feed_forward + 2 * 2 * width
    head = width * width + width + 2 * width
    published = 2 * width + 200 * width + 2 * width + 2 * block + head
    built = BERT4Rec(width, 200, layers=2, heads=heads, type_embedding=True)
    assert size(built) == published == expected


def test_the_size_that_recml_tests() -> None:
    """Its test's arithmetic, less the items and their biases: there are 5 segments of 32."""
    width, hidden, places = 32, 64, 20
    block = (
        (width + 1) * width * 3 + (width + 1) * width  # q, k, v and output
        + 2 * width
        + (width + 1) * hidden + (hidden + 1) * width
        + 2 * width
    )  # fmt: skip
    published = 5 * width + places * width + 2 * width + 3 * block + (width + 1) * width + 2 * width
    widen = partial(layers.GELU, expansion=2.0)
    built = BERT4Rec(width, places - 1, layers=3, heads=4, type_embedding=True, feed_forward=widen)
    assert size(built) == published - 4 * width == 27_488


def test_it_has_a_place_for_the_question() -> None:
    assert BERT4Rec(D, L).position.table.shape == (L + 1, D)


def test_a_gap_until_the_next_event_is_refused() -> None:
    with pytest.raises(ValueError, match="request time of a position is the time of its event; choose LogBuckets"):
        BERT4Rec(D, L, time=times.RequestGap)


# --- the start


@pytest.mark.parametrize("type_embedding", [False, True])
def test_it_starts_as_its_docstring_says(type_embedding: bool) -> None:
    built = BERT4Rec(64, 60, layers=3, heads=2, type_embedding=type_embedding)
    weights = {name: module.weight for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    assert len(weights) == 3 * 4 + 1
    for name, weight in weights.items():
        # a normal cut at two deviations has 0.8796 of its deviation
        assert weight.std().item() == pytest.approx(0.8796 * 0.02, rel=0.03), name
        assert 0.0395 < weight.abs().max() <= 0.04, name
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
    if type_embedding:
        assert 0.005 < built.segment.abs().max() <= 0.04
    else:
        assert built.segment is None
    norms = [module for module in built.modules() if isinstance(module, layers.LayerNorm)]
    assert len(norms) == 2 * 3 + 2
    assert all((norm.weight == 1).all() and not norm.bias.any() and norm.eps == EPS for norm in norms)


def test_there_is_no_dropout_inside_the_feed_forward() -> None:
    """BERT drops what each branch adds, attention weights and the input."""
    built = BERT4Rec(D, L, dropout=0.5)
    assert {block.feed_forward.dropout.p for block in built.blocks} == {0.0}
    assert {block.dropout.p for block in built.blocks} == {block.attention.dropout for block in built.blocks} == {0.5}
    assert built.dropout.p == 0.5


def test_padding_is_seen_by_an_empty_history_alone() -> None:
    """It has nothing else to look at, and stays finite."""
    built = build()
    nothing = torch.zeros(1, 3, dtype=torch.long)
    out = built(torch.zeros(1, 3, D).double(), torch.tensor([0]), nothing, None)
    assert out.isfinite().all()
