"""Checks of the nested values in a dataset's manifest, which may be damaged or come from a stranger."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args

from recsys2stage import columns as c
from recsys2stage.artifacts import take
from recsys2stage.options import Repeats, TimeUnit

MAKE = "make it again: recsys prepare-data"
REQUIRED = {"counts": dict, "protocol": dict, "has": dict, "features": dict, "actions": list, "split_hash": str}
COUNTS = ("events", "users", "items", "train_events", "val_events", "test_events", "val_users", "test_users")
KINDS = ("categorical", "multi", "numeric", "vector")
EVENT_COLUMNS = (c.USER_ID, c.ITEM_ID, c.TIME, c.RATING, c.ACTION)


class SourceLog(NamedTuple):
    """How the events were named in the source: histories in its format can be read, too.

    Attributes:
        columns: our column name -> column of the source, such as {"user_id": "customer"}.
        time_unit: seconds, milliseconds, iso or order.
    """

    columns: dict[str, str]
    time_unit: str


def check_dataset_manifest(manifest: dict[str, Any], where: Path) -> None:
    """Raises a ValueError unless all values that a dataset reads from its manifest have the expected types.

    Args:
        manifest: of a dataset.
        where: its file, for the error.
    """
    for name, kind in REQUIRED.items():
        take(manifest, name, kind, where)
    counts, protocol, has, features = (manifest[name] for name in ("counts", "protocol", "has", "features"))
    for name in COUNTS:
        if take(counts, name, int, f"{where}, counts,") < 0:
            _refuse(where, f"the count {name} {counts[name]}", "0 or more")
    if not counts["items"]:
        _refuse(where, "0 items", "at least 1")
    for name in ("time", "rating", "action"):
        take(has, name, bool, f"{where}, has,")
    if protocol.get("repeats") not in get_args(Repeats):
        _refuse(where, f"the repeats {protocol.get('repeats')!r}", f"one of {', '.join(get_args(Repeats))}")
    if "targets" in manifest:
        take(take(manifest, "targets", dict, where), "baskets", bool, f"{where}, targets,")
    for name in ("split", "tie_break"):
        take(protocol, name, str, f"{where}, protocol,")
    if not all(isinstance(name, str) for name in manifest["actions"]):
        _refuse(where, f"the actions {manifest['actions']!r}", "names")
    for owner in ("items", "users"):
        for spec in take(features, owner, list, f"{where}, features,"):
            _check_feature(spec, owner, where)
    source_log(manifest, where)


def _check_feature(spec: Any, owner: str, where: Path) -> None:
    name, kind, size = ((spec.get(key) if isinstance(spec, dict) else None) for key in ("name", "kind", "size"))
    named = isinstance(name, str) and name and "\0" not in name and ".." not in name.replace("\\", "/").split("/")
    if not (named and kind in KINDS and type(size) is int and size >= 1):
        expected = f"a name, a kind of {', '.join(KINDS)} and a size of at least 1"
        _refuse(where, f"the feature {spec!r} of {owner}", expected)


def source_log(manifest: dict[str, Any], where: Path, make: str = MAKE) -> SourceLog:
    """Columns and time unit of the source, from the manifest of a dataset, an index or a bundle.

    Manifests of earlier versions lack them: then our own column names and seconds are assumed.

    Raises:
        ValueError: for values of another type.
    """
    log = manifest.get("log", {"columns": {}, "time_unit": "seconds"})
    columns, unit = (log.get("columns"), log.get("time_unit")) if isinstance(log, dict) else (None, None)
    named = isinstance(columns, dict) and all(
        name in EVENT_COLUMNS and isinstance(column, str) for name, column in columns.items()
    )
    if not named or unit not in get_args(TimeUnit):
        _refuse(where, f"the log {log!r}", f"columns by name and a time unit of {', '.join(get_args(TimeUnit))}", make)
    return SourceLog(dict(columns), unit)  # type: ignore[arg-type]  # checked above


def _refuse(where: Path, value: str, expected: str, make: str = MAKE) -> NoReturn:
    raise ValueError(f"{where} has {value[:120]}, expected {expected}; {make}")
