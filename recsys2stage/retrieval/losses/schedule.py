"""Numbers that change with the share of the run that is done."""

from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class Schedule(Generic[T]):
    """One value for the whole run, or steps: the value of the last point that the run has reached.

    Args:
        name: of the option, for errors.
        values: a value, or points (share of the run, value): the first at 0, ascending, none after 1.
    """

    def __init__(self, name: str, values: T | Sequence[tuple[float, T]]) -> None:
        points = [(float(share), value) for share, value in values] if isinstance(values, list) else [(0.0, values)]
        shares = [share for share, _ in points]
        if not shares or shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] > 1:
            raise ValueError(
                f"{name} has points at {shares} of the run, expected ascending shares from 0 to at most 1, "
                "such as [[0, A], [0.5, B]]"
            )
        self.points: list[tuple[float, T]] = points  # type: ignore[assignment]  # a list is never a value

    @property
    def moves(self) -> bool:
        return len(self.points) > 1

    @property
    def values(self) -> list[T]:
        return [value for _, value in self.points]

    def at(self, progress: float) -> T:
        """The value at this share of the run."""
        return next(value for share, value in reversed(self.points) if share <= progress)
