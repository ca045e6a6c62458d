"""Data module of the ranker (`Candidates`): batches of mined candidate lists."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from recsys2stage import columns as c
from recsys2stage.artifacts import find_parent, fingerprint, read_array, read_manifest, take, verify
from recsys2stage.checkpoints import OPTIONS, load_checkpoint
from recsys2stage.data.batches import padded_indices, recent_events
from recsys2stage.data.dataset import Dataset, feature_specs
from recsys2stage.options import MAX_LENGTH, RequestTime, check_integer
from recsys2stage.ranking.lists import STATES, CandidateLists, concatenate_lists, read_candidates
from recsys2stage.ranking.signals.base import FOLDER, MAX_CANDIDATES
from recsys2stage.ranking.signals.other import DESCRIBED
from recsys2stage.retrieval.histories import BEST, ArrayModule, BatchLoader, chosen_epochs, seed
from recsys2stage.retrieval.index import VECTORS
from recsys2stage.shapes import CandidateBatch

NEEDS = {  # of the manifest of mined lists
    "options": dict,
    "vector_dim": int,
    "max_length": int,
    "signals": list,
    "request_time": str,
    "split_hash": str,
}


class Lists(NamedTuple):
    """A batch of candidate lists and the index of the positive in each."""

    candidates: CandidateBatch
    positive: Int[Tensor, " B"]  # −1 if it is not among the candidates


class Candidates(ArrayModule):
    """Mined candidate lists: training lists of most users, validation lists of the others.

    Args:
        path: folder written by `recsys mine-negatives`.
        batch_size: lists per batch.
        recent: number R of newest events of a history given to the ranker.
        folds: further mined folders with training lists of the same events, from retrievers that were not trained on
            their targets: of a fold of users (mine-negatives with `fold`), or of earlier targets (data prepared by
            LeaveOneOut with a higher `val`). States of another retriever do not match this one's vectors, so the ranker
            must be without state.
        refit: folder of a finished ranker that was selected on these lists: trains on all lists, including the
            validation lists, for the number of epochs of that ranker's best checkpoint.
    """

    def __init__(
        self,
        path: Path,
        batch_size: int = 128,
        recent: int = 20,
        folds: list[Path] | None = None,
        refit: Path | None = None,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size, example=128)
        check_integer("recent", recent, 0, MAX_LENGTH, example=20)  # 0: no event
        self.path, self.batch_size, self.recent = Path(path), batch_size, recent
        self.folds, self.refit = [Path(folder) for folder in folds or []], None if refit is None else Path(refit)
        self.manifest = read_mined_manifest(self.path)
        if (fold := self.manifest["options"].get("fold")) is not None:
            raise ValueError(
                f"{self.path} holds lists of fold {fold} of the users, expected those of a retriever fitted on "
                f"all users; give these as path, and {self.path} as one of data.folds"
            )
        self.dataset = Dataset(_parent(self.path, self.manifest, "data"))
        self.dataset.check_split(self.path, self.manifest["split_hash"])

    @property
    def num_items(self) -> int:
        return self.dataset.num_items

    @property
    def vector_dim(self) -> int:
        return int(self.manifest["vector_dim"])

    @property
    def num_candidates(self) -> int:
        """Number of candidates retrieved per user in mining, and therefore in serving."""
        return int(self.manifest["options"]["k"])

    @property
    def parents(self) -> dict[str, Path]:
        folds = {f"fold {number}": folder for number, folder in enumerate(self.folds, start=1)}
        return {"candidates": self.path} | folds | ({} if self.refit is None else {"selected": self.refit})

    @property
    def epochs(self) -> int | None:
        """Number of training epochs for a refit; None: as configured."""
        if self.refit is None:
            return None
        made = read_manifest(self.refit, "ranker", f"recsys fit --output {self.refit}, without refit")
        lists = {name: fingerprint(folder) for name, folder in self.parents.items() if name != "selected"}
        if {name: parent["hash"] for name, parent in made["parents"].items()} != lists:
            raise ValueError(
                f"{self.refit} was not selected on the lists of {', '.join(map(str, [self.path, *self.folds]))}; refit "
                "on the lists it was selected on, or select a ranker on these first"
            )
        return chosen_epochs(self.refit / BEST, self.dataset, f"recsys fit --output {self.refit}, without refit")

    @property
    def masks_ids(self) -> bool:
        """Whether the ranker to refit was chosen with its IDs always masked."""
        assert self.refit is not None
        best = load_checkpoint(self.refit / "best.ckpt", f"recsys fit --output {self.refit}, without refit")
        return bool(best[OPTIONS].get("mask_ids"))

    @property
    def features(self) -> list[dict[str, Any]]:
        """Item features available to the ranker: name, kind, size and width of the array of values."""
        return feature_specs(self.dataset.item_features)

    @property
    def signals(self) -> list[dict[str, Any]]:
        """{"name", "by_id", "counted"} of each mined signal feature."""
        return self.manifest["signals"]

    @property
    def scores_cold(self) -> bool:
        """Whether the retriever's scores of cold items (no training events) are usable."""
        return bool(self.manifest["scores_cold"])

    def item_vectors(self) -> Float[Tensor, "W D"]:
        """The retriever's item vectors; row 0 is padding."""
        path = _parent(self.path, self.manifest, "index") / VECTORS
        vectors = np.array(read_array(path, np.float32, (self.num_items, self.vector_dim)))
        return torch.from_numpy(np.concatenate([np.zeros_like(vectors[:1]), vectors]))

    def setup(self, stage: str) -> None:
        given = [folder.resolve() for folder in map(Path, [self.path, *self.folds])]
        if len(set(given)) < len(given):
            twice = next(folder for folder in given if given.count(folder) > 1)
            raise ValueError(f"{twice} is given twice, expected path and folds to differ; leave one out")
        names = [signal["name"] for signal in self.signals]
        own = read_candidates(self.path, names, self.dataset)
        self._refuse_test_events(self.path, own)
        validation = np.unique(own.user[own.fold == "select"])
        self.states = read_array(self.path / STATES, np.float32, (len(own.user), self.vector_dim))
        self.lists = concatenate_lists([own, *(self.read_fold(folder, names, validation) for folder in self.folds)])

    def read_fold(self, folder: Path, names: list[str], validation: np.ndarray) -> CandidateLists:
        """Reads lists of other targets of the same events; those of validation users are not used for training.

        Args:
            folder: written by `recsys mine-negatives`.
            names: columns of the signals.
            validation: validation users of this module's own lists.
        """
        manifest = read_mined_manifest(folder)
        data, own = Dataset(_parent(folder, manifest, "data")), self.manifest
        data.check_split(folder, manifest["split_hash"])
        if manifest["signals"] != self.signals or signal_options(folder, manifest) != signal_options(self.path, own):
            raise ValueError(
                f"{folder} and {self.path} were mined with different signals or signal options; mine both with the "
                "same ones"
            )
        if manifest["scores_cold"] != own["scores_cold"]:
            raise ValueError(
                f"only one of the retrievers of {folder} and {self.path} has an item tower, so their scores of cold "
                "items are not comparable; train both with an item tower or both without"
            )
        if manifest["request_time"] != own["request_time"]:  # otherwise signals would use different request times
            raise ValueError(
                f"the retriever of {folder} has request_time {manifest['request_time']}, that of {self.path} "
                f"{own['request_time']}; train both with the same one"
            )
        same = np.array_equal(data.offsets, self.dataset.offsets) and np.array_equal(data.items, self.dataset.items)
        if not same:
            raise ValueError(f"{folder} was mined from other events than {self.path}; prepare both from the same log")
        if (np.asarray(data.train_ends) > np.asarray(self.dataset.val_ends)).any():
            raise ValueError(
                f"the retriever of {folder} was trained on test events of {self.dataset.path}; prepare the fold's data "
                "with earlier targets, as LeaveOneOut with a higher val"
            )
        lists = read_candidates(folder, names, data)
        self._refuse_test_events(folder, lists)
        held_out = np.isin(lists.user, validation) | (lists.fold == "select")
        return lists._replace(fold=np.where(held_out, "unused", lists.fold))

    def _refuse_test_events(self, folder: Path, lists: CandidateLists) -> None:
        if (late := int((lists.position >= np.asarray(self.dataset.val_ends)[lists.user]).sum())) > 0:
            raise ValueError(f"{late:,} targets of {folder} are test events of {self.dataset.path}; mine earlier ones")

    def training_lists(self) -> Int[np.ndarray, " N"]:
        """Numbers of the training lists, which contain their target."""
        used = self.lists.fold == "train" if self.refit is None else np.ones(len(self.lists.fold), dtype=bool)
        train = np.flatnonzero(used & (self.lists.positive >= 0))
        if not len(train):
            raise ValueError(
                f"no candidate list in {self.path} contains its target; mine more candidates (k) or train the retriever"
            )
        return train

    def train_dataloader(self) -> BatchLoader:
        train = self.training_lists()
        return self._shuffled(lambda batch: self.read(train[batch]), np.diff(self.lists.offsets)[train])

    def sample_lists(self, count: int) -> tuple[Lists, Int[np.ndarray, " N"]]:
        """At most `count` training lists, sampled by the seed of the run, and the user of each."""
        train = self.training_lists()
        sampled = train if len(train) <= count else np.random.default_rng(seed()).choice(train, count, replace=False)
        return self.read(sampled), self.lists.user[sampled]

    def val_dataloader(self) -> BatchLoader:
        validation = np.flatnonzero(self.lists.fold == "select")
        if not len(validation):
            raise ValueError(f"{self.path} has no validation users for the ranker; mine with select above 0")
        return self._in_order(self.read, validation, self.batch_size)

    def test_dataloader(self) -> BatchLoader:
        raise ValueError("the ranker and its retriever are tested together, on the same users: run recsys evaluate")

    def read(self, batch: np.ndarray) -> Lists:
        starts, ends = self.lists.offsets[batch], self.lists.offsets[batch + 1]
        index, real = padded_indices(starts, ends)
        ends = self.dataset.ends(self.lists.user[batch], self.lists.position[batch])
        length = min(self.recent, self.manifest["max_length"])  # maximum length in serving
        newest = self.dataset.events(np.maximum(ends - length, self.dataset.offsets[self.lists.user[batch]]), ends)
        recent, ages = recent_events(newest, self.lists.request_time[batch], self.recent, self.dataset.has_time)
        candidates = CandidateBatch(
            state=torch.from_numpy(self.read_states(batch)),
            items=torch.from_numpy(np.where(real, self.lists.items[index], c.PAD).astype(np.int64)),
            score=torch.from_numpy(self.lists.score[index]),
            rank=torch.from_numpy(self.lists.rank[index].astype(np.int64)).clamp(min=1),
            signals=torch.from_numpy(self.lists.signals[index]),
            recent=recent,
            ages=ages,
        )
        return Lists(candidates, torch.from_numpy(self.lists.positive[batch]))

    def read_states(self, batch: np.ndarray) -> Float[np.ndarray, "B D"]:
        """The users' query vectors; zero in lists of another retriever."""
        own = batch < len(self.states)
        states = np.asarray(self.states[np.where(own, batch, 0)], dtype=np.float32)
        return states * own[:, None]


