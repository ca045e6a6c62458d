"""The signal interface: ranker features of a candidate at a request, beyond the retriever's score.

Signals are not trained by gradient descent. `fit` counts training events into tables; `__call__` looks them up. The
same code runs in mining, evaluation and serving. S: number of values (features) of a signal.
"""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from recsys2stage.artifacts import read_array, read_json
from recsys2stage.data.batches import Padded, Ragged, in_chunks, newest_first
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_integer
from recsys2stage.trust import class_name, factory

MAX_CANDIDATES = 1 << 20  # per request
MAX_LEFT_OUT = 1 << 22  # exclusions that are passed to a candidate generator at once
FOLDER, DESCRIPTION = "signals", "signals.json"  # in a folder of mined lists or a bundle


class Requests(NamedTuple):
    """B requests with C candidates each."""

    items: np.ndarray  # (B, C) int64, 0 is padding
    history: Padded  # the newest events before each request
    request_time: np.ndarray  # (B,) int64 seconds; the time of the newest event where no request time is given
    vectors: np.ndarray  # (V + 1, D) float32, the retriever's item vectors, row 0 zero
    queries: np.ndarray  # (B, D) float32, the retriever's query vectors
    allowed: np.ndarray | None = None  # (B, V) bool, items that may be proposed; None: all

    def newest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Items and times of the newest `count` events, newest first, (B, count) int64 each; padded with 0."""
        return self.newest_items(count), newest_first(self.history.times, self.history.lengths, count)

    def newest_items(self, count: int) -> np.ndarray:
        """Items of the newest `count` events, newest first, (B, count) int64; padded with 0."""
        return newest_first(self.history.items, self.history.lengths, count)


class Signal(ABC):
    """Features of each candidate of a request. A subclass stores each option as an attribute of the same name."""

    by_id: ClassVar[bool] = False  # True if derived from the item ID; zeroed where the ID is masked
    tables: dict[str, np.ndarray]  # everything that `fit` computed

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the S values; a class attribute where they are fixed."""

    @property
    def counted(self) -> Collection[str]:
        """Names of the values that count the item's own events; they are zeroed for cold items."""
        return ()

    @property
    def reads_times(self) -> bool:
        """Whether requests need a request time and event times."""
        return False

    @property
    def reads_ratings(self) -> bool:
        """Whether the ratings of the history are used."""
        return False

    @property
    def reads_user(self) -> bool:
        """Whether user features are used."""
        return False

    @abstractmethod
    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        """Computes `tables` from training events only.

        Args:
            dataset: prepared dataset.
            vectors: (V + 1, D) the retriever's item vectors, row 0 zero.

        Raises:
            ValueError: if the dataset lacks what the signal needs.
        """

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        """Loads the tables of an earlier `fit`."""
        self.tables = tables

    @abstractmethod
    def __call__(self, requests: Requests) -> np.ndarray:
        """(B, C, S) float32, finite, of moderate size (logarithms of counts and seconds); 0 at padding."""


class Proposer(Signal):
    """A signal that is also a candidate generator.

    Args:
        candidates: number of items proposed for each request; 0: none.
    """

    # whether `propose` reads `Requests.allowed`; if not, all items that are not allowed are passed as excluded ones,
    # which takes time and memory in proportion to the catalogue
    reads_allowed: ClassVar[bool] = False

    def __init__(self, candidates: int = 0) -> None:
        check_integer("candidates", candidates, 0, MAX_CANDIDATES, example=50)  # 0: none
        self.candidates = candidates

    @abstractmethod
    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        """Top `candidates` items that are allowed and not excluded, best first, (B, candidates) int64; padded with −1.

        `requests.items` is ignored.
        """


def is_excluded(items: np.ndarray, excluded: Ragged, size: int) -> np.ndarray:
    """Which of (B, N) items are excluded in their row; also True for padding (0 and below).

    Args:
        size: V + 1.
    """
    keys = np.sort(excluded.rows * size + excluded.values)
    queries = np.arange(len(items))[:, None] * size + items
    index = np.searchsorted(keys, queries).clip(max=max(len(keys) - 1, 0))
    return (items <= 0) | (keys[index] == queries if len(keys) else False)


def propose_excluding(signal: Proposer, requests: Requests, excluded: Ragged) -> np.ndarray:
    """What a signal proposes that does not read `requests.allowed`: for it, items that are not allowed are excluded."""
    assert requests.allowed is not None
    parts, (count, size) = [], requests.allowed.shape
    for part in in_chunks(count, max(1, MAX_LEFT_OUT // size)):  # at most so many exclusions at once
        begin, end = excluded.offsets[part.start], excluded.offsets[part.stop]
        row, item = np.nonzero(~requests.allowed[part])
        rows = np.concatenate([excluded.rows[begin:end] - part.start, row])
        items = np.concatenate([excluded.values[begin:end], item + 1])[np.argsort(rows, kind="stable")]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=part.stop - part.start))])
        own = requests._replace(
            items=requests.items[part],
            history=requests.history.take(part),
            request_time=requests.request_time[part],
            queries=requests.queries[part],
            allowed=None,
        )
        parts.append(signal.propose(own, Ragged(items, offsets)))
    return np.concatenate(parts)


def unit(vectors: np.ndarray) -> np.ndarray:
    """L2-normalizes along the last axis; zero vectors stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def specify(signal: Signal) -> dict[str, Any]:
    """Class path and options of a signal, for JSON."""
    options = {name: getattr(signal, name) for name in inspect.signature(type(signal)).parameters}
    return {"class_path": class_name(type(signal)), "init_args": options}


def save_signals(signals: Sequence[Signal], folder: Path) -> None:
    """Writes signals and their tables into a new folder."""
    folder.mkdir()
    (folder / DESCRIPTION).write_text(json.dumps([specify(signal) for signal in signals], indent=2), encoding="utf-8")
    for number, signal in enumerate(signals):
        for name, table in signal.tables.items():
            np.save(folder / f"{number}.{name}.npy", table)


def load_signals(folder: Path) -> list[Signal]:
    """Loads saved signals; tables are memory-mapped."""
    signals, path = [], folder / DESCRIPTION
    for number, spec in enumerate(read_json(path, list, "recsys mine-negatives, and export-bundle")):
        make = factory(spec, Signal, path)
        try:
            signal = make()
        except Exception as error:  # options are untrusted; a constructor may raise anything
            raise ValueError(f"{path} has a {spec['class_path']} with other options ({error})") from error
        files = sorted(folder.glob(f"{number}.*.npy"))
        # plain views of the mapped files: each operation on a np.memmap itself makes another Python object
        signal.restore({file.name.split(".")[1]: np.asarray(read_array(file)) for file in files})
        signals.append(signal)
    return signals
