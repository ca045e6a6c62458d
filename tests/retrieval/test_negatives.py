"""Draws against their distributions, expected draws against counting, schedules, and both from YAML."""

import math
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor

from recsys2stage.retrieval.losses import (
    DCL,
    GBCE,
    Catalogue,
    InBatch,
    InfoNCE,
    Loss,
    Mixed,
    Negatives,
    Targets,
    Uniform,
)
from recsys2stage.retrieval.losses.negatives import LogShares, SampledNegatives
from recsys2stage.retrieval.losses.schedule import Schedule

V = 6
COUNTS = torch.tensor([99, 0, 1, 3, 7, 15, 31])  # what padding counts must not matter
DAY = 86_400


def targets(items: list[int], rows: list[int] | None = None, progress: float = 0.0) -> Targets:
    rows = list(range(len(items))) if rows is None else rows
    met = torch.zeros(max(rows, default=0) + 2, 3, dtype=torch.int64)  # the last history has no place
    return Targets(torch.tensor(items), torch.tensor(rows), met, progress=progress)


def catalogue(last_times: Tensor | None = None) -> Catalogue:
    last_times = torch.zeros_like(COUNTS) if last_times is None else last_times
    return Catalogue(lambda items: torch.zeros(len(items), 2), COUNTS, last_times)


def drawn(negatives: Negatives, places: Targets, last_times: Tensor | None = None) -> SampledNegatives:
    return negatives(places, catalogue(last_times))


# --- in-batch


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_popularity_is_a_power_of_one_more_than_the_count(alpha: float) -> None:
    weight = [(int(count) + 1) ** alpha for count in COUNTS[1:]]
    share = LogShares(alpha)(torch.arange(V + 1), COUNTS)
    assert share[1:].exp().tolist() == pytest.approx([w / sum(weight) for w in weight])
    assert share[0] == -math.inf, "padding is never drawn"


def test_other_answers_are_merged_with_their_numbers() -> None:
    places = targets([5, 2, 5, 3, 5])
    got = drawn(InBatch(), places)
    assert (got.items.tolist(), got.sample_counts.tolist()) == ([[2, 3, 5]], [[1, 1, 3]])
    share = [(int(count) + 1) / sum(int(count) + 1 for count in COUNTS[1:]) for count in COUNTS]
    assert got.log_expected[0].exp().tolist() == pytest.approx([4 * share[item] for item in (2, 3, 5)])
    assert got.target_log_q.exp().tolist() == pytest.approx([4 * share[item] for item in (5, 2, 5, 3, 5)])
    assert drawn(InBatch(), targets([4])).log_expected.isfinite().all(), "a place alone has no draws and no log 0"


# --- uniform


@pytest.mark.parametrize(("per", "sets"), [("event", 5), ("sequence", 4), ("batch", 1)])
def test_each_place_has_the_set_it_is_promised(per: Any, sets: int) -> None:
    got = drawn(Uniform(3, per), targets([5, 2, 5, 3, 5], rows=[0, 0, 1, 1, 2]))
    assert len(got.items) == sets
    assert got.sample_counts.sum(1).tolist() == [3] * sets
    assert torch.allclose(got.log_expected, torch.tensor(3 / V).double().log())
    assert torch.allclose(got.target_log_q, torch.tensor(3 / V).double().log())
    starts = None if got.starts is None else got.starts.tolist()
    assert starts == {"event": None, "sequence": [0, 2, 4, 5, 5], "batch": [0, 5]}[per]


@pytest.mark.parametrize("per", ["event", "sequence", "batch"])
def test_every_item_is_drawn_alike_and_padding_never(per: Any) -> None:
    got = drawn(Uniform(3000, per), targets([1] * 4))
    often = torch.zeros(V + 1, dtype=torch.float64).index_add_(0, got.items.flatten(), got.sample_counts.flatten())
    often /= often.sum()
    assert often[0] == 0
    assert (often[1:] - 1 / V).abs().max() < 5 * math.sqrt(1 / V / 3000)


def test_one_set_for_all_places_holds_each_item_once_and_in_order() -> None:
    one_history = targets([1, 2], rows=[0, 0])._replace(window_items=torch.ones(1, 3, dtype=torch.int64))
    for negatives, places in (
        (Uniform(50, "batch"), targets([1, 2])),
        (Uniform(50, "sequence"), one_history),
        (Uniform(50), targets([1])),
        (Mixed(share=0.9), targets([1] * 9)),
    ):
        got = drawn(negatives, places)
        assert got.items.tolist() == [list(range(1, V + 1))]
        assert got.sample_counts.sum() > V


