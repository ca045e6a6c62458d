"""The contract of encoders, held by every encoder of the package with its position and time encodings.

All of them with all of them are in `make test-slow`; here every pair of an encoder and a position, an encoder and a
time, and a position and a time stands in some case.
"""

import inspect
import io
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from worlds import gap_world

from recsys2stage.retrieval import encoders
from recsys2stage.retrieval.encoders import Encoder, positions, times
from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder
from recsys2stage.retrieval.encoders.positions import Learned, PerDistance, Position, Rotary, Sinusoidal
from recsys2stage.retrieval.encoders.times import Calendar, HybridTimestamp, LogBuckets, RequestGap, Time
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.shapes import Shape

DIM, LENGTH, HEADS = 8, 6, 2
DAY = 86_400
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x, lengths, times and request times


def family(base: type) -> list[type]:
    """The class and all below it that live in the package and are for use."""
    members = [base, *(deeper for member in base.__subclasses__() for deeper in family(member))]
    own = {member: None for member in members if member.__module__.startswith("recsys2stage.")}
    return [member for member in own if not inspect.isabstract(member) and not member.__name__.startswith("_")]


ENCODERS: dict[str, Callable[..., Encoder]] = {
    encoder.__name__: encoder for encoder in family(Encoder) if encoder is not AttentiveEncoder
}
POSITIONS: dict[str, Callable[[Shape], Position]] = {
    **{position.__name__: position for position in family(Position) if position is not positions.Combined},
    "Rotary+Learned+PerDistance": partial(positions.Combined, parts=[Rotary, Learned, PerDistance]),
    "Learned+Sinusoidal": partial(positions.Combined, parts=[Learned, Sinusoidal]),
}
TIMES: dict[str, Callable[[Shape], Time]] = {
    **{time.__name__: time for time in family(Time) if time is not times.Combined},
    "Calendar of request": partial(Calendar, of="request"),
    "RequestGap+LogBuckets": partial(times.Combined, parts=[RequestGap, LogBuckets]),
    "Calendar+HybridTimestamp": partial(times.Combined, parts=[Calendar, HybridTimestamp]),
}


class Case(NamedTuple):
    """Names in ENCODERS, POSITIONS and TIMES."""

    encoder: str
    position: str
    time: str

    @property
    def causal(self) -> bool:
        return ENCODERS[self.encoder].causal

    def clock(self) -> Time:
        return TIMES[self.time](Shape(DIM, LENGTH, HEADS))

    @property
    def asks(self) -> bool:
        """Whether its clock has to know when a recommendation is asked for."""
        now = torch.zeros(1, 1, dtype=torch.long)
        try:
            self.clock().embed(torch.zeros(1, 1, DIM), now, None)
            self.clock().buckets(now, None)
        except ValueError:
            return True
        return False

    @property
    def refusal(self) -> str | None:
        """What a constructor says to this combination, where it refuses it."""
        shape = Shape(DIM, LENGTH, HEADS)
        if not issubclass(ENCODERS[self.encoder], AttentiveEncoder):
            for part in (POSITIONS[self.position](shape), TIMES[self.time](shape)):
                if part.in_attention:
                    return rf"{type(part).__name__} acts inside attention, and {self.encoder} has none; choose "
        for name in ("RequestGap", "HybridTimestamp"):
            if not self.causal and name in self.time:
                return rf"{name} encodes the gap .* bidirectional encoder .* the time of its event; choose Log"
        return None


def covering(cases: Iterable[Case]) -> list[Case]:
    """A few of the cases in which every pair of parts that stands together in any still does."""
    cases = list(cases)
    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & missing)))  # the first of those that add most
        missing -= pairs(chosen[-1])
    return chosen


def pairs(case: Case) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(zip(Case._fields, case, strict=True), 2))


EVERY = [Case(*names) for names in product(ENCODERS, POSITIONS, TIMES)]
TAKEN = [case for case in EVERY if not case.refusal]
COVERING = covering(TAKEN)


