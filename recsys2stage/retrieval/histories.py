"""Data module of the retriever (`Histories`), and the batch loader and data module base that both stages share.

Batches are gathers over memory-mapped arrays, so there are no workers and no per-row Python.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from lightning import LightningDataModule
from torch import Tensor

from recsys2stage import columns as c
from recsys2stage.artifacts import fingerprint, read_manifest, take
from recsys2stage.checkpoints import OPTIONS, SPLIT, load_checkpoint, trained_until
from recsys2stage.data.batches import as_history, windows
from recsys2stage.data.dataset import At, Dataset, feature_specs
from recsys2stage.data.folds import Fold, without_fold
from recsys2stage.options import MAX_LENGTH, Part, RequestTime, Until, check_integer, check_option, check_untrained
from recsys2stage.shapes import History

BEST = "best.ckpt"  # in the folder of a fit


class Queries(NamedTuple):
    """Histories with their targets and excluded items."""

    users: Int[Tensor, " B"]
    history: History
    target: Int[Tensor, " B"]
    excluded_rows: Int[Tensor, " X"]
    excluded_items: Int[Tensor, " X"]


class BatchLoader:
    """Data loader that follows a plan of index arrays, computed at the start of each epoch.

    All plans here depend only on seed and epoch, so a run resumes exactly in the middle of an epoch.

    Args:
        read: indices -> batch.
        plan: returns the index arrays of an epoch, one per batch; their number must not change between epochs.
        epoch: returns the current epoch number.
    """

    def __init__(
        self,
        read: Callable[[np.ndarray], Any],
        plan: Callable[[], list[np.ndarray]],
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.read, self.plan, self.epoch = read, plan, epoch
        self.length = len(plan())
        self.state = {"epoch": epoch(), "next": 0, "batches": self.length}
        self.loaded: dict[str, int] | None = None

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        plan, epoch = self.plan(), self.epoch()
        loaded, self.loaded = self.loaded, None  # applies to one epoch only: the next starts at batch 0
        first = 0
        if loaded is not None and loaded["epoch"] == epoch and loaded["next"] < loaded["batches"]:
            if loaded["batches"] != len(plan):
                raise ValueError(
                    f"the checkpoint was saved after {loaded['next']} of the {loaded['batches']} batches of an epoch, "
                    f"which now has {len(plan)}; resume with the same data, batch size and number of processes, "
                    "or start a new run without --ckpt_path"
                )
            first = loaded["next"]
        for number in range(first, len(plan)):
            # before the yield: a checkpoint is saved while the batch is in use
            self.state = {"epoch": epoch, "next": number + 1, "batches": len(plan)}
            yield self.read(plan[number])

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state.keys() != self.state.keys():
            raise ValueError("the checkpoint was written by an older version; start a new run without --ckpt_path")
        self.loaded = state


def seed() -> int:
    """Seed of the run, as set by `seed_everything`."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def shuffled(lengths: np.ndarray, batch_size: int, epoch: int, pool: int = 32) -> list[np.ndarray]:
    """Random batches of indices, bucketed by length to reduce padding; depends only on the run's seed and the epoch.

    The shuffled indices are cut into pools of `pool` batches. Each pool is sorted by length and cut into batches, and
    the batches are shuffled.
    """
    rng = np.random.default_rng([seed(), epoch])
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * pool):
        part = order[start : start + batch_size * pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def balance_batches(batches: list[np.ndarray], processes: int) -> list[np.ndarray]:
    """Splits the largest batches until their number is a multiple of `processes`; each index is kept exactly once.

    Raises:
        ValueError: if a process would have no batch.
    """
    if len(batches) < processes:
        raise ValueError(
            f"{processes} processes share {len(batches)} training batches, expected at least one per process; lower "
            f"the data's batch_size, or set trainer.devices to at most {len(batches)}"
        )
    batches = list(batches)
    while len(batches) % processes:
        largest = max(range(len(batches)), key=lambda number: len(batches[number]))
        if len(batches[largest]) == 1:
            raise ValueError(
                f"{len(batches)} training batches of one row cannot be shared equally by {processes} processes; set "
                "the data's batch_size to at least 2"
            )
        batches[largest : largest + 1] = np.array_split(batches[largest], 2)
    return batches


class ArrayModule(LightningDataModule):
    """Base data module over memory-mapped arrays: shards training and evaluation batches between processes."""

    path: Path
    batch_size: int
    dataset: Dataset

    @property
    def split_hash(self) -> str:
        """Hash of the prepared dataset's split; stored in checkpoints."""
        return self.dataset.manifest["split_hash"]

    @property
    def until(self) -> Until:
        """Where the training events end; stored in checkpoints."""
        return self.dataset.until

    def __str__(self) -> str:  # Lightning's own reads a batch of every loader
        return f"{type(self).__name__}({self.path})"

    def _shuffled(self, read: Callable[[np.ndarray], Any], lengths: np.ndarray) -> BatchLoader:
        """Training batches of this process. Across processes, each index is used once per epoch."""
        rank, processes = self._rank()

        def epoch() -> int:
            return self.trainer.current_epoch if self.trainer else 0

        def plan() -> list[np.ndarray]:
            return balance_batches(shuffled(lengths, self.batch_size, epoch()), processes)[rank::processes]

        return BatchLoader(read, plan, epoch)

    def _in_order(self, read: Callable[[np.ndarray], Any], rows: np.ndarray, batch_size: int) -> BatchLoader:
        """Evaluation batches of this process: each row once, and the same number of batches in every process.

        Args:
            read: rows -> batch.
            rows: (n,) numbers of the targets or lists to evaluate.
            batch_size: rows per batch.

        Raises:
            ValueError: if there are fewer rows than processes.
        """
        rank, processes = self._rank()
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        if len(rows) < processes:
            raise ValueError(
                f"{processes} processes share {len(rows)} evaluation targets, expected at least one per process; set "
                f"trainer.devices to at most {len(rows)}"
            )
        if processes > 1:
            count = -(-len(batches) // processes) * processes
            batches = np.array_split(rows, count if count <= len(rows) else count - processes)[rank::processes]
        return BatchLoader(read, lambda: batches)

    def _rank(self) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class Histories(ArrayModule):
    """Training windows over every user's training events, and histories that end before validation and test targets.

    Args:
        path: prepared dataset.
        prepare: configuration of `recsys prepare-data`, used if `path` has no dataset yet.
        max_length: maximum history length L.
        batch_size: windows per training batch.
        eval_batch_size: targets per validation or test batch.
        request_time: request time given to the model: none (`none`), the time of the newest event (`last_event`), or
            the target's own time (`target`), which matches a server that knows the current time.
        next_action: target action given to the model: none (`none`), the target's own action (`target`), or the name of
            an action: then the target's own in training and this one at every request.
        fold: users left out of training, as NUMBER/TOTAL: 0/5 is the first of five folds, by a hash of the user. Then
            mine-negatives makes lists around all their events. None: train on all users. All users validate.
        refit: folder of a finished retriever that was chosen by validation on this dataset: trains with its options on
            the events until `until`, for the number of epochs of its best checkpoint, and does not validate.
        until: where the training events of a refit end: before each user's test targets (`test`, if it is None), or
            nowhere (`end`: there can be no test then).
    """

    def __init__(
        self,
        path: Path,
        prepare: Path | None = None,
        max_length: int = 200,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        request_time: RequestTime = "none",
        next_action: str = "none",
        fold: str | None = None,
        refit: Path | None = None,
        until: Literal["test", "end"] | None = None,
    ) -> None:
        super().__init__()
        if until is not None:
            check_option("until", until, Literal["test", "end"])
            if refit is None:
                raise ValueError(
                    f"until is {until!r} without refit, expected the folder of a finished retriever as refit: a fit on "
                    "validation events cannot choose its number of epochs; set refit, or leave out until"
                )
        if fold is not None and refit is not None:
            raise ValueError(
                f"fold is {fold} and refit {refit}, expected one of them: a refit learns from all users; leave fold out"
            )
        check_integer("max_length", max_length, 1, MAX_LENGTH, example=200)
        check_integer("batch_size", batch_size, example=128)
        check_integer("eval_batch_size", eval_batch_size, example=256)
        check_option("request_time", request_time, RequestTime)
        self.path, self.max_length = Path(path), max_length
        self.request_time, self.next_action = request_time, next_action
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.prepare, self.refit = prepare, None if refit is None else Path(refit)
        self.prepare_data()  # before Lightning calls it, because the model's size comes from the data
        self.dataset = Dataset(path, "val" if refit is None else until or "test")
        self.dataset.check_request_time(request_time)
        self.dataset.check_next_action(next_action)
        self.fold = None if fold is None else str(Fold.parse(fold))
        self.trained = self.dataset if fold is None else without_fold(self.dataset, Fold.parse(fold))
        train_ends = np.asarray(self.trained.train_ends)
        self.window_starts, self.window_ends = windows(np.asarray(self.dataset.offsets[:-1]), train_ends, max_length)
        self.window_users = np.searchsorted(self.dataset.offsets, self.window_starts, side="right") - 1

    def prepare_data(self) -> None:
        """Prepares the dataset with the configuration `prepare` if it is missing."""
        if self.prepare is None or (self.path / c.MANIFEST).is_file():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the first process prepares, the others wait
            try:
                if not (self.path / c.MANIFEST).is_file():
                    prepare_dataset(self.prepare, self.path)
            finally:
                lock.unlink(missing_ok=True)

    @property
    def num_items(self) -> int:
        return self.dataset.num_items

    @property
    def parents(self) -> dict[str, Path]:
        return {"data": self.path} | ({} if self.refit is None else {"selected": self.refit / BEST})

    @property
    def epochs(self) -> int | None:
        """Number of training epochs for a refit; None: as configured."""
        if self.refit is None:
            return None
        make = f"recsys fit --output {self.refit}, without refit"
        made = read_manifest(self.refit, "retriever", make)
        if made["parents"].get("data", {}).get("hash") != fingerprint(self.path):
            raise ValueError(
                f"{self.refit} was not chosen on {self.path} as it is now, expected a retriever of these data; refit "
                "on the data it was chosen on, or choose one on these first"
            )
        return chosen_epochs(self.refit / BEST, self.dataset, make)

    @property
    def features(self) -> list[dict[str, Any]]:
        """Declared item features, without their arrays."""
        return feature_specs(self.dataset.item_features)

    @property
    def user_features(self) -> list[dict[str, Any]]:
        """Declared user features, without their arrays."""
        return feature_specs(self.dataset.user_features)

    @property
    def actions(self) -> list[str]:
        """Action types, numbered from 1."""
        return self.dataset.action_names

    def train_dataloader(self) -> BatchLoader:
        if not len(self.window_starts):
            raise ValueError(f"{self.path} has no user with two training events, so there are no targets to train on")
        return self._shuffled(self.read_windows, self.window_ends - self.window_starts)

    def val_dataloader(self) -> BatchLoader:
        return self._queries("val")

    def test_dataloader(self) -> BatchLoader:
        return self._queries("test")

    def _queries(self, split: Part) -> BatchLoader:
        users, events = self.dataset.target_events(split)
        if not len(users):
            raise ValueError(f"{self.path} has no user with a {split} target; see counts in {self.path / c.MANIFEST}")

        def read(batch: np.ndarray) -> Queries:
            return self.read_queries(users[batch], events[batch])

        return self._in_order(read, np.arange(len(users)), self.eval_batch_size)

    def read_windows(self, batch: np.ndarray) -> History:
        padded = self.dataset.events(self.window_starts[batch], self.window_ends[batch])
        user_values = self.dataset.user_values(self.window_users[batch])
        unknown = None if self.next_action == "none" else np.zeros(len(batch), np.int64)  # after the newest event
        return as_history(padded._replace(user=user_values), self.request_time, target_action=unknown)

    def read_queries(self, users: np.ndarray, at: At) -> Queries:
        """Queries of one target for each row.

        Args:
            users: (B,) user of each target; a user may have several.
            at: (B,) indices of the targets, or `val` or `test` for each user's (first) target.
        """
        padded = self.dataset.histories(users, at, self.max_length)
        excluded = self.dataset.filtered_items(users, at)
        return Queries(
            users=torch.from_numpy(users),
            history=as_history(
                padded,
                self.request_time,
                self.dataset.request_times(users, at),
                self.dataset.target_action(users, at, self.next_action),
            ),
            target=torch.from_numpy(self.dataset.targets(users, at)),
            excluded_rows=torch.from_numpy(excluded.rows),
            excluded_items=torch.from_numpy(excluded.values),
        )


def chosen_epochs(best: Path, dataset: Dataset, make: str) -> int:
    """Number of epochs after which the best checkpoint of a fit was saved.

    Args:
        best: the checkpoint.
        dataset: of the refit.
        make: command that makes such a checkpoint, for the error.

    Raises:
        ValueError: for a checkpoint of another split, of a refit, of a fold of users, or from before the first step.
    """
    checkpoint = load_checkpoint(best, make)
    dataset.check_split(best, checkpoint[SPLIT])
    check_untrained(best, trained_until(checkpoint, best), "val", "refit the run that was chosen by validation")
    if not take(checkpoint, "global_step", int, best):
        raise ValueError(
            f"{best} is step 0, before any training, expected one after a step; serve it as it is, or use REFIT=all"
        )
    if (fold := take(checkpoint, OPTIONS, dict, best).get("fold")) is not None:
        raise ValueError(
            f"{best} was fitted with data.fold {fold}, expected a retriever fitted on all users; refit the one that is "
            "served"
        )
    return int(take(checkpoint, "epoch", int, best)) + 1


def prepare_dataset(config: Path, output: Path) -> None:
    """Runs `recsys prepare-data --config config --output output`."""
    from jsonargparse import ArgumentParser

    from recsys2stage.data import sources  # noqa: F401  (short class names resolve once their module is imported)
    from recsys2stage.data.prepare import prepare

    if not config.is_file():
        raise FileNotFoundError(f"{output} has no dataset and {config} does not exist; give a prepare-data config")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(prepare)
    options = parser.instantiate(parser.parse_path(str(config)))
    prepare(**{**options.as_dict(), "output": output})
