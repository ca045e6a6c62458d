"""What usually follows all of the newest items taken together: linear next-item models in closed form."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, cut, highest

NEGLIGIBLE = 0.01  # weight below which an event of the history is left out
NUMBERS_IN_FLIGHT = 1 << 22  # weights that are looked up together


class SLIT(Proposer):
    """Session-aware Linear Item Transition models (Choi et al., WWW 2021, eq. 9) with the next item as the answer.

    At each training event t, x_t is the history before it with an event k places back weighted decay^k, k = 0 the
    newest, and y_t marks the item of t. The weights

        W = argmin  Σ_t |y_t − Wᵀ x_t|² + Σ_ab ridge · m · W_ab²  =  (Σ x_t x_tᵀ + ridge · m · I)⁻¹ Σ x_t y_tᵀ

    with m the mean of the diagonal of Σ x_t x_tᵀ, are one model for each decay. Where `Transitions` counts what follows
    each event alone, these know that two events of the history say the same.

    The numbers are sign(s) · log(1 + 100 |s|) of s = Wᵀx at the candidate: near the share of times that it came
    next. They are 0, which says nothing, without a history and for items outside `items`.

    Proposals have the largest sum of s over the decays.

    Args:
        candidates: how many it names at each request; 0: none.
        decays: weight of an event in comparison to the one after it, one for each model.
        ridge: penalty of the weights.
        history: newest events that are looked at, those with a weight of at least .01 of the newest's.
        items: the most frequent items, which have weights; memory is its square, time of `fit` its cube.
    """

    by_id = True

    def __init__(
        self,
        candidates: int = 0,
        decays: Sequence[float] = (0.6, 0.85, 0.95, 0.99),
        ridge: float = 0.3,
        history: int = 100,
        items: int = 4096,
    ) -> None:
        super().__init__(candidates)
        self.decays, self.ridge, self.history, self.items = list(decays), ridge, history, items
        if not self.decays or not all(0 < decay <= 1 for decay in self.decays) or len(set(self.names)) < len(decays):
            raise ValueError(f"decays are {self.decays}, expected some with 0 < decay <= 1, a hundredth apart")
        if ridge <= 0:
            raise ValueError(f"ridge is {ridge}, expected a number above 0")
        if min(history, items) < 1:
            raise ValueError(f"history is {history} and items {items}, expected at least 1 each")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"next_{100 * decay:.0f}" for decay in self.decays)

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        train = spans(dataset.offsets[:-1], dataset.train_ends)
        items = np.asarray(dataset.items[train.values])
        after = np.repeat(train.offsets[1:], np.diff(train.offsets)) - np.arange(len(items)) - 1  # events of its user
        counts = np.asarray(dataset.train_counts)
        frequent = np.argsort(-counts, kind="stable")[: self.items]
        frequent = np.sort(frequent[counts[frequent] > 0])
        row = np.zeros(len(counts), dtype=np.int32)  # of each item in the weights; 0: none
        row[frequent] = np.arange(1, len(frequent) + 1)
        self.tables = {"row": row}
        for number, decay in enumerate(self.decays):
            gram, targets = _moments(row[items].astype(np.int64), after, decay, self._reach(decay), len(frequent) + 1)
            weights = np.zeros(gram.shape, dtype=np.float16)  # three digits are more than noise leaves
            if gram[1:, 1:].any():
                weights[1:, 1:] = _ridge(gram[1:, 1:], targets[1:, 1:], self.ridge)
            self.tables[f"weights_{number}"] = weights

    def _reach(self, decay: float) -> int:
        """How many of the newest events a model looks at."""
        return self.history if decay == 1 else min(self.history, 1 + int(math.log(NEGLIGIBLE) / math.log(decay)))

    def __call__(self, requests: Requests) -> np.ndarray:
        row = np.asarray(self.tables["row"])
        items = row[requests.items.clip(min=0)]
        newest = row[requests.newest(max(map(self._reach, self.decays)))[0]]
        numbers = np.zeros((*items.shape, len(self.decays)), dtype=np.float32)
        for number, decay in enumerate(self.decays):
            weights, reach = self.tables[f"weights_{number}"], self._reach(decay)
            fade = (decay ** np.arange(reach)).astype(np.float32)
            block = max(1, NUMBERS_IN_FLIGHT // max(reach * items.shape[1], 1))
            for begin in range(0, len(items), block):
                rows = slice(begin, begin + block)
                pairs = weights[newest[rows, :reach, None], items[rows, None]]  # (B, history, C)
                numbers[rows, :, number] = fade @ pairs.astype(np.float32)
        return np.sign(numbers) * np.log1p(100 * np.abs(numbers))

    def propose(self, requests: Requests, known: Ragged) -> np.ndarray:
        row = np.asarray(self.tables["row"])
        item = np.flatnonzero(row)  # of each row of the weights but the first
        newest = row[requests.newest(max(map(self._reach, self.decays)))[0]]
        proposals = np.zeros((len(newest), self.candidates), dtype=np.int64)
        for begin in range(0, len(newest), ROWS_IN_FLIGHT):
            rows = slice(begin, begin + ROWS_IN_FLIGHT)
            met, place = np.unique(newest[rows], return_inverse=True)
            place = place.reshape(-1, newest.shape[1])
            scores = np.zeros((len(place), len(item)), dtype=np.float32)
            for number, decay in enumerate(self.decays):
                history, reach = np.zeros((len(place), len(met)), dtype=np.float32), self._reach(decay)
                at = np.broadcast_to(np.arange(len(place))[:, None], (len(place), reach))
                np.add.at(history, (at, place[:, :reach]), (decay ** np.arange(reach)).astype(np.float32))
                scores += history @ self.tables[f"weights_{number}"][met][:, 1:].astype(np.float32)
            few = cut(known, begin, begin + len(place))
            scores[scores <= 0] = -np.inf
            proposals[rows] = highest(scores, item, few, len(row), self.candidates)
        return proposals


def _moments(
    items: np.ndarray, after: np.ndarray, decay: float, history: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Σ x xᵀ and Σ x yᵀ over all training events that have a history, (size, size) float64 each.

    Args:
        items: (E,) of the training events, user by user.
        after: (E,) how many of its user's come after each.
        decay: weight of an event in comparison to the one after it.
        history: newest events in x.
        size: above every item number.
    """
    gram, targets = np.zeros(size * size), np.zeros(size * size)
    for lag in range(history):
        first = np.flatnonzero(after >= lag + 1)  # with an event `lag` places on and one to predict after that
        last = first + lag
        np.add.at(targets, items[first] * size + items[last + 1], decay**lag)
        # both stand in x at each answer from last + 1 on, until the first has left: Σ_s decay^(lag + 2s)
        times = np.minimum(after[last], history - lag)
        weight = times if decay == 1 else (1 - decay ** (2 * times)) / (1 - decay**2)
        np.add.at(gram, items[first] * size + items[last], weight * decay**lag * (1 if lag else 0.5))
    pairs = gram.reshape(size, size)
    return pairs + pairs.T, targets.reshape(size, size)


def _ridge(gram: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """(gram + ridge · its mean diagonal · I)⁻¹ answers; gram is changed."""
    gram[np.diag_indices_from(gram)] += ridge * np.diag(gram).mean()
    return torch.cholesky_solve(torch.from_numpy(targets), torch.linalg.cholesky(torch.from_numpy(gram))).numpy()