def parameters(cases: Iterable[Case]) -> list[Any]:
    """Those of the covering design, and the others as slow."""
    design = set(COVERING)
    return [pytest.param(case, id="-".join(case), marks=[] if case in design else [pytest.mark.slow]) for case in cases]


every_case = pytest.mark.parametrize("case", parameters(TAKEN))
every_causal_case = pytest.mark.parametrize("case", parameters(case for case in TAKEN if case.causal))


def few_heads(encoder: str) -> dict[str, int]:
    return {"heads": HEADS} if "heads" in inspect.signature(ENCODERS[encoder]).parameters else {}


def build(case: Case, **options: Any) -> Encoder:
    """In evaluation mode, with its weights enlarged so that no effect hides behind a small initial value."""
    options = {**few_heads(case.encoder), **options, "position": POSITIONS[case.position], "time": TIMES[case.time]}
    built = ENCODERS[case.encoder](DIM, LENGTH, **options)
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return built.eval()


def inputs(case: Case, rows: int = 3, length: int = LENGTH) -> Inputs:
    """Full histories of events some days apart. An encoder that sees both sides is asked at the times of its places."""
    happened = 1_000_000_000 + torch.randint(DAY // 2, 5 * DAY, (rows, length)).cumsum(1)
    asked = torch.cat([happened[:, 1:], happened[:, -1:] + 3 * DAY], dim=1) if case.causal else happened
    return torch.randn(rows, length, DIM), torch.full((rows,), length), happened, asked


def moved(before: Tensor, after: Tensor) -> Tensor:
    """How far each place of the rows moved at most, (L,)."""
    return (before - after).abs().amax(dim=(0, 2))


# --- the families and the design


def test_the_families_are_found() -> None:
    assert {"Transformer", "SASRec", "LiGR", "BERT4Rec"} <= set(ENCODERS)
    assert {"Position", "Learned", "Sinusoidal", "Rotary", "PerDistance", "T5Buckets"} <= set(POSITIONS)
    assert {"Time", "RequestGap", "LogBuckets", "LogSpaced", "Calendar", "HybridTimestamp"} <= set(TIMES)
    asking = {time for time in TIMES if Case("Transformer", "Position", time).asks}
    assert asking == set(TIMES) - {"Time", "Calendar"}, "of the published clocks, only these need no request time"
    exported = {part for part in vars(encoders).values() if inspect.isclass(part) and issubclass(part, Encoder)}
    assert exported - {Encoder} == set(ENCODERS.values()), "recsys2stage.retrieval.encoders must export every encoder"


def test_the_design_covers_every_pair() -> None:
    wanted = {pair for case in TAKEN for pair in pairs(case)}
    assert {pair for case in COVERING for pair in pairs(case)} == wanted
    assert set(COVERING) <= set(TAKEN)
    assert covering(TAKEN) == COVERING, "the design must be the same wherever it is made"
    most = len(POSITIONS) * len(TIMES)
    assert len(COVERING) < 1.4 * most < len(TAKEN) / 2


@pytest.mark.parametrize("case", [case for case in EVERY if case.refusal], ids="-".join)
def test_what_an_encoder_cannot_do_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=case.refusal):
        build(case)


def test_there_is_something_to_refuse() -> None:
    refused = {case for case in EVERY if case.refusal}
    assert Case("BERT4Rec", "Position", "RequestGap") in refused
    assert Case("BERT4Rec", "Position", "RequestGap+LogBuckets") in refused
    assert not {case.encoder for case in refused} & {"Transformer", "SASRec", "LiGR", "HSTU", "FuXi"}


# --- the contract


@every_case
def test_shape_is_kept(case: Case) -> None:
    built = build(case)
    longest = LENGTH if case.causal else LENGTH + 1  # an encoder that sees both sides is asked in a place of its own
    for rows, length in ((3, longest), (1, LENGTH), (4, 1), (2, 3)):
        assert built(*inputs(case, rows, length)).shape == (rows, length, DIM)


