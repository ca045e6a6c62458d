"""Batches of event rows as arrays: ragged, or left-aligned with lengths; model histories and training windows."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from recsys2stage import columns as c
from recsys2stage.options import RequestTime, check_integer, check_option
from recsys2stage.shapes import History


class Ragged(NamedTuple):
    """Rows of different lengths: row b is values[offsets[b]:offsets[b + 1]]."""

    values: np.ndarray  # (sum,)
    offsets: np.ndarray  # (B + 1,) int64

    @property
    def rows(self) -> np.ndarray:
        """The row of each value, (sum,) int64."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def spans(starts: np.ndarray, ends: np.ndarray) -> Ragged:
    """The indices starts[b] .. ends[b] - 1 of each row, without a loop."""
    lengths = np.maximum(ends - starts, 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths), offsets)


def padded_indices(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices starts[b] .. ends[b] - 1 left-aligned, padded with 0, and the mask of real ones, (B, L) each."""
    column = np.arange(max(int((ends - starts).max(initial=0)), 1))
    real = column < (ends - starts)[:, None]
    return np.where(real, starts[:, None] + column, 0), real


class Padded(NamedTuple):
    """Left-aligned events, as long as the longest row, and the users' features."""

    items: np.ndarray  # (B, L) int64
    times: np.ndarray  # (B, L) int64
    lengths: np.ndarray  # (B,) int64
    ratings: np.ndarray | None = None  # (B, L) float32
    actions: np.ndarray | None = None  # (B, L) int64
    user: tuple[np.ndarray, ...] | None = None  # (B, P) of each declared user feature

    def take(self, rows: slice) -> "Padded":
        """Selects users."""
        fields = {name: field[rows] for name, field in self._asdict().items() if isinstance(field, np.ndarray)}
        return self._replace(**fields, user=None if self.user is None else tuple(values[rows] for values in self.user))


def left_aligned(
    items: np.ndarray,
    times: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    ratings: np.ndarray | None = None,
    actions: np.ndarray | None = None,
) -> Padded:
    """Events starts[b] .. ends[b] - 1 of each row."""
    if not len(items):  # nothing to gather from
        empty = np.zeros((len(starts), 1), dtype=np.int64)
        return Padded(empty, empty, np.zeros(len(starts), dtype=np.int64))
    if len(starts) == 1 and ends[0] > starts[0]:  # one request: a slice takes a fraction of the time of index arrays
        own = slice(int(starts[0]), int(ends[0]))
        return Padded(
            items=items[own].astype(np.int64)[None],
            times=np.array(times[own])[None],
            lengths=ends - starts,
            ratings=None if ratings is None else ratings[own].astype(np.float32)[None],
            actions=None if actions is None else actions[own].astype(np.int64)[None],
        )
    index, real = padded_indices(starts, ends)
    return Padded(
        items=np.where(real, items[index], c.PAD).astype(np.int64),
        times=np.where(real, times[index], 0),
        lengths=ends - starts,
        ratings=None if ratings is None else np.where(real, ratings[index], np.float32(0)),
        actions=None if actions is None else np.where(real, actions[index], c.UNKNOWN).astype(np.int64),
    )


def as_history(
    padded: Padded,
    request_time: RequestTime,
    target_time: np.ndarray | None = None,
    target_action: np.ndarray | None = None,
) -> History:
    """Converts a batch to the tensors that a model reads.

    Args:
        padded: histories.
        request_time: request time of each position: that of its target, of its own event (`last_event`), or none.
        target_time: (B,) seconds of the last position's target; None: the time of the last event.
        target_action: (B,) action type of the last position's target; None: no target actions.
    """
    check_option("request_time", request_time, RequestTime)
    request = None
    if request_time == "last_event":
        request = padded.times
    elif request_time == "target":
        last = np.maximum(padded.lengths - 1, 0)
        own = padded.times[np.arange(len(last)), last]
        request = shift_left(padded.times, padded.lengths, own if target_time is None else target_time)
    target_actions = None
    if target_action is not None:
        actions = np.zeros_like(padded.items) if padded.actions is None else padded.actions
        target_actions = shift_left(actions, padded.lengths, target_action)
    return History(
        items=torch.from_numpy(padded.items),
        lengths=torch.from_numpy(np.asarray(padded.lengths)),
        times=torch.from_numpy(padded.times),
        request=tensor(request),
        ratings=tensor(padded.ratings),
        actions=tensor(padded.actions),
        target_action=tensor(target_actions),
        user=None if padded.user is None else tuple(torch.from_numpy(values) for values in padded.user),
    )


def newest_first(values: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """The newest `count` of left-aligned (B, L) values, newest first, (B, count), padded with 0."""
    if len(values) == 1:  # one request: slices take a fraction of the time of index arrays
        length = int(lengths[0])
        own, newest = min(length, count), np.zeros((1, count), dtype=values.dtype)
        newest[0, :own] = values[0, length - own : length][::-1]
        return newest
    position = np.asarray(lengths)[:, None] - 1 - np.arange(count)
    return np.where(position >= 0, values[np.arange(len(values))[:, None], np.maximum(position, 0)], 0)


def recent_events(
    padded: Padded, request_time: np.ndarray, count: int, has_time: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Items of the newest `count` events and their ages at request time, newest first.

    Args:
        padded: histories.
        request_time: (B,) seconds.
        has_time: whether times are seconds; if not, all ages are 0.

    Returns:
        (B, count) int64 items and (B, count) float32 log(1 + seconds), both padded with 0.
    """
    items, times = (newest_first(values, padded.lengths, count) for values in (padded.items, padded.times))
    ages = np.where((items > 0) & has_time, np.log1p((request_time[:, None] - times).clip(min=0)), 0).astype(np.float32)
    return torch.from_numpy(items), torch.from_numpy(ages)


def tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(values)


def shift_left(values: np.ndarray, lengths: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The value of the next position, and `last` at each row's last position, (B, L)."""
    shifted = np.concatenate([values[:, 1:], np.zeros_like(values[:, :1])], axis=1)
    shifted[np.arange(len(lengths)), np.maximum(lengths - 1, 0)] = last
    return shifted


def windows(starts: np.ndarray, ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each row of events into windows, so that each event except a row's first is a target exactly once.

    A window of n + 1 events has n targets. Windows are filled from the newest event back; only the oldest may be short.
    Adjacent windows share one event: the last target of the older is the first input of the newer.

    Args:
        starts: (B,) first event of each row.
        ends: (B,) one past the last event of each row.
        length: maximum number of targets in a window.

    Returns:
        starts and ends (one past the last event) of the windows, each (W,) int64.
    """
    targets = np.maximum(ends - starts - 1, 0)
    counts = -(-targets // length)
    number = spans(np.zeros_like(counts), counts)  # 0 for the newest window of a row
    window_ends = np.repeat(ends, counts) - number.values * length
    window_starts = np.maximum(window_ends - length - 1, np.repeat(starts, counts))
    return window_starts, window_ends


def in_chunks(count: int, size: int) -> Iterator[slice]:
    check_integer("batch_size", size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
