"""Options that several stages share, and checks of option values.

Each error is one sentence: the value given, what was expected, and the next step.
"""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, get_args

Part = Literal["val", "test"]
Until = Literal["val", "test", "end"]  # where training events end: at validation targets, test targets, or nowhere
RequestTime = Literal["none", "last_event", "target"]
TRAINED_TARGETS: dict[Until, tuple[Part, ...]] = {"val": (), "test": ("val",), "end": ("val", "test")}
STRETCH: dict[Until, str] = {
    "val": "the events before the validation targets",
    "test": "all events before the test targets",
    "end": "all events",
}
Repeats = Literal["first", "last", "keep", "error"]  # events with the same user and item
TimeUnit = Literal["seconds", "milliseconds", "iso", "order"]
Seen = Literal["keep", "filter"]  # whether seen items may be recommended

LARGEST = 2**31 - 1  # integer without another upper bound
MAX_SEED = 2**32 - 1  # that `seed_everything` accepts
MAX_LENGTH = 1 << 20  # events of a history
MAX_WIDTH = 1 << 16  # of a vector or a layer
MAX_LAYERS = 1_000


def check_option(name: str, value: object, expected: Any) -> None:
    """Raises a ValueError unless the value is one of those of a Literal.

    Args:
        name: of the option, for the error.
        value: value given.
        expected: the Literal type.
    """
    allowed = [str(one) for one in get_args(expected)]
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1) if isinstance(value, str) else []
        step = f"did you mean {near[0]!r}?" if near else f"set {name} to one of them"
        raise ValueError(f"{name} is {short_repr(value)}, expected {', '.join(allowed[:-1])} or {allowed[-1]}; {step}")


def check_untrained(where: object, until: Until, part: Part, step: str) -> None:
    """Raises a ValueError for an artifact that was trained on the targets of a part, as a refit is.

    Args:
        where: the artifact, for the error.
        until: where its training events end.
        part: whose targets are to be measured or mined.
        step: what to do instead, for the error.
    """
    if part in TRAINED_TARGETS[until]:
        raise ValueError(
            f"{where} was refitted on {STRETCH[until]}, expected one that was not trained on {part} targets; {step}"
        )


def check_integer(
    name: str,
    value: object,
    low: int = 1,
    high: int = LARGEST,
    *,
    other: str = "",
    example: int | None = None,
) -> None:
    """Raises a ValueError unless the value is an integer within bounds. A bool and a float such as 2.0 are not.

    Args:
        name: of the option, for the error.
        value: value given.
        low: lower bound.
        high: upper bound.
        other: meaning of None, which is then allowed: "null for all".
        example: valid value, for the error; None: the lower bound.
    """
    if value is None and other:
        return
    integral = isinstance(value, Integral) and not isinstance(value, bool)
    if integral and low <= value <= high:  # type: ignore[operator]  # an integer
        return
    if not integral:
        bounds = f"an integer, at least {low:,}" if high == LARGEST else f"an integer from {low:,} to {high:,}"
    else:
        bounds = f"at least {low:,}" if value < low else f"at most {high:,}"  # type: ignore[operator]
    alternative = f", or {other}" if other else ""
    step = f"set {name} to {low if example is None else example}, for example"
    raise ValueError(f"{name} is {short_repr(value)}, expected {bounds}{alternative}; {step}")


def check_number(
    name: str,
    value: object,
    *,
    example: float | int,
    low: float | int | None = None,
    above: float | int | None = None,
    high: float | int | None = None,
    below: float | int | None = None,
    other: str = "",
    what: str = "a number",
) -> None:
    """Raises a ValueError unless the value is a finite number within bounds. A bool is not a number.

    Args:
        name: of the option, for the error.
        value: value given.
        example: valid value, for the error.
        low: lower bound, itself valid.
        above: lower bound, itself not valid.
        high: upper bound, itself valid.
        below: upper bound, itself not valid.
        other: meaning of None, which is then allowed.
        what: what the number is, for the error.
    """
    if value is None and other:
        return
    if is_number(value):
        number = float(value)  # type: ignore[arg-type]  # a number
        inside = (low is None or number >= low) and (high is None or number <= high)
        if inside and (above is None or number > above) and (below is None or number < below):
            return
    start = f"from {low}" if low is not None else f"above {above}" if above is not None else ""
    end = f"at most {high}" if high is not None else f"below {below}" if below is not None else ""
    if low is not None:
        bounds = f"{start} to {end.removeprefix('at most ')}" if end else f"of at least {low}"
    else:
        bounds = " and ".join(part for part in (start, end) if part) or "that is finite"
    alternative = f", or {other}" if other else ""
    raise ValueError(
        f"{name} is {short_repr(value)}, expected {what} {bounds}{alternative}; set {name} to {example}, for example"
    )


def check_integers(name: str, values: object, low: int = 1, high: int = LARGEST, *, example: Sequence[int]) -> None:
    """Raises a ValueError unless the value is a list of one or more integers within bounds; see `check_integer`."""
    valid = isinstance(values, (list, tuple)) and len(values) > 0
    try:
        for value in values if valid else ():  # type: ignore[attr-defined]
            check_integer(name, value, low, high)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(
            f"{name} is {short_repr(values)}, expected a list of integers, {low:,} to {high:,} each; set {name} to "
            f"{list(example)}, for example"
        )


def check_seed(name: str, value: object) -> None:
    """Raises a ValueError unless the value is a seed, an integer from 0 to 2^32 - 1."""
    check_integer(name, value, 0, MAX_SEED)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; a bool is not."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def short_repr(value: object) -> str:
    """The value given, short, with numpy's numbers as plain ones."""
    if isinstance(value, Real) and not isinstance(value, bool):
        value = int(value) if isinstance(value, Integral) else float(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def not_installed(packages: Sequence[str]) -> str:
    """For messages: a, which is not installed; a, b, which are not installed."""
    return f"{', '.join(packages)}, which {'is' if len(packages) == 1 else 'are'} not installed"


def call_text(cls: type, given: Mapping[str, Any]) -> str:
    """A class with those of its arguments that differ from their defaults, as scikit-learn shows an estimator."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    same = {name for name, value in given.items() if type(value) is type(defaults[name]) and value == defaults[name]}
    return f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in given.items() if name not in same)})"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 item, 2,000 items."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