def test_without_a_count_there_are_as_many_as_places() -> None:
    assert drawn(Uniform(None, "batch"), targets([1] * 17)).sample_counts.sum() == 17


def test_only_active_items_are_drawn() -> None:
    newest = torch.tensor([0, 1, 9, 10, 11, 12, 0]) * DAY
    got = drawn(Uniform(200, "batch", active_after="1970-01-11"), targets([1]), newest)  # which is day 10
    assert got.items.tolist() == [[4, 5]]
    assert torch.allclose(got.log_expected.exp(), torch.tensor(100.0).double())
    later = drawn(Uniform(200, "batch", active_after="1970-01-12T01:00:00+02:00"), targets([1]), newest)
    assert later.items.tolist() == [[4, 5]], "one o'clock in Helsinki is the evening before in UTC"
    mixed = drawn(Mixed(Uniform(None, "batch", active_after="1970-01-11")), targets([1] * 50), newest)
    assert mixed.items.tolist() == [[1, 4, 5]]


def test_a_date_after_all_data_or_no_date_is_refused() -> None:
    newest = torch.tensor([0, 1, 9, 10, 11, 12, 0]) * DAY
    with pytest.raises(ValueError, match=r"active_after is 1970-01-14, .* newest event is at 1970-01-13 00:00:00 UTC"):
        drawn(Uniform(active_after="1970-01-14"), targets([1]), newest)
    with pytest.raises(ValueError, match="active_after is 'May', expected an ISO date"):
        Uniform(active_after="May")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "count is 0"),
        (lambda: Uniform(None), "count is null and per is event"),
        (lambda: Mixed(Uniform(5, "batch")), "pool samples 5 per batch"),
        (lambda: Mixed(Uniform(5)), "pool samples 5 per event"),
        (lambda: Mixed(share=1.0), "share is 1.0, expected a share from 0 to below 1"),
        (lambda: Mixed(share=[(0.0, 0.5), (0.5, -0.1)]), "share is"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- mixed


def test_a_mixture_expects_what_both_sources_give() -> None:
    """9 places, share 0.75: 8 other answers and 24 draws of the pool, which holds items 4 and 5."""
    newest = torch.tensor([0, 1, 1, 1, 2, 2, 1]) * DAY
    negatives = Mixed(Uniform(None, "batch", active_after="1970-01-02T12:00"), share=0.75, alpha=0.5)
    got = drawn(negatives, targets([1, 1, 4, 6, 6, 6, 6, 6, 2]), newest)
    weight = [0.0, *((int(count) + 1) ** 0.5 for count in COUNTS[1:])]
    expected = {item: 8 * weight[item] / sum(weight) + 24 * (item in (4, 5)) / 2 for item in range(1, V + 1)}
    assert got.items.tolist() == [[1, 2, 4, 5, 6]]
    assert got.log_expected[0].exp().tolist() == pytest.approx([expected[item] for item in (1, 2, 4, 5, 6)])
    assert got.target_log_q[3].exp().item() == pytest.approx(expected[6])
    assert got.sample_counts.sum() == 9 + 24
    assert (got.sample_counts[0, 0], got.sample_counts[0, 1], got.sample_counts[0, 4]) == (2, 1, 5)


def test_a_share_of_nothing_is_in_batch() -> None:
    places = targets([5, 2, 5, 3, 5])
    for ours, other in zip(drawn(Mixed(share=0.0), places), drawn(InBatch(), places), strict=True):
        torch.testing.assert_close(ours, other)


def test_expected_draws_are_what_draws_come_to_on_average() -> None:
    """Answers drawn from q: over many batches each item comes as often as expected."""
    share = LogShares()(torch.arange(V + 1), COUNTS).exp()
    for negatives in (InBatch(), Mixed(share=0.3), Uniform(20, "batch")):
        total = torch.zeros(V + 1, dtype=torch.float64)
        expected = torch.zeros(V + 1, dtype=torch.float64)
        for _ in range(400):
            items = torch.multinomial(share, 50, replacement=True).tolist()
            got = drawn(negatives, targets(items))
            total.index_add_(0, got.items[0], got.sample_counts[0])
            expected[got.items[0]] = got.log_expected[0].exp()
            if not isinstance(negatives, Uniform):
                total[items[0]] -= 1  # a place's own answer is no draw
        assert (total[1:] / 400 - expected[1:]).abs().max() < 0.05 * expected.max()


# --- schedules


def test_a_schedule_keeps_the_last_value_it_has_reached() -> None:
    steps = Schedule("hard", [(0.0, None), (0.25, 9), (1.0, 3)])
    assert [steps.at(progress) for progress in (0.0, 0.2, 0.25, 0.9, 1.0)] == [None, None, 9, 9, 3]
    assert steps.varies
    assert [Schedule("hard", 7).at(progress) for progress in (0.0, 1.0)] == [7, 7]
    assert not Schedule("hard", 7).varies
    assert not Schedule("hard", [(0.0, 7)]).varies


@pytest.mark.parametrize(
    "points", [[], [(0.1, 5)], [(0.0, 5), (0.5, 4), (0.4, 3)], [(0.0, 5), (0.0, 4)], [(0.0, 5), (1.5, 4)]]
)
def test_points_that_are_no_steps_are_refused(points: list[tuple[float, int | None]]) -> None:
    with pytest.raises(ValueError, match=r"hard has points at .* expected ascending shares from 0 to at most 1"):
        InfoNCE(hard=points)


def test_the_share_follows_the_run() -> None:
    negatives = Mixed(share=[(0.0, 0.5), (0.6, 0.2)])
    numbers = [int(drawn(negatives, targets([1] * 21, progress=p)).sample_counts.sum()) for p in (0.0, 0.59, 0.6, 1.0)]
    assert numbers == [41, 41, 26, 26]


def test_a_loss_tells_what_it_changes() -> None:
    plain, steps = InfoNCE(hard=5, negatives=Mixed(share=0.3)), [(0.0, None), (0.5, 64)]
    assert not plain.scheduled
    assert plain.facts(0.7) == {}
    hard = DCL(hard=steps)
    assert hard.scheduled
    assert (hard.facts(0.4), hard.facts(0.5)) == ({}, {"hard_k": 64})
    for loss in (
        InfoNCE(negatives=Mixed(share=[(0.0, 0.5), (0.5, 0.25)])),
        GBCE(None, Mixed(share=[(0.0, 0.5), (0.5, 0.25)])),
    ):
        assert loss.scheduled
        assert (loss.facts(0.0), loss.facts(0.5)) == ({"global_share": 0.5}, {"global_share": 0.25})


# --- YAML


def from_yaml(text: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Loss, "loss")
    return parser.instantiate(parser.parse_string(text)).loss


def test_losses_are_written_in_yaml() -> None:
    loss = from_yaml(
        """
        loss:
          class_path: DCL
          init_args:
            temperature: 0.02
            correct: negatives
            same_sequence: true
            near: 0.99
            hard: [[0, null], [0.15, 8192], [0.5, 128]]
            negatives:
              class_path: Mixed
              init_args:
                alpha: 0.75
                share: [[0, 0.5], [0.6, 0.25]]
                pool: {class_path: Uniform, init_args: {count: null, per: batch, active_after: 2025-05-29}}
        """
    )
    assert isinstance(loss, DCL)
    assert isinstance(loss.negatives, Mixed)
    assert loss.hard.points == [(0.0, None), (0.15, 8192), (0.5, 128)]
    assert loss.negatives.share.points == [(0.0, 0.5), (0.6, 0.25)]
    assert loss.negatives.pool.after == 1_748_476_800
    assert (loss.temperature, loss.correct, loss.same_sequence, loss.near) == (0.02, "negatives", True, 0.99)


@pytest.mark.parametrize(("text", "points"), [("64", 64), ("null", None)])
def test_a_plain_value_is_a_schedule_of_one_point(text: str, points: int | None) -> None:
    loss = from_yaml(f"loss: {{class_path: InfoNCE, init_args: {{hard: {text}}}}}")
    assert loss.hard.points == [(0.0, points)]


def test_a_schedule_that_is_none_is_one_error() -> None:
    with pytest.raises(ArgumentError):
        from_yaml("loss: {class_path: InfoNCE, init_args: {hard: [[0, many]]}}")
