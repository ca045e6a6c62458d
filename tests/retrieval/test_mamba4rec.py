"""Mamba4Rec against its equations, place by place, and one step at a time against the whole history."""

import math

import pytest
import torch
from naive import DAY, Places, Row, Weights, assert_same, batch, enlarged, feed_forward, linear, norm, sigmoid
from torch import Tensor, nn

from recsys2stage.retrieval.encoders import positions, times
from recsys2stage.retrieval.encoders.mamba4rec import Mamba4Rec, State

D, S, H, E, W = 6, 5, 4, 12, 4  # width, state, heads, width inside a layer, convolution
LENGTH = 8


def build(**options: object) -> Mamba4Rec:
    """A small one in float64, whose states are felt and forgotten at a middling pace."""
    built = enlarged(Mamba4Rec(D, LENGTH, state=S, ssm_heads=H, **{"chunk": 3, **options}).double())
    with torch.no_grad():
        for block in built.blocks:
            block.mamba.dt_bias += 3
    return built


# --- its equations


def mamba2(xs: Places, weights: Weights, name: str) -> Places:
    """Dao & Gu 2024: the convolution, h_t = exp(dt A) h_{t-1} + dt B_t x_t, y_t = C_t h_t (+ D x_t), gate and norm."""
    projected = [linear(x, weights, f"{name}.into") for x in xs]
    states = [torch.zeros(S, E // H).double() for _ in range(H)]
    out = []
    for place in range(len(xs)):
        convolved = torch.zeros(E + 2 * S).double()
        for back in range(min(W, place + 1)):
            tap, before = weights[f"{name}.taps"][:, W - 1 - back], projected[place - back][E : 2 * E + 2 * S]
            convolved = convolved + tap * before
        convolved = convolved * sigmoid(convolved)
        x, written, read = convolved[:E], convolved[E : E + S], convolved[E + S :]
        y = []
        for head in range(H):
            own = x[head * E // H : (head + 1) * E // H]
            dt = (1 + (projected[place][2 * E + 2 * S + head] + weights[f"{name}.dt_bias"][head]).exp()).log()
            a = -weights[f"{name}.log_rate"][head].exp()
            states[head] = (dt * a).exp() * states[head] + dt * torch.outer(written, own)
            y.append(read @ states[head])
            if f"{name}.skip" in weights:
                y[-1] = y[-1] + weights[f"{name}.skip"][head] * own
        z = projected[place][:E]
        gated = norm(torch.cat(y) * z * sigmoid(z), weights, f"{name}.norm", eps=1e-5)
        out.append(linear(gated, weights, f"{name}.out"))
    return out


def mamba4rec(row: Row, weights: Weights) -> Places:
    xs = row.x
    if "position.table" in weights:
        xs = [x + weights["position.table"][place] for place, x in enumerate(xs)]
    if "time.vectors.weight" in weights:
        gaps = [request - happened for request, happened in zip(row.request, row.times, strict=True)]
        xs = [x + weights["time.vectors.weight"][int(math.log2(1 + gap))] for x, gap in zip(xs, gaps, strict=True)]
    xs = [norm(x, weights, "norm", eps=1e-12) for x in xs]
    layer = 0
    while (block := f"blocks.{layer}") + ".mamba.taps" in weights:
        mixed = mamba2(xs, weights, f"{block}.mamba")
        xs = [norm(x + m, weights, f"{block}.mamba_norm", eps=1e-12) for x, m in zip(xs, mixed, strict=True)]
        fed = [feed_forward(x, weights, f"{block}.feed_forward", "GELU") for x in xs]
        xs = [norm(x + f, weights, f"{block}.feed_forward_norm", eps=1e-12) for x, f in zip(xs, fed, strict=True)]
        layer += 1
    return xs


@pytest.mark.parametrize(
    "lengths", [[2, 1], [3, 2], [6, 4], [8, 5]], ids=["below a chunk", "a chunk", "two chunks", "an uneven chunk"]
)
def test_it_is_its_equations(lengths: list[int]) -> None:
    assert_same(build(), mamba4rec, batch(lengths, D))


def test_its_options_are_their_equations() -> None:
    built = build(skip=True, layers=3, position=positions.Learned, time=times.RequestGap)
    assert_same(built, mamba4rec, batch([8, 3], D))


@pytest.mark.parametrize("whole", [False, True])
def test_the_chunk_changes_nothing(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: whole)
    length, found = 13, []
    x, mass = torch.randn(2, length, D).double().requires_grad_(), torch.randn(2, length, D).double()
    weights = build().state_dict()
    for chunk in (1, 2, 5, 12, 13, 64):
        built = build(chunk=chunk)
        built.load_state_dict(weights)
        out = plainly(built, x)
        found.append([out, *torch.autograd.grad((out * mass).sum(), [x, *built.parameters()])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def plainly(built: Mamba4Rec, x: Tensor) -> Tensor:
    """Full histories without times."""
    return built(x, torch.full((len(x),), x.size(1)), torch.zeros(x.shape[:2], dtype=torch.long), None)


# --- one event at a time


@pytest.mark.parametrize(
    ("position", "time"),
    [
        (positions.Position, None),
        (positions.Learned, times.RequestGap),
        (positions.Sinusoidal, times.Calendar),
        (positions.Position, times.HybridTimestamp),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_steps_are_the_whole(position: type, time: type | None, skip: bool) -> None:
    built = build(position=position, time=time, skip=skip)
    x, lengths, happened, asked = batch([LENGTH, LENGTH, LENGTH], D)
    with torch.no_grad():
        want = built(x, lengths, happened, asked)
        state = built.start(3)
        for place in range(LENGTH):
            got, state = built.step(x[:, place], state, happened[:, place], asked[:, place])
            torch.testing.assert_close(got, want[:, place], rtol=1e-9, atol=1e-9)


def test_a_step_leaves_its_state_as_it_is() -> None:
    """Several futures can be tried from one past, and no row sees another."""
    built, x = build(), torch.randn(2, LENGTH, D).double()
    with torch.no_grad():
        state = built.start(2)
        for place in range(LENGTH - 1):
            _, state = built.step(x[:, place], state)
        kept = [part.clone() for part in tensors(state)]
        first, _ = built.step(x[:, -1], state)
        built.step(torch.randn(2, D).double(), state)
        assert all(torch.equal(one, other) for one, other in zip(tensors(state), kept, strict=True))
        again, _ = built.step(torch.stack([x[0, -1], torch.randn(D).double()]), state)
    torch.testing.assert_close(again[0], first[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(again[1], first[1])
    torch.testing.assert_close(first, plainly(built, x)[:, -1], rtol=1e-9, atol=1e-9)


def test_the_state_does_not_grow_and_without_positions_a_history_may() -> None:
    built, x = build(), torch.randn(1, 3 * LENGTH, D).double()
    with torch.no_grad():
        state, out = built.start(1), x[:, 0]
        shapes = [part.shape for part in tensors(state)]
        for place in range(x.size(1)):
            out, state = built.step(x[:, place], state)
        assert [part.shape for part in tensors(state)] == shapes
        assert state.events == 3 * LENGTH
        torch.testing.assert_close(out, plainly(built, x)[:, -1], rtol=1e-9, atol=1e-9)
    assert sum(part.numel() for part in tensors(state)) == 2 * ((W - 1) * (E + 2 * S) + S * E)


def tensors(state: State) -> list[Tensor]:
    return [part for layer in state.layers for part in layer]


def test_what_cannot_be_stepped_is_refused() -> None:
    built, x = build(position=positions.Learned), torch.randn(1, D).double()
    state = built.start(1)
    for _ in range(LENGTH):
        _, state = built.step(x, state)
    with pytest.raises(ValueError, match=r"Learned has 8 positions and this is event 9 .* raise max_length"):
        built.step(x, state)
    clocked = build(time=times.RequestGap)
    with pytest.raises(ValueError, match=r"RequestGap needs the time of the event; give step a time"):
        clocked.step(x, clocked.start(1))
    with pytest.raises(ValueError, match=r"RequestGap needs request times, but request_time is"):
        clocked.step(x, clocked.start(1), torch.tensor([DAY]))


# --- numbers


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("faster", [0.0, 8.0])
def test_long_histories_keep_their_gradients(whole: bool, faster: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite and near those in float64, whether little is forgotten or, with a dt of 5 and more, everything at once."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: whole)
    built = Mamba4Rec(16, 1000, state=8, ssm_heads=4, dropout=0.0)
    with torch.no_grad():
        for block in built.blocks:
            block.mamba.dt_bias += faster
    x, mass, found = torch.randn(2, 1000, 16), torch.randn(2, 1000, 16), {}
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        out = plainly(built.to(dtype), leaf)
        leaves = {"x": leaf, **dict(built.named_parameters())}
        gradients = torch.autograd.grad((out * mass).sum(), list(leaves.values()))
        found[dtype] = {"out": out, **dict(zip(leaves, gradients, strict=True))}
    for name, rough in found[torch.float32].items():
        assert rough.isfinite().all(), name
        exact = found[torch.float64][name]
        # what is forgotten at once has no pace to speak of: its gradient is next to nothing, and noise
        if not (faster and name.endswith(("log_rate", "dt_bias"))):
            assert (rough - exact).norm() < 1e-3 * exact.norm(), name


def test_bf16_keeps_the_recurrence_in_float32() -> None:
    built = Mamba4Rec(16, 200, dropout=0.0)
    x = torch.randn(2, 200, 16)
    exact = plainly(built, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = plainly(built, x)
        rough.square().sum().backward()  # where autocast still holds
    assert not torch.equal(rough, exact)
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in built.parameters())


# --- how it starts


def test_parameters_of_recml() -> None:
    """Layers of RecML's sizes: states of 64, a convolution of 4 without bias, twice the width inside, 8 heads."""
    D, S, H, W = 64, 64, 8, 4
    E = 2 * D
    projection, output = D * (2 * E + 2 * S + H), E * D
    mamba = projection + (E + 2 * S) * W + 2 * H + E + output  # with taps, rates and biases of dt, and a norm
    feed_forward = D * 4 * D + 4 * D + 4 * D * D + D
    block = mamba + feed_forward + 2 * 2 * D
    expected = 2 * block + 2 * D
    built = Mamba4Rec(D, 200)
    assert sum(weight.numel() for weight in built.parameters()) == expected == 135_712
    with_skip = Mamba4Rec(D, 200, skip=True)
    assert sum(weight.numel() for weight in with_skip.parameters()) == expected + 2 * H
    assert built.dropout.p == built.blocks[0].dropout.p == built.blocks[0].feed_forward.dropout.p == 0.2


def test_it_starts_as_its_docstring_says() -> None:
    built = Mamba4Rec(64, 10, layers=4, ssm_heads=128, skip=True)
    mambas = [block.mamba for block in built.blocks]
    rate = torch.cat([mamba.log_rate for mamba in mambas]).exp()
    assert 1 <= rate.min() < 1.2
    assert 15.8 < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8.5, abs=0.6)
    dt = nn.functional.softplus(torch.cat([mamba.dt_bias for mamba in mambas])).log10()
    assert -3 - 1e-3 <= dt.min() < -2.98
    assert -1.02 < dt.max() <= -1 + 1e-3
    assert dt.mean().item() == pytest.approx(-2, abs=0.08)
    taps = torch.cat([mamba.taps for mamba in mambas])
    assert 0.49 < taps.abs().max() <= 0.5
    assert taps.mean().item() == pytest.approx(0, abs=0.02)
    assert all((mamba.skip == 1).all() and mamba.norm.eps == 1e-5 for mamba in mambas)
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert 0.99 * bound < module.weight.abs().max() <= bound * (1 + 1e-6), name
            assert (module.bias is None) == name.endswith((".into", ".out")), name
            assert module.bias is None or not module.bias.any(), name


# --- what it refuses


@pytest.mark.parametrize("position", [positions.Rotary, positions.PerDistance])
def test_positions_inside_attention_are_refused(position: type) -> None:
    said = "acts inside attention, and Mamba4Rec has none; choose Learned, Sinusoidal or no position"
    with pytest.raises(ValueError, match=f"{position.__name__} {said}"):
        Mamba4Rec(64, 10, position=position)


def test_times_inside_attention_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LogBuckets acts inside attention, .* has none; choose RequestGap, Calendar"):
        Mamba4Rec(64, 10, time=times.LogBuckets)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expand · dim = 20 is not a multiple of ssm_heads 8; change one of them"):
        Mamba4Rec(10, 5)
