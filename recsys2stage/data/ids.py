"""The rule for ids: one text for each user and item, whatever type it comes in (docs/data.md has the table).

Ids compare by that text everywhere: in the log, in tables of items and users, in histories, vectors and options.
"""

import logging
import math
import numbers
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import yaml  # type: ignore[import-untyped]

from recsys2stage.columns import PLAIN_NUMBER

logger = logging.getLogger("recsys2stage")

WHOLE = {pl.Float16: 2**11, pl.Float32: 2**24, pl.Float64: 2**53}  # beyond it a float has no whole number of its own
MISSING = r"^(?i:nan|null|none|na|n/a|<na>|nil|\\n)$"  # texts that other programs write where a value is missing
NUL = "\x00"


def cast_id_column(raw: pl.Expr, dtype: Any, where: str) -> pl.Expr:
    """Ids of a typed column: whole numbers or text, null where there is none.

    Args:
        dtype: the type of the column.
        where: file and column, for the error.

    Raises:
        ValueError: for a type that holds no ids: booleans, bytes, times, lists.
    """
    if dtype.is_integer():
        return raw
    if dtype in WHOLE:
        bound = WHOLE[dtype.base_type()]
        return pl.when((raw == raw.floor()) & (raw.abs() <= bound)).then(raw).cast(pl.Int64, strict=False)
    if dtype.is_decimal():
        return raw.cast(pl.String).str.extract(r"^(-?\d+)(?:\.0*)?$", 1).cast(pl.Int128, strict=False)
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        return raw.cast(pl.String)
    raise ValueError(f"{where} the type {dtype} holds no ids; expected whole numbers or text: convert the column")


def expected_id(dtype: Any) -> str:
    """What an id must be, for errors."""
    if dtype in WHOLE:
        return f"an id: floats are ids only if they are whole and within ±{WHOLE[dtype.base_type()]}"
    return "an id: decimals are ids only if they are whole" if dtype.is_decimal() else "an id"


def as_text(value: Any) -> str | None:
    """The id that a Python value is, as text; None where it is missing.

    Raises:
        ValueError: for booleans, bytes, and floats that are no whole numbers within ±2^53.
    """
    if type(value) in (int, str):
        return str(value)
    kind = type(value).__name__
    if value is None or kind in ("NAType", "NaTType"):
        return None
    if isinstance(value, (bytes, bytearray)) or kind in ("bool", "bool_"):
        raise ValueError(f"{value!r} is not an id; expected a whole number, a text or an object with a text of its own")
    if isinstance(value, (numbers.Real, Decimal)) and not isinstance(value, numbers.Integral):
        if math.isnan(value):
            return None
        bound = math.inf if isinstance(value, Decimal) else WHOLE[pl.Float32 if kind == "float32" else pl.Float64]
        if not math.isfinite(value) or value != math.floor(value) or abs(float(value)) > bound:
            raise ValueError(f"{value!r} is not an id; floats are ids only if they are whole and within ±{bound}")
        return str(math.floor(value))
    return str(value)


def ids_from_objects(name: str, values: Iterable[Any]) -> pl.Series:
    """Ids of Python objects: whole numbers where all are, else text, null where there is none."""
    values = list(values)
    texts = pl.Series(name, [as_text(value) for value in values], dtype=pl.String)
    return texts if any(isinstance(value, str) for value in values) else narrow_ids(texts)


