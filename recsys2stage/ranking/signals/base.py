"""What a signal is: numbers of a candidate at a request that the retriever does not say.

Signals learn nothing by gradient. They count training events once, into tables, and look those up: the same code when
lists are mined, when they are measured and when they are served. S numbers of a signal.
"""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from recsys2stage.artifacts import read_array, read_json
from recsys2stage.data.batches import Padded, Ragged, newest_first
from recsys2stage.data.dataset import Dataset
from recsys2stage.trust import factory, name_of

FOLDER, DESCRIPTION = "signals", "signals.json"  # of a mined or served folder


class Requests(NamedTuple):
    """B requests with C candidates each."""

    items: np.ndarray  # (B, C) int64, 0 where there is no candidate
    history: Padded  # the newest events before each request
    now: np.ndarray  # (B,) int64 seconds of each request; of the newest event where the model is not told
    vectors: np.ndarray  # (V + 1, D) float32, the retriever's item vectors, row 0 zero
    queries: np.ndarray  # (B, D) float32, its query vectors

    def newest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Items and times of the newest `count` events, newest first, (B, count) int64 each; 0 where there are none."""
        return newest_first(self.history.items, self.history.lengths, count), newest_first(
            self.history.times, self.history.lengths, count
        )


class Signal(ABC):
    """Numbers of each candidate of a request, from tables of training events. Options are kept under their names."""

    by_id: ClassVar[bool] = False  # whether they come from the item's id, and are hidden where ids are masked
    tables: dict[str, np.ndarray]  # all it has counted

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Of the S numbers; a plain attribute of the class where they never change."""

    @property
    def counted(self) -> Collection[str]:
        """Those of the names that count the item's own events, and are hidden where it has none."""
        return ()

    @property
    def reads_times(self) -> bool:
        """Whether a request must say when it and its events happened."""
        return False

    @property
    def reads_ratings(self) -> bool:
        """Whether it looks at how a history's events were rated."""
        return False

    @property
    def reads_user(self) -> bool:
        """Whether it looks at features of the user."""
        return False

    @abstractmethod
    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        """Counts training events, and nothing else, into `tables`.

        Args:
            dataset: prepared dataset.
            vectors: (V + 1, D) the retriever's item vectors, row 0 zero.

        Raises:
            ValueError: where the data lack what the signal needs.
        """

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        """Takes the tables that `fit` made, read again."""
        self.tables = tables

    @abstractmethod
    def __call__(self, requests: Requests) -> np.ndarray:
        """(B, C, S) float32, finite, of moderate size (logarithms of counts and seconds); 0 where no candidate is."""


class Proposer(Signal):
    """A signal that also names candidates of its own.

    Args:
        candidates: how many it names at each request; 0: none.
    """

    def __init__(self, candidates: int = 0) -> None:
        if candidates < 0:
            raise ValueError(f"candidates is {candidates}, expected 0 for none, or more")
        self.candidates = candidates

    @abstractmethod
    def propose(self, requests: Requests, known: Ragged) -> np.ndarray:
        """Its best `candidates` items that are not known, best first, (B, candidates) int64; −1 where there are fewer.

        `requests.items` is not looked at.
        """


def is_excluded(items: np.ndarray, known: Ragged, size: int) -> np.ndarray:
    """Which of (B, N) items their row's user has met; also true of 0 and below.

    Args:
        size: above every item number.
    """
    keys = np.sort(known.rows * size + known.values)
    target_action = np.arange(len(items))[:, None] * size + items
    place = np.searchsorted(keys, target_action).clip(max=max(len(keys) - 1, 0))
    return (items <= 0) | (keys[place] == target_action if len(keys) else False)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1 along the last axis; zero stays zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def specify(signal: Signal) -> dict[str, Any]:
    """A signal's class and options, plainly."""
    options = {name: getattr(signal, name) for name in inspect.signature(type(signal)).parameters}
    return {"class_path": name_of(type(signal)), "init_args": options}


def save_signals(signals: Sequence[Signal], folder: Path) -> None:
    """Writes signals and their tables into a new folder."""
    folder.mkdir()
    (folder / DESCRIPTION).write_text(json.dumps([specify(signal) for signal in signals], indent=2), encoding="utf-8")
    for number, signal in enumerate(signals):
        for name, table in signal.tables.items():
            np.save(folder / f"{number}.{name}.npy", table)


def load_signals(folder: Path) -> list[Signal]:
    """Signals as they were saved; tables stay on disk until they are looked at."""
    signals, path = [], folder / DESCRIPTION
    for number, described in enumerate(read_json(path, list, "recsys mine-negatives, and export-bundle")):
        made = factory(described, Signal, path)
        try:
            signal = made()
        except Exception as error:  # whatever a constructor says of untrusted options
            raise ValueError(f"{path} has a {described['class_path']} with other options ({error})") from error
        files = sorted(folder.glob(f"{number}.*.npy"))
        signal.restore({file.name.split(".")[1]: read_array(file) for file in files})
        signals.append(signal)
    return signals
