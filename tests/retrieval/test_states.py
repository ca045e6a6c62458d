"""Queries with states of users are those without, whatever becomes of the users' histories."""

import itertools
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from closeness import close

from recsys2stage.data.batches import as_history, left_aligned
from recsys2stage.retrieval.encoders import HSTU, BERT4Rec, FuXi, LiGR, Mamba4Rec, SASRec, Transformer
from recsys2stage.retrieval.encoders.positions import Learned
from recsys2stage.retrieval.encoders.times import Combined, LogBuckets, RequestGap
from recsys2stage.retrieval.inputs import ActionEmbedding, Input, NextAction, RatingEmbedding
from recsys2stage.retrieval.states import OUTCOMES, UserStates
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.retrieval.users import UserTower
from recsys2stage.shapes import History

V, L, D = 30, 12, 8
PLENTY = 1 << 24
EXACT = 1e-5  # of unit vectors: rounding of a few layers
GAPS = partial(Combined, parts=[RequestGap, LogBuckets])
CAUSAL = {
    "Transformer": partial(Transformer, time=GAPS),
    "SASRec": partial(SASRec, time=GAPS),
    "LiGR": partial(LiGR, time=GAPS),
    "HSTU": partial(HSTU, time=GAPS),
    "FuXi": partial(FuXi, time=GAPS),
    "Mamba4Rec": partial(Mamba4Rec, time=RequestGap, position=Learned, state=4),
}
USER = [
    {"name": "age", "kind": "categorical", "size": 4, "values": 1},
    {"name": "height", "kind": "numeric", "size": 1, "values": 1},
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inputs": {"inputs": [ActionEmbedding, RatingEmbedding, NextAction], "actions": ["look", "buy"], "item_bias": True},
    "token": {"user": partial(UserTower, film=False), "user_features": USER},
    "film": {"user": partial(UserTower, token=False), "user_features": USER, "similarity": "dot"},
    "all": {
        "inputs": [RatingEmbedding, NextAction],
        "actions": ["look", "buy"],
        "user": UserTower,
        "user_features": USER,
    },
}
FEW = [("HSTU", "inputs"), ("HSTU", "film"), ("Mamba4Rec", "token")]


class Event(NamedTuple):
    time: int
    item: int
    rating: float
    action: int


def towers(encoder: Any, **options: Any) -> TwoTower:
    built = TwoTower(V, L, D, encoder, **options)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name != "items.table.weight":
                weight += 0.1 * torch.randn_like(weight)
            else:
                weight[1:] += torch.randn_like(weight[1:])
    return built.eval()


def as_batch(users: list[list[Event]], request: list[int], action: list[int], features: list[int]) -> History:
    """The newest L events of each user."""
    rows = [events[-L:] for events in users]
    ends = np.cumsum([len(row) for row in rows])
    columns = list(zip(*(event for row in rows for event in row), strict=True)) or [[], [], [], []]
    time, item, rating, kind = (np.array(column) for column in columns)
    padded = left_aligned(
        item, time, ends - [len(row) for row in rows], ends, rating.astype(np.float32), kind.astype(np.int64)
    )
    user = np.array(features)[:, None] % 4, np.array(features, dtype=np.float32)[:, None]
    return as_history(padded._replace(user=user), "target", np.array(request), np.array(action))


class World:
    """Users whose histories change in every way that a log does."""

    def __init__(self, rng: np.random.Generator, users: int) -> None:
        self.rng = rng
        self.users = [self.events(int(rng.integers(0, L))) for _ in range(users)]

    def events(self, count: int, after: int = 10**9) -> list[Event]:
        times = after + np.cumsum(self.rng.integers(1, 10**6, count))
        return [self.event(int(time)) for time in times]

    def event(self, time: int) -> Event:
        rng = self.rng
        return Event(time, int(rng.integers(1, V + 1)), float(rng.integers(0, 6)), int(rng.integers(0, 3)))

    def change(self) -> None:
        rng = self.rng
        own = self.users[rng.integers(len(self.users))]
        newest = own[-1].time if own else 10**9
        draw = rng.random()
        if draw < 0.7:  # one or several events
            own += self.events(int(rng.integers(1, 4)), newest)
        elif draw < 0.8 and own:  # late
            own.append(self.event(int(rng.integers(own[0].time - 5, newest + 1))))
            own.sort(key=lambda event: event.time)
        elif draw < 0.9 and own:  # another action, or another rating
            place = int(rng.integers(len(own)))
            own[place] = own[place]._replace(**{str(rng.choice(["action", "rating"])): 1})
        else:  # erased, and new
            own[:] = self.events(int(rng.integers(0, 4)))

    def batch(self) -> tuple[History, list[str | None]]:
        """Requests of a few users, some twice and some without an id, at times of their own."""
        rng = self.rng
        rows = rng.integers(0, len(self.users), int(rng.integers(1, 7))).tolist()
        request = [(self.users[row][-1].time if self.users[row] else 10**9) + int(rng.integers(10**7)) for row in rows]
        names = [None if rng.random() < 0.1 else f"u{row}" for row in rows]
        action = rng.integers(0, 3, len(rows)).tolist()
        return as_batch([self.users[row] for row in rows], request, action, [row + 1 for row in rows]), names


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        pytest.param(*case, id="-".join(case), marks=[] if case[1] == "all" or case in FEW else [pytest.mark.slow])
        for case in itertools.product(CAUSAL, OPTIONS)
    ],
)
def test_random_requests_are_those_without_states(encoder: str, options: str, rng: np.random.Generator) -> None:
    built, world = towers(CAUSAL[encoder], **OPTIONS[options]), World(rng, 4)
    assert built.extends
    one, full = UserStates(PLENTY), as_batch([world.events(L)], [2 * 10**9], [0], [1])
    with torch.inference_mode():
        built.queries(full, one, ["full"])
    plenty, few = UserStates(PLENTY), UserStates(2 * one.nbytes)
    with torch.inference_mode():
        for _ in range(30):
            world.change()
            history, names = world.batch()
            expected = built.queries(history)
            for states in (plenty, few):
                close(built.queries(history, states, names), expected, EXACT)
                assert states.nbytes <= states.max_bytes
                assert states.nbytes == sum(state.nbytes for state in states._states.values())
    assert set(plenty.outcomes) == set(OUTCOMES) - {"unsupported"}
    assert few.outcomes["hit"]
    assert plenty.outcomes["miss"] < few.outcomes["miss"], "the smaller one must have dropped users"