def given_ids(values: Iterable[Any]) -> list[str]:
    """Ids from the arguments of a call, as text; none may be missing, and one text is no list of its characters."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"ids are the text {values!r}, expected a list of ids: [{values!r}]")
    texts = [as_text(value) for value in values]
    if None in texts:
        raise ValueError(f"id {texts.index(None) + 1} of {len(texts)} is missing; leave it out")
    return [text for text in texts if text is not None]


def narrow_ids(ids: pl.Series) -> pl.Series:
    """Text that is all plain whole numbers of 64 bits as such (007 is none), and numbers in the narrowest of Int64,
    UInt64 and text that holds all."""
    if ids.dtype == pl.String and (ids.null_count() == len(ids) or not ids.str.contains(PLAIN_NUMBER).all()):
        return ids
    for dtype in (pl.Int64, pl.UInt64):
        narrow = ids.cast(dtype, strict=False)
        if narrow.null_count() == ids.null_count():
            return narrow
    return ids.cast(pl.String)


def parse_ids(ids: pl.Series, where: str | Path) -> pl.Series:
    """The ids of a typed column, null where they are missing.

    Raises:
        ValueError: naming the first row whose value is no id.
    """
    found = (
        ids.to_frame().select(cast_id_column(pl.col(ids.name), ids.dtype, f"{where}, column {ids.name!r}:")).to_series()
    )
    bad = found.is_null() & ids.is_not_null()
    if ids.dtype.is_float():
        bad &= ids.is_not_nan()
    if bad.any():
        row = bad.arg_true()[0]
        raise ValueError(f"{where}, column {ids.name!r}, row {row + 1}: {ids[row]} is not {expected_id(ids.dtype)}")
    return narrow_ids(found) if found.dtype in (pl.Int128, pl.UInt128) else found


def require_ids(ids: pl.Series, where: str | Path) -> pl.Series:
    """The ids of a typed column, one in every row.

    Raises:
        ValueError: for values that are no ids, and for missing ones.
    """
    found = parse_ids(ids, where)
    missing = found.is_null()
    if found.dtype == pl.String:
        missing |= found.str.strip_chars() == ""
    if missing.any():
        raise ValueError(
            f"{missing.sum():,} of {len(ids):,} rows have no {ids.name} in {where}, the first is row "
            f"{missing.arg_true()[0] + 1}; fill in or drop them"
        )
    return found


def common_dtype(dtypes: Iterable[Any]) -> Any:
    """A type that holds the ids of columns of several types, as they come from `of_column`."""
    dtypes = set(dtypes)
    if len(dtypes) == 1:
        return dtypes.pop()
    if all(dtype.is_integer() for dtype in dtypes):
        return pl.Int128 if dtypes & {pl.UInt64, pl.UInt128, pl.Int128} else pl.Int64
    return pl.String


def parse_yaml_ids(text: str) -> list[str] | None:
    """The ids of a list in the notation of YAML, each as it is written: 0012 is not 10; None for any other text.

    Raises:
        ValueError: for a list within the list.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return _scalars(node) if isinstance(node, yaml.SequenceNode) else None


def read_yaml_ids(config: Path, option: str) -> list[str] | None:
    """The same of an option of a YAML file; None where it is no list there."""
    try:
        node = yaml.compose(config.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # who reads it says so
        return None
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    lists = [value for name, value in pairs if name.value == option and isinstance(value, yaml.SequenceNode)]
    return _scalars(lists[-1]) if lists else None


def _scalars(node: yaml.SequenceNode) -> list[str]:
    for one in node.value:
        if not isinstance(one, yaml.ScalarNode):
            raise ValueError(
                "a list of ids holds a list or a mapping; expected ids, in quotes where they hold , : or ]"
            )
    return [one.value for one in node.value]


def read_id_lines(path: Path) -> list[str]:
    """The lines of a text file of ids, without their ends; an id may hold what Python's splitlines() splits at."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it with iconv") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def warn_ambiguous_ids(ids: pl.Series, name: str, where: str | Path) -> None:
    """Warns of ids that differ as text only, and of those that usually mean a missing value.

    Args:
        ids: each once, (n,) text.
        name: what to call them.
    """
    texts = ids.drop_nulls()
    stripped = texts.str.strip_chars()
    number = stripped.cast(pl.Float64, strict=False)
    whole = (number == number.floor()) & (number.abs() <= 2**53)
    plain = pl.select(pl.when(whole).then(number.cast(pl.Int64, strict=False)).cast(pl.String)).to_series()
    plain = plain.fill_null(stripped)
    twins = pl.DataFrame({"text": texts, "plain": plain}).filter(pl.col("text") != pl.col("plain"))
    twins = twins.filter(pl.col("plain").is_in(texts.implode()))
    if len(twins):
        text, plain_text = twins.row(0)
        logger.warning(
            "%s: %s values of %s look like others and are taken as ids of their own, for example %r beside %r; write "
            "each id in one way",
            *(where, f"{len(twins):,}", name, text, plain_text),
        )
    missing = texts.filter(texts.str.contains(MISSING))
    if len(missing):
        logger.warning(
            "%s: the %s %s is taken as an id like any other; where it means a missing value, leave the field empty",
            *(where, name, ", ".join(map(repr, missing.head(3)))),
        )


def select(wanted: Sequence[str], ids: pl.Series, where: str | Path) -> pl.Series:
    """Which ids are wanted, (n,) bool; blanks around a wanted id are passed over where only the id without them exists.

    Raises:
        ValueError: naming wanted ids that are not there.
    """
    text = ids.cast(pl.String)
    there = set(text)
    found = {one if one in there else one.strip() for one in wanted}
    if missing := sorted(found - there):
        raise ValueError(f"{len(missing)} of {len(found)} user ids are not in {where}, for example {missing[:3]}")
    return text.is_in(list(found))
