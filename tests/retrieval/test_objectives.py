"""Objectives: which events are hidden, what is told of them, and that training asks as serving does."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys2stage.columns import MASK, PAD
from recsys2stage.data.batches import Padded, as_history
from recsys2stage.options import RequestTime
from recsys2stage.retrieval.encoders import BERT4Rec, Encoder, Transformer
from recsys2stage.retrieval.objectives import Cloze, NextItem, Objective
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.towers import append_masked_event
from recsys2stage.shapes import History

MODES: list[RequestTime] = ["none", "last_event", "target"]
every_mode = pytest.mark.parametrize("mode", MODES)


def window(mode: RequestTime = "none", rows: int = 300, longest: int = 12, shortest: int = 2) -> History:
    """Windows of all lengths; no item stands twice in a row, no time stands twice anywhere."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(shortest, longest + 1, rows)
    real = np.arange(longest) < lengths[:, None]
    items = np.stack([rng.permutation(longest * 2)[:longest] + 1 for _ in range(rows)])
    times = 10**9 + np.cumsum(rng.integers(1, 10**6, (rows, longest)), axis=1)
    return as_history(Padded(np.where(real, items, PAD), np.where(real, times, 0), lengths), mode)


def copied(history: History) -> History:
    return History(*(None if part is None else part.clone() for part in history))


def same(one: History, other: History) -> bool:
    return all(mine is yours is None or torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))


def real_places(history: History) -> Tensor:
    return torch.arange(history.items.size(1)) < history.lengths[:, None]


# --- which events are hidden


