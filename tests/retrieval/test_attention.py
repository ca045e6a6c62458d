"""Attention in blocks is the attention of the equations: outputs, gradients, dropout, and what it keeps in memory."""

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recsys2stage.retrieval.encoders import attention
from recsys2stage.retrieval.encoders.attention import Bias, bias_attention, pointwise_attention, softmax_attention

ROWS, HEADS, LENGTH, WIDTH, BUCKETS = 3, 2, 5, 4, 5
LENGTHS = torch.tensor([LENGTH, 3, 0])
SCALE, DIVISOR = 0.7, 5.0
KINDS = ["softmax", "two-sided", "pointwise", "bias"]
BIASES = list(product([0, 1, HEADS], repeat=2))  # heads of the position bias and of the time table; 0: there is none

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dropout = pytest.mark.parametrize("kind", KINDS[:3])


class Given(NamedTuple):
    """What attention is asked about; the first five are learned."""

    q: Tensor
    k: Tensor
    v: Tensor
    position: Tensor | None
    table: Tensor | None
    buckets: Tensor | None
    lengths: Tensor

    @property
    def learned(self) -> list[Tensor]:
        return [x for x in self[:5] if x is not None]


def inputs(
    position: int = HEADS,
    table: int = HEADS,
    rows: int = ROWS,
    heads: int = HEADS,
    length: int = LENGTH,
    width: int = WIDTH,
    dtype: torch.dtype = torch.float64,
) -> Given:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    return Given(
        *(drawn(rows, heads, length, width) for _ in range(3)),
        drawn(position, length, length) if position else None,
        drawn(table, BUCKETS) if table else None,
        torch.randint(BUCKETS, (rows, length, length), dtype=torch.uint8) if table else None,
        LENGTHS if rows == ROWS else torch.randint(length + 1, (rows,)),
    )


def attend(kind: str, given: Given, dropout: float = 0.0) -> Tensor:
    q, k, v, position, table, buckets, lengths = given
    bias = Bias(position, buckets, table)
    if kind == "softmax":
        return softmax_attention(q, k, v, bias, dropout=dropout)
    if kind == "two-sided":
        return softmax_attention(q, k, v, bias, causal=False, lengths=lengths, dropout=dropout)
    if kind == "pointwise":
        return pointwise_attention(q, k, v, bias, SCALE, DIVISOR, dropout)
    return bias_attention(v, bias)


def naive(kind: str, given: Given) -> Tensor:
    """The equations, for one row, head and query after another, and in these for one key after another."""
    q, k, v, position, table, buckets, lengths = given
    rows, heads, length, width = v.shape
    mixed = []
    for row, head, i in product(range(rows), range(heads), range(length)):
        seen = range(max(1, int(lengths[row]))) if kind == "two-sided" else range(i + 1)
        logits = []
        for j in seen:
            logit = v.new_zeros(())
            if kind != "bias":
                logit = q[row, head, i] @ k[row, head, j] * (SCALE if kind == "pointwise" else width**-0.5)
            if position is not None:
                logit = logit + position[head if len(position) > 1 else 0, i, j]
            if table is not None and buckets is not None:
                logit = logit + table[head if len(table) > 1 else 0, int(buckets[row, i, j])]
            logits.append(logit)
        weights = torch.stack(logits)
        if kind == "pointwise":
            weights = weights / (1 + (-weights).exp()) / DIVISOR
        elif kind != "bias":
            weights = weights.exp() / weights.exp().sum()
        mixed.append(sum(weight * v[row, head, j] for weight, j in zip(weights, seen, strict=True)))
    return torch.stack(mixed).view(rows, heads, length, width)


def gradients(out: Tensor, given: Given, weights: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((out * weights).sum(), given.learned, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(given.learned, found, strict=True)]


def assert_same(given: Given, expected: Tensor, *outs: Tensor) -> None:
    """In output and in the gradient of all that is learned."""
    weights = torch.randn_like(expected)
    wanted = gradients(expected, given, weights)
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        for got, want in zip(gradients(out, given, weights), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@contextlib.contextmanager
def whole_tensors() -> Iterator[None]:
    """What runs on a GPU and under torch.compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 queries; two rows at a time in the first tile of two heads, one in the next."""
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "BLOCK", 70)


# --- the equations


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("kind", "position", "table"),  # without a bias there is no channel of it
    [(kind, *heads) for kind, heads in product(KINDS, BIASES) if kind != "bias" or any(heads)],
)
def test_attention_is_its_equation(kind: str, position: int, table: int) -> None:
    given = inputs(position, table)
    with whole_tensors():
        whole = attend(kind, given)
    assert_same(given, naive(kind, given), attend(kind, given), whole)


