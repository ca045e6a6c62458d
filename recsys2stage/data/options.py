"""Options that several verbs share, and the checks of option values."""

from typing import Literal

from recsys2stage.options import check_integer as check_integer
from recsys2stage.options import check_number as check_number
from recsys2stage.options import check_option as check_option
from recsys2stage.options import check_seed as check_seed

Part = Literal["val", "test"]
RequestTime = Literal["none", "last_event", "target"]
Repeats = Literal["first", "last", "keep", "error"]  # events with the same user and item
TimeUnit = Literal["seconds", "milliseconds", "iso", "order"]
Seen = Literal["keep", "filter"]  # whether seen items may be recommended


def check_least(name: str, value: object, least: int = 1, other: str = "") -> None:
    """Raises a ValueError unless the value is an integer of at least `least`.

    Args:
        name: of the option, for the error.
        value: value given.
        least: lower bound.
        other: meaning of None, which is then allowed; for the error.
    """
    check_integer(name, value, least, other=other)