@pytest.mark.parametrize("newest", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rate", [0.05, 0.6])
def test_only_real_places_are_hidden_and_one_at_least(rate: float, newest: float) -> None:
    given = window()
    hidden = Cloze(rate, newest)(given).target_positions
    assert not (hidden & ~real_places(given)).any()
    assert hidden.any(1).all()


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_each_place_is_hidden_at_the_rate(rate: float) -> None:
    given = window("target", rows=4_000, longest=40, shortest=40)
    share = Cloze(rate, newest=0.0)(given).target_positions.float().mean(0)
    assert share.mean().item() == pytest.approx(rate, abs=0.01)
    assert (share - rate).abs().max() < 0.04, "no place is favoured"


def test_a_row_that_would_hide_nothing_hides_the_newest() -> None:
    given = window("target", rows=2_000, longest=4, shortest=4)
    hidden = Cloze(0.1, newest=0.0)(given).target_positions
    assert hidden.any(1).all()
    # to the tenth come those of the rows that would hide none
    share = hidden.float().mean(0)
    assert (share[:-1] - 0.1).abs().max() < 0.03
    assert share[-1].item() == pytest.approx(0.1 + 0.9**4, abs=0.04)


@pytest.mark.parametrize("newest", [0.0, 0.3, 1.0])
def test_in_a_share_of_the_rows_the_newest_alone_is_hidden(newest: float) -> None:
    given = window(rows=2_000, longest=40, shortest=30)
    hidden = Cloze(0.5, newest)(given).target_positions
    last = torch.arange(40) == given.lengths[:, None] - 1
    assert (hidden == last).all(1).float().mean().item() == pytest.approx(newest, abs=0.03)


def test_draws_follow_the_seed() -> None:
    given, cloze = window(), Cloze()
    torch.manual_seed(3)
    first = cloze(given).target_positions
    second = cloze(given).target_positions
    torch.manual_seed(3)
    assert torch.equal(cloze(given).target_positions, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("rate", "newest"), [(0.0, 0.1), (1.0, 0.1), (-0.2, 0.1), (0.2, -0.1), (0.2, 1.1)])
def test_shares_beyond_0_and_1_are_refused(rate: float, newest: float) -> None:
    with pytest.raises(ValueError, match=rf"(rate is {rate}|newest is {newest}), expected a share"):
        Cloze(rate, newest)


# --- what is asked and what is told


@every_mode
def test_what_is_hidden_is_the_answer_and_cannot_be_seen(mode: RequestTime) -> None:
    given = window(mode)
    kept = copied(given)
    batch = Cloze(0.4)(given)
    assert same(given, kept), "the window must be left as it was"
    assert torch.equal(batch.targets, given.items[batch.target_positions])
    assert (batch.history.items[batch.target_positions] == MASK).all()
    assert torch.equal(batch.history.items[~batch.target_positions], given.items[~batch.target_positions])
    assert torch.equal(batch.history.lengths, given.lengths)
    for row, hidden in enumerate(batch.target_positions):
        assert not set(given.items[row, hidden].tolist()) & set(batch.history.items[row].tolist())


@every_mode
def test_a_question_does_not_depend_on_its_answers(mode: RequestTime) -> None:
    given = window(mode)
    torch.manual_seed(1)
    batch = Cloze(0.4)(given)
    other = given._replace(items=torch.where(batch.target_positions, given.items + 50, given.items))
    torch.manual_seed(1)
    asked = Cloze(0.4)(other)
    assert same(asked.history, batch.history)
    assert torch.equal(asked.target_positions, batch.target_positions)
    assert torch.equal(asked.targets, batch.targets + 50)


@every_mode
def test_the_time_of_a_hidden_event_is_what_a_request_would_tell(mode: RequestTime) -> None:
    given = window(mode)
    batch = Cloze(0.4)(given)
    got, hidden = batch.history, batch.target_positions
    for row, length in enumerate(given.lengths.tolist()):
        times = given.times[row].tolist()
        told = list(times)[:length]
        for place in range(length):
            if hidden[row, place] and mode != "target":  # what an event before it shows, never a hidden one's time
                told[place] = max(
                    (times[other] for other in range(place) if not hidden[row, other]), default=times[place]
                )
        assert length == 1 or mode == "target" or not hidden[row, 0]
        assert got.times[row, :length].tolist() == told
        if mode == "none":
            assert got.request is None
        else:
            assert got.request is not None
            assert got.request[row, :length].tolist() == told, "each place is asked at its own time"
    assert mode != "target" or hidden[:, 0].any()
    assert (hidden[:, 1:] & hidden[:, :-1]).any(), "neighbours must be hidden somewhere"


@every_mode
def test_training_asks_for_the_newest_as_serving_does(mode: RequestTime) -> None:
    """Where the newest alone is hidden, the question is that of the history before it."""
    given = window(mode)
    batch = Cloze(newest=1.0)(given)
    rows, last = torch.arange(len(given.lengths)), given.lengths - 1
    before = real_places(given) & (torch.arange(given.items.size(1)) < last[:, None])
    padded = Padded(*((part * before).numpy() for part in (given.items, given.times)), last.numpy())
    served = append_masked_event(as_history(padded, mode, given.times[rows, last].numpy()))
    real = real_places(given)
    assert torch.equal(served.lengths, batch.history.lengths)
    assert torch.equal(served.items[:, :-1][real], batch.history.items[real])
    assert torch.equal(served.times[:, :-1][real], batch.history.times[real])
    assert (served.request is None) == (batch.history.request is None) == (mode == "none")
    if served.request is not None and batch.history.request is not None:
        assert torch.equal(served.request[:, :-1][real], batch.history.request[real])


@every_mode
def test_the_next_item_is_asked_for_at_every_place_but_the_newest(mode: RequestTime) -> None:
    given = window(mode, rows=20)
    batch = NextItem()(given)
    wanted = [item for row, length in enumerate(given.lengths) for item in given.items[row, 1:length].tolist()]
    assert batch.targets.tolist() == wanted
    assert torch.equal(batch.target_positions, real_places(batch.history))
    assert torch.equal(batch.history.lengths, given.lengths - 1)
    for row, length in enumerate(given.lengths.tolist()):
        assert batch.history.times[row, : length - 1].tolist() == given.times[row, : length - 1].tolist()
        if batch.history.request is not None:
            told = given.times[row, 1:length] if mode == "target" else given.times[row, : length - 1]
            assert batch.history.request[row, : length - 1].tolist() == told.tolist()
    assert (batch.history.request is None) == (mode == "none")


def test_a_target_that_begins_a_session_has_its_weight() -> None:
    lengths, times = torch.tensor([5, 3]), torch.tensor([[0, 3599, 7199, 7199, 20_000], [50, 40_000, 40_001, 0, 0]])
    items = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    weights = NextItem(session_weight=10.0, gap=3600)(History(items, lengths, times, None)).weights
    assert weights is not None
    assert weights.tolist() == [1, 10, 1, 10, 10, 1]
    later = NextItem(session_weight=[(0.0, 1.0), (0.8, 3.0)])
    assert later(History(items, lengths, times, None), 0.79).weights is None
    weights = later(History(items, lengths, times, None), 0.8).weights
    assert weights is not None
    assert weights.tolist() == [1, 3, 1, 3, 3, 1]


# --- which objective suits which encoder


def retriever(encoder: type[Encoder], **options: Any) -> Retriever:
    return Retriever(num_items=9, max_length=5, dim=8, encoder=encoder, **options)


@pytest.mark.parametrize(("encoder", "objective"), [(Transformer, NextItem), (BERT4Rec, Cloze)])
def test_an_encoder_is_asked_what_suits_it(encoder: type[Encoder], objective: type[Objective]) -> None:
    assert type(retriever(encoder).objective) is objective
    own = objective()
    assert retriever(encoder, objective=own).objective is own


def test_an_objective_that_does_not_suit_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="BERT4Rec is bidirectional, so it would see the targets: it cannot be trained with NextItem; leave the",
    ):
        retriever(BERT4Rec, objective=NextItem())
    with pytest.raises(
        ValueError, match="Transformer is causal: it cannot be trained with Cloze; leave the objective out"
    ):
        retriever(Transformer, objective=Cloze())
