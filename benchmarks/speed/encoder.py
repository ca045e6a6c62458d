"""CPU time of the encoder at a request: milliseconds a history, and bytes of a cached user, as one JSON object.

    python benchmarks/alternate.py --before ../before encoder benchmarks/speed/encoder.py \\
        --bundle runs/ml-1m/bundle --data data/ml-1m

Histories are those of users of the prepared data, as many events as the model reads. `queries` of the recommender is
measured: arrays of events to query vectors.

cold_1, cold_32  one history; 32 histories of different users, for each of them
cold_full        one history of the model's longest, or the longest there is
warm_1, warm_32  the same users one event later, where the version keeps states of users; without those whose history
                 fills the model's longest, as these are computed anew
again_1          a further request of the same histories
state_bytes      memory of the state of a user, on average over the users of `warm_1`
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from recsys2stage.data.batches import Padded
from recsys2stage.data.dataset import Dataset
from recsys2stage.recommender import Recommender

try:
    from recsys2stage.retrieval.states import UserStates
except ImportError:  # an earlier version
    UserStates = None  # type: ignore[assignment,misc]  # an earlier version has no such class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--users", type=int, default=128, help="users of each measurement, a multiple of 32")
    parser.add_argument("--rounds", type=int, default=3, help="the median round counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, data = Recommender.load(options.bundle), Dataset(options.data)
    longest = model.towers.max_length
    rng = np.random.default_rng(0)
    users = rng.choice(data.num_users, options.users, replace=False)
    ends, begins = np.asarray(data.offsets[users + 1]), np.asarray(data.offsets[users])

    def batches(ends: np.ndarray, chosen: np.ndarray, size: int) -> list[tuple[list[Any], Padded]]:
        """Histories up to `ends`, of `size` users each."""
        return [
            (users[rows].tolist(), data.events(np.maximum(ends[rows] - longest, begins[rows]), ends[rows]))
            for rows in (chosen[start : start + size] for start in range(0, len(chosen), size))
        ]

    def milliseconds(work: list[tuple[list[Any], Padded]], **states: Any) -> float:
        start = time.process_time()
        for names, padded in work:
            kept = states | {"users": names} if states else {}
            model.queries(padded, padded.times.max(1) + 60, **kept)
        return 1e3 * (time.process_time() - start) / sum(len(names) for names, _ in work)

    def rounds(measure: Callable[[], float]) -> float:
        return median(measure() for _ in range(options.rounds))

    everyone = np.arange(len(users))
    milliseconds(batches(ends, everyone, 1))  # touches all pages
    numbers = {
        "cold_1": rounds(lambda: milliseconds(batches(ends, everyone, 1))),
        "cold_32": rounds(lambda: milliseconds(batches(ends, everyone, 32))),
        "cold_full": rounds(
            lambda: milliseconds(batches(ends, np.argsort(begins - ends, kind="stable")[: len(users) // 4], 1))
        ),
        "events": float(np.minimum(ends - begins, longest).mean()),
    }
    if UserStates is not None:
        returning = np.flatnonzero(ends - begins < longest)
        found: dict[str, list[float]] = {"warm_1": [], "warm_32": [], "again_1": []}
        for _ in range(options.rounds):
            states = UserStates(1 << 33)
            milliseconds(batches(ends - 1, returning, 1), states=states)
            found["warm_1"].append(milliseconds(batches(ends, returning, 1), states=states))
            found["again_1"].append(milliseconds(batches(ends, returning, 1), states=states))
            numbers["state_bytes"] = states.nbytes / len(states)
            states = UserStates(1 << 33)
            milliseconds(batches(ends - 1, returning, 32), states=states)
            found["warm_32"].append(milliseconds(batches(ends, returning, 32), states=states))
            assert states.outcomes["hit"] == states.outcomes["miss"] == len(returning)
        numbers |= {name: median(values) for name, values in found.items()}
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
