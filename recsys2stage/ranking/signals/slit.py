"""SLIT: linear item-transition models over the whole recent history, fitted in closed form."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from recsys2stage.data.batches import Ragged, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import MAX_LENGTH, check_integer, check_number, is_number
from recsys2stage.ranking.signals.base import Proposer, Requests
from recsys2stage.ranking.signals.keys import ROWS_IN_FLIGHT, slice_rows, top_by_score

NEGLIGIBLE = 0.01  # events with a smaller weight are left out of the history
NUMBERS_IN_FLIGHT = 1 << 17  # model weights per block, which stay in the processor's cache
WORDS = {1: np.uint16, 2: np.uint32, 4: np.uint64, 8: np.complex128}  # as long as so many float16


class SLIT(Proposer):
    """Session-aware Linear Item Transition models (Choi et al., WWW 2021, eq. 9) with the next item as target.

    For each training event t, x_t is the history before it, with weight decay^k for the event k positions before the
    newest, and y_t is the one-hot item of t. The weights

        W = argmin  Σ_t |y_t − Wᵀ x_t|² + Σ_ab ridge · m · W_ab²  =  (Σ x_t x_tᵀ + ridge · m · I)⁻¹ Σ x_t y_tᵀ

    with m the mean of the diagonal of Σ x_t x_tᵀ, are one model for each decay. `Transitions` counts followers of each
    event separately; these models also account for the correlation between the events of a history.

    The values are sign(s) · log(1 + 100 |s|) of s = Wᵀx at the candidate, which approximates the probability that it
    comes next. They are 0 without a history and for items that are not among the `items` most frequent ones.

    Proposals have the largest sum of s over the decays.

    Args:
        candidates: number of items proposed for each request; 0: none.
        decays: weight of an event relative to the next newer one, one for each model.
        ridge: L2 penalty of the weights.
        history: number of newest events to use, of which those with a weight below 0.01 are left out.
        items: number of most frequent items that have weights; memory is quadratic in it, time of `fit` cubic.
    """

    reads_allowed = True
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
        check_number("ridge", ridge, above=0, example=0.3)
        check_integer("history", history, 1, MAX_LENGTH, example=100)
        check_integer("items", items, example=4096)
        valid = isinstance(decays, (list, tuple)) and all(is_number(decay) and 0 < decay <= 1 for decay in decays)
        self.decays, self.ridge, self.history, self.items = list(decays) if valid else [], ridge, history, items
        if not self.decays or len(set(self.names)) < len(self.decays):
            raise ValueError(
                f"decays is {decays!r}, expected a list of numbers above 0 to 1, a hundredth apart; set decays to "
                "[0.6, 0.85, 0.95], for example"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"next_{100 * decay:.0f}" for decay in self.decays)

    def fit(self, dataset: Dataset, vectors: np.ndarray) -> None:
        train = spans(dataset.offsets[:-1], dataset.train_ends)
        items = np.asarray(dataset.items[train.values])
        after = np.repeat(train.offsets[1:], np.diff(train.offsets)) - np.arange(len(items)) - 1  # later of its user
        counts = np.asarray(dataset.train_counts)
        frequent = np.argsort(-counts, kind="stable")[: self.items]
        frequent = np.sort(frequent[counts[frequent] > 0])
        row = np.zeros(len(counts), dtype=np.int32)  # row of each item in the weights; 0: none
        row[frequent] = np.arange(1, len(frequent) + 1)
        # (rows, rows, models): one step finds the weights of a pair in all models. float16: three digits are more
        # precise than the estimates
        weights = np.zeros((len(frequent) + 1, len(frequent) + 1, len(self.decays)), dtype=np.float16)
        for number, decay in enumerate(self.decays):
            gram, targets = _moments(row[items].astype(np.int64), after, decay, self._reach(decay), len(frequent) + 1)
            if gram[1:, 1:].any():
                weights[1:, 1:, number] = _ridge(gram[1:, 1:], targets[1:, 1:], self.ridge)
        self.restore({"row": row, "weights": weights})

    def restore(self, tables: dict[str, np.ndarray]) -> None:
        if "weights" not in tables and "weights_0" in tables:  # a table for each model, as they were stored before
            own = [tables[f"weights_{number}"] for number in range(len(self.decays))]
            tables = {"row": tables["row"], "weights": np.stack(own, axis=2)}
        super().restore(tables)
        self._items = np.flatnonzero(tables["row"]) if "row" in tables else np.zeros(0, np.int64)  # of rows 1, 2, ...

    def _reach(self, decay: float) -> int:
        """Number of newest events that a model uses."""
        return self.history if decay == 1 else min(self.history, 1 + int(math.log(NEGLIGIBLE) / math.log(decay)))

    def __call__(self, requests: Requests) -> np.ndarray:
        row = self.tables["row"]
        longest = max(1, int(np.max(requests.history.lengths, initial=0)))
        fades = self._fades[:, :longest]
        items = row[np.maximum(requests.items, 0)]
        newest = row[requests.newest_items(fades.shape[1])]
        values = np.zeros((*items.shape, len(fades)), dtype=np.float32)
        block = max(1, NUMBERS_IN_FLIGHT // max(fades.numel() * items.shape[1], 1))
        for begin in range(0, len(items), block):
            own = slice(begin, begin + block)
            pairs = self._pairs(newest[own], items[own]).float()  # (B, events, C · models)
            sums = torch.matmul(fades, pairs).view(len(pairs), len(fades), items.shape[1], len(fades))
            values[own] = sums.diagonal(dim1=1, dim2=3).numpy()
        return np.copysign(np.log1p(100 * np.abs(values)), values)

    @functools.cached_property
    def _fades(self) -> torch.Tensor:
        """Weight of each of the newest events in each model, (models, events) float32; 0 beyond its reach."""
        fades = torch.zeros(len(self.decays), max(map(self._reach, self.decays)))
        for fade, decay in zip(fades, self.decays, strict=True):
            fade[: self._reach(decay)] = torch.from_numpy(decay ** np.arange(self._reach(decay)))
        return fades

    def _pairs(self, newest: np.ndarray, items: np.ndarray) -> torch.Tensor:
        """Weights of (B, L) events for (B, C) items, by row, (B, L, C · models) float16."""
        weights = self.tables["weights"]
        index = (newest[..., None] * np.int64(len(weights)) + items[:, None]).reshape(-1)
        table = weights.reshape(-1, weights.shape[2])
        one = WORDS.get(weights.shape[2])
        if one is None or not table.flags.c_contiguous:
            pairs = table.take(index, axis=0)
        else:  # all models in one word: memory is read once
            pairs = table.view(one)[:, 0].take(index).view(np.float16)
        return torch.from_numpy(pairs.reshape(*newest.shape, -1))

    def propose(self, requests: Requests, excluded: Ragged) -> np.ndarray:
        row, weights = self.tables["row"], self.tables["weights"]
        item = self._items
        newest = row[requests.newest_items(max(map(self._reach, self.decays)))]
        proposals = np.zeros((len(newest), self.candidates), dtype=np.int64)
        for begin in range(0, len(newest), ROWS_IN_FLIGHT):
            rows = slice(begin, begin + ROWS_IN_FLIGHT)
            distinct, inverse = np.unique(newest[rows], return_inverse=True)
            inverse = inverse.reshape(-1, newest.shape[1])
            scores = np.zeros((len(inverse), len(item)), dtype=np.float32)
            for number, decay in enumerate(self.decays):
                history, reach = np.zeros((len(inverse), len(distinct)), dtype=np.float32), self._reach(decay)
                at = np.broadcast_to(np.arange(len(inverse))[:, None], (len(inverse), reach))
                np.add.at(history, (at, inverse[:, :reach]), (decay ** np.arange(reach)).astype(np.float32))
                scores += history @ weights[distinct, 1:, number].astype(np.float32)
            own = slice_rows(excluded, begin, begin + len(inverse))
            scores[scores <= 0] = -np.inf
            allowed = None if requests.allowed is None else requests.allowed[rows]
            proposals[rows] = top_by_score(scores, item, own, self.candidates, allowed)
        return proposals


def _moments(
    items: np.ndarray, after: np.ndarray, decay: float, history: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Σ x xᵀ and Σ x yᵀ over all training events with a history, (size, size) float64 each.

    Args:
        items: (E,) rows of the training events' items, grouped by user.
        after: (E,) number of later events of the same user.
        decay: weight of an event relative to the next newer one.
        history: number of newest events in x.
        size: number of rows, including row 0.
    """
    gram, targets = np.zeros(size * size), np.zeros(size * size)
    for lag in range(history):
        first = np.flatnonzero(after >= lag + 1)  # events with one `lag` positions later and a target after that
        last = first + lag
        np.add.at(targets, items[first] * size + items[last + 1], decay**lag)
        # both are in x for each target from last + 1 until `first` leaves the window: Σ_s decay^(lag + 2s)
        times = np.minimum(after[last], history - lag)
        weight = times if decay == 1 else (1 - decay ** (2 * times)) / (1 - decay**2)
        np.add.at(gram, items[first] * size + items[last], weight * decay**lag * (1 if lag else 0.5))
    pairs = gram.reshape(size, size)
    return pairs + pairs.T, targets.reshape(size, size)


def _ridge(gram: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """(gram + ridge · its mean diagonal · I)⁻¹ targets; gram is changed in place."""
    gram[np.diag_indices_from(gram)] += ridge * np.diag(gram).mean()
    return torch.cholesky_solve(torch.from_numpy(targets), torch.linalg.cholesky(torch.from_numpy(gram))).numpy()