@every_case
def test_a_change_in_the_future_moves_nothing_before_it(case: Case) -> None:
    built = build(case)
    x, *rest = inputs(case)
    with torch.no_grad():
        before = built(x, *rest)
        for place in (0, 3, LENGTH - 1):
            changed = x.clone()
            # new random vectors: adding a constant would be undone by a norm, and the test would pass whatever happens
            changed[:, place] = torch.randn_like(x[:, place])
            moves = moved(before, built(changed, *rest))
            assert (moves[place:] > 1e-3).all(), "a place must see itself and its past"
            if case.causal:
                assert (moves[:place] == 0).all()
            else:
                assert (moves[:place] > 1e-4).all(), "an encoder that is not causal must see both sides"


@every_case
def test_the_time_of_a_later_event_moves_nothing_before_it(case: Case) -> None:
    """Nor does it move the place before it, but that the place is asked at the time of that event."""
    built, place = build(case), 3
    x, lengths, happened, asked = inputs(case)
    with torch.no_grad():
        before = built(x, lengths, happened, asked)
        later = happened.clone()
        later[:, place + 1 :] += 4_000 * DAY + 7_000  # not the same hour, nor the same weekday
        asked_later = later
        if case.causal:
            asked_later = torch.cat([later[:, 1:], asked[:, -1:] + 4_000 * DAY + 7_000], dim=1)
        moves = moved(before, built(x, lengths, later, asked_later))
    if case.time == "Time":
        assert (moves == 0).all(), "without a clock no time must be felt"
        return
    assert (moves[place + 1 :] > 1e-3).all(), "a clock must be felt"
    if case.causal:
        assert (moves[:place] == 0).all()
        assert (moves[place] > 1e-3) == case.asks
        assert case.asks or moves[place] == 0
    else:
        assert (moves[: place + 1] > 1e-4).all()


@every_causal_case
def test_the_time_of_a_request_moves_nothing_before_its_place(case: Case) -> None:
    built, place = build(case), 3
    x, lengths, happened, asked = inputs(case)
    later = asked.clone()
    later[:, place] += 400 * DAY + 7_000
    with torch.no_grad():
        moves = moved(built(x, lengths, happened, asked), built(x, lengths, happened, later))
    assert (moves[:place] == 0).all()
    assert (moves[place] > 1e-3) == case.asks
    assert case.asks or (moves == 0).all()


@every_case
def test_a_clock_that_has_to_be_told_says_so(case: Case) -> None:
    built = build(case)
    x, lengths, happened, _ = inputs(case)
    if case.asks:
        with pytest.raises(ValueError, match="needs request times, but request_time is"):
            built(x, lengths, happened, None)
    else:
        with torch.no_grad():
            assert torch.equal(built(x, lengths, happened, None), built(x, lengths, happened, happened + 1))


@every_case
def test_padding_is_invisible(case: Case) -> None:
    built = build(case)
    x, _, happened, asked = inputs(case, 4)
    lengths = torch.tensor([1, 3, 4, 2])
    real = torch.arange(LENGTH) < lengths[:, None]
    with torch.no_grad():
        clean = built(x * real[..., None], lengths, happened * real, asked * real)
        # whatever stands there
        other = torch.where(real[..., None], x, 50 * torch.randn_like(x))
        dirty = built(other, lengths, torch.where(real, happened, 7), torch.where(real, asked, 10**10))
        torch.testing.assert_close(dirty[real], clean[real], rtol=1e-4, atol=1e-5)
        # however long it is
        cut = (x * real[..., None])[:, :4], lengths, (happened * real)[:, :4], (asked * real)[:, :4]
        torch.testing.assert_close(built(*cut)[real[:, :4]], clean[real], rtol=1e-4, atol=1e-5)
    assert (dirty[~real] - clean[~real]).abs().max() > 1e-3, "the probe must differ in the padding"


