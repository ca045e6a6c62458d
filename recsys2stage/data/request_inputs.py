"""Inputs of a request, checked and encoded as in training: times and user features."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from recsys2stage import columns as c
from recsys2stage.columns import YEAR_2100

logger = logging.getLogger("recsys2stage")

MAX_TIME_RATIO = 50  # to the newest training event; larger times must be in another unit
UNITS = {"milliseconds": 1_000, "microseconds": 1_000_000, "nanoseconds": 1_000_000_000}

Values = tuple[np.ndarray, ...]  # (B, P) of each declared user feature, as `Dataset.user_values` gives them


def as_seconds(values: Any, name: str, newest: int | None) -> np.ndarray:
    """Times as whole seconds since 1970, (n,) int64.

    Args:
        values: (n,) numbers; floats must be whole.
        name: what they are, for errors.
        newest: seconds of the newest training event; None: unknown.

    Raises:
        ValueError: for values that are not whole, negative, or so large that they must be in another unit.
    """
    array = np.asarray(values)
    if not array.size:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == np.floor(array)).all():
        array = array.astype(np.float64)
    elif array.dtype.kind not in "iu":
        bad = next((value for value in values if not _is_whole(value)), values[0])
        raise ValueError(
            f"{name} holds {bad!r}, expected whole seconds since 1970; convert a datetime with a time zone by "
            "int(value.timestamp())"
        )
    if (low := array.min()) < 0:
        raise ValueError(f"{name} holds {int(low)}, expected seconds since 1970: 0 or more")
    limit, high = min(YEAR_2100, MAX_TIME_RATIO * newest if newest else YEAR_2100), int(array.max())
    if high > limit:
        unit = next((unit for unit, size in UNITS.items() if high // size <= limit), None)
        than = "the year 2100" if limit == YEAR_2100 else f"{MAX_TIME_RATIO} times the newest training event, {newest}"
        hint = f"; it looks like {unit}: divide by {UNITS[unit]}" if unit else ""
        raise ValueError(f"{name} holds {high}, expected seconds since 1970, and that is beyond {than}{hint}")
    return array.astype(np.int64)


def _is_whole(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return False
    return math.isfinite(value) and value == math.floor(value)


def check_ascending(times: np.ndarray) -> None:
    """Raises a ValueError unless the times of a history ascend."""
    back = np.flatnonzero(np.diff(times) < 0)
    if len(back):
        event = int(back[0])
        raise ValueError(
            f"times go back from {times[event]} (event {event + 1} of {len(times)}) to {times[event + 1]} (the next); "
            "give history and times oldest first"
        )


def format_time(seconds: int) -> str:
    """Formats seconds for messages: 2003-02-28 17:49:50 UTC (1046454590)."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC ({seconds})"


def check_user_specs(specs: Sequence[Any], where: str | Path) -> None:
    """Raises a ValueError for user features that are not in the format of `side_tables.user_specs`.

    Args:
        specs: declared features from a manifest.
        where: the manifest, for the error.
    """
    for spec in specs:
        name, kind, size, classes = (
            (spec.get(key) if isinstance(spec, dict) else None) for key in ("name", "kind", "size", "classes")
        )
        if kind == "numeric":
            fits = classes is None and type(size) is int and size == 1
        else:
            named = isinstance(classes, list) and all(isinstance(one, str) for one in classes)
            fits = kind in ("categorical", "multi") and named and type(size) is int and size == 1 + len(classes or ())
        if not (fits and isinstance(name, str)):
            raise ValueError(
                f"{where} has the user feature {str(spec)[:80]}, expected a name, a kind, its classes and a size of "
                "one more; make it again"
            )


