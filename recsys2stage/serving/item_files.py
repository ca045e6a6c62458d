"""Files of item ids that may or may not be recommended."""

import logging
from pathlib import Path

import numpy as np

from recsys2stage.data.ids import read_id_lines
from recsys2stage.recommender import Recommender

logger = logging.getLogger("recsys2stage")


def read_allowed_items(recommender: Recommender, allow: Path | None, exclude: Path | None) -> np.ndarray | None:
    """Reads which items may be recommended, (V,) bool; None: all.

    Args:
        recommender: the recommender to serve.
        allow: text file of the only ids that may be recommended, one per line; None: all.
        exclude: text file of ids that may not.

    Raises:
        ValueError: for a file that cannot be read, and a list of allowed ids that leaves no item.
    """
    if allow is None and exclude is None:
        return None
    allowed = np.ones(len(recommender.vectors), dtype=bool)
    if allow is not None:
        allowed[:] = False
        allowed[_read_numbers(recommender, "allow", allow)] = True
    if exclude is not None:
        allowed[_read_numbers(recommender, "exclude", exclude)] = False
    if not allowed[1:].any():
        raise ValueError(
            f"--allow {allow} and --exclude {exclude} leave none of {len(allowed) - 1:,} items, expected at least 1; "
            "name other ids"
        )
    return allowed[1:]


def _read_numbers(recommender: Recommender, option: str, path: Path) -> np.ndarray:
    """Item numbers of the ids in a file; unknown ones are left out, with a warning."""
    if not path.is_file():
        raise ValueError(f"--{option} {path} is not a file; give one with an item id per line")
    ids = [line for line in read_id_lines(path) if line.strip()]
    numbers = recommender.catalogue.numbers(ids)
    unknown = np.flatnonzero(numbers == 0)
    if len(ids) == len(unknown):
        found = f"holds {len(ids):,} ids, for example {ids[0]!r}, all unknown to the model" if ids else "holds no ids"
        raise ValueError(
            f"--{option} {path} {found}; expected ids such as {recommender.example_id!r}, write one per line"
        )
    if len(unknown):
        logger.warning(
            "--%s %s: %s of %s ids are not of items of the model, for example %r",
            *(option, path, f"{len(unknown):,}", f"{len(ids):,}", ids[unknown[0]]),
        )
    return numbers[numbers > 0]
