"""Session: time since the newest event, state of the current session, and calendar time of the request."""

import numpy as np

from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_integer
from recsys2stage.ranking.signals.base import Requests, Signal

DAY = 86_400
RECENT = 10  # number of newest events averaged in `mean_gap`


class Session(Signal):
    """Session context, equal for all candidates of a request; the scorer crosses it with features of the candidates.

    A session is a run of events without a gap longer than `session` seconds. If the gap from the newest event to the
    request is longer, or there are no events, the request starts a new session. The values:

    - gap: log(1 + seconds since the newest event), 0 without events;
    - events: log(1 + events in the history, after truncation);
    - session_events, session_seconds: log(1 + events of the current session), log(1 + seconds since its first event);
      0 in a new session;
    - new_session: 1 if the request starts a session, else 0;
    - hour_sin, hour_cos, weekday_sin, weekday_cos: cyclic encoding of the request's hour of the day and day of the week
      (UTC, from Sunday);
    - mean_gap: mean of log(1 + seconds) of the gaps between the newest 10 events, 0 with fewer than two events.

    Args:
        session: the longest gap within a session, in seconds.
    """

    reads_times = True
    names = (
        *("gap", "events", "session_events", "new_session", "session_seconds"),
        *("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "mean_gap"),
    )

    def __init__(self, session: int = 1800) -> None:
        check_integer("session", session, 0, example=1800)
        self.session = session

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if not dataset.has_time:
            raise ValueError(f"{dataset.path} has an order and no times; leave Session out")
        self.tables = {}  # uses the request only

    def __call__(self, requests: Requests) -> np.ndarray:
        values = self.request_values(requests).astype(np.float32)
        return np.where(requests.items[:, :, None] > 0, values[:, None], np.float32(0))

    def request_values(self, requests: Requests) -> np.ndarray:
        """(B, 10) float64, the values of each request."""
        times, lengths, now = requests.history.times, np.asarray(requests.history.lengths), requests.request_time
        column, nonempty = np.arange(times.shape[1]), lengths > 0
        newest = np.take_along_axis(times, (lengths - 1).clip(min=0)[:, None], axis=1)[:, 0]
        gap = np.where(nonempty, (now - newest).clip(min=0), 0)

        gaps = np.diff(times, axis=1, prepend=0).clip(min=0)  # before each event
        inner = (column > 0) & (column < lengths[:, None])
        start = np.where(inner & (gaps > self.session), column, 0).max(axis=1)  # first event of the newest session
        fresh = ~nonempty | (gap > self.session)
        first = np.take_along_axis(times, start[:, None], axis=1)[:, 0]
        events = np.where(fresh, 0, lengths - start)
        seconds = np.where(fresh, 0, (now - first).clip(min=0))

        recent = inner & (column > lengths[:, None] - RECENT)
        pace = np.where(recent, np.log1p(gaps), 0).sum(axis=1) / recent.sum(axis=1).clip(min=1)
        hour = 2 * np.pi * (now % DAY) / DAY
        weekday = 2 * np.pi * ((now // DAY + 4) % 7) / 7
        circles = [np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday)]
        clock = [np.log1p(gap), np.log1p(lengths), np.log1p(events), fresh, np.log1p(seconds)]
        return np.stack([*clock, *circles, pace], axis=1)