@every_case
def test_a_history_is_alone_in_its_batch(case: Case) -> None:
    built, batch = build(case), inputs(case, 3)
    with torch.no_grad():
        together = built(*batch)
        alone = torch.cat([built(*(part[row : row + 1] for part in batch)) for row in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every_case
def test_order_matters(case: Case) -> None:
    # one layer: in a deeper one even a causal mask alone tells the order
    built = build(case, layers=1)
    x, *rest = inputs(case)
    swapped = x.clone()
    swapped[:, [0, 3]] = x[:, [3, 0]]
    with torch.no_grad():
        moves = (built(swapped, *rest)[:, -1] - built(x, *rest)[:, -1]).abs().amax()
    attentive = issubclass(ENCODERS[case.encoder], AttentiveEncoder)
    blind = attentive and case.position == "Position" and case.time == "Time"  # a set of events
    assert (moves > 1e-4) == (not blind)


@every_case
def test_every_weight_learns(case: Case) -> None:
    built = build(case).train()
    length = LENGTH if case.causal else LENGTH + 1
    (built(*inputs(case, 8, length)) * torch.randn(8, length, DIM)).sum().backward()
    idle = [name for name, weight in built.named_parameters() if weight.grad is None or weight.grad.abs().max() < 1e-6]
    assert not idle


@every_case
def test_empty_and_short_histories_are_finite(case: Case) -> None:
    built = build(case).train()
    for length in (1, LENGTH):
        x = torch.zeros(2, length, DIM)
        x[1, 0] = torch.randn(DIM)
        x.requires_grad_()
        nothing = torch.zeros(2, length, dtype=torch.long)
        out = built(x, torch.tensor([0, 1]), nothing, nothing)
        assert out.isfinite().all()
        out.square().sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in built.parameters())


@every_case
def test_bf16_is_finite_and_near(case: Case) -> None:
    built, batch = build(case), inputs(case)
    with torch.no_grad():
        exact = built(*batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = built(*batch)
    assert rough.isfinite().all()
    assert ((rough.float() - exact).norm() / exact.norm()).item() < 0.05
    assert not torch.equal(rough.float(), exact), "autocast must have reached the encoder"


@every_case
def test_dropout_is_for_training_only(case: Case) -> None:
    built, batch = build(case, dropout=0.5), inputs(case)
    with torch.no_grad():
        assert torch.equal(built(*batch), built(*batch))
        built.train()
        assert not torch.equal(built(*batch), built(*batch))


@every_case
def test_dropout_does_not_show_the_future(case: Case) -> None:
    """In training, with the same draws: the paths that drop are others than those that do not."""
    built, place = build(case, dropout=0.2).train(), 3
    x, *rest = inputs(case)
    changed = x.clone()
    changed[:, place] = torch.randn_like(x[:, place])
    outs = []
    for version in (x, changed):
        torch.manual_seed(1)
        outs.append(built(version, *rest).detach())
    moves = moved(*outs)
    assert (moves[place:] > 1e-3).any()
    assert (moves[:place] == 0).all() == case.causal


@every_case
def test_a_state_dict_says_all(case: Case) -> None:
    """Saved, and loaded without running code into one that was built the same way."""
    built, batch = build(case), inputs(case)
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    other = build(case)
    with torch.no_grad():
        assert not torch.equal(other(*batch), built(*batch))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(*batch), built(*batch))


# --- compiled


def compiled_case(encoder: str) -> Case:
    """With all that positions and times can do, where the encoder has attention."""
    rich = Case(encoder, "Rotary+Learned+PerDistance", "LogBuckets")
    return rich if rich in TAKEN else Case(encoder, "Learned", "Calendar")


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiled_it_is_the_same(encoder: str) -> None:
    """In one graph, in an interpreter of its own: the checks of shapes that run with the tests cannot be compiled."""
    code = f"import test_encoders; test_encoders.compare_compiled({encoder!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compare_compiled(encoder: str) -> None:
    """Output and gradients, of histories of two lengths; compiled, attention stands in whole tensors."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    case = compiled_case(encoder)
    built = build(case, layers=1).double()
    compiled = torch.compile(built, dynamic=True, fullgraph=True)
    for length in (LENGTH, LENGTH - 2):
        x, *rest = inputs(case, length=length)
        x = x.double().requires_grad_()
        leaves, mass = [x, *built.parameters()], torch.randn_like(x)
        outs = [run(x, *rest) for run in (built, compiled)]
        torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        gradients = [torch.autograd.grad((out * mass).sum(), leaves) for out in outs]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# --- what an encoder leaves to its parts


@every_case
def test_a_clock_starts_as_it_does_alone(case: Case) -> None:
    """An encoder fills in the weights of its own maps, and not those of the clock it was given."""
    torch.manual_seed(0)
    built = ENCODERS[case.encoder](64, LENGTH, position=POSITIONS[case.position], time=TIMES[case.time])
    for name, weight in built.time.named_parameters():
        small = weight.std().item() < 0.03 if "bias" not in name else not weight.any()
        assert small, f"{name} starts at {weight.std().item():.3f}, and N(0, 0.02) is its own"


@every_case
def test_an_encoder_says_whether_it_reads_times(case: Case) -> None:
    assert build(case).reads_times == (TIMES[case.time] is not Time)


# --- worlds whose answers are known


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("world", ["cycle", "two_walks"])
def test_a_world_is_learned(encoder: str, world: str, request: pytest.FixtureRequest) -> None:
    """The next item is the newest plus one, or the last but one plus one: the target comes to be among the ten best.

    Histories are cut shorter than those of training, so that the places at which they are asked have been learned.
    """
    data = Histories(request.getfixturevalue(world), max_length=6, eval_batch_size=500)
    learner = Learner(data, partial(ENCODERS[encoder], layers=1, dropout=0.0, **few_heads(encoder)))
    assert max(learner.hits(10)) < 0.7, "30 of the 40 items are unknown to a user: chance is 1/3"
    learner.learn(100 if ENCODERS[encoder].causal else 400)  # what is hidden is a fifth of what comes next
    assert learner.hits(10) == [1.0, 1.0]
    assert min(learner.hits(1)) > 0.9


@pytest.mark.parametrize("encoder", ["Transformer", "FuXi", "Mamba4Rec"])
def test_a_clock_is_read(encoder: str, tmp_path: Path) -> None:
    """How long a user waits decides among four items, and only who is told knows."""
    data = Histories(gap_world(tmp_path), max_length=8, eval_batch_size=500, request_time="target")
    build = partial(ENCODERS[encoder], layers=1, dropout=0.0, **few_heads(encoder))
    blind, told = Learner(data, build), Learner(data, partial(build, time=times.RequestGap))
    for learner in (blind, told):
        learner.learn(80)
    assert max(blind.hits(1)) < 0.45
    assert min(told.hits(1)) > 0.9


class Learner:
    """A small retriever on a small world."""

    def __init__(self, data: Histories, encoder: Callable[..., Encoder]) -> None:
        torch.manual_seed(0)
        self.data = data
        self.model = Retriever(data.num_items, data.max_length, dim=32, encoder=encoder)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def learn(self, steps: int) -> None:
        model = self.model
        for _ in range(steps):
            rows = torch.randperm(len(self.data.window_starts))[:100].numpy()
            self.optimizer.zero_grad()
            model.losses(self.data.read_windows(rows))["loss"].backward()
            self.optimizer.step()

    def hits(self, k: int) -> list[float]:
        """HR@k of validation and of test."""
        [val], [test] = self.data.val_dataloader(), self.data.test_dataloader()
        with torch.no_grad():
            return [(self.model.ranks(batch) <= k).double().mean().item() for batch in (val, test)]
