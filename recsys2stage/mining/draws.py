"""Random numbers for candidate lists: a list's numbers depend on the seed, its user and its target only."""

import numpy as np

from recsys2stage.data.hashing import GOLDEN, splitmix64


class ListDraws:
    """One stream of random numbers for each of B lists (SplitMix64), whatever the other lists of a batch are.

    It has the methods of `numpy.random.Generator` that miners need; their sizes are (B, N).

    Args:
        state: (B,) uint64, the state of each stream.
    """

    def __init__(self, state: np.ndarray) -> None:
        self.state = state

    @classmethod
    def of(cls, seed: int, users: np.ndarray, places: np.ndarray) -> "ListDraws":
        """The streams of B targets.

        Args:
            seed: of all lists.
            users: (B,) user of each target.
            places: (B,) index of each target among all events.
        """
        return cls(splitmix64(splitmix64(users, seed) + places.astype(np.uint64), seed))

    def random(self, size: tuple[int, int]) -> np.ndarray:
        """(B, N) float64, uniform in [0, 1)."""
        if size[0] != len(self.state):
            raise ValueError(f"size is {size}, expected ({len(self.state)}, N): one row for each list")
        return (self._next(size[1]) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, size: tuple[int, int]) -> np.ndarray:
        """(B, N) int64, uniform from `low` to `high` − 1; the bias is below (high − low) / 2^53."""
        return low + (self.random(size) * (high - low)).astype(np.int64)

    def spawn(self, count: int) -> list["ListDraws"]:
        """Independent streams for the parts of a miner, so that one part does not depend on how many another draws."""
        return [ListDraws(state) for state in self._next(count).T]

    def _next(self, count: int) -> np.ndarray:
        """The next `count` numbers of each stream, (B, count) uint64."""
        with np.errstate(over="ignore"):
            steps = np.arange(count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
            numbers = splitmix64(self.state[:, None] + steps[:-1], 0)
            self.state = self.state + steps[-1]
        return numbers
