"""User and item ids: parsing, and comparison as text whatever their type (table in docs/data.md).

Ids compare as text everywhere: in the log, side tables, histories, vectors and options.
"""

import logging
import math
import numbers
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from recsys2stage.columns import PLAIN_NUMBER
from recsys2stage.options import short_repr

logger = logging.getLogger("recsys2stage")

WHOLE = {pl.Float16: 2**11, pl.Float32: 2**24, pl.Float64: 2**53}  # floats represent every integer up to this
MISSING = r"^(?i:nan|null|none|na|n/a|<na>|nil|\\n)$"  # how other programs write missing values
NUL = "\x00"


def cast_id_column(raw: pl.Expr, dtype: Any, where: str) -> pl.Expr:
    """Ids of a typed column as integers or text, null where missing or invalid.

    Args:
        dtype: the type of the column.
        where: file and column, for the error message.

    Raises:
        ValueError: for unsupported types: booleans, bytes, times, lists.
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
    raise ValueError(f"{where} the type {dtype} holds no ids; expected integers or text: convert the column")


def expected_id(dtype: Any) -> str:
    """Description of a valid id of this column type, for error messages."""
    if dtype in WHOLE:
        return f"an id: floats are ids only if they are integers within ±{WHOLE[dtype.base_type()]}"
    return "an id: decimals are ids only if they are integers" if dtype.is_decimal() else "an id"


def as_text(value: Any) -> str | None:
    """Converts a Python value to an id as text; None for a missing value.

    Raises:
        ValueError: for booleans, bytes, and floats that are not integers within ±2^53.
    """
    if type(value) in (int, str):
        return str(value)
    kind = type(value).__name__
    if value is None or kind in ("NAType", "NaTType"):
        return None
    if isinstance(value, (bytes, bytearray)) or kind in ("bool", "bool_"):
        raise ValueError(
            f"{value!r} is not an id, expected an integer, a string or an object with its own str(); convert it"
        )
    if isinstance(value, (numbers.Real, Decimal)) and not isinstance(value, numbers.Integral):
        if math.isnan(value):
            return None
        bound = math.inf if isinstance(value, Decimal) else WHOLE[pl.Float32 if kind == "float32" else pl.Float64]
        if not math.isfinite(value) or value != math.floor(value) or abs(float(value)) > bound:
            raise ValueError(
                f"{value!r} is not an id, expected an integer: floats are ids only if integers within ±{bound}; "
                "convert it"
            )
        return str(math.floor(value))
    return str(value)


def ids_from_objects(name: str, values: Iterable[Any]) -> pl.Series:
    """Ids of Python objects: integers if all are, else text; null where missing."""
    values = list(values)
    texts = pl.Series(name, [as_text(value) for value in values], dtype=pl.String)
    return texts if any(isinstance(value, str) for value in values) else narrow_ids(texts)


def given_ids(values: Iterable[Any]) -> list[str]:
    """Ids passed as an argument, as text. Rejects missing ids and a single string in place of a list."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ValueError(f"ids is {values!r}, expected a list of ids; write [{values!r}]")
    texts = [as_text(value) for value in values]
    if None in texts:
        raise ValueError(f"id {texts.index(None) + 1} of {len(texts)} is missing, expected an id; leave it out")
    return [text for text in texts if text is not None]


def narrow_ids(ids: pl.Series) -> pl.Series:
    """Casts ids to the narrowest of Int64, UInt64 and text; text only if every id is a plain integer (007 is not)."""
    if ids.dtype == pl.String and (ids.null_count() == len(ids) or not ids.str.contains(PLAIN_NUMBER).all()):
        return ids
    for dtype in (pl.Int64, pl.UInt64):
        narrow = ids.cast(dtype, strict=False)
        if narrow.null_count() == ids.null_count():
            return narrow
    return ids.cast(pl.String)


def parse_ids(ids: pl.Series, where: str | Path) -> pl.Series:
    """Ids of a typed column, null where missing.

    Raises:
        ValueError: with the first row that has an invalid id.
    """
    parsed = (
        ids.to_frame().select(cast_id_column(pl.col(ids.name), ids.dtype, f"{where}, column {ids.name!r}:")).to_series()
    )
    bad = parsed.is_null() & ids.is_not_null()
    if ids.dtype.is_float():
        bad &= ids.is_not_nan()
    if bad.any():
        row = bad.arg_true()[0]
        raise ValueError(
            f"{where}, column {ids.name!r}, row {row + 1}: {ids[row]} is not {expected_id(ids.dtype)}; convert the "
            "column"
        )
    return narrow_ids(parsed) if parsed.dtype in (pl.Int128, pl.UInt128) else parsed


