"""Option values that change with training progress."""

from collections.abc import Sequence
from typing import Generic, TypeVar

from recsys2stage.options import is_number

T = TypeVar("T")


class Schedule(Generic[T]):
    """A constant value, or a step function of training progress.

    Args:
        name: option name, for error messages.
        values: a value, or points (share of the run, value), ascending from share 0 to at most 1; each value
            holds until the next point.
    """

    def __init__(self, name: str, values: T | Sequence[tuple[float, T]]) -> None:
        given = values if isinstance(values, list) else [(0.0, values)]
        if not all(isinstance(point, (list, tuple)) and len(point) == 2 and is_number(point[0]) for point in given):
            raise ValueError(
                f"{name} is {values!r}, expected a value or a list of points (share of the run, value); set it to "
                "[[0, A], [0.5, B]], for example"
            )
        points = [(float(share), value) for share, value in given]
        shares = [share for share, _ in points]
        if not shares or shares[0] != 0 or shares != sorted(set(shares)) or shares[-1] > 1:
            raise ValueError(
                f"{name} has points at {shares} of the run, expected ascending shares from 0 to at most 1; set it to "
                "[[0, A], [0.5, B]], for example"
            )
        self.points: list[tuple[float, T]] = points  # type: ignore[assignment]  # a value is never a list

    @property
    def varies(self) -> bool:
        return len(self.points) > 1

    @property
    def values(self) -> list[T]:
        return [value for _, value in self.points]

    def at(self, progress: float) -> T:
        """The value at this progress, from 0 to 1."""
        return next(value for share, value in reversed(self.points) if share <= progress)