def read_mined_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of mined lists; raises if the data or index they were mined from has changed."""
    manifest = read_manifest(folder, "candidates", f"recsys mine-negatives --output {folder}")
    for name, kind in NEEDS.items():
        take(manifest, name, kind, folder / c.MANIFEST)
    _check_values(manifest, folder / c.MANIFEST, f"mine again: recsys mine-negatives --output {folder}")
    verify(folder, manifest, f"recsys mine-negatives --output {folder}")
    if "scores_cold" not in manifest:
        raise ValueError(
            f"{folder} was mined by an older version, whose manifest lacks scores_cold; mine again: "
            f"recsys mine-negatives --output {folder}"
        )
    for name, parent in manifest["parents"].items():
        path = _parent(folder, manifest, name)
        if fingerprint(path) != parent.get("hash"):
            raise ValueError(
                f"{folder} was mined from another {name} than the one now in {path}; mine again: "
                f"recsys mine-negatives --output {folder}"
            )
    return manifest


def signal_options(folder: Path, manifest: dict[str, Any]) -> list[Any]:
    """Class and options of the signals of mined lists, with the architecture of a second retriever for its folder.

    The second retriever of a fold is another training of the same one, in another folder.

    Args:
        folder: the mined lists.
        manifest: theirs.
    """
    options = []
    for number, signal in enumerate(manifest["options"]["signals"]):
        described = folder / FOLDER / f"{number}.{DESCRIBED}.npy"
        if described.is_file():
            init = {name: value for name, value in signal["init_args"].items() if name != "index"}
            signal = {**signal, "init_args": init | {DESCRIBED: read_array(described, np.uint8).tobytes()}}
        options.append(signal)
    return options


def _check_values(manifest: dict[str, Any], where: Path, advice: str) -> None:
    """Raises a ValueError for nested values of other types, as in damaged manifests or those of strangers."""

    def refuse(value: str, expected: str) -> NoReturn:
        raise ValueError(f"{where} has {value[:120]}, expected {expected}; {advice}")

    options = manifest["options"]
    for name, value, most in (
        ("k", options.get("k"), MAX_CANDIDATES),
        ("vector_dim", manifest["vector_dim"], MAX_CANDIDATES),
        ("max_length", manifest["max_length"], MAX_CANDIDATES),
    ):
        if type(value) is not int or not 1 <= value <= most:
            refuse(f"the {name} {value!r}", f"an integer from 1 to {most:,}")
    if not {"data", "index"} <= manifest["parents"].keys():
        refuse(f"the parents {', '.join(manifest['parents'])}", "data and index")
    if not isinstance(options.get("fold"), str | None):
        refuse(f"the option fold {options['fold']!r}", "a fold such as 0/5, or null")
    if not isinstance(options.get("signals"), list):
        refuse(f"the option signals {options.get('signals')!r}", "a list of signals")
    for signal in manifest["signals"]:
        given = signal if isinstance(signal, dict) else {}
        if not isinstance(given.get("name"), str) or not all(
            isinstance(given.get(flag), bool) for flag in ("by_id", "counted")
        ):
            refuse(f"the signal {signal!r}", "a name and the flags by_id and counted")
    if manifest["request_time"] not in get_args(RequestTime):
        refuse(f"the request_time {manifest['request_time']!r}", f"one of {', '.join(get_args(RequestTime))}")
    if not isinstance(manifest.get("scores_cold", False), bool):  # its absence has a sentence of its own
        refuse(f"the scores_cold {manifest['scores_cold']!r}", "true or false")


def _parent(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    advice = f"put it back, or mine again: recsys mine-negatives --data DATA --index INDEX --output {folder}"
    return find_parent(folder, manifest, name, advice)
