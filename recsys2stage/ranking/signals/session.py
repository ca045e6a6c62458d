"""Session: time since the newest event, state of the current session, and calendar time of the request."""

import itertools
import math

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
        now, lengths = requests.request_time, np.asarray(requests.history.lengths)
        values = np.zeros((len(now), len(self.names)))
        rows = zip(requests.history.times, lengths.tolist(), now.tolist(), strict=True)
        for row, (times, length, request) in enumerate(rows):  # a handful of numbers each: arrays would be slower
            values[row, [0, 1, 2, 3, 4, 9]] = self._session(times[:length].tolist(), request)
        hour = 2 * np.pi * (now % DAY) / DAY
        weekday = 2 * np.pi * ((now // DAY + 4) % 7) / 7
        values[:, 5:9] = np.stack([np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday)], axis=1)
        return values

    def _session(self, times: list[int], request: int) -> tuple[float, ...]:
        """All values of a request but the calendar's.

        Args:
            times: of the events, ascending.
            request: the request's time.
        """
        if not times:
            return 0.0, 0.0, 0.0, 1.0, 0.0, 0.0
        gaps = [max(later - time, 0) for time, later in itertools.pairwise(times[-RECENT:])]
        pace = sum(map(math.log1p, gaps)) / max(len(gaps), 1)
        gap = max(request - times[-1], 0)
        if gap > self.session:
            return math.log1p(gap), math.log1p(len(times)), 0.0, 1.0, 0.0, pace
        start = len(times) - 1  # first event of the newest session
        while start and times[start] - times[start - 1] <= self.session:
            start -= 1
        seconds = math.log1p(max(request - times[start], 0))
        return math.log1p(gap), math.log1p(len(times)), math.log1p(len(times) - start), 0.0, seconds, pace
