"""The newest position alone, and new positions after those in memory, are what `forward` gives at these positions.

In float64, so that a difference is a mistake and not rounding.
"""

from typing import Any

import pytest
import torch
from test_encoders import DIM, ENCODERS, LENGTH, Case, build, every_case, every_causal_case, inputs
from torch import Tensor

from recsys2stage.retrieval.encoders import HSTU, Encoder, Mamba4Rec, Transformer
from recsys2stage.retrieval.encoders import blocks as block_module
from recsys2stage.retrieval.encoders.base import Memory
from recsys2stage.retrieval.encoders.blocks import Block
from recsys2stage.retrieval.encoders.positions import Combined, Learned
from recsys2stage.retrieval.encoders.times import Calendar, LogBuckets

EXACT = 1e-9


def double(case: Case, **options: Any) -> Encoder:
    return build(case, layers=3, **options).double()


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)


@every_case
def test_the_newest_state_is_that_of_the_full_computation(case: Case) -> None:
    built = double(case)
    for lengths in ([LENGTH] * 3, [1, 3, LENGTH], [4], [0, 2]):
        x, _, times, request = inputs(case, len(lengths), max(lengths))
        given = x.double(), torch.tensor(lengths), times, request
        with torch.inference_mode():
            same(built.newest(*given), Encoder.newest(built, *given))


@every_causal_case
def test_new_positions_after_a_memory_are_those_of_the_full_computation(case: Case) -> None:
    """Two histories of different lengths, which grow by different numbers of events together."""
    built = double(case)
    assert built.extends
    x, _, times, request = inputs(case, 2)
    x, started, memories = x.double(), [2, 3], list[Memory]()
    with torch.inference_mode():
        built.newest(x[:, :3], torch.tensor(started), times[:, :3], torch.where(times[:, :3] > 0, 7, 0), memories)
        for memory, length in zip(memories, started, strict=True):
            assert memory.positions == length - 1, "the newest position has another request time at the next request"
        # the request times of final positions are those of the data
        memories.clear()
        built.newest(x[:, :3], torch.tensor(started), times[:, :3], request[:, :3], memories)
        for grow in (1, 2, 1):
            ends = [memory.positions + grow for memory in memories]
            new = torch.stack([x[row, end - grow : end] for row, end in enumerate(ends)])
            asked = [request[row : row + 1, :end].clone() for row, end in enumerate(ends)]
            for own in asked:
                own[:, -1] += 12_345  # of the newest position, whatever it is
            got = built.extend(new, memories, [times[row : row + 1, :end] for row, end in enumerate(ends)], asked)
            for row, end in enumerate(ends):
                whole = x[row : row + 1, :end], torch.tensor([end]), times[row : row + 1, :end], asked[row]
                same(got[row : row + 1], Encoder.newest(built, *whole))
                assert memories[row].positions == end - 1


@pytest.mark.parametrize("block", ["PreNorm", "PostNorm", "Parallel", "Gated"])
def test_every_block_computes_the_rows_that_are_needed(block: str) -> None:
    case = Case("Transformer", "Rotary", "LogBuckets")
    built = double(case, block=getattr(block_module, block))
    x, lengths, times, request = inputs(case)
    given, memories = (x.double(), lengths, times, request), list[Memory]()
    with torch.inference_mode():
        same(built.newest(*given, keep=memories), Encoder.newest(built, *given))
        for memory in memories:
            memory.truncate(2)
        rows = [(times[row : row + 1], request[row : row + 1]) for row in range(3)]
        got = built.extend(given[0][:, 2:], memories, [one for one, _ in rows], [other for _, other in rows])
        same(got, Encoder.newest(built, *given))


@pytest.mark.parametrize(
    "options",
    [{"scaling": "both", "bias": "all", "affine": True, "width": 6}, {"final_norm": True}],
    ids=["all", "norm"],
)
def test_options_of_hstu(options: dict[str, Any]) -> None:
    case = Case("HSTU", "PerDistance", "LogSpaced")
    built = double(case, **options)
    x, lengths, times, request = inputs(case)
    with torch.inference_mode():
        given = x.double(), lengths, times, request
        same(built.newest(*given), Encoder.newest(built, *given))


def test_long_histories_are_computed_in_several_blocks() -> None:
    for encoder in (HSTU, Transformer, ENCODERS["FuXi"], Mamba4Rec):
        time = {} if encoder is Mamba4Rec else {"time": LogBuckets}
        built = encoder(DIM, 200, **time).eval().double()
        times = torch.arange(400).view(2, 200) * 5_000
        given = torch.randn(2, 200, DIM).double(), torch.tensor([200, 131]), times, times + 5_000
        with torch.inference_mode():
            same(built.newest(*given), Encoder.newest(built, *given))


class Gapped(Calendar):
    """Reads the event before, so it cannot be given new events alone."""

    def embed(self, x: Tensor, times: Tensor, request: Tensor | None) -> Tensor:
        before = torch.cat([times[:, :1], times[:, :-1]], dim=1)
        return super().embed(x, times - before, request)


class Smoothed(Learned):
    """Takes no `start`."""

    def embed(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.table[: x.size(1)] + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class Own(Block):
    """A block without `extend`."""

    def forward(self, x: Tensor, lengths: Tensor, position: Any, bias: Any) -> Tensor:
        return x + self.attention(x, lengths, position, bias)


class Doubled(Transformer):
    """Another forward."""

    def forward(self, *given: Any) -> Tensor:
        return 2 * super().forward(*given)


@pytest.mark.parametrize(
    "options",
    [
        {"time": Gapped},
        {"position": Smoothed},
        {"position": lambda shape: Combined(shape, [Learned, Smoothed])},
        {"block": Own},
        {"kind": Doubled},
    ],
    ids=["time", "position", "combined", "block", "encoder"],
)
def test_classes_of_ones_own_are_computed_in_full(options: dict[str, Any]) -> None:
    kind = options.get("kind", Transformer)
    built = kind(DIM, LENGTH, **{name: part for name, part in options.items() if name != "kind"}).eval().double()
    assert not built.extends
    case = Case("Transformer", "Learned", "Calendar")
    x, lengths, times, request = inputs(case)
    given = x.double(), lengths, times, request
    with torch.inference_mode():
        same(built.newest(*given), Encoder.newest(built, *given))
    with pytest.raises(NotImplementedError, match="keeps no memory"):
        Encoder.extend(built, given[0], [], [], [])


def test_training_computes_all_positions() -> None:
    """With gradients and dropout."""
    built = Transformer(DIM, LENGTH, dropout=0.5).train()
    x, lengths, times, request = inputs(Case("Transformer", "Rotary", "Time"))
    torch.manual_seed(1)
    newest = built.newest(x, lengths, times, request)
    torch.manual_seed(1)
    assert torch.equal(newest, built(x, lengths, times, request)[:, -1])
    assert newest.requires_grad