def require_ids(ids: pl.Series, where: str | Path) -> pl.Series:
    """Ids of a typed column without missing values.

    Raises:
        ValueError: for invalid and missing ids.
    """
    parsed = parse_ids(ids, where)
    missing = parsed.is_null()
    if parsed.dtype == pl.String:
        missing |= parsed.str.strip_chars() == ""
    if missing.any():
        raise ValueError(
            f"{missing.sum():,} of {len(ids):,} rows have no {ids.name} in {where}, the first is row "
            f"{missing.arg_true()[0] + 1}; fill in or drop them"
        )
    return parsed


def common_dtype(dtypes: Iterable[Any]) -> Any:
    """The type that holds all ids of columns of several types, as returned by `cast_id_column`."""
    dtypes = set(dtypes)
    if len(dtypes) == 1:
        return dtypes.pop()
    if all(dtype.is_integer() for dtype in dtypes):
        return pl.Int128 if dtypes & {pl.UInt64, pl.UInt128, pl.Int128} else pl.Int64
    return pl.String


def parse_yaml_ids(text: str) -> list[str] | None:
    """Ids of a YAML list as strings, without YAML type conversion (0012 stays 0012); None if it is not a list.

    Raises:
        ValueError: for a nested list or mapping.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return _scalars(node) if isinstance(node, yaml.SequenceNode) else None


def read_yaml_ids(config: Path, option: str) -> list[str] | None:
    """Like `parse_yaml_ids`, for an option of a YAML file; None if it is not a list there."""
    try:
        node = yaml.compose(config.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # the config parser reports it
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
    """Ids of a text file, one per line. Splits at line ends only (LF, CRLF, CR); splitlines() would split within "
    "ids."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it with iconv") from error
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def warn_ambiguous_ids(ids: pl.Series, name: str, where: str | Path) -> None:
    """Warns of ids that differ only in notation (7, 007, " 7"), and of ids that look like a missing value.

    Args:
        ids: (n,) text, unique.
        name: their column name, for the message.
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
            "%s: %s values of %s look like others but are separate ids, for example %r and %r; use one notation per id",
            *(where, f"{len(twins):,}", name, text, plain_text),
        )
    missing = texts.filter(texts.str.contains(MISSING))
    if len(missing):
        logger.warning(
            "%s: the %s %s is read as an id; if it means a missing value, leave the field empty",
            *(where, name, ", ".join(map(repr, missing.head(3)))),
        )


def select(wanted: Sequence[str], ids: pl.Series, where: str | Path, step: str = "") -> pl.Series:
    """Mask of the wanted user ids, (n,) bool. Blanks around a wanted id are ignored if only the stripped id exists.

    Args:
        wanted: ids, as text.
        ids: existing ids, (n,).
        where: what holds the existing ids, for the error.
        step: a next step besides checking the ids, for the error.

    Raises:
        ValueError: with wanted ids that do not exist.
    """
    text = ids.cast(pl.String)
    existing = set(text)
    requested = {one if one in existing else one.strip() for one in wanted}
    if missing := sorted(requested - existing):
        shown = ", ".join(short_repr(one) for one in missing[:3])
        if len(requested) == 1:
            given, check = f"user {shown} is not in {where}", "check the id"
        else:
            are = "is" if len(missing) == 1 else "are"
            given = f"{len(missing):,} of {len(requested):,} users {are} not in {where}, for example {shown}"
            check = "check the ids"
        like = f"expected ids such as {short_repr(str(text[0]))}" if len(text) else "which has no users"
        raise ValueError(f"{given}, {like}; {check}{step}")
    return text.is_in(list(requested))


def none_known(given: Sequence[Any], what: str) -> str:
    """For messages: the model knows none of the given item ids.

    Args:
        given: ids, at least one.
        what: where they are given, such as " of the history".
    """
    example = short_repr(given[0])
    if len(given) == 1:
        return f"the model does not know the item id{what}, {example}"
    return f"the model knows none of the {len(given):,} item ids{what}, for example {example}"
