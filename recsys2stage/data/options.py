"""Checks of options that a type alone does not make: one of a few words (from Python, too), a number that counts."""

from typing import Any, Literal, get_args

Part = Literal["val", "test"]
RequestTime = Literal["none", "last_event", "target"]
Seen = Literal["keep", "filter"]  # whether seen items may be recommended


def check_option(name: str, value: object, expected: Any) -> None:
    """Raises a ValueError unless the value is one of those of a Literal.

    Args:
        name: of the option, for the error.
        value: what was given.
        expected: the Literal type.
    """
    allowed = get_args(expected)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {', '.join(allowed[:-1])} or {allowed[-1]}")


def check_least(name: str, value: float | int, least: int = 1, other: str = "") -> None:
    """Raises a ValueError where a number is below the least that means something.

    Args:
        name: of the option, for the error.
        value: what was given.
        least: allowed.
        other: what else may be given, for the error.
    """
    if value < least:
        raise ValueError(f"{name} is {value}, expected at least {least}{f', or {other}' if other else ''}")
