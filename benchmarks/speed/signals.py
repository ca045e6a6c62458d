"""CPU time of each signal, with its default options: fitting, values and proposals. One JSON object.

    python benchmarks/alternate.py --before ../before signals benchmarks/speed/signals.py data/ml-1m
    python benchmarks/speed/signals.py data/ml-1m --signals ItemKNN --options '{"ItemKNN": {"shrink": 1}}'

A request is the test target of a random user: its history of at most 200 events, its time, and 200 candidates sampled
by popularity. Requests are computed one at a time, as for a single visitor. The retriever's vectors are random.

SIGNAL_fit_s       seconds of `fit`
SIGNAL_values_ms   milliseconds a request to look up the values of its candidates
SIGNAL_propose_ms  milliseconds a request to propose 50 candidates, seen items excluded; only signals that propose
SIGNAL_tables_mb   size of the tables in the bundle

Signals that the version, or the data, lack are left out; `OtherRetriever` costs what a second retriever costs.
"""

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking import signals as package
from recsys2stage.ranking.signals import Proposer, Requests, Signal
from recsys2stage.ranking.signals.base import unit

PROPOSED, LENGTH = 50, 200  # candidates that a signal proposes; newest events of a history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared dataset")
    parser.add_argument("--signals", nargs="*", help="names of signals; default: all")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: name of a signal -> its options")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=200, help="candidates of a request")
    parser.add_argument("--width", type=int, default=128, help="width of the vectors")
    options = parser.parse_args()
    dataset, random = Dataset(options.data), np.random.default_rng(0)
    vectors = random.standard_normal((dataset.num_items + 1, options.width), dtype=np.float32)
    vectors[0] = 0
    vectors = unit(vectors)
    users = random.permutation(dataset.users("test"))[: options.requests]
    shares = np.asarray(dataset.train_counts) / np.sum(dataset.train_counts)
    requests = [read_request(dataset, user, vectors, shares, options.candidates, random) for user in users]
    numbers: dict[str, float] = {}
    for name in options.signals or own_signals():
        given = dict(options.options.get(name, {}))
        try:
            numbers |= measure(name, given, dataset, vectors, users, requests)
        except ValueError as error:  # the data lack what the signal reads
            print(f"{name}: {error}", file=sys.stderr)
    print(json.dumps(numbers))


def own_signals() -> list[str]:
    """The signals of this version that need no other index."""
    classes = {name: one for name, one in vars(package).items() if inspect.isclass(one) and issubclass(one, Signal)}
    return sorted(name for name, one in classes.items() if not inspect.isabstract(one) and name != "OtherRetriever")


def read_request(
    dataset: Dataset, user: int, vectors: np.ndarray, shares: np.ndarray, count: int, random: np.random.Generator
) -> Requests:
    """The request of a user's test target, with candidates sampled by their shares."""
    one = np.array([user])
    items = random.choice(len(shares), size=min(count, int(np.count_nonzero(shares))), replace=False, p=shares)
    seconds = np.asarray(dataset.times[dataset.target_indices("test")[one]])
    query = unit(random.standard_normal((1, vectors.shape[1]), dtype=np.float32))
    return Requests(items[None].astype(np.int64), dataset.histories(one, "test", LENGTH), seconds, vectors, query)


def measure(
    name: str,
    given: dict[str, object],
    dataset: Dataset,
    vectors: np.ndarray,
    users: np.ndarray,
    requests: list[Requests],
) -> dict[str, float]:
    """The numbers of one signal; medians over the requests."""
    make = getattr(package, name)
    proposes = issubclass(make, Proposer)
    signal = make(**({"candidates": PROPOSED} if proposes else {}) | given)
    start = time.process_time()
    signal.fit(dataset, vectors)
    numbers = {f"{name}_fit_s": time.process_time() - start}
    numbers[f"{name}_values_ms"] = median_ms(signal, [(request,) for request in requests])
    if proposes:
        seen = [dataset.seen(np.array([user]), "test") for user in users]
        numbers[f"{name}_propose_ms"] = median_ms(signal.propose, list(zip(requests, seen, strict=True)))
    numbers[f"{name}_tables_mb"] = sum(table.nbytes for table in signal.tables.values()) / 1e6
    return numbers


def median_ms(call: Callable[..., object], arguments: list[tuple[Any, ...]]) -> float:
    """Median milliseconds of CPU time of a call, after a first one that computes what is kept."""
    call(*arguments[0])
    times = []
    for own in arguments:
        start = time.process_time()
        call(*own)
        times.append(time.process_time() - start)
    return 1e3 * median(times)


if __name__ == "__main__":
    main()
