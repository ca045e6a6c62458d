"""Whom to recommend for: users of a prepared dataset or of a file, their histories, and what they are asked for."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.data import ids
from recsys2stage.data.batches import Padded, Ragged, left_aligned, spans
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.request_inputs import Values, as_seconds, encode_users, known_ratings
from recsys2stage.data.sources.quotes import layout_of
from recsys2stage.recommender import NOT_TOLD, Recommender

logger = logging.getLogger("recsys2stage")

EVENT_COLUMNS = (c.USER_ID, c.ITEM_ID, c.TIME, c.RATING, c.ACTION)  # never features of the user


class DatasetRequests:
    """The users of a prepared dataset with all their events.

    Args:
        dataset: the dataset.
        recommender: whose history length counts.
        only: user ids, as text; None: everybody.
    """

    def __init__(self, dataset: Dataset, recommender: Recommender, only: Sequence[str] | None = None) -> None:
        recommender.check(dataset)
        self.dataset, self.max_length = dataset, recommender.towers.max_length
        table = pl.read_parquet(dataset.path / c.USER_TABLE, columns=[c.USER, c.USER_ID]).sort(c.USER)
        if only is not None:
            table = table.filter(ids.select(only, table[c.USER_ID], dataset.path))
        self.users, self.user_ids = table[c.USER].to_numpy().astype(np.int64), table[c.USER_ID].to_numpy()

    @property
    def newest(self) -> int:
        """Seconds of the newest event of the log."""
        return int(self.dataset.times.max())

    @property
    def last_times(self) -> np.ndarray:
        """Seconds of each user's newest event, 0 without one, (n,) int64."""
        starts, ends = self.dataset.offsets[self.users], self.dataset.offsets[self.users + 1]
        return np.where(ends > starts, self.dataset.times[np.maximum(ends - 1, 0)], 0)

    def read(self, part: slice) -> tuple[Padded, Ragged]:
        """Histories, and all seen items."""
        users = self.users[part]
        return self.dataset.histories(users, "all", self.max_length), self.dataset.seen(users, "all")


