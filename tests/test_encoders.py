"""The contract of encoders, held by every encoder with every position and time encoding of the package."""

import inspect
import math

import pytest
import torch
from torch import Tensor

from recsys2stage import encoders, positions, times
from recsys2stage.encoders import Encoder, Transformer
from recsys2stage.encoders.transformer import EPS
from recsys2stage.positions import Position, Rotary
from recsys2stage.times import RequestGap, Time

DIM, LENGTH = 8, 6
DAY = 86_400


def family(base: type) -> list[type]:
    """The class and all below it that live in the package, the abstract ones left out."""
    members = [base, *(deeper for member in base.__subclasses__() for deeper in family(member))]
    own = {member: None for member in members if member.__module__.startswith("recsys2stage.")}
    return [member for member in own if not inspect.isabstract(member)]


def cases() -> list[tuple[type, type, type]]:
    """Every encoder with whatever positions and times it takes; what it does not take is the neutral one."""
    found = []
    for encoder in family(Encoder):
        takes = inspect.signature(encoder).parameters
        for position in family(Position) if "position" in takes else [Position]:
            found += [(encoder, position, time) for time in (family(Time) if "time" in takes else [Time])]
    return found


CASES = cases()
every_encoder = pytest.mark.parametrize(
    ("encoder", "position", "time"), CASES, ids=["-".join(part.__name__ for part in case) for case in CASES]
)


def build(encoder: type, position: type, time: type, length: int = LENGTH, **options: object) -> Encoder:
    """In evaluation mode, with its weights enlarged so that no effect hides behind a small initial value."""
    takes = inspect.signature(encoder).parameters
    parts = {name: part for name, part in (("position", position), ("time", time)) if name in takes}
    built: Encoder = encoder(DIM, length, **parts, **{name: v for name, v in options.items() if name in takes})
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return built.eval()