@pytest.mark.parametrize("encoder", CAUSAL)
def test_a_hit_computes_no_history(encoder: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after several events, for several users together and at another request time."""
    built, states, world = towers(CAUSAL[encoder]), UserStates(PLENTY), World(rng, 0)
    world.users = [world.events(5), world.events(8), world.events(3)]
    names, zeros = ["a", "b", "c"], [0, 0, 0]
    with torch.inference_mode():
        built.queries(as_batch(world.users, [2 * 10**9] * 3, zeros, zeros), states, names)
        for more, seconds in ((0, 5), (1, 10), (3, 10**6)):
            for own in world.users[:2]:
                own += world.events(more, own[-1].time)
            history = as_batch(world.users, [2 * 10**9 + seconds] * 3, zeros, zeros)
            expected = built.queries(history)
            with monkeypatch.context() as patch:
                patch.setattr(built, "newest_states", None)
                close(built.queries(history, states, names), expected, EXACT)
    assert states.outcomes == Counter(miss=3, hit=9)


def test_the_newest_position_is_never_kept(rng: np.random.Generator) -> None:
    built, states, world = towers(CAUSAL["HSTU"]), UserStates(PLENTY), World(rng, 0)
    world.users = [world.events(5), world.events(1)]
    with torch.inference_mode():
        built.queries(as_batch(world.users, [2 * 10**9] * 2, [0, 0], [0, 0]), states, ["a", "b"])
    assert list(states._states) == ["a"], "of one event nothing is final"
    assert states._states["a"].memory.positions == 4
    assert states._states["a"].inputs.shape[1] == 4


def test_other_user_features_are_another_state(rng: np.random.Generator) -> None:
    built, states, world = towers(CAUSAL["HSTU"], **OPTIONS["token"]), UserStates(PLENTY), World(rng, 0)
    world.users = [world.events(6)]
    with torch.inference_mode():
        for feature in (1, 2):
            history = as_batch(world.users, [2 * 10**9], [0], [feature])
            close(built.queries(history, states, ["a"]), built.queries(history), EXACT)
    assert states.outcomes == Counter(miss=1, changed=1)


def test_what_is_forgotten_is_not_kept_by_the_call_that_runs(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, states, world = towers(CAUSAL["HSTU"]), UserStates(PLENTY), World(rng, 0)
    world.users = [world.events(6)]
    history, compute = as_batch(world.users, [2 * 10**9], [0], [0]), built.newest_states

    def interrupted(*given: Any) -> Any:
        states.forget("a")
        return compute(*given)

    with torch.inference_mode():
        monkeypatch.setattr(built, "newest_states", interrupted)
        built.queries(history, states, ["a"])
        assert (len(states), states.nbytes) == (0, 0)
        monkeypatch.undo()
        built.queries(history, states, ["a"])
        assert len(states) == 1
        states.forget("a")
    assert (len(states), states.nbytes) == (0, 0)


class Order(Input):
    """Reads other events, so that new events cannot be embedded alone."""

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return x + torch.arange(x.size(1))[:, None]


@pytest.mark.parametrize(
    "options", [{"encoder": BERT4Rec}, {"encoder": HSTU, "inputs": [Order]}], ids=["both", "input"]
)
def test_what_needs_the_whole_history_keeps_no_states(options: dict[str, Any], rng: np.random.Generator) -> None:
    built, states, world = towers(**options), UserStates(PLENTY), World(rng, 0)
    world.users = [world.events(6), world.events(4)]
    history = as_batch(world.users, [2 * 10**9] * 2, [0, 0], [0, 0])
    with torch.inference_mode():
        for _ in range(2):
            close(built.queries(history, states, ["a", None]), built.queries(history), EXACT)
    assert states.take_outcomes() == Counter(unsupported=2, anonymous=2)
    assert not states.outcomes
    assert len(states) == 0


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="max_bytes is -1, expected"):
        UserStates(-1)
    world = World(rng, 0)
    world.users = [world.events(6)]
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="2 users and 1 histories; give one for each"),
    ):
        towers(HSTU).queries(as_batch(world.users, [2 * 10**9], [0], [0]), UserStates(PLENTY), ["a", "b"])
