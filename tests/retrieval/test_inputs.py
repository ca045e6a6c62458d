"""What events say besides their item: against loops, in worlds where it decides, and never ahead of its time."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from lightning import Trainer
from test_retriever import QUIET, model_for
from torch import Tensor
from worlds import cycle_world, forks_world

from recsys2stage.data.batches import Padded, as_history
from recsys2stage.data.dataset import Dataset
from recsys2stage.retrieval.encoders import BERT4Rec, Transformer
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.inputs import (
    ActionEmbedding,
    Input,
    InputFactory,
    NextAction,
    RatingEmbedding,
    check_inputs,
)
from recsys2stage.retrieval.objectives import Cloze
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.shapes import History

B, L, D = 3, 5, 4
KINDS = ["buy", "like", "see"]
Decides = Literal["target_action", "action", "rating"]
INPUTS: dict[Decides, InputFactory] = {
    "target_action": NextAction,
    "action": ActionEmbedding,
    "rating": RatingEmbedding,
}


def history(**known: Tensor) -> History:
    lengths = torch.tensor([5, 2, 4])
    items = torch.randint(1, 9, (B, L)) * (torch.arange(L) < lengths[:, None])
    return History(items, lengths, torch.zeros_like(items), None, **known)


# --- against loops


@pytest.mark.parametrize(("part", "field"), [(ActionEmbedding, "actions"), (NextAction, "target_action")])
@pytest.mark.parametrize("known", [True, False])
def test_kinds_are_added_from_their_table(part: type[Input], field: str, known: bool) -> None:
    made = part(D, KINDS).double()
    kinds = torch.randint(0, 4, (B, L))
    x, weight = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, L, D, dtype=torch.float64)
    got = made(x, history(**({field: kinds} if known else {})))
    (got * weight).sum().backward()

    [table] = made.parameters()
    want, gradient = x.clone(), torch.zeros(4, D, dtype=torch.float64)
    for row in range(B):
        for place in range(L):
            kind = int(kinds[row, place]) if known else 0
            for d in range(D):
                want[row, place, d] += float(table[kind, d].detach())
                gradient[kind, d] += float(weight[row, place, d])
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(table.grad, gradient, rtol=0, atol=1e-9)
    assert table.grad[0].abs().max() > 1e-4, "what is unknown learns, too"


@pytest.mark.parametrize(("low", "high", "levels"), [(0.5, 5.0, 10), (1, 5, 5), (-10.0, 10.0, 6), (1, 100, 3)], ids=str)
def test_a_rating_adds_the_vector_of_the_nearest_level(low: float, high: float, levels: int) -> None:
    made = RatingEmbedding(D, low=low, high=high, levels=levels).double()
    ratings = (low + (high - low) * (1.4 * torch.rand(B, L) - 0.2)) * (torch.rand(B, L) < 0.8)  # some beyond, some 0
    x, weight = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, L, D, dtype=torch.float64)
    got = made(x, history(ratings=ratings))
    (got * weight).sum().backward()

    grid = [low + (high - low) * level / (levels - 1) for level in range(levels)]
    want, gradient = x.clone(), torch.zeros(levels + 1, D, dtype=torch.float64)
    for row in range(B):
        for place in range(L):
            rating = float(ratings[row, place])
            level = 0 if rating == 0 else 1 + min(range(levels), key=lambda n: abs(grid[n] - rating))
            for d in range(D):
                want[row, place, d] += float(made.table.weight[level, d].detach())
                gradient[level, d] += float(weight[row, place, d])
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(made.table.weight.grad, gradient, rtol=0, atol=1e-9)
    unknown = x + made.table.weight[0].detach()
    torch.testing.assert_close(made(x, history()).detach(), unknown, rtol=0, atol=1e-9)


def test_every_half_star_has_its_own_level() -> None:
    stars = torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.5], [3.0, 3.5, 4.0, 4.5, 5.0], [0.0, 0.0, 0.0, 0.1, 9.0]])
    levels = RatingEmbedding(D).level(history(ratings=stars))
    assert levels.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [0, 0, 0, 1, 10]]


def test_tables_start_small_and_the_unknown_at_zero() -> None:
    for made in (ActionEmbedding(64, ["a"] * 99), NextAction(64, ["a"] * 99), RatingEmbedding(64, levels=99)):
        assert made.table.weight[1:].std().item() == pytest.approx(0.02, rel=0.05)
        assert not made.table.weight[0].any()


# --- worlds in which they decide


def hit_at_1(data: Histories, inputs: list[InputFactory] | None) -> float:
    model = model_for(
        data,
        encoder=partial(Transformer, layers=1, dropout=0.0),
        inputs=inputs,
        actions=data.actions,
        next_action=data.next_action,
        warmup_steps=5,
    )
    Trainer(max_epochs=12, limit_val_batches=0, **QUIET).fit(model, data)
    model.eval()
    with torch.no_grad():
        ranks = torch.cat([model.ranks(batch) for batch in data.test_dataloader()])
    return float((ranks == 1).double().mean())


@pytest.mark.parametrize("decides", list(INPUTS))
def test_a_fork_is_taken_right_by_who_is_told_what_decides(decides: Decides, tmp_path: Path) -> None:
    path = forks_world(tmp_path, decides)
    told = "target" if decides == "target_action" else "none"
    sizes: dict[str, int] = {"max_length": 8, "batch_size": 32, "eval_batch_size": 300}
    assert hit_at_1(Histories(path, next_action=told, **sizes), [INPUTS[decides]]) > 0.9
    assert 0.4 < hit_at_1(Histories(path, **sizes), None) < 0.6


# --- causality


def padded_events(rng: np.random.Generator) -> Padded:
    items = rng.integers(1, 9, (1, 6))
    ratings = rng.integers(1, 11, (1, 6)).astype(np.float32) / 2
    return Padded(items, items * 1_000, np.array([6]), ratings, rng.integers(1, 4, (1, 6)))


def states(padded: Padded, inputs: Sequence[InputFactory], asked: int | None) -> Tensor:
    torch.manual_seed(0)
    towers = TwoTower(9, 8, 8, partial(Transformer, layers=1, dropout=0.0), inputs=inputs, actions=KINDS).double()
    for part in towers.inputs:  # as large as the rest, so that what they say shows
        torch.nn.init.normal_(part.table.weight)
    with torch.no_grad():
        return towers(as_history(padded, "none", target_action=None if asked is None else np.array([asked])))[0]


@pytest.mark.parametrize("place", range(6))
def test_an_events_kind_and_rating_are_seen_from_its_own_place_on(place: int, rng: np.random.Generator) -> None:
    padded = padded_events(rng)
    ratings, actions = padded.ratings.copy(), padded.actions.copy()
    ratings[0, place], actions[0, place] = 5.5 - ratings[0, place], 1 + actions[0, place] % 3
    for part, other in ((RatingEmbedding, {"ratings": ratings}), (ActionEmbedding, {"actions": actions})):
        moved = (states(padded, [part], None) - states(padded._replace(**other), [part], None)).abs().amax(1) > 1e-6
        assert moved.tolist() == [later >= place for later in range(6)]


@pytest.mark.parametrize("place", range(1, 6))
def test_the_next_events_kind_is_seen_a_place_ahead_only_where_it_is_asked_for(
    place: int, rng: np.random.Generator
) -> None:
    padded = padded_events(rng)
    actions = padded.actions.copy()
    actions[0, place] = 1 + actions[0, place] % 3
    other = padded._replace(actions=actions)
    moved = (states(padded, [NextAction], 2) - states(other, [NextAction], 2)).abs().amax(1) > 1e-6
    assert moved.tolist() == [later >= place - 1 for later in range(6)]
    assert torch.equal(states(padded, [NextAction], None), states(other, [NextAction], None))
    asked = (states(padded, [NextAction], 1) - states(padded, [NextAction], 2)).abs().amax(1) > 1e-6
    assert asked.tolist() == [False] * 5 + [True]


def test_what_cloze_hides_is_hidden_with_its_kind_and_rating_but_not_from_who_asks(tmp_path: Path) -> None:
    data = Histories(
        forks_world(tmp_path, "target_action", users=40), max_length=8, batch_size=64, next_action="target"
    )
    window = data.read_windows(np.arange(40))
    training_batch = Cloze(0.4)(window)
    hidden, read = training_batch.target_positions, training_batch.history
    assert hidden.any()
    assert not read.actions[hidden].any()
    assert not read.ratings[hidden].any()
    assert torch.equal(read.target_action[hidden], window.actions[hidden])
    towers = TwoTower(data.num_items, 8, 8, partial(BERT4Rec, layers=1), inputs=list(INPUTS.values()), actions=KINDS)
    assert towers(read).isfinite().all()
    batch = next(iter(data.val_dataloader()))
    asked = [batch.history._replace(target_action=torch.full_like(batch.history.items, kind)) for kind in (1, 2)]
    one, other = map(towers.eval().queries, asked)
    assert ((one - other).abs().amax(1) > 1e-6).all(), "the hidden event at the end is asked for by its kind"


# --- what cannot be read is refused


def test_data_must_have_what_inputs_read(cycle: Path, tmp_path: Path) -> None:
    rated, both = Dataset(cycle), Dataset(forks_world(tmp_path, "target_action", users=20))
    everything = [make(D, KINDS) for make in INPUTS.values()]
    check_inputs(everything, both, "target")
    check_inputs(everything, both, "buy")
    check_inputs([RatingEmbedding(D)], rated, "none")
    check_inputs([], rated, "none")
    with pytest.raises(ValueError, match=r"ActionEmbedding reads the actions of events, and .*cycle.* has none"):
        check_inputs([RatingEmbedding(D), ActionEmbedding(D, KINDS)], rated, "none")
    rated.ratings = None
    with pytest.raises(ValueError, match=r"RatingEmbedding reads the ratings .* with a column `rating`"):
        check_inputs([RatingEmbedding(D)], rated, "none")


def test_a_next_action_must_be_told_and_read(tmp_path: Path) -> None:
    dataset = Dataset(forks_world(tmp_path, "target_action", users=20))
    with pytest.raises(ValueError, match=r"NextAction reads the target action, and next_action is 'none'; set"):
        check_inputs([NextAction(D, KINDS)], dataset, "none")
    with pytest.raises(ValueError, match="next_action is 'buy', and no input of the model reads it; add NextAction"):
        check_inputs([ActionEmbedding(D, KINDS)], dataset, "buy")


def test_a_scale_must_hold_the_ratings(tmp_path: Path) -> None:
    dataset = Dataset(cycle_world(tmp_path, users=4))
    check_inputs([RatingEmbedding(D)], dataset, "none")
    dataset.ratings = dataset.ratings * 10
    with pytest.raises(
        ValueError, match=r"from 0.5 to 5, but the ratings of .* go from 40 to 40; set its low and high"
    ):
        check_inputs([RatingEmbedding(D)], dataset, "none")
    check_inputs([RatingEmbedding(D, low=10, high=50, levels=5)], dataset, "none")


@pytest.mark.parametrize("wrong", [{"levels": 1}, {"low": 5}, {"low": 9.0, "high": 1.0}])
def test_levels_must_make_a_scale(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected low below high|levels is 1"):
        RatingEmbedding(D, **wrong)