@every_kind
@pytest.mark.parametrize("block", [1, 70, 1 << 18])
def test_blocks_are_the_whole_whatever_their_borders(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", 4)
    monkeypatch.setattr(attention, "BLOCK", block)
    for length in (1, 3, 4, 5, 8, 9):
        given = inputs(rows=4, length=length)
        with whole_tensors():
            expected = attend(kind, given)
        assert_same(given, expected, attend(kind, given))


@every_kind
def test_blocks_are_the_whole_in_their_real_sizes(kind: str) -> None:
    for length in (attention.TILE - 1, attention.TILE, attention.TILE + 1, 2 * attention.TILE + 1):
        given = inputs(position=1, rows=2, length=length)
        with whole_tensors():
            expected = attend(kind, given)
        assert_same(given, expected, attend(kind, given))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("position", "table"), BIASES)
def test_causal_attention_needs_no_lengths_and_heeds_none(position: int, table: int) -> None:
    q, k, v, place, numbers, buckets, lengths = given = inputs(position, table)
    told = softmax_attention(q, k, v, Bias(place, buckets, numbers), causal=True, lengths=lengths)
    torch.testing.assert_close(told, attend("softmax", given), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("small_blocks")
@every_kind
@pytest.mark.parametrize("table", [0, HEADS])
def test_inputs_of_any_layout_are_read_and_left_alone(kind: str, table: int) -> None:
    """Encoders hand over views into one projection, and a sum hands back a gradient without strides."""
    given = inputs(table=table)
    packed = torch.stack([x.transpose(1, 2) for x in given[:3]], dim=2).detach().requires_grad_()  # (B, L, 3, H, K)
    views = Given(*packed.permute(2, 0, 3, 1, 4), *given[3:])
    before = [x.clone() for x in given.learned]
    out, expected = attend(kind, views), attend(kind, given)
    torch.testing.assert_close(out, expected)
    (got,) = torch.autograd.grad(out.sum(), packed)
    want = torch.autograd.grad(expected.sum(), given[:3], allow_unused=True)
    for d_view, d in zip(got.permute(2, 0, 3, 1, 4), want, strict=True):
        torch.testing.assert_close(d_view, torch.zeros_like(d_view) if d is None else d)
    assert all(map(torch.equal, given.learned, before))


@pytest.mark.parametrize(("position", "table"), BIASES)
def test_an_empty_history_is_finite(position: int, table: int) -> None:
    given = inputs(position, table)._replace(lengths=torch.zeros(ROWS, dtype=torch.long))
    for path in (contextlib.nullcontext(), whole_tensors()):
        with path:
            out = attend("two-sided", given)
        assert out.isfinite().all()
        assert all(d.isfinite().all() for d in gradients(out, given, torch.ones_like(out)))


def test_attention_to_both_sides_asks_for_lengths() -> None:
    given = inputs()
    with pytest.raises(AssertionError, match="needs lengths to mask the padding"):
        softmax_attention(given.q, given.k, given.v, Bias(), causal=False)


# --- dropout


def shown(kind: str, rows: int, length: int, dropout: float) -> tuple[Tensor, Tensor]:
    """Weights (B, H, L, L) without and with dropout: values that are unit vectors show them."""
    given = inputs(rows=rows, length=length, width=length)
    given = given._replace(
        v=torch.eye(length, dtype=torch.float64).expand_as(given.v), lengths=torch.full((rows,), length)
    )
    with torch.no_grad():
        return attend(kind, given), attend(kind, given, dropout)


@pytest.mark.usefixtures("small_blocks")
@every_dropout
@pytest.mark.parametrize("blocked", [True, False], ids=["blocks", "whole"])
def test_dropout_zeroes_its_share_and_raises_the_rest(kind: str, blocked: bool) -> None:
    with contextlib.nullcontext() if blocked else whole_tensors():
        weights, dropped = shown(kind, rows=40, length=11, dropout=0.25)
    seen = weights != 0
    ratio = dropped[seen] / weights[seen]
    gone = ratio == 0
    torch.testing.assert_close(ratio[~gone], torch.full_like(ratio[~gone], 1 / 0.75))
    assert gone.double().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / len(ratio)) ** 0.5)
    assert not dropped[~seen].any()


@pytest.mark.usefixtures("small_blocks")
@every_dropout
def test_dropout_is_drawn_anew_for_each_row_head_query_and_key(kind: str) -> None:
    weights, dropped = shown(kind, rows=40, length=8, dropout=0.5)
    kept = torch.where(weights != 0, (dropped != 0).double(), torch.nan)  # (B, H, L, L)
    for axes in product([False, True], repeat=4):  # averages over any of the axes must vary as those of coins do
        over = [axis for axis, taken in enumerate(axes) if taken]
        if not over or len(over) == 4:
            continue
        count = (~kept.isnan()).sum(over)
        apart = (kept.nanmean(over) - 0.5)[count > 0] * 2 * count[count > 0] ** 0.5
        assert apart.square().mean().item() == pytest.approx(1, abs=max(0.35, 5 * (2 / len(apart)) ** 0.5)), over


