"""Miners of ranker negatives: hard negatives (RankBand), sampled ones (Uniform, Popular), and their Mixture."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.mining.draws import ListDraws
from recsys2stage.options import check_integer, check_number
from recsys2stage.ranking.lists import NONE, without_repeats
from recsys2stage.trust import class_name

MAX_COUNT = 1 << 20  # negatives of a list


class Request(NamedTuple):
    """Inputs of a miner for B requests."""

    candidates: np.ndarray  # (B, K) int64, in the order of serving, best first, padded with −1
    target: np.ndarray  # (B,) int64
    excluded: np.ndarray  # sorted keys row · (V + 1) + item of the excluded items and the target
    counts: np.ndarray  # (V + 1,) training events of each item
    withheld: np.ndarray | None = None  # (V + 1,) bool, items excluded from all lists; None: none

    @classmethod
    def from_exclusions(
        cls,
        candidates: np.ndarray,
        target: np.ndarray,
        rows: np.ndarray,
        items: np.ndarray,
        counts: np.ndarray,
        withheld: np.ndarray | None = None,
    ) -> "Request":
        """From the row and item of each excluded pair."""
        keys = np.concatenate([rows, np.arange(len(target))]) * len(counts) + np.concatenate([items, target])
        return cls(candidates, target, np.unique(keys), counts, withheld)

    def is_excluded(self, items: np.ndarray) -> np.ndarray:
        """Which of (B, N) items cannot be negatives of their row: excluded items, the target and padding (−1)."""
        keys = np.arange(len(items))[:, None] * len(self.counts) + items
        index = np.searchsorted(self.excluded, keys).clip(max=max(len(self.excluded) - 1, 0))
        excluded = (items == NONE) | (self.excluded[index] == keys if len(self.excluded) else False)
        return excluded if self.withheld is None else excluded | self.withheld[items]


class Miner(ABC):
    """Chooses negatives."""

    @abstractmethod
    def choose(self, request: Request, rng: ListDraws) -> np.ndarray:
        """(B, N) item numbers, padded with −1.

        Args:
            request: the lists.
            rng: random numbers for each list. They depend on the seed, the user and the target only, so that a list
                does not depend on the batch it is mined in.
        """


class RankBand(Miner):
    """Hard negatives: all candidates between two ranks, or a random sample of them.

    Args:
        count: number of negatives per list; None: the whole band.
        skip_top: number of top candidates to leave out, the most likely false negatives. Keep it 0 if the ranker uses
            the retriever's rank, or it learns the gap in the ranks instead.
        last: lowest rank of the band; None: all candidates.
    """

    def __init__(self, count: int | None = None, skip_top: int = 0, last: int | None = None) -> None:
        check_integer("count", count, other="null for the whole band", example=50)
        check_integer("skip_top", skip_top, 0)
        check_integer("last", last, other="null for all candidates", example=200)
        if last is not None and last <= skip_top:
            raise ValueError(
                f"the band of ranks above {skip_top} and up to {last} is empty, expected 0 <= skip_top < last; raise "
                "last"
            )
        self.count, self.skip_top, self.last = count, skip_top, last

    def choose(self, request: Request, rng: ListDraws) -> np.ndarray:
        band = request.candidates[:, self.skip_top : self.last]
        eligible = ~request.is_excluded(band)
        if self.count is None or self.count >= band.shape[1]:
            return np.where(eligible, band, NONE)
        keys = np.where(eligible, rng.random(band.shape), 2.0)
        sampled = np.sort(np.argpartition(keys, self.count - 1, axis=1)[:, : self.count], axis=1)  # keep rank order
        return np.take_along_axis(np.where(eligible, band, NONE), sampled, axis=1)


class _Sampled(Miner):
    """Samples from the catalogue, with spare samples that replace excluded items."""

    def __init__(self, count: int) -> None:
        check_integer("count", count, 1, MAX_COUNT, example=10)
        self.count = count

    def choose(self, request: Request, rng: ListDraws) -> np.ndarray:
        count = min(self.count, len(request.counts) - 1)  # at most the catalogue
        sampled = self.sample((len(request.target), 2 * count + 8), request.counts, rng)
        sampled = np.where(request.is_excluded(sampled), NONE, sampled)
        first = np.argsort(sampled == NONE, axis=1, kind="stable")[:, :count]
        return np.take_along_axis(sampled, first, axis=1)

    @abstractmethod
    def sample(self, shape: tuple[int, int], counts: np.ndarray, rng: ListDraws) -> np.ndarray: ...


class Uniform(_Sampled):
    """Items sampled uniformly from the catalogue.

    Args:
        count: number of negatives per list.
    """

    def sample(self, shape: tuple[int, int], counts: np.ndarray, rng: ListDraws) -> np.ndarray:
        return rng.integers(1, len(counts), size=shape)


class Popular(_Sampled):
    """Items sampled in proportion to a power of their training counts.

    Args:
        count: number of negatives per list.
        exponent: power of the counts; 1: proportional to them, 0: uniform.
    """

    def __init__(self, count: int, exponent: float = 0.75) -> None:
        super().__init__(count)
        check_number("exponent", exponent, low=0, high=10, example=0.75)
        self.exponent = exponent

    def sample(self, shape: tuple[int, int], counts: np.ndarray, rng: ListDraws) -> np.ndarray:
        weights = np.where(np.arange(len(counts)) > 0, counts, 0) ** self.exponent
        return np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(shape), side="right").clip(
            1, len(counts) - 1
        )


class Mixture(Miner):
    """The negatives of several miners, without duplicates.

    Args:
        miners: miners to combine, in order.
    """

    def __init__(self, miners: list[Miner]) -> None:
        if not miners:
            raise ValueError("miners is [], expected at least one miner; add one, for example RankBand")
        self.miners = miners

    def choose(self, request: Request, rng: ListDraws) -> np.ndarray:
        parts = zip(self.miners, rng.spawn(len(self.miners)), strict=True)
        return without_repeats(np.concatenate([miner.choose(request, own) for miner, own in parts], axis=1))


def specify_miner(miner: Miner) -> dict[str, Any]:
    """Class path and options of a miner, for the manifest."""
    options = {k: [specify_miner(m) for m in v] if isinstance(v, list) else v for k, v in vars(miner).items()}
    return {"class_path": class_name(type(miner)), "init_args": options}
