"""The signal of repeats: every value equals a loop over the user's events."""

import math

import numpy as np

from recsys2stage.data.batches import Ragged, left_aligned
from recsys2stage.ranking.signals.base import Requests
from recsys2stage.ranking.signals.repeats import Repeats

DAY, SIZE = 86_400, 9
NOW = 1_600_000_000


def requests(histories: list[list[tuple[int, int]]], items: list[list[int]]) -> Requests:
    """Requests at NOW after events of (item, days before NOW)."""
    ends = np.cumsum([len(history) for history in histories])
    events = [event for history in histories for event in history]
    item = np.array([item for item, _ in events], dtype=np.int64)
    time = np.array([NOW - days * DAY for _, days in events], dtype=np.int64)
    padded = left_aligned(item, time, ends - [len(history) for history in histories], ends)
    now = np.full(len(histories), NOW)
    return Requests(np.array(items), padded, now, np.zeros((SIZE, 2), np.float32), np.zeros((len(now), 2), np.float32))


def test_values_are_counted_in_the_own_history() -> None:
    histories = [[(3, 30), (5, 20), (3, 20), (3, 10)], [(5, 1)], [], [(4, 5), (4, 5)]]
    values = Repeats(half_life=10 * DAY)(requests(histories, [[3, 5, 7, 0], [3, 5, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]]))
    weight = 0.125 + 0.25 + 0.5
    three = [math.log1p(3), math.log1p(weight), math.log1p(10 * DAY), 0.0]  # every 10 days, and 10 days ago
    np.testing.assert_allclose(values[0, 0], three, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(values[0, 1], [math.log(2), math.log1p(0.25), math.log1p(20 * DAY), 0], rtol=1e-6)
    assert not values[0, 2:].any()
    assert not values[1, 0].any(), "of another user"
    assert values[1, 1, 0] == np.float32(math.log(2))
    assert not values[2].any()
    np.testing.assert_allclose(values[3, 0, [0, 3]], [math.log(3), 0], rtol=1e-6)  # two in one second are no interval


def test_an_overdue_item_is_above_zero_and_one_just_bought_below() -> None:
    late = requests([[(3, 40), (3, 30)], [(3, 21), (3, 1)]], [[3], [3]])
    due = Repeats()(late)[:, 0, 3]
    np.testing.assert_allclose(due, [math.log(31 / 11), math.log(2 / 21)], rtol=1e-6)


def test_proposals_are_the_own_items_by_decayed_frequency() -> None:
    histories = [[(1, 900), (2, 20), (3, 10), (2, 9), (4, 1)], [], [(5, 3_000_000 // DAY)]]
    asked = requests(histories, [[0], [0], [0]])
    excluded = Ragged(np.array([4]), np.array([0, 1, 1, 1]))
    assert Repeats(3, half_life=10 * DAY).propose(asked, excluded).tolist() == [[2, 3, 1], [-1] * 3, [5, -1, -1]]
    allowed = np.ones((3, SIZE - 1), bool)
    allowed[0, 1] = False  # item 2
    found = Repeats(3, half_life=1).propose(asked._replace(allowed=allowed), excluded)
    assert sorted(found[0].tolist()) == [-1, 1, 3], "too old for any weight, but still proposed"
