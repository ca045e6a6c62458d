"""Negatives for the ranker, chosen among what the retriever ranks high and sampled from the catalogue. Bare arrays."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.ranking.lists import NONE, without_repeats
from recsys2stage.trust import name_of


class Request(NamedTuple):
    """What is known of B requests when their negatives are chosen."""

    candidates: np.ndarray  # (B, K) int64, as they are served, best first, −1 where there is no more
    target: np.ndarray  # (B,) int64
    known: np.ndarray  # sorted keys row · (V + 1) + item of what is no negative: excluded items, and the target
    counts: np.ndarray  # (V + 1,) training events of each item

    @classmethod
    def of(
        cls, candidates: np.ndarray, target: np.ndarray, rows: np.ndarray, items: np.ndarray, counts: np.ndarray
    ) -> "Request":
        """From the (rows, items) that are excluded from the lists."""
        keys = np.concatenate([rows, np.arange(len(target))]) * len(counts) + np.concatenate([items, target])
        return cls(candidates, target, np.unique(keys), counts)

    def is_excluded(self, items: np.ndarray) -> np.ndarray:
        """Which of (B, N) items are no negatives in their row: excluded, or the target; also true of −1."""
        keys = np.arange(len(items))[:, None] * len(self.counts) + items
        place = np.searchsorted(self.known, keys).clip(max=max(len(self.known) - 1, 0))
        return (items == NONE) | (self.known[place] == keys if len(self.known) else False)


class Miner(ABC):
    """Chooses negatives: (B, N) item numbers, −1 where there are fewer."""

    @abstractmethod
    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray: ...


class RankBand(Miner):
    """Candidates between two ranks, all of them or some at random.

    Args:
        count: how many; None: the whole band.
        skip_top: leave out this many of the best, which are the likeliest to be unknown positives. Keep it 0 where the
            ranker sees the retriever's rank, or it learns the gap instead.
        last: lowest rank of the band; None: all candidates.
    """

    def __init__(self, count: int | None = None, skip_top: int = 0, last: int | None = None) -> None:
        if skip_top < 0 or (last is not None and last <= skip_top):
            raise ValueError(
                f"the band of ranks above {skip_top} and up to {last} is empty; expected 0 <= skip_top < last"
            )
        self.count, self.skip_top, self.last = count, skip_top, last

    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray:
        band = request.candidates[:, self.skip_top : self.last]
        fit = ~request.is_excluded(band)
        if self.count is None or self.count >= band.shape[1]:
            return np.where(fit, band, NONE)
        lottery = np.where(fit, rng.random(band.shape), 2.0)
        sampled = np.sort(np.argpartition(lottery, self.count - 1, axis=1)[:, : self.count], axis=1)  # keep rank order
        return np.take_along_axis(np.where(fit, band, NONE), sampled, axis=1)


class _Drawn(Miner):
    """Draws from the catalogue, with a few spare draws in place of positives."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1; leave the miner out to draw nothing")
        self.count = count

    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray:
        sampled = self.draw((len(request.target), 2 * self.count + 8), request.counts, rng)
        sampled = np.where(request.is_excluded(sampled), NONE, sampled)
        first = np.argsort(sampled == NONE, axis=1, kind="stable")[:, : self.count]
        return np.take_along_axis(sampled, first, axis=1)

    @abstractmethod
    def draw(self, shape: tuple[int, int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


class Uniform(_Drawn):
    """Any item of the catalogue, each alike.

    Args:
        count: how many a user.
    """

    def draw(self, shape: tuple[int, int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(1, len(counts), size=shape)


class Popular(_Drawn):
    """Items in proportion to a power of their training counts.

    Args:
        count: how many a user.
        exponent: 1: as they occur; 0: uniform.
    """

    def __init__(self, count: int, exponent: float = 0.75) -> None:
        super().__init__(count)
        self.exponent = exponent

    def draw(self, shape: tuple[int, int], counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        weights = np.where(np.arange(len(counts)) > 0, counts, 0) ** self.exponent
        return np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(shape), side="right").clip(
            1, len(counts) - 1
        )


class Mixture(Miner):
    """Several miners one after the other; what an earlier one chose is not repeated.

    Args:
        miners: the parts, in order.
    """

    def __init__(self, miners: list[Miner]) -> None:
        if not miners:
            raise ValueError("Mixture got no miners; name at least one")
        self.miners = miners

    def choose(self, request: Request, rng: np.random.Generator) -> np.ndarray:
        return without_repeats(np.concatenate([miner.choose(request, rng) for miner in self.miners], axis=1))


def specify_miner(miner: Miner) -> dict[str, Any]:
    """A miner's class and options, for the manifest."""
    options = {k: [specify_miner(m) for m in v] if isinstance(v, list) else v for k, v in vars(miner).items()}
    return {"class_path": name_of(type(miner)), "init_args": options}
