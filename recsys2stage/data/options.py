"""Options that take one of a few words. The command line checks them; a call from Python reaches the code unchecked."""

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