def inputs(rows: int = 3, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Full histories: x, lengths, times and request times."""
    gaps = torch.randint(1, 30 * DAY, (rows, length))
    happened = 1_000_000_000 + gaps.cumsum(1)
    asked = torch.cat([happened[:, 1:], happened[:, -1:] + 3 * DAY], dim=1)
    return torch.randn(rows, length, DIM), torch.full((rows,), length), happened, asked


def moved(before: Tensor, after: Tensor) -> Tensor:
    """How far each place of the rows moved at most, (L,)."""
    return (before - after).abs().amax(dim=(0, 2))


def test_the_families_are_found() -> None:
    assert Transformer in family(Encoder)
    assert {Position, Rotary, positions.Learned} <= set(family(Position))
    assert {Time, RequestGap} <= set(family(Time))
    exported = {part for part in vars(encoders).values() if inspect.isclass(part) and issubclass(part, Encoder)}
    assert exported - {Encoder} == set(family(Encoder)), "recsys2stage.encoders must export every encoder"
    assert len(CASES) >= len(family(Position)) * len(family(Time))


@every_encoder
def test_shape_is_kept(encoder: type, position: type, time: type) -> None:
    built = build(encoder, position, time)
    for rows, length in ((3, LENGTH), (1, LENGTH), (4, 1), (2, 3)):
        x, *rest = inputs(rows, length)
        assert built(x, *rest).shape == (rows, length, DIM)


@every_encoder
@pytest.mark.parametrize("place", [0, 3, LENGTH - 1])
def test_a_change_in_the_future_moves_nothing_before_it(encoder: type, position: type, time: type, place: int) -> None:
    built = build(encoder, position, time)
    x, lengths, happened, asked = inputs()
    with torch.no_grad():
        before = built(x, lengths, happened, asked)
        # new random vectors: adding a constant would be undone by a norm, and the test would pass whatever happens
        x[:, place] = torch.randn_like(x[:, place])
        moves = moved(before, built(x, lengths, happened, asked))
    assert (moves[place:] > 1e-3).all(), "a place must see itself and its past"
    if place:
        assert (moves[:place] > 1e-5).any() == (not encoder.causal)
        assert not encoder.causal or (moves[:place] == 0).all()


@every_encoder
def test_the_time_of_a_later_event_moves_nothing_before_it(encoder: type, position: type, time: type) -> None:
    built, place = build(encoder, position, time), 3
    x, lengths, happened, asked = inputs()
    with torch.no_grad():
        before = built(x, lengths, happened, asked)
        happened, asked = happened.clone(), asked.clone()
        happened[:, place + 1 :] += 4_000 * DAY
        asked[:, place:] += 4_000 * DAY  # the request after `place` is the event at place + 1
        moves = moved(before, built(x, lengths, happened, asked))
    assert (moves[place:] > 1e-3).any() == (time is not Time), "a clock must be felt, and none must not"
    assert not encoder.causal or (moves[:place] == 0).all()


@every_encoder
def test_padding_is_invisible(encoder: type, position: type, time: type) -> None:
    built = build(encoder, position, time)
    x, _, happened, asked = inputs(4)
    lengths = torch.tensor([1, 3, 4, 2])
    real = torch.arange(LENGTH) < lengths[:, None]
    with torch.no_grad():
        clean = built(x * real[..., None], lengths, happened * real, asked * real)
        # whatever stands there
        other = torch.where(real[..., None], x, 50 * torch.randn_like(x))
        dirty = built(other, lengths, torch.where(real, happened, 7), torch.where(real, asked, 10**10))
        torch.testing.assert_close(dirty[real], clean[real], rtol=1e-5, atol=1e-6)
        # however long it is
        cut = (x * real[..., None])[:, :4], lengths, (happened * real)[:, :4], (asked * real)[:, :4]
        torch.testing.assert_close(built(*cut)[real[:, :4]], clean[real], rtol=1e-5, atol=1e-6)
    assert (dirty[~real] - clean[~real]).abs().max() > 1e-3, "the probe must differ in the padding"


@every_encoder
def test_a_history_is_alone_in_its_batch(encoder: type, position: type, time: type) -> None:
    built, batch = build(encoder, position, time), inputs(3)
    with torch.no_grad():
        together = built(*batch)
        alone = torch.cat([built(*(part[row : row + 1] for part in batch)) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@every_encoder
def test_order_matters(encoder: type, position: type, time: type) -> None:
    # one layer: in a deeper one even a causal mask alone tells the order
    built = build(encoder, position, time, layers=1)
    x, lengths, happened, asked = inputs()
    with torch.no_grad():
        before = built(x, lengths, happened, asked)[:, -1]
        swapped = x.clone()
        swapped[:, [0, 3]] = x[:, [3, 0]]
        moves = (built(swapped, lengths, happened, asked)[:, -1] - before).abs().amax()
    blind = encoder is Transformer and position is Position and time is Time  # a set of past events
    assert (moves > 1e-4) == (not blind)


@every_encoder
def test_every_weight_learns(encoder: type, position: type, time: type) -> None:
    built = build(encoder, position, time).train()
    (built(*inputs(8)) * torch.randn(8, LENGTH, DIM)).sum().backward()
    idle = [name for name, weight in built.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not idle


@every_encoder
@pytest.mark.parametrize("length", [1, LENGTH])
def test_empty_and_short_histories_are_finite(encoder: type, position: type, time: type, length: int) -> None:
    built = build(encoder, position, time).train()
    lengths = torch.tensor([0, 1])
    x = torch.zeros(2, length, DIM)
    x[1, 0] = torch.randn(DIM)
    x.requires_grad_()
    nothing = torch.zeros(2, length, dtype=torch.long)
    out = built(x, lengths, nothing, nothing)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in built.parameters())


@every_encoder
def test_bf16_is_finite_and_near(encoder: type, position: type, time: type) -> None:
    built, batch = build(encoder, position, time), inputs()
    with torch.no_grad():
        exact = built(*batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = built(*batch)
    assert rough.isfinite().all()
    assert ((rough.float() - exact).norm() / exact.norm()).item() < 0.05
    assert not torch.equal(rough.float(), exact), "autocast must have reached the encoder"


@every_encoder
def test_dropout_is_for_training_only(encoder: type, position: type, time: type) -> None:
    built, batch = build(encoder, position, time, dropout=0.5), inputs()
    with torch.no_grad():
        assert torch.equal(built(*batch), built(*batch))
        built.train()
        assert not torch.equal(built(*batch), built(*batch))


# --- the transformer's own


def test_transformer_starts_as_its_docstring_says() -> None:
    layers = 4
    built = Transformer(64, 10, layers=layers, heads=4)
    linear = {name: module for name, module in built.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) == layers * 5 + 1  # qkv, out, w1, w3, w2 and the last projection
    for name, module in linear.items():
        writes_residual = name.endswith((".out", ".w2"))
        bound = math.sqrt(6 / (module.in_features + module.out_features))
        bound /= math.sqrt(2 * layers) if writes_residual else 1
        weight = module.weight
        assert 0.99 * bound < weight.abs().max() <= bound * (1 + 1e-6), name  # uniform reaches, and ends at, its bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        assert weight.mean().item() == pytest.approx(0, abs=0.05 * bound), name
        assert (module.bias is None) == name.endswith((".w1", ".w2", ".w3")), name
        assert module.bias is None or not module.bias.any(), name
    norms = [module for module in built.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert len(norms) == 2 * layers + 1
    assert all((norm.weight == 1).all() and norm.eps == EPS == 1e-6 for norm in norms)


def test_transformer_of_the_published_size() -> None:
    D, hidden = 256, 4 * 256
    attention = D * 3 * D + 3 * D + D * D + D
    feed_forward = 3 * D * hidden
    block = attention + feed_forward + 2 * D
    expected = 4 * block + D + D * D + D
    built = Transformer(D, 200, layers=4, heads=8, expansion=4.0)
    assert sum(weight.numel() for weight in built.parameters()) == expected == 4_266_496
    assert all(block.attention.heads == 8 for block in built.blocks)
    assert built.dropout.p == 0.1


def test_transformer_by_its_equations() -> None:
    """One block in float64 against the formulas of the module's docstring, written out for each head and place."""
    D, H, L = 8, 2, 5
    built = Transformer(D, L, layers=1, heads=H, position=Position).double().eval()
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.3 * torch.randn_like(weight)
        x = torch.randn(1, L, D, dtype=torch.float64)
        lengths, nothing = torch.tensor([L]), torch.zeros(1, L, dtype=torch.long)
        got = built(x, lengths, nothing, None)[0]

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

        block = built.blocks[0]
        h = norm(x[0], block.attention_norm.weight)
        qkv = h @ block.attention.qkv.weight.T + block.attention.qkv.bias
        mixed = torch.zeros(L, D, dtype=torch.float64)
        for head in range(H):
            own = slice(head * D // H, (head + 1) * D // H)
            q, k, v = qkv[:, :D][:, own], qkv[:, D : 2 * D][:, own], qkv[:, 2 * D :][:, own]
            for i in range(L):
                weights = torch.softmax(q[i] @ k[: i + 1].T / math.sqrt(D // H), dim=0)
                mixed[i, own] = weights @ v[: i + 1]
        y = x[0] + mixed @ block.attention.out.weight.T + block.attention.out.bias
        h, ff = norm(y, block.feed_forward_norm.weight), block.feed_forward
        gate = h @ ff.w1.weight.T
        y = y + (gate * torch.sigmoid(gate) * (h @ ff.w3.weight.T)) @ ff.w2.weight.T
        want = norm(y, built.norm.weight) @ built.projection.weight.T + built.projection.bias
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_transformer_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"dim 10 is not a multiple of heads 4"):
        Transformer(10, 5, heads=4)


def test_the_clock_is_optional() -> None:
    assert type(Transformer(DIM, LENGTH).time) is Time
    assert type(Transformer(DIM, LENGTH, time=times.RequestGap).time) is RequestGap
