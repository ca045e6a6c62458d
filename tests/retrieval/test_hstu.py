"""HSTU against its equations, written out for each place, head and bucket, in each of its published forms."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recsys2stage.retrieval.encoders.hstu import HSTU
from recsys2stage.retrieval.encoders.layers import LayerNorm
from recsys2stage.retrieval.encoders.positions import Combined, Learned, PerDistance, Position, Rotary
from recsys2stage.retrieval.encoders.times import LogBuckets, LogSpaced

D, N, L = 6, 7, 5  # histories shorter than the longest, by which weights are divided
DAY = 86_400
Weights = dict[str, Tensor]
OfPair = Callable[[int, int, int, int], Tensor | float]  # of a layer, a head, a query's place and a key's place


def history() -> tuple[Tensor, Tensor, Tensor]:
    """One history: x, times and request times, from seconds to years apart."""
    happened = 1_000_000_000 + torch.tensor([0, 1, 90, 9_000, 40 * DAY])
    asked = torch.tensor([*happened[1:].tolist(), 1_000_000_000 + 3_000 * DAY])
    return torch.randn(L, D, dtype=torch.float64), happened, asked


def enlarged(built: HSTU) -> HSTU:
    """In double, with weights so large that no effect hides behind a small initial value."""
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return built.double().eval()


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """LayerNorm of one place."""
    x = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"] if f"{name}.weight" in weights else x


def naive(x: Tensor, weights: Weights, heads: int, factor: float, divisor: float, normed: bool, bias: OfPair) -> Tensor:
    """All blocks over the places of one history."""
    layers = sum(name.endswith("uvqk.weight") for name in weights)
    for n in range(layers):
        at = f"blocks.{n}"
        silu = []
        for place in x:
            entering = norm(place, weights, f"{at}.norm") if normed else place
            linear = weights[f"{at}.uvqk.weight"] @ entering + weights.get(f"{at}.uvqk.bias", 0)
            silu.append(linear * torch.sigmoid(linear))
        width = len(silu[0]) // (4 * heads)
        states = []
        for i, place in enumerate(x):
            mixed = []
            for head in range(heads):
                v, q, k = (slice(start := (part * heads + head) * width, start + width) for part in (1, 2, 3))
                total = torch.zeros(width, dtype=x.dtype)
                for j in range(i + 1):
                    logit = factor * sum(silu[i][q] * silu[j][k]) + bias(n, head, i, j)
                    total = total + logit * torch.sigmoid(logit) / divisor * silu[j][v]
                mixed.append(total)
            gated = norm(torch.cat(mixed), weights, f"{at}.mixed_norm") * silu[i][: heads * width]
            states.append(place + weights[f"{at}.out.weight"] @ gated + weights.get(f"{at}.out.bias", 0))
        x = torch.stack(states)
    return x


def assert_same(built: HSTU, expected: Callable[[Tensor, Weights], Tensor]) -> None:
    """Output and all gradients."""
    x, happened, asked = history()
    x.requires_grad_()
    weights = dict(built.named_parameters())
    got = built(x[None], torch.tensor([L]), happened[None], asked[None])[0]
    want = expected(x, weights)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    mass = torch.randn_like(got)
    leaves = [x, *weights.values()]
    gradients = (torch.autograd.grad((out * mass).sum(), leaves) for out in (got, want))
    for name, one, other in zip(["x", *weights], *gradients, strict=True):
        assert other.abs().max() > 1e-8, f"{name} must matter"
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def log_bucket(seconds: int) -> int:
    return min(int(math.log(max(abs(seconds), 1)) / 0.301), 128)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(2, None), (2, 2), (3, 3)])
def test_the_form_of_meta(heads: int, width: int | None, per_head: bool) -> None:
    _, happened, asked = history()
    parts = [Learned, functools.partial(PerDistance, per_head=per_head)]
    position = functools.partial(Combined, parts=parts)
    time = functools.partial(LogBuckets, per_head=per_head)
    built = enlarged(HSTU(D, N, layers=2, heads=heads, width=width, position=position, time=time))

    def expected(x: Tensor, weights: Weights) -> Tensor:
        distance, elapsed = weights["position.parts.1.tables"], weights["time.tables"]

        def bias(n: int, head: int, i: int, j: int) -> Tensor:
            at = head if per_head else 0
            return distance[n, at, i - j] + elapsed[n, at, log_bucket(int(asked[i] - happened[j]))]

        x = torch.stack([math.sqrt(D) * x[i] + weights["position.parts.0.table"][i] for i in range(L)])
        return naive(x, weights, heads, factor=1, divisor=N, normed=True, bias=bias)

    assert_same(built, expected)


@pytest.mark.parametrize(("scaling", "factor", "divisor"), [("length", 1, N), ("width", 3**-0.5, 1)])
def test_the_form_of_recml(scaling: str, factor: float, divisor: float) -> None:
    options = {"scaling": scaling, "affine": True, "bias": "none", "scale_input": False, "final_norm": True}
    built = enlarged(HSTU(D, N, layers=2, heads=2, position=Learned, **options))

    def expected(x: Tensor, weights: Weights) -> Tensor:
        x = torch.stack([x[i] + weights["position.table"][i] for i in range(L)])
        x = naive(x, weights, 2, factor, divisor, normed=True, bias=lambda n, head, i, j: 0.0)
        return torch.stack([norm(place, weights, "norm") for place in x])

    assert_same(built, expected)


def test_the_form_of_the_finalist() -> None:
    _, happened, asked = history()
    options = {"scaling": "width", "input_norm": False, "affine": True, "bias": "all", "scale_input": False}
    built = enlarged(HSTU(D, N, layers=2, heads=2, position=Learned, time=LogSpaced, **options))
    bounds = sorted({round((30 * DAY) ** (step / 99)) for step in range(100)})

    def expected(x: Tensor, weights: Weights) -> Tensor:
        def bias(n: int, head: int, i: int, j: int) -> Tensor:
            seconds = max(int(asked[i] - happened[j]), 1)
            return weights["time.tables"][0, 0, sum(bound <= seconds for bound in bounds) - 1]

        x = torch.stack([x[i] + weights["position.table"][i] for i in range(L)])
        return naive(x, weights, 2, factor=1 / math.sqrt(3), divisor=1, normed=False, bias=bias)

    assert_same(built, expected)


def test_both_scalings_at_once_and_a_turning_position() -> None:
    """Queries and keys turn, values and gates do not; a head of two dimensions turns by one radian a place."""
    heads = 3
    built = enlarged(HSTU(D, N, layers=1, heads=heads, scaling="both", position=Rotary))
    x, happened, asked = history()
    weights = dict(built.named_parameters())

    def turned(pair: Tensor, place: int) -> Tensor:
        cos, sin = math.cos(place), math.sin(place)
        return torch.stack([pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin])

    scaled = math.sqrt(D) * x
    linear = [weights["blocks.0.uvqk.weight"] @ norm(place, weights, "") for place in scaled]
    uvqk = [(place * torch.sigmoid(place)).view(4, heads, 2) for place in linear]
    for i in range(L):
        mixed = torch.zeros(heads, 2, dtype=x.dtype)
        for head in range(heads):
            for j in range(i + 1):
                logit = turned(uvqk[i][2, head], i) @ turned(uvqk[j][3, head], j) / math.sqrt(2)
                mixed[head] += logit * torch.sigmoid(logit) / N * uvqk[j][1, head]
        gated = norm(mixed.flatten(), weights, "") * uvqk[i][0].flatten()
        want = scaled[i] + weights["blocks.0.out.weight"] @ gated + weights["blocks.0.out.bias"]
        got = built(x[None], torch.tensor([L]), happened[None], asked[None])[0, i]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # Rotary keeps its angles in float32


# --- sizes


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "width"), [(256, 4, 4, 64), (256, 16, 8, 32), (50, 2, 1, 50), (50, 8, 2, 25)]
)
def test_the_published_sizes(dim: int, layers: int, heads: int, width: int) -> None:
    """ML-20M and ML-20M large, ML-1M and ML-1M large."""
    length, buckets = 200, 129
    built = HSTU(dim, length, layers=layers, heads=heads, time=LogBuckets)
    sizes = {name: weight.numel() for name, weight in built.named_parameters()}
    block = dim * 4 * heads * width + heads * width * dim + dim  # norms have no weights
    assert sum(count for name, count in sizes.items() if name.startswith("blocks.")) == layers * block
    assert sizes.pop("position.parts.0.table") == length * dim
    assert sizes.pop("position.parts.1.tables") == layers * length  # the published 2N − 1 hold distances nobody sees
    assert sizes.pop("time.tables") == layers * buckets
    assert sum(sizes.values()) == layers * block == {4: 1_311_744, 16: 5_246_976, 2: 25_100, 8: 100_400}[layers]


def test_a_head_may_be_of_any_width() -> None:
    built = HSTU(64, N, layers=1, heads=4, width=5)
    assert built.blocks[0].uvqk.weight.shape == (4 * 4 * 5, 64)
    assert built.blocks[0].out.weight.shape == (64, 4 * 5)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="dim 6 is not a multiple of heads 4; change one of them"):
        HSTU(6, N, heads=4)
    with pytest.raises(ValueError, match=r"heads of dim / heads = 4 dimensions but width is 6; leave out width"):
        HSTU(8, N, heads=2, width=6, position=Rotary)
    HSTU(8, N, heads=2, width=4, position=Rotary)


# --- times and tables


@pytest.mark.parametrize("time", [LogBuckets, LogSpaced])
@pytest.mark.parametrize("place", range(L))
def test_the_time_of_a_request_reaches_its_own_place_only(time: type, place: int) -> None:
    built = enlarged(HSTU(D, N, layers=1, time=time))
    x, happened, asked = history()
    sooner = asked.clone()
    sooner[place] = happened[place] + 60
    with torch.no_grad():
        before, after = (
            built(x[None], torch.tensor([L]), happened[None], request[None])[0] for request in (asked, sooner)
        )
    moves = (before - after).abs().amax(1) > 1e-4
    assert moves.tolist() == [i == place for i in range(L)]


def test_tables_of_each_layer_or_of_all() -> None:
    x, happened, asked = history()
    batch = x[None], torch.tensor([L]), happened[None], asked[None]
    one, each = (
        enlarged(HSTU(D, N, layers=3, position=Position, time=functools.partial(LogBuckets, shared=shared)))
        for shared in (True, False)
    )
    assert one.time.tables.shape == (1, 1, 129)
    assert each.time.tables.shape == (3, 1, 129)
    with torch.no_grad():
        each.blocks.load_state_dict(one.blocks.state_dict())
        each.time.tables.copy_(one.time.tables.expand(3, 1, 129))
        torch.testing.assert_close(each(*batch), one(*batch))
        for layer in range(3):
            same = each.time.tables[layer].clone()
            each.time.tables[layer] += torch.randn(1, 129)
            assert (each(*batch) - one(*batch)).abs().max() > 1e-3
            each.time.tables[layer] = same


def test_default_positions_are_the_published_ones() -> None:
    built = HSTU(D, N, layers=3)
    assert [type(part) for part in built.position.parts] == [Learned, PerDistance]
    assert built.position.parts[0].table.shape == (N, D)
    assert built.position.parts[1].tables.shape == (3, 1, N)


# --- the start


@pytest.mark.parametrize("bias", ["none", "out", "all"])
def test_it_starts_as_its_docstring_says(bias: str) -> None:
    built = HSTU(64, 10, layers=2, heads=4, width=24, affine=True, bias=bias, final_norm=True)
    for block in built.blocks:
        assert block.uvqk.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert block.uvqk.weight.abs().max() > 0.06  # a normal, not a uniform, distribution
        bound = math.sqrt(6 / (64 + 4 * 24))
        assert 0.99 * bound < block.out.weight.abs().max() <= bound * (1 + 1e-6)
        assert block.out.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert (block.uvqk.bias is None) == (bias != "all")
        assert (block.out.bias is None) == (bias == "none")
        assert not any(linear.bias.any() for linear in (block.uvqk, block.out) if linear.bias is not None)
    assert built.position.parts[0].table.std().item() == pytest.approx(64**-0.5, rel=0.1)  # beside items times √64
    norms = [module for module in built.modules() if isinstance(module, LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    assert all((norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-6 for norm in norms)


def test_dropout_is_on_the_input_and_before_the_output_map() -> None:
    """The share of zeros in what enters the first norm, the attention and the output map."""
    built = HSTU(64, 50, layers=1, heads=2, dropout=0.75).train()
    entered: dict[str, Tensor] = {}
    block = built.blocks[0]
    for name, module in {"stream": block.norm, "mixed": block.mixed_norm, "out": block.out}.items():
        module.register_forward_pre_hook(lambda module, args, name=name: entered.update({name: args[0].detach()}))
    nothing = torch.zeros(8, 50, dtype=torch.long)
    built(torch.randn(8, 50, 64), torch.full((8,), 50), nothing, None)
    shares = {name: (seen == 0).float().mean().item() for name, seen in entered.items()}
    assert shares == {
        name: pytest.approx(share, abs=0.02) for name, share in (("stream", 0.75), ("mixed", 0.0), ("out", 0.75))
    }
