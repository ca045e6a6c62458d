"""Transformers from their equations, in float64, place by place, head by head and key by key.

Nothing here comes from the package, whose encoders are held to it. Weights are named as the module names them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor, nn

DAY = 86_400
Weights = dict[str, Tensor]
Places = list[Tensor]  # one vector a place
Branch = Callable[[Places], Places]
Bias = Callable[[int, int, int, int], Tensor | float]  # of a layer, a head, a query's place and a key's place
Rotate = Callable[[Tensor, int], Tensor]  # a head's query or key and its place


class Row(NamedTuple):
    """The real places of one history."""

    x: Places
    times: list[int]
    request: list[int]


Encode = Callable[[Row, Weights], Places]


@contextmanager
def float64() -> Iterator[None]:
    """Modules built here are made in double, tables of waves included."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


Module = TypeVar("Module", bound=nn.Module)


def enlarged(built: Module) -> Module:
    """With weights so large that no effect hides behind a small initial value."""
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.4 * torch.randn_like(weight)
    return built.eval()


def batch(lengths: list[int], dim: int, own_time: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Histories with events from seconds to years apart: x, lengths, times and request times, junk at padding."""
    gaps = torch.tensor([0, 1, 90, 9_000, 40 * DAY, 3, 700 * DAY, 50])
    rows, longest = len(lengths), max(lengths)
    happened = torch.stack([1_000_000_000 + gaps.roll(row)[:longest].cumsum(0) for row in range(rows)])
    asked = torch.cat([happened[:, 1:], happened[:, -1:] + 3_000 * DAY], dim=1)
    return torch.randn(rows, longest, dim).double(), torch.tensor(lengths), happened, happened if own_time else asked


def assert_same(built: nn.Module, expected: Encode, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Output and the gradients of x and of every weight, over the real places of each history.

    The module is held to it twice: as it computes on a CPU, in blocks, and as it does elsewhere, in whole tensors.
    """
    x, lengths, happened, asked = inputs
    x.requires_grad_()
    weights = dict(built.named_parameters())
    real = torch.arange(x.size(1)) < lengths[:, None]
    mass = torch.randn(int(real.sum()), x.size(2)).double()

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * mass).sum(), [x, *weights.values()])

    rows = [
        Row(list(x[row, :length]), happened[row, :length].tolist(), asked[row, :length].tolist())
        for row, length in enumerate(lengths.tolist())
    ]
    want = torch.stack([place for row in rows for place in expected(row, weights)])
    wanted = gradients(want)
    for whole in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.compiler.is_compiling", lambda whole=whole: whole)
            got = built(x, lengths, happened, asked)[real]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
            for name, one, other in zip(["x", *weights], gradients(got), wanted, strict=True):
                assert other.abs().max() > 1e-8, f"{name} must matter"
                torch.testing.assert_close(
                    one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
                )


# --- layers, for the vector of one place


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = weights[f"{name}.weight"] @ x
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-6) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias."""
    if f"{name}.bias" in weights:
        x = x - x.sum() / len(x)
        return x / ((x * x).sum() / len(x) + eps) ** 0.5 * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return x / ((x * x).sum() / len(x) + eps) ** 0.5 * weights[f"{name}.weight"]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def feed_forward(x: Tensor, weights: Weights, name: str, kind: str) -> Tensor:
    hidden = linear(x, weights, f"{name}.w1")
    if kind == "ReLU":
        hidden = hidden * (hidden > 0)
    elif kind == "SwiGLU":
        hidden = hidden * sigmoid(hidden) * linear(x, weights, f"{name}.w3")
    elif kind == "GELU":
        hidden = gelu(hidden)
    else:
        assert kind == "GeGLU"
        hidden = gelu(hidden) * linear(x, weights, f"{name}.w3")
    return linear(hidden, weights, f"{name}.w2")


# --- what is done with all places of a history


def of_each(function: Callable[..., Tensor], *options: Any) -> Branch:
    return lambda xs: [function(x, *options) for x in xs]


def added(*terms: Places) -> Places:
    return [sum(parts[1:], start=parts[0]) for parts in zip(*terms, strict=True)]


def placed(xs: Places, table: Tensor, scale: float = 1.0) -> Places:
    """With the learned vector of each place."""
    return [scale * x + table[i] for i, x in enumerate(xs)]


def no_bias(layer: int, head: int, i: int, j: int) -> float:
    return 0.0


def no_turn(part: Tensor, place: int) -> Tensor:
    return part


def attention(
    xs: Places,
    weights: Weights,
    name: str,
    heads: int,
    bias: Callable[[int, int, int], Tensor | float],
    rotate: Rotate = no_turn,
    causal: bool = True,
) -> Places:
    """softmax_j(q_i·k_j / √K + b_ij) v_j for each head, side by side, through the output map."""
    dim, width = len(xs[0]), len(xs[0]) // heads
    qkv = [linear(x, weights, f"{name}.qkv") for x in xs]
    out = []
    for i in range(len(xs)):
        mixed = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            q = rotate(qkv[i][:dim][own], i)
            masses, values = [], []
            for j in range(i + 1 if causal else len(xs)):
                k = rotate(qkv[j][dim : 2 * dim][own], j)
                masses.append(((q * k).sum() / math.sqrt(width) + bias(head, i, j)).exp())
                values.append(qkv[j][2 * dim :][own])
            mixed.append(sum(mass * value for mass, value in zip(masses, values, strict=True)) / sum(masses))
        out.append(linear(torch.cat(mixed), weights, f"{name}.out"))
    return out


def rotary(base: float = 500.0) -> Rotate:
    """Dimensions k and k + K/2 turn by place · base^(-2k / K)."""

    def rotate(part: Tensor, place: int) -> Tensor:
        half, turned = len(part) // 2, part.clone()
        for k in range(half):
            angle = place * base ** (-2 * k / len(part))
            turned[k] = part[k] * math.cos(angle) - part[k + half] * math.sin(angle)
            turned[k + half] = part[k + half] * math.cos(angle) + part[k] * math.sin(angle)
        return turned

    return rotate


def t5_bucket(distance: int, causal: bool, buckets: int, max_distance: int) -> int:
    """In whole numbers: bucket exact + m begins at the first distance d with (d / exact)^n >= (max / exact)^m."""
    own = buckets if causal else buckets // 2
    side = own if distance < 0 and not causal else 0
    distance = max(distance, 0) if causal else abs(distance)
    exact = own // 2
    if distance < exact:
        return side + distance
    n = own - exact
    steps = sum(distance**n * exact**m >= max_distance**m * exact**n for m in range(1, n))
    return side + exact + steps


def log_bucket(seconds: int, buckets: int = 129) -> int:
    return min(int(math.log(max(abs(seconds), 1)) / 0.301), buckets - 1)