class FileRequests:
    """Users whose histories stand in a CSV or Parquet file: user_id, item_id and perhaps time (seconds).

    Where the model has inputs for them, it is also told of the columns rating and action (names); a history without
    them is one of unknown ratings and kinds. Columns named like the declared user features say what is known of the
    users, in any of a user's rows; the classes of a multi-valued feature are a list or a text with | between them.

    Args:
        path: the file; rows in any order, as they are sorted by time (equal times stay in the order of the file), or
            oldest first where it has no time.
        recommender: whose items and history length count.
        only: user ids, as text; None: everybody.
    """

    def __init__(self, path: Path, recommender: Recommender, only: Sequence[str] | None = None) -> None:
        classes = [spec["name"] for spec in recommender.user_features if spec["kind"] != "numeric"]
        log = read_log(Path(path), classes)
        require(log, [c.USER_ID, c.ITEM_ID] + ([c.TIME] if recommender.needs_times else []), path)
        log = log.with_columns(ids.checked(log[name], path) for name in (c.USER_ID, c.ITEM_ID))
        if c.TIME in log.columns and (nulls := log[c.TIME].null_count()):
            raise ValueError(f"{nulls:,} of {len(log):,} rows have no {c.TIME} in {path}; fill in or drop them")
        if c.TIME in log.columns and not log[c.TIME].dtype.is_integer() and len(log):
            raise ValueError(f"{path} has the time {log[c.TIME][0]!r}; expected whole seconds since 1970")
        if c.TIME in log.columns and len(log) and recommender.has_time:
            as_seconds(log[c.TIME].to_numpy(), f"{path}, column time,", recommender.newest_time)
        self.newest = int(log[c.TIME].max() or 0) if c.TIME in log.columns else 0  # type: ignore[arg-type]  # whole
        if only is not None:
            log = log.filter(ids.select(only, log[c.USER_ID], path))
        if not len(log):
            raise ValueError(f"{path} holds no events; expected one row for each event of each user")
        if c.TIME in log.columns:
            log = log.sort(c.TIME, maintain_order=True)
        numbers = recommender.catalogue.numbers(log[c.ITEM_ID].to_list())
        if not numbers.any():
            raise ValueError(
                f"none of the {len(log):,} item ids in {path} is known to the model, for example "
                f"{log[c.ITEM_ID][0]!r}; expected ids as {recommender.catalogue.items[c.ITEM_ID][0]!r}"
            )
        if not numbers.all():
            logger.warning(
                "%s: %s of %s events are of items the model does not know", path, f"{(numbers == 0).sum():,}", len(log)
            )
        self.max_length = recommender.towers.max_length
        self.user_ids, user = np.unique(log[c.USER_ID].to_numpy(), return_inverse=True)
        order = np.argsort(user[numbers > 0], kind="stable")
        self.items = numbers[numbers > 0][order]
        times = log[c.TIME].to_numpy() if c.TIME in log.columns else np.zeros(len(log), dtype=np.int64)
        self.times = times[numbers > 0][order].astype(np.int64)
        self.ratings, self.actions = (
            None if column is None else column[numbers > 0][order]
            for column in (_ratings(log, recommender, path), _action_numbers(log, recommender, path))
        )
        counts = np.bincount(user[numbers > 0], minlength=len(self.user_ids))
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.last_times = np.zeros(len(self.user_ids), dtype=np.int64)  # seconds of each user's newest event
        np.maximum.at(self.last_times, user, times.astype(np.int64))
        self.features = _user_features(log, user, len(self.user_ids), recommender, path)

    def read(self, part: slice) -> tuple[Padded, Ragged]:
        """Histories, and all seen items."""
        starts, ends = self.offsets[:-1][part], self.offsets[1:][part]
        known = spans(starts, ends)
        newest = np.maximum(starts, ends - self.max_length)
        padded = left_aligned(self.items, self.times, newest, ends, self.ratings, self.actions)
        if self.features is not None:
            padded = padded._replace(user=tuple(values[part] for values in self.features))
        return padded, Ragged(self.items[known.values], known.offsets)


def _ratings(log: pl.DataFrame, recommender: Recommender, path: Path) -> np.ndarray | None:
    """Of each event, (n,) float32; None where the model does not look at them or there are none."""
    if "ratings" not in recommender.reads or not _there(log, c.RATING, path):
        return None
    try:
        return known_ratings(log[c.RATING].cast(pl.Float32).to_list())
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} has ratings that are no numbers: {str(error).splitlines()[0]}") from error


def _action_numbers(log: pl.DataFrame, recommender: Recommender, path: Path) -> np.ndarray | None:
    """Of each event, (n,) int64; None where the model does not look at them or there are none."""
    if not recommender.reads_actions or not _there(log, c.ACTION, path):
        return None
    return recommender.catalogue.action_numbers(log[c.ACTION].cast(pl.String).to_list(), path)


def _user_features(
    log: pl.DataFrame, user: np.ndarray, users: int, recommender: Recommender, path: Path
) -> Values | None:
    """Of each user, (users, P) of each declared feature; None where the file has none.

    Args:
        user: (n,) the number of each row's user.
    """
    specs = [spec for spec in recommender.user_features if spec["name"] not in EVENT_COLUMNS]
    there = [spec for spec in specs if spec["name"] in log.columns]
    if recommender.reads_user:
        there = [spec for spec in specs if _there(log, spec["name"], path)]
    known: list[dict[str, Any]] = [{} for _ in range(users)]
    for spec in there:
        name = spec["name"]
        pairs = pl.DataFrame({"user": user, "value": log[name]}).drop_nulls()
        for row, value in (
            pairs if pairs.schema["value"].is_nested() else pairs.unique(maintain_order=True)
        ).iter_rows():
            if spec["kind"] == "multi" and isinstance(value, str):
                value = value.split("|")
            if known[row].setdefault(name, value) != value:
                raise ValueError(
                    f"{path} has two values of {name} for one user, {known[row][name]!r} and {value!r}; leave one"
                )
    return encode_users(recommender.user_features, known, str(path)) if there else None


