"""Checks of option values: members of a Literal, lower bounds of numbers."""

from typing import Any, Literal, get_args

Part = Literal["val", "test"]
RequestTime = Literal["none", "last_event", "target"]
Repeats = Literal["first", "last", "keep", "error"]  # events with the same user and item
TimeUnit = Literal["seconds", "milliseconds", "iso", "order"]
Seen = Literal["keep", "filter"]  # whether seen items may be recommended


def check_option(name: str, value: object, expected: Any) -> None:
    """Raises a ValueError unless the value is one of those of a Literal.

    Args:
        name: of the option, for the error.
        value: value given.
        expected: the Literal type.
    """
    allowed = get_args(expected)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {', '.join(allowed[:-1])} or {allowed[-1]}")


def check_least(name: str, value: float | int, least: int = 1, other: str = "") -> None:
    """Raises a ValueError if a number is below its lower bound.

    Args:
        name: of the option, for the error.
        value: value given.
        least: lower bound.
        other: alternative value, for the error.
    """
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}{f', or {other}' if other else ''}")
