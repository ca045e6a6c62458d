"""Folds over users: a share of the users whose events a retriever is not trained on and signals do not count."""

import re
from typing import NamedTuple

import numpy as np

from recsys2stage.data.dataset import Dataset
from recsys2stage.data.hashing import splitmix64

MAX_FOLDS = 1_000
SEED = 0x466F6C64  # of the hash; another one than the choice of the ranker's validation users, so both are independent


class Fold(NamedTuple):
    """Fold `number` of `total`, written number/total: the users whose hash leaves that remainder."""

    number: int  # from 0
    total: int

    @classmethod
    def parse(cls, text: object) -> "Fold":
        """From text such as 0/5.

        Raises:
            ValueError: for other text, and for numbers out of range.
        """
        found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text) if isinstance(text, str) else None
        fold = cls(int(found[1]), int(found[2])) if found else None
        if fold is None or not (2 <= fold.total <= MAX_FOLDS and fold.number < fold.total):
            raise ValueError(
                f"fold is {str(text)[:80]!r}, expected NUMBER/TOTAL with a total from 2 to {MAX_FOLDS:,} and a number "
                "from 0 to total − 1; set fold to 0/5, for example, for the first of five"
            )
        return fold

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def members(self, num_users: int) -> np.ndarray:
        """Which users are in the fold, by a hash of the user number, (U,) bool."""
        return splitmix64(np.arange(num_users), SEED) % np.uint64(self.total) == self.number


def without_fold(dataset: Dataset, fold: Fold) -> Dataset:
    """The dataset with the training events of all users but the fold's.

    The users of the fold keep their events, as histories and targets that are given by index, but `train_ends`, and all
    that is counted of training events, leaves them out. Their validation targets by name ("val") are meaningless.

    Raises:
        ValueError: if no user is left to train on, or no user is in the fold.
    """
    members = fold.members(dataset.num_users)
    starts, ends = np.asarray(dataset.offsets[:-1]), np.asarray(dataset.train_ends)
    for empty, who in ((~members, "outside"), (members, "in")):
        if not (ends > starts)[empty].any():
            raise ValueError(
                f"fold is {fold}, and {dataset.path} has no user with training events {who} it, expected some in and "
                f"some outside it; {dataset.num_users:,} users are too few: prepare data of more users, or leave fold "
                "out"
            )
    view = Dataset(dataset.path, dataset.until)
    view.fold, view.train_ends = str(fold), np.where(members, starts, ends)
    return view