def _there(log: pl.DataFrame, name: str, path: Path) -> bool:
    if name not in log.columns:
        logger.warning("%s has no column %s, at which the model looks; they are taken as unknown", path, name)
    return name in log.columns


def target_actions_of(users: np.ndarray, action: str, recommender: Recommender) -> np.ndarray:
    """The kind of action to recommend for, for each user, (n,) int64.

    Args:
        users: their ids.
        action: the name of a kind, for everybody; or a CSV or Parquet file with user_id and action (a name), or a .json
            of {user_id: action}. Whoever is not in the file, or without an action there, is asked for the usual kind.
        recommender: that shall be asked.
    """
    if recommender.next_action == "none":
        raise ValueError(NOT_TOLD)
    if action in recommender.actions:
        return np.full(len(users), recommender.target_action_number(action))
    if not Path(action).is_file():
        raise ValueError(
            f"the action asked for is {action!r}: no file, and no kind that the model knows, which are "
            f"{', '.join(recommender.actions)}"
        )
    named = read_target_actions(Path(action))
    number = {name: recommender.target_action_number(name) for name in set(named.values())}
    told = [named.get(str(user)) for user in users]
    if untold := told.count(None):
        usual = repr(recommender.next_action) if recommender.default_action else "an unknown kind"
        logger.warning("%s names no action for %s of %s users: %s", action, f"{untold:,}", f"{len(users):,}", usual)
        if untold == len(users) and named:  # perhaps written in another way
            logger.warning(
                "%s: its users are such as %r, those to recommend for %r", action, next(iter(named)), str(users[0])
            )
    return np.array([recommender.default_action if name is None else number[name] for name in told], dtype=np.int64)


def read_target_actions(path: Path) -> dict[str, str]:
    """The name of the kind of action that each user id in a file, as text, is asked for."""
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=tuple)  # a dict hides repeated keys
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, tuple):
            raise ValueError(f"{path} holds a {type(found).__name__}, expected {{user_id: action}}")
        pairs = [(user, None if name is None else str(name)) for user, name in found]
        log = pl.DataFrame(pairs, schema={c.USER_ID: pl.String, c.ACTION: pl.String}, orient="row")
    else:
        log = read_log(path)
        require(log, [c.USER_ID, c.ACTION], path)
        log = log.with_columns(ids.checked(log[c.USER_ID], path))
    log = log.select(pl.col(c.USER_ID, c.ACTION).cast(pl.String)).drop_nulls()
    twice = log.filter(pl.col(c.USER_ID).is_duplicated())[c.USER_ID].unique()
    if len(twice):
        raise ValueError(f"{path} names more than one action for {len(twice):,} users, for example {twice[0]!r}")
    return dict(log.iter_rows())


def read_log(path: Path, text: Sequence[str] = ()) -> pl.DataFrame:
    """A CSV or Parquet file of events. Names in a CSV stay as they are written: item 0012 is not item 12.

    Args:
        path: the file.
        text: further columns of names.
    """
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        names = dict.fromkeys((c.USER_ID, c.ITEM_ID, c.ACTION, *text), pl.String)
        quote = layout_of(path, ",").quote if path.is_file() else None
        log = pl.read_csv(path, schema_overrides=names, infer_schema_length=None, quote_char=quote)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    twice = [name for name in log.columns if f"{name}_duplicated_0" in log.columns]  # as polars names the second
    if twice:
        raise ValueError(f"{path} has more than one column {twice[0]!r}; one must go")
    return log.with_columns(ids.narrowed(log[c.USER_ID])) if c.USER_ID in log.columns else log


def require(log: pl.DataFrame, names: Sequence[str], path: Path) -> None:
    """Raises a ValueError that says which columns a table lacks."""
    if missing := [name for name in names if name not in log.columns]:
        raise ValueError(f"{path} lacks the columns {missing}; it has {log.columns}")
