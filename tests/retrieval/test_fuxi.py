"""FuXi-α against its equations, written out for each place, head and bucket, with all of its channels and fewer."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recsys2stage.retrieval.encoders.fuxi import FuXi
from recsys2stage.retrieval.encoders.positions import Combined, Learned, PerDistance, Position, Rotary
from recsys2stage.retrieval.encoders.times import LogBuckets, RequestGap

D, H, N, L = 6, 2, 7, 5  # histories shorter than the longest, by which semantic weights are divided
DAY = 86_400
Weights = dict[str, Tensor]
Channel = Callable[[int, int, int, int], Tensor]  # of a layer, a head, a query's place and a key's place


def history() -> tuple[Tensor, Tensor, Tensor]:
    """One history: x, times and request times, from seconds to years apart."""
    happened = 1_000_000_000 + torch.tensor([0, 1, 90, 9_000, 40 * DAY])
    asked = torch.tensor([*happened[1:].tolist(), 1_000_000_000 + 3_000 * DAY])
    return torch.randn(L, D, dtype=torch.float64), happened, asked


def states(built: FuXi, x: Tensor, happened: Tensor, asked: Tensor) -> Tensor:
    return built(x[None], torch.tensor([L]), happened[None], asked[None])[0]


def enlarged(built: FuXi) -> FuXi:
    """In double, with weights so large that no effect hides behind a small initial value."""
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return built.double().eval()


def norm(x: Tensor) -> Tensor:
    """RMSNorm of one place, without weights."""
    return x / (x.square().mean() + 1e-6).sqrt()


def naive(x: Tensor, weights: Weights, layers: int, channels: list[Channel]) -> Tensor:
    """All blocks over the places of one history; `channels` are those besides the semantic one, which comes last."""
    width, count = D // H, len(channels) + 1
    for n in range(layers):
        own = {name: weights[f"blocks.{n}.{name}.weight"] for name in ("uvqk", "out")}
        w1, w2, w3 = (weights[f"blocks.{n}.feed_forward.w{number}.weight"] for number in (1, 2, 3))
        linear = [own["uvqk"] @ norm(place) for place in x]
        silu = [place * torch.sigmoid(place) for place in linear]
        u = [place[: count * D] for place in silu]
        v, q, k = ([place[(count + part) * D :][:D].view(H, width) for place in silu] for part in range(3))
        after = []
        for i, place in enumerate(x):
            mixed = []
            for head in range(H):
                for channel in channels:
                    mixed.append(sum(channel(n, head, i, j) * v[j][head] for j in range(i + 1)))
                semantic = torch.zeros(width, dtype=x.dtype)
                for j in range(i + 1):
                    logit = q[i][head] @ k[j][head]
                    semantic = semantic + logit * torch.sigmoid(logit) / N * v[j][head]
                mixed.append(semantic)
            one = place + own["out"] @ (norm(torch.cat(mixed)) * u[i]) + weights[f"blocks.{n}.out.bias"]
            gate = w1 @ norm(one)
            after.append(one + w2 @ (gate * torch.sigmoid(gate) * (w3 @ norm(one))))
        x = torch.stack(after)
    return x


def log_bucket(seconds: int) -> int:
    return min(int(math.log(max(abs(seconds), 1)) / 0.301), 128)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("expansion", [1.0, 2.5])
@pytest.mark.parametrize(("where", "when"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_equations(where: bool, when: bool, expansion: float, per_head: bool) -> None:
    """Output and gradients of x and of all weights."""
    x, happened, asked = history()
    x.requires_grad_()
    distance = functools.partial(PerDistance, per_head=per_head)
    position = functools.partial(Combined, parts=[Learned, distance]) if where else Learned
    time = functools.partial(LogBuckets, per_head=per_head) if when else None
    built = enlarged(FuXi(D, N, layers=2, heads=H, expansion=expansion, position=position, time=time))
    weights = dict(built.named_parameters())

    def by_distance(n: int, head: int, i: int, j: int) -> Tensor:
        return weights["position.parts.1.tables"][n, head if per_head else 0, i - j]

    def by_time(n: int, head: int, i: int, j: int) -> Tensor:
        return weights["time.tables"][n, head if per_head else 0, log_bucket(int(asked[i] - happened[j]))]

    places = weights["position.parts.0.table" if where else "position.table"]
    entering = torch.stack([math.sqrt(D) * x[i] + places[i] for i in range(L)])
    want = naive(entering, weights, 2, [by_distance] * where + [by_time] * when)
    got = states(built, x, happened, asked)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    mass = torch.randn_like(got)
    leaves = [x, *weights.values()]
    gradients = (torch.autograd.grad((out * mass).sum(), leaves) for out in (got, want))
    for name, one, other in zip(["x", *weights], *gradients, strict=True):
        assert other.abs().max() > 1e-8, f"{name} must matter"
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_a_turning_position_acts_on_the_semantic_channel() -> None:
    """One head of two dimensions: turning query and key by their places turns one by their distance, in radians."""
    built = enlarged(FuXi(2, N, layers=1, heads=1, position=Rotary, scale_input=False))
    x = torch.randn(1, 2, 2, dtype=torch.float64)
    nothing = torch.zeros(1, 2, dtype=torch.long)
    got = built(x, torch.tensor([2]), nothing, None)[0, 1]
    weights = dict(built.named_parameters())
    linear = [weights["blocks.0.uvqk.weight"] @ norm(place) for place in x[0]]
    u, v, q, k = zip(*((place * torch.sigmoid(place)).view(4, 2) for place in linear), strict=True)
    total = torch.zeros(2, dtype=torch.float64)
    for j in range(2):
        apart = 1 - j
        turn = torch.tensor([[math.cos(apart), -math.sin(apart)], [math.sin(apart), math.cos(apart)]]).double()
        logit = (turn @ q[1]) @ k[j]
        total += logit * torch.sigmoid(logit) / N * v[j]
    one = x[0, 1] + weights["blocks.0.out.weight"] @ (norm(total) * u[1]) + weights["blocks.0.out.bias"]
    w1, w2, w3 = (weights[f"blocks.0.feed_forward.w{number}.weight"] for number in (1, 2, 3))
    gate = w1 @ norm(one)
    want = one + w2 @ (gate * torch.sigmoid(gate) * (w3 @ norm(one)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # Rotary keeps its angles in float32


# --- sizes


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "expansion", "expected"),
    [
        (256, 2, 4, 4.0, 2_753_024),  # ML-20M
        (256, 8, 8, 4.0, 11_012_096),  # ML-20M, large
        (50, 2, 1, 1.0, 60_100),  # ML-1M
        (50, 8, 2, 1.0, 240_400),  # ML-1M, large
    ],
)
def test_the_published_sizes(dim: int, layers: int, heads: int, expansion: float, expected: int) -> None:
    length, buckets = 200, 129
    built = FuXi(dim, length, layers=layers, heads=heads, expansion=expansion, time=LogBuckets)
    sizes = {name: weight.numel() for name, weight in built.named_parameters()}
    projections = dim * 3 * dim + 3 * dim * dim  # U is as wide as three channels; V, Q and K
    back = 3 * dim * dim + dim
    block = projections + back + 3 * expansion * dim * dim  # norms have no weights, other linear maps no biases
    assert sizes.pop("position.parts.0.table") == length * dim
    assert sizes.pop("position.parts.1.tables") == layers * length  # the published 2N − 1 hold distances nobody sees
    assert sizes.pop("time.tables") == layers * buckets
    assert all(name.startswith("blocks.") for name in sizes)
    assert sum(sizes.values()) == layers * block == expected


@pytest.mark.parametrize(
    ("position", "time", "channels"),
    [(PerDistance, LogBuckets, 3), (Rotary, LogBuckets, 2), (PerDistance, RequestGap, 2), (Position, None, 1)],
)
def test_an_encoding_without_a_bias_has_no_channel(position: type, time: type | None, channels: int) -> None:
    block = FuXi(8, N, layers=1, heads=2, position=position, time=time).blocks[0]
    assert block.uvqk.weight.shape == ((channels + 3) * 8, 8)
    assert block.out.weight.shape == (8, channels * 8)


def test_a_width_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="dim 6 is not a multiple of heads 4; change one of them"):
        FuXi(6, N, heads=4)


# --- times and tables


@pytest.mark.parametrize("place", range(L))
def test_the_time_of_a_request_reaches_its_own_place_only(place: int) -> None:
    built = enlarged(FuXi(D, N, layers=1, time=LogBuckets))
    x, happened, asked = history()
    sooner = asked.clone()
    sooner[place] = happened[place] + 60
    with torch.no_grad():
        moves = (states(built, x, happened, asked) - states(built, x, happened, sooner)).abs().amax(1) > 1e-4
    assert moves.tolist() == [i == place for i in range(L)]


@pytest.mark.parametrize("shared", [True, False])
def test_tables_of_each_layer_or_of_all(shared: bool) -> None:
    """A layer's table reaches the layer's channel, and a shared one all layers."""
    position, time = (functools.partial(kind, shared=shared) for kind in (PerDistance, LogBuckets))
    built = enlarged(FuXi(D, N, layers=3, position=position, time=time))
    x, happened, asked = history()
    before: list[Tensor] = []
    for block in built.blocks:
        block.mixed_norm.register_forward_pre_hook(lambda module, args: before.append(args[0].detach()))
    for tables in (built.position.tables, built.time.tables):
        assert len(tables) == (1 if shared else 3)
        for layer in range(len(tables)):
            before.clear()
            states(built, x, happened, asked)
            with torch.no_grad():
                tables[layer] += torch.randn_like(tables[layer])
            states(built, x, happened, asked)
            moved = [not torch.equal(old, new) for old, new in zip(before[:3], before[3:], strict=True)]
            assert moved == [n >= layer for n in range(3)]


# --- the start


def test_it_starts_as_its_docstring_says() -> None:
    built = FuXi(64, 10, layers=2, heads=4, expansion=2.0, time=LogBuckets)
    assert built.position.parts[0].table.shape == (10, 64)
    assert built.position.parts[1].tables.shape == (2, 1, 10)
    for block in built.blocks:
        assert block.uvqk.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert block.uvqk.weight.abs().max() > 0.06  # a normal, not a uniform, distribution
        feed_forward = block.feed_forward
        for linear in (block.out, feed_forward.w1, feed_forward.w2, feed_forward.w3):
            bound = math.sqrt(6 / (linear.in_features + linear.out_features))
            assert 0.99 * bound < linear.weight.abs().max() <= bound * (1 + 1e-6)
            assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_dropout_is_on_the_input_and_before_both_maps() -> None:
    """The share of zeros in what enters the first norm, the output map and the feed-forward."""
    built = FuXi(64, 50, layers=1, heads=2, dropout=0.75).train()
    entered: dict[str, Tensor] = {}
    block = built.blocks[0]
    for name, module in {"stream": block.norm, "out": block.out, "feed_forward": block.feed_forward}.items():
        module.register_forward_pre_hook(lambda module, args, name=name: entered.update({name: args[0].detach()}))
    nothing = torch.zeros(8, 50, dtype=torch.long)
    built(torch.randn(8, 50, 64), torch.full((8,), 50), nothing, None)
    shares = {name: (seen == 0).float().mean().item() for name, seen in entered.items()}
    assert shares == {name: pytest.approx(0.75, abs=0.02) for name in ("stream", "out", "feed_forward")}
