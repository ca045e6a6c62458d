"""Dropout, norms and feed-forwards: shares and scales of dropout, and every formula by hand."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from recsys2stage.retrieval.encoders import layers
from recsys2stage.retrieval.encoders.layers import (
    GELU,
    Dropout,
    FeedForward,
    GeGLU,
    LayerNorm,
    Norm,
    ReLU,
    RMSNorm,
    SwiGLU,
    dropout_mask,
)

DIM = 12

# --- dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_zeroes_its_share_and_raises_the_rest(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(61, 1_009, dtype=dtype)
    out = Dropout(p)(x)
    assert out.dtype == dtype
    share = (out == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
    rest = out[out != 0].double()
    assert (rest == rest[0]).all()
    assert rest[0].item() == pytest.approx(1 / (1 - p), rel=0.004 if dtype == torch.bfloat16 else 2e-4)
    assert (x == 1).all(), "the input stays as it is"


@pytest.mark.parametrize("p", [1e-4, 0.999])
def test_rare_shares_keep_the_expectation(p: float) -> None:
    keep, scale = dropout_mask(torch.Size([2_000_000]), p)
    assert (~keep).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / keep.numel()) + 2**-17)
    # the share is a multiple of 2^-16, and the scale that of the very share
    steps = round(p * 2**16)
    assert scale == 1 / (1 - steps / 2**16)
    assert keep.double().mean().item() * scale == pytest.approx(1, abs=5 * math.sqrt(p * scale / keep.numel()))


def test_a_share_too_small_to_be_drawn_drops_nothing() -> None:
    keep, scale = dropout_mask(torch.Size([2_000_000]), 1e-6)
    assert keep.all()
    assert scale == 1


def test_neighbours_are_dropped_independently() -> None:
    """Four elements share one draw of the generator."""
    keep = dropout_mask(torch.Size([400_000]), 0.5)[0].double() * 2 - 1
    for apart in (1, 2, 3, 4, 5, 8):
        together = (keep[apart:] * keep[:-apart]).mean().item()
        assert together == pytest.approx(0, abs=5 / math.sqrt(400_000)), apart
    for lane in range(4):
        assert keep[lane::4].mean().item() == pytest.approx(0, abs=5 / math.sqrt(100_000)), lane


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 7), (2, 3, 0), (2, 3, 5)])
def test_any_shape_is_dropped(shape: tuple[int, ...]) -> None:
    keep, scale = dropout_mask(torch.Size(shape), 0.5)
    assert (keep.shape, keep.dtype, scale) == (shape, torch.bool, 2.0)
    x = torch.randn(shape)
    out = Dropout(0.5)(x)
    assert torch.equal(out, torch.where(out != 0, 2 * x, out))


def test_in_evaluation_and_without_a_share_dropout_is_nothing() -> None:
    x, state = torch.randn(5, 7), torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_drops_what_forward_dropped() -> None:
    x = torch.randn(50, 40, dtype=torch.float64).T.requires_grad_()  # in no order of memory
    out, weights = Dropout(0.3)(x), torch.randn(40, 50, dtype=torch.float64)
    (got,) = torch.autograd.grad((out * weights).sum(), x)
    torch.testing.assert_close(got, weights * (out / x).detach())
    assert 0 < (got == 0).sum() < got.numel()
    (ones,) = torch.autograd.grad(Dropout(0.3)(x).sum(), x)  # a gradient without strides
    assert len(ones.unique()) == 2

    def reseeded(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return Dropout(0.3)(x).square()

    small = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reseeded, small)
    assert torch.autograd.gradgradcheck(reseeded, small)


def test_masks_follow_the_seed() -> None:
    x, dropout = torch.ones(30, 30), Dropout(0.5)
    torch.manual_seed(7)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(7)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)
    draws = [dropout_mask(torch.Size([900]), 0.5, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, math.nan])
def test_a_share_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout is {p}, expected a share from 0 to below 1"):
        Dropout(p)


# --- norms


def normed_by_hand(norm: Norm, x: Tensor) -> Tensor:
    rows = []
    for row in x.flatten(0, -2):
        mean = sum(row) / DIM if isinstance(norm, LayerNorm) else 0.0
        square = sum((value - mean) ** 2 for value in row) / DIM
        rows.append((row - mean) / (square + norm.eps) ** 0.5)
    out = torch.stack(rows).view(x.shape)
    if norm.weight is not None:
        out = out * norm.weight
        if isinstance(norm, LayerNorm):
            out = out + norm.bias
    return out


def assert_same(out: Tensor, expected: Tensor, learned: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), learned)
    want = torch.autograd.grad((expected * weights).sum(), learned)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("eps", "in_cache"), [(1e-6, 1 << 16), (0.1, 1), (0.1, 2 * DIM + 1)])
def test_norms_are_their_formulas(
    norm: type[Norm], affine: bool, eps: float, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "CACHE_BLOCK", in_cache)
    built = norm(DIM, eps, affine).double()
    assert len(list(built.parameters())) == (0 if not affine else 2 if norm is LayerNorm else 1)
    with torch.no_grad():
        for weight in built.parameters():
            weight.copy_(torch.randn_like(weight))
    x = (3 + 2 * torch.randn(3, 3, DIM, dtype=torch.float64)).transpose(0, 1).requires_grad_()  # in no order of memory
    assert_same(built(x), normed_by_hand(built, x), [x, *built.parameters()])
    x = torch.randn(DIM, dtype=torch.float64, requires_grad=True)
    assert_same(built(x), normed_by_hand(built, x[None])[0], [x, *built.parameters()])
    assert built(x[None][:0]).shape == (0, DIM)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_as_exact_as_their_type(norm: type[Norm], dtype: torch.dtype) -> None:
    """As inside of autocast: a linear map hands over bf16, the weights are float32."""
    built, x = norm(DIM), 5 * torch.randn(40, DIM).to(dtype)
    out, exact = built(x), norm(DIM).double()(x.double())
    assert ((out.double() - exact).norm() / exact.norm()).item() < (0.005 if dtype == torch.bfloat16 else 1e-6)
    assert built.weight is not None
    with torch.no_grad():
        built.weight[0] = 2.0  # the plain sum of a LayerNorm is 0 whatever it is given, and so is its gradient
    leaf = x.clone().requires_grad_()
    built(leaf).sum(-1)[0].backward()  # a gradient without strides
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    assert leaf.grad[0].abs().max() > 1e-3
    assert not leaf.grad[1:].any()


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_start_neutral_and_survive_zeros(norm: type[Norm]) -> None:
    built = norm(DIM)
    assert built.eps == 1e-6
    torch.testing.assert_close(built(torch.randn(50, DIM)).square().mean(-1), torch.ones(50), rtol=1e-4, atol=0)
    x = torch.zeros(2, DIM, requires_grad=True)
    built(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


# --- feed-forwards


def linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return x @ weight.T + (0 if bias is None else bias)


def hidden_by_hand(layer: FeedForward, x: Tensor) -> Tensor:
    first = linear(layer.w1.weight, layer.w1.bias, x)
    if isinstance(layer, ReLU):
        return first * (first > 0)
    if isinstance(layer, SwiGLU):
        activated = first / (1 + (-first).exp())
    else:
        activated = first * (1 + torch.erf(first / math.sqrt(2))) / 2
    gated = isinstance(layer, (SwiGLU, GeGLU))
    return activated * linear(layer.w3.weight, layer.w3.bias, x) if gated else activated


@pytest.mark.parametrize("member", [ReLU, GELU, SwiGLU, GeGLU])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forwards_are_their_formulas(member: type[FeedForward], bias: bool) -> None:
    layer = member(DIM, 0.0, expansion=1.5, bias=bias).double()
    assert layer.width == 18
    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert [module.bias is not None for module in linears] == [bias] * (3 if member in (SwiGLU, GeGLU) else 2)
    x = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    assert_same(
        layer(x),
        linear(layer.w2.weight, layer.w2.bias, hidden_by_hand(layer, x)),
        [x, *layer.parameters()],
    )


def test_ungated_ones_have_biases_and_gated_ones_have_none() -> None:
    assert all(layer(DIM, 0.0).w1.bias is not None and layer(DIM, 0.0).width == 48 for layer in (ReLU, GELU))
    assert all(layer(DIM, 0.0).w3.bias is None and layer(DIM, 0.0).width == 48 for layer in (SwiGLU, GeGLU))


@pytest.mark.parametrize("member", [ReLU, SwiGLU])
def test_dropout_falls_on_the_hidden_layer_only(member: type[FeedForward]) -> None:
    layer, x = member(DIM, 0.5).double(), torch.randn(4, DIM, dtype=torch.float64)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    keep, scale = dropout_mask(torch.Size([4, layer.width]), 0.5)
    hidden = hidden_by_hand(layer, x) * keep * scale
    torch.testing.assert_close(out, linear(layer.w2.weight, layer.w2.bias, hidden), rtol=0, atol=1e-9)
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("member", [SwiGLU, GeGLU])
def test_equal_parameters_are_equal_within_one_hidden_unit(member: type[SwiGLU | GeGLU]) -> None:
    for dim, expansion in product((8, 10, 50, 64), (1.0, 2.0, 4.0)):
        gated = member(dim, 0.0, expansion, equal_parameters=True)
        plain = ReLU(dim, 0.0, expansion, bias=False)
        apart = sum(w.numel() for w in gated.parameters()) - sum(w.numel() for w in plain.parameters())
        assert abs(apart) <= 3 * dim / 2 + 1e-9, "to the nearest unit of three rows"
