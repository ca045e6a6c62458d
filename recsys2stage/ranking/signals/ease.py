"""EASE: a linear model of the items of a history, in closed form; order does not count."""

import numpy as np
import torch

from recsys2stage.data.batches import Ragged
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import check_integer, check_number
from recsys2stage.ranking.lists import without_repeats
from recsys2stage.ranking.signals.base import Requests
from recsys2stage.ranking.signals.item_knn import co_occurrences, distinct_pairs
from recsys2stage.ranking.signals.slit import SLIT


class EASE(SLIT):
    """Embarrassingly shallow autoencoder (Steck, WWW 2019): the items of a user predicted from the user's other items.

    With x_u the set of the items of user u's training events as zeros and ones,

        B = argmin  Σ_u |x_u − Bᵀ x_u|² + ridge · m · |B|²   with a zero diagonal,   m the mean of Σ_u x_u²,

    which is B_ab = −P_ab / P_bb with P = (Σ_u x_u x_uᵀ + ridge · m · I)⁻¹. `SLIT` predicts the next item from the
    events before it; EASE knows no order, and repeated events count once.

    The value is sign(s) · log(1 + 100 |s|) of s = Bᵀx at the candidate, 0 without a history and for items that are not
    among the `items` most frequent ones. Proposals have the largest s.

    Args:
        candidates: number of items proposed for each request; 0: none.
        ridge: L2 penalty of the weights, relative to the mean number of users of an item.
        history: number of newest events to use.
        items: number of most frequent items that have weights; memory is quadratic in it, time of `fit` cubic.
    """

    def __init__(self, candidates: int = 0, ridge: float = 3.0, history: int = 100, items: int = 4096) -> None:
        check_number("ridge", ridge, above=0, example=3.0)
        check_integer("items", items, example=4096)
        super().__init__(candidates, decays=[1.0], ridge=ridge, history=history, items=items)

    @property
    def names(self) -> tuple[str, ...]:
        return ("score",)

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        counts, size = np.asarray(dataset.train_counts), dataset.num_items + 1
        frequent = np.argsort(-counts, kind="stable")[: self.items]
        frequent = np.sort(frequent[counts[frequent] > 0])
        row = np.zeros(size, dtype=np.int32)  # row of each item in the weights; 0: none
        row[frequent] = np.arange(1, len(frequent) + 1)
        users, items = distinct_pairs(dataset)
        columns, known = row[items].astype(np.int64), row[items] > 0
        gram = np.zeros((len(frequent) + 1, len(frequent) + 1))
        for first, second, together in co_occurrences(users[known], columns[known], len(gram)):
            gram[first, second] = together
        gram = gram[1:, 1:]
        weights = np.zeros((len(frequent) + 1, len(frequent) + 1, 1), dtype=np.float16)
        if len(frequent):
            gram[np.diag_indices_from(gram)] += self.ridge * np.diag(gram).mean()
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(torch.from_numpy(gram)))
            inverse /= -inverse.diagonal().clone()
            inverse.fill_diagonal_(0)
            weights[1:, 1:, 0] = inverse.numpy()
        self.restore({"row": row, "weights": weights})

    def __call__(self, requests: Requests) -> np.ndarray:
        return super().__call__(_each_once(requests))

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        return super().propose(_each_once(requests), excluded)


def _each_once(requests: Requests) -> Requests:
    """The requests with only the newest event of each item; older ones become item 0, which has no weights."""
    history = requests.history
    columns = np.arange(history.items.shape[1])
    back = np.asarray(history.lengths)[:, None] - 1 - columns  # newest first, and back again
    place = np.where(back >= 0, back, columns)
    newest = without_repeats(np.take_along_axis(history.items, place, axis=1)).clip(min=0)
    return requests._replace(history=history._replace(items=np.take_along_axis(newest, place, axis=1)))
