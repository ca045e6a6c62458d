"""When the request comes: how long after the newest event, how far into a sitting, at what hour of what day."""

import numpy as np

from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.base import Requests, Signal

DAY = 86_400
RECENT = 10  # newest events whose gaps say how busy the user is now


class Session(Signal):
    """The user's clock, the same for all candidates of a request; a scorer crosses it with what it knows of them.

    A session is a run of events with no gap longer than `session` between them; if the gap from the newest event to
    the request is longer, or there is no event, the request opens a new one. The numbers:

    - gap: log(1 + seconds since the newest event), 0 without one;
    - events: log(1 + events in the history, as far as it is shown);
    - session_events, session_seconds: log(1 + events of the open session), log(1 + seconds since its first one); 0 in
      a new one;
    - new_session: 1 where the request opens one, else 0;
    - hour_sin, hour_cos, weekday_sin, weekday_cos: the request's hour of the day and day of the week (UTC, from Sunday)
      as points on circles;
    - mean_gap: mean of log(1 + seconds) of the gaps between the newest 10 events, 0 where there are fewer than two.

    Args:
        session: the longest gap within a session, in seconds.
    """

    reads_times = True
    names = (
        *("gap", "events", "session_events", "new_session", "session_seconds"),
        *("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "mean_gap"),
    )

    def __init__(self, session: int = 1800) -> None:
        if session < 0:
            raise ValueError(f"session is {session}, expected seconds: 0 or more, such as 1800")
        self.session = session

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        if not dataset.has_time:
            raise ValueError(f"{dataset.path} has an order and no times; leave Session out")
        self.tables = {}  # all it looks at is in the request

    def __call__(self, requests: Requests) -> np.ndarray:
        numbers = self.of_requests(requests).astype(np.float32)
        return np.where(requests.items[:, :, None] > 0, numbers[:, None], np.float32(0))

    def of_requests(self, requests: Requests) -> np.ndarray:
        """(B, 10) float64, the numbers of each request."""
        times, lengths, now = requests.history.times, np.asarray(requests.history.lengths), requests.now
        column, some = np.arange(times.shape[1]), lengths > 0
        newest = np.take_along_axis(times, (lengths - 1).clip(min=0)[:, None], axis=1)[:, 0]
        gap = np.where(some, (now - newest).clip(min=0), 0)

        gaps = np.diff(times, axis=1, prepend=0).clip(min=0)  # before each event
        inner = (column > 0) & (column < lengths[:, None])
        start = np.where(inner & (gaps > self.session), column, 0).max(axis=1)  # of the newest session
        fresh = ~some | (gap > self.session)
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
