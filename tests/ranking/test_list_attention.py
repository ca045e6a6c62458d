"""Attention over the list: no order, no padding, the other candidates count, and it begins at the retriever's order."""

from typing import Any

import pytest
import torch
from closeness import close
from naive import enlarged
from test_scorers import B, C, D, F, shown
from torch import Tensor, nn

from recsys2stage.ranking.scorers import ListAttention, RankerInputs


def part(seen: RankerInputs, order: Tensor) -> RankerInputs:
    """The candidates at these places."""
    listed = {name: getattr(seen, name)[:, order] for name in ("vectors", "features", "base", "listed")}
    return seen._replace(**listed)


def test_it_starts_at_zero_and_learns() -> None:
    scorer, seen = ListAttention(D, F, width=8, dropout=0.0), shown()
    assert not scorer(seen).any()
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(scorer(seen), torch.zeros(B, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(weight.grad is not None for weight in scorer.parameters())


def test_the_order_of_a_list_does_not_matter() -> None:
    scorer, seen, order = enlarged(ListAttention(D, F, width=8, layers=2)), shown(), torch.randperm(C)
    close(scorer(part(seen, order)), scorer(seen)[:, order])


def test_padding_is_not_attended_to_and_candidates_are() -> None:
    scorer, seen = enlarged(ListAttention(D, F, width=8, layers=2)), shown()
    listed = seen.listed.clone()
    listed[:, 4:] = False
    cut = scorer(part(seen, torch.arange(4)))
    close(scorer(seen._replace(listed=listed))[:, :4], cut)
    assert (scorer(seen)[:, :4] - cut).abs().max() > 1e-2, "a candidate's score depends on the others"


@pytest.mark.parametrize(
    "shape", [{"candidates": 0}, {"requests": 0}, {"newest": 0}], ids=["none", "no request", "new"]
)
def test_without_candidates_or_events_it_is_finite(shape: Any) -> None:
    seen = shown(**shape)
    scores = enlarged(ListAttention(D, F, width=8))(seen._replace(listed=torch.zeros_like(seen.listed)))
    assert scores.shape == seen.base.shape
    assert scores.isfinite().all()


def test_it_finds_what_no_scorer_of_single_candidates_can() -> None:
    """The positive is of the class that is rarest in its list; which class that is differs from list to list."""
    generator = torch.Generator().manual_seed(0)
    rare = torch.randint(2, (400,), generator=generator)
    classes = (1 - rare)[:, None].repeat(1, C)
    place = torch.randint(C, (400,), generator=generator)
    classes[torch.arange(400), place] = rare
    seen = shown(requests=400)._replace(features=nn.functional.one_hot(classes, F).float())
    seen = seen._replace(vectors=torch.zeros_like(seen.vectors))
    torch.manual_seed(0)
    scorer = ListAttention(D, F, width=16, dropout=0.0)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(scorer(seen), place)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (scorer(seen).argmax(1) == place).float().mean() > 0.95


def test_options_out_of_range_say_so() -> None:
    with pytest.raises(ValueError, match="width 9 is not a multiple of heads 2; change one of them"):
        ListAttention(D, F, width=9)
