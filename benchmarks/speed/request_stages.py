"""CPU time of requests by stage, without HTTP: milliseconds a user, as one JSON object.

    python benchmarks/alternate.py --before ../before requests benchmarks/speed/request_stages.py \\
        --bundle runs/ml-1m/bundle --data data/ml-1m --users 200

A request is a known user of the prepared data without the newest event, at the time of that event, with k = 10, through
both stages of `Engine.compute`. Every measurement has users of its own, so that nothing is known of them.

single, batch_8, batch_32  encode, search (with the proposals of the signals), signals, rank (with the answer), whole
returning                  users with fewer events than the window of the model, one event and a minute after they came;
                           with states of users, where the version has them
first_stage_V              one request of `Recommender.recommend` without a ranker over V random item vectors
new_user_V                 the same without a history
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.index import Exact
from recsys2stage.serving import engine as serving
from recsys2stage.serving.engine import Engine
from recsys2stage.serving.histories import UserEvents
from recsys2stage.serving.packed import load_known_users
from recsys2stage.serving.schemas import RecommendRequest

STAGES = ("encode", "search", "signals", "rank")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--users", type=int, default=200, help="users of each measurement")
    parser.add_argument("--items", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    # the stages are measured in seconds of CPU time, also where other processes take turns on the core
    vars(serving)["time"] = SimpleNamespace(perf_counter=time.process_time)  # all that it uses
    engine = Engine.load(options.bundle)
    engine.warm()
    histories = read_histories(options.bundle, options.data, 4 * options.users)
    groups = [histories[number::4] for number in range(4)]
    numbers = measure(engine, "first", groups[3], 1)  # touches the pages of all tables
    numbers.clear()
    numbers |= measure(engine, "single", groups[0], 1)
    numbers |= measure(engine, "batch_8", groups[1], 8)
    numbers |= measure(engine, "batch_32", groups[2], 32)
    short = [history for history in groups[0] if len(history.items) < engine.recommender.towers.max_length]
    if hasattr(serving, "UserStates"):
        engine.states = serving.UserStates(1 << 28)
    measure(engine, "first", short, 1)
    numbers |= measure(engine, "returning", short, 1, later=True)
    if hasattr(engine, "states"):
        engine.states = None
    for count in options.items:
        numbers |= measure_first_stage(engine.recommender, count, options.users)
    print(json.dumps(numbers))


def read_histories(bundle: Path, data: Path, count: int) -> list[UserEvents]:
    """All events of random users of the prepared data, as the service reads them."""
    known = load_known_users(bundle, data)
    assert known is not None
    users = np.random.default_rng(0).permutation(len(known))[:count]
    return [UserEvents(*known.events(user)) for user in users.tolist()]


def before_last(events: UserEvents) -> UserEvents:
    """The events without the newest one."""
    ratings = None if events.ratings is None else events.ratings[:-1]
    actions = None if events.actions is None else events.actions[:-1]
    return UserEvents(events.items[:-1], events.times[:-1], ratings, actions, events.user)


def measure(engine: Engine, name: str, histories: list[UserEvents], size: int, later: bool = False) -> dict[str, float]:
    """Medians over the batches of the milliseconds a user."""
    events = histories if later else [before_last(history) for history in histories]
    bodies = [
        RecommendRequest(user_id=str(number), request_time=int(history.times[-1]) + 60 * later, k=10)
        for number, history in enumerate(histories)
    ]
    times: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "whole")}
    for begin in range(0, len(bodies) - size + 1, size):
        start = time.process_time()
        results = engine.compute(bodies[begin : begin + size], events[begin : begin + size])
        times["whole"].append(time.process_time() - start)
        stages: dict[str, float] = results[0].stages  # type: ignore[union-attr]  # no problem: the request is right
        for stage in STAGES:
            times[stage].append(stages.get(stage, 0.0))
    return {f"{name}_{stage}_ms": 1e3 * median(values) / size for stage, values in times.items()}


def measure_first_stage(model: Recommender, count: int, requests: int) -> dict[str, float]:
    """Medians of requests to the first stage alone, with random vectors."""
    random = np.random.default_rng(0)
    index = Exact()
    index.build(random.standard_normal((count, model.index.vectors.shape[1]), dtype=np.float32))
    catalogue = pl.DataFrame({c.ITEM: np.arange(1, count + 1), c.ITEM_ID: np.arange(1, count + 1).astype(str)})
    popularity = random.integers(0, 1_000, count + 1)
    options: dict[str, Any] = {"next_action": model.next_action, "actions": model.actions, "has_time": model.has_time}
    large = Recommender(model.towers, index, None, catalogue, popularity, model.request_time, **options)
    known = model.towers.items.num_items  # histories hold items that the towers know
    numbers = {}
    for name, length in ((f"first_stage_{count}", 50), (f"new_user_{count}", 0)):
        times = []
        for _ in range(max(5, min(requests, 20))):
            history = [str(item) for item in 1 + random.permutation(min(known, count))[:length]]
            seconds = [1_000_000_000 + 60 * event for event in range(length)]
            start = time.process_time()
            large.recommend(history, 10, times=seconds, request_time=1_000_100_000)
            times.append(time.process_time() - start)
        numbers[f"{name}_ms"] = 1e3 * median(times[1:])
    return numbers


if __name__ == "__main__":
    main()