@every_dropout
def test_dropout_keeps_the_expectation(kind: str) -> None:
    rows, p = 600, 0.3
    row = inputs(rows=1, width=LENGTH)
    many = Given(*(None if x is None else x.detach().expand(rows, *x.shape[1:]) for x in row[:3]), *row[3:])
    many = many._replace(
        v=torch.eye(LENGTH, dtype=torch.float64).expand(rows, HEADS, LENGTH, LENGTH),
        buckets=None if row.buckets is None else row.buckets.expand(rows, -1, -1),
        lengths=torch.full((rows,), LENGTH),
    )
    with torch.no_grad():
        expected, mean = attend(kind, many)[0], attend(kind, many, p).mean(0)
    error = (expected.abs() * (p / (1 - p) / rows) ** 0.5).clamp(min=1e-12)
    assert ((mean - expected) / error).abs().max() < 5


@every_dropout
def test_backward_drops_what_forward_dropped(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TILE", 2)
    monkeypatch.setattr(attention, "BLOCK", 4)
    given = inputs(position=1, table=1, rows=2, heads=1, length=3, width=2)._replace(lengths=torch.tensor([3, 2]))

    def reseeded(*learned: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attend(kind, Given(*learned, *given[5:]), dropout=0.5)

    assert torch.autograd.gradcheck(reseeded, given.learned)
    assert (reseeded(*given.learned) - attend(kind, given)).abs().max() > 0.01, "something must be dropped"


@every_dropout
def test_masks_follow_the_seed_and_nothing_else_draws(kind: str) -> None:
    given = inputs()

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return attend(kind, given, dropout=0.5)

    first = seeded()
    state = torch.get_rng_state()
    again = attend(kind, given, dropout=0.5)
    assert torch.equal(first, seeded())
    assert not torch.equal(first, again)
    gradients(first, given, torch.ones_like(first))
    attend(kind, given)
    assert torch.equal(torch.get_rng_state(), state), "neither backward nor attention without dropout may draw"


# --- memory and precision


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made, what was given and its views left out."""

    def __init__(self, given: Given) -> None:
        super().__init__()
        self.given = {x.untyped_storage().data_ptr() for x in given if x is not None}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in self.given:
                self.elements = max(self.elements, made.numel())
        return out


def measured(kind: str, given: Given, dropout: float) -> tuple[int, int]:
    """Elements of the largest tensor made, and of the largest one saved for backward."""
    saved = [0]

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with Largest(given) as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = attend(kind, given, dropout)
        out.sum().backward()
    return largest.elements, max(saved)


@pytest.mark.parametrize(
    ("kind", "biased"), [(kind, biased) for kind, biased in product(KINDS, [False, True]) if kind != "bias" or biased]
)
def test_the_weights_of_all_pairs_are_never_in_memory(kind: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads, length, block = 8, 4, 256, 1 << 16
    monkeypatch.setattr(attention, "BLOCK", block)
    given = inputs(int(biased), heads * biased, rows, heads, length, width=8, dtype=torch.float32)
    made, saved = measured(kind, given, dropout=0.1 if biased else 0.0)
    assert made <= block == given.q.numel()
    assert saved <= (rows * length * length if biased else block)  # the buckets, of one byte each
    if biased:
        with whole_tensors():
            made, saved = measured(kind, given, dropout=0.0)
        assert made >= rows * heads * length * length, "the probe must see whole tensors"


@every_kind
@pytest.mark.parametrize("inside", [False, True], ids=["backward after autocast", "backward inside autocast"])
def test_bf16_is_finite_and_near(kind: str, inside: bool) -> None:
    length, rows = 48, 4
    given = inputs(rows=rows, length=length, width=8, dtype=torch.float32)
    linear, x = nn.Linear(16, 3 * 16), torch.randn(rows, length, 16)
    weights = torch.randn(rows, HEADS, length, 8)

    def run(bf16: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            q, k, v = linear(x).view(rows, length, 3, HEADS, 8).permute(2, 0, 3, 1, 4)
            out = attend(kind, given._replace(q=q, k=k, v=v))
            assert out.dtype == (torch.bfloat16 if bf16 else torch.float32)
            learned = [linear.weight, *given.learned[3:]]
            if bf16 and inside:
                return [out.float(), *torch.autograd.grad((out * weights).sum(), learned)]
        return [out.float(), *torch.autograd.grad((out * weights).sum(), learned)]

    for rough, exact in zip(run(True), run(False), strict=True):
        assert rough.isfinite().all()
        assert ((rough - exact).norm() / exact.norm()).item() < 0.02


def test_large_logits_do_not_overflow() -> None:
    given = inputs(dtype=torch.float32)
    given = given._replace(q=given.q * 1e4)
    for kind in KINDS:
        out = attend(kind, given)
        assert out.isfinite().all()
        assert all(d.isfinite().all() for d in gradients(out, given, torch.ones_like(out)))
