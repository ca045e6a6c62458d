"""Times: the gap between an event and its request falls into log2 buckets."""

import pytest
import torch
from torch import Tensor

from recsys2stage.shapes import Shape
from recsys2stage.times import RequestGap, Time

NOW = 1_700_000_000
SHAPE = Shape(dim=2, max_length=9, heads=1)


def buckets(gaps: list[int], number: int = 32) -> list[int]:
    """The bucket of each gap, read off what is added."""
    clock = RequestGap(SHAPE, number)
    with torch.no_grad():
        clock.table.weight.copy_(torch.arange(number)[:, None].expand(number, 2))
    times = torch.full((1, len(gaps)), NOW)
    added: Tensor = clock.embed(torch.zeros(1, len(gaps), 2), times, times + torch.tensor([gaps]))
    return added[0, :, 0].long().tolist()


def test_buckets_at_their_corners() -> None:
    assert buckets([0, 1, 2, 3, 6, 7, 8, 14, 15]) == [0, 1, 1, 2, 2, 3, 3, 3, 4]
    corners = range(1, 31)
    assert buckets([2**n - 2 for n in corners]) == [n - 1 for n in corners]
    assert buckets([2**n - 1 for n in corners]) == list(corners)


def test_gaps_beyond_the_last_bucket_and_before_the_event_are_capped() -> None:
    assert buckets([2**31 - 2, 2**31 - 1, 2**32, 2**40]) == [30, 31, 31, 31]
    assert buckets([0, 6, 7, 2**20], number=4) == [0, 2, 3, 3]
    assert buckets([-1, -(10**9)]) == [0, 0]


def test_request_gap_without_a_request_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=r"request_time is 'none'; set data\.init_args\.request_time to 'target'"):
        RequestGap(SHAPE).embed(torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long), None)


def test_the_base_has_no_clock() -> None:
    x, times = torch.randn(1, 2, 2), torch.tensor([[1, 2]])
    assert Time(SHAPE).embed(x, times, times) is x
    assert Time(SHAPE).embed(x, times, None) is x