def encode_users(specs: Sequence[Mapping[str, Any]], users: Sequence[Mapping[str, Any]], where: str) -> Values:
    """Encodes user features as the model reads them, (B, P) each.

    Args:
        specs: the declared features, as `side_tables.user_specs` gives them.
        users: name -> value for each user: a class, a list of classes, or a number. A missing name, None and NaN are
            unknown. A class that is not in the training data is also unknown, with a warning.
        where: source of the users, for messages.

    Raises:
        ValueError: for names that are not declared, and values of the wrong type.
    """
    names = [spec["name"] for spec in specs]
    if undeclared := sorted({name for user in users for name in user} - set(names)):
        expected = f"expected some of {', '.join(names)}" if names else "but the training data declare none"
        raise ValueError(f"{where} has the user features {', '.join(map(repr, undeclared))}, {expected}")
    encoded: list[np.ndarray] = []
    for spec in specs:
        name, values = spec["name"], [user.get(spec["name"]) for user in users]
        if spec["kind"] == "numeric":
            numbers = [_number(value, name, where) for value in values]
            encoded.append(np.array(numbers, dtype=np.float32)[:, None])
            continue
        codes = {text: code for code, text in enumerate(spec["classes"], start=1)}
        rows = [_class_list(value, spec["kind"], name, where) for value in values]
        unknown = [value for row in rows for value in row if not class_code(value, codes)]
        if unknown:
            logger.warning(
                "%s: %s values of %s are not in the training data, for example %r; they count as unknown",
                *(where, f"{len(unknown):,}", name, unknown[0]),
            )
        coded = [list(dict.fromkeys(code for value in row if (code := class_code(value, codes)))) for row in rows]
        table = np.zeros((len(users), max([1, *map(len, coded)])), dtype=np.int32)
        for row, row_codes in zip(table, coded, strict=True):
            row[: len(row_codes)] = row_codes
        encoded.append(table)
    return tuple(encoded)


def _number(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real) or math.isinf(value):
        raise ValueError(f"{where}: {name} is {value!r}, expected a finite number, or None where it is unknown")
    return float(value)


def _class_list(value: Any, kind: str, name: str, where: str) -> list[Any]:
    """The classes of one user."""
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return []
    if kind == "categorical":
        if isinstance(value, (list, tuple, set, np.ndarray)):
            raise ValueError(f"{where}: {name} is {value!r}, expected one class")
        return [value]
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, np.ndarray)):
        raise ValueError(f"{where}: {name} is {value!r}, expected a list of classes")
    return [text for one in value if one is not None and (text := str(one).strip())]


def class_code(value: Any, codes: Mapping[str, int]) -> int:
    """The number of a class; 0 if it is unknown. 1, 1.0 and "1" are the same class: a table holds only one of them."""
    if isinstance(value, (bool, np.bool_)):
        texts = [str(bool(value)).lower()]
    elif _is_whole(value):
        texts = [str(int(value)), str(float(value))]
    else:
        texts = [str(value)]
    return next((codes[text] for text in texts if text in codes), c.UNKNOWN)


def request_seconds(
    request_time: int | None, newest: int, newest_time: int | None, has_time: bool, reads_time: bool
) -> int:
    """Request time in seconds.

    Args:
        request_time: as given; None: the current time.
        newest: seconds of the newest event of the history; 0 if it is empty.
        newest_time: seconds of the newest training event, as in `as_seconds`.
        has_time: whether the model was trained on times.
        reads_time: whether the model reads the request time.
    """
    if request_time is None:
        clock = int(time.time())
        if newest > clock and reads_time:
            logger.warning(
                "the newest event of the history, %s, lies in the future of this machine's clock, %s; it is "
                "used as the request time: pass request_time",
                *(format_time(newest), format_time(clock)),
            )
        return max(clock, newest)
    seconds = int(as_seconds([request_time], "request_time", newest_time)[0])
    if has_time and seconds < newest:
        raise ValueError(
            f"request_time is {seconds}, before the newest event of the history, {newest}; give a later time, or only "
            "the events before the request"
        )
    return seconds


def fill_ratings(ratings: Sequence[float | int | None]) -> np.ndarray:
    """Ratings with 0 for missing ones, (n,) float32."""
    return np.nan_to_num(np.array(ratings, dtype=np.float32))
