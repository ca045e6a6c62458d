"""Requests from a prepared dataset or a file: users, their histories, user features and target actions."""

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
from recsys2stage.data.manifest import EVENT_COLUMNS, SourceLog
from recsys2stage.data.request_inputs import Values, encode_users, fill_ratings
from recsys2stage.recommender import NO_TARGET_ACTION, Recommender
from recsys2stage.serving.event_files import OWN, read_events, read_log, require, sort_by_time

logger = logging.getLogger("recsys2stage")


class DatasetRequests:
    """Users of a prepared dataset, with all their events as history.

    Args:
        dataset: the dataset.
        recommender: the recommender to serve; gives the history length.
        only: user ids, as text; None: all users.
    """

    def __init__(self, dataset: Dataset, recommender: Recommender, only: Sequence[str] | None = None) -> None:
        recommender.check(dataset)
        self.dataset, self.max_length = dataset, recommender.towers.max_length
        table = pl.read_parquet(dataset.path / c.USER_TABLE, columns=[c.USER, c.USER_ID]).sort(c.USER)
        if only is not None:
            table = table.filter(ids.select(only, table[c.USER_ID], "the data", ", or give a history: --histories"))
        self.users, self.user_ids = table[c.USER].to_numpy().astype(np.int64), table[c.USER_ID].to_numpy()

    @property
    def newest(self) -> int:
        """Time of the newest event of the log, in seconds."""
        return int(self.dataset.times.max())

    @property
    def last_times(self) -> np.ndarray:
        """Time of each user's newest event in seconds, 0 without events, (n,) int64."""
        starts, ends = self.dataset.offsets[self.users], self.dataset.offsets[self.users + 1]
        return np.where(ends > starts, self.dataset.times[np.maximum(ends - 1, 0)], 0)

    def read(self, part: slice) -> tuple[Padded, Ragged]:
        """Histories and seen items of a slice of the users."""
        users = self.users[part]
        return self.dataset.histories(users, "all", self.max_length), self.dataset.seen(users, "all")


class FileRequests:
    """Users and histories from a file with the columns user_id, item_id and optionally time (seconds or ISO text).

    The file is CSV, TSV, JSON lines or Parquet by its ending. Columns may also have the names of the source that the
    data were prepared from; its times are then in the source's unit. The columns rating and action (names) are read if
    the model has inputs for them; missing values are unknown. User features are read from columns of their declared
    names, from any row of a user; the classes of a multi-valued feature are a list or a text separated by |.

    Args:
        path: the file, of a format in `event_files`. Its rows are sorted by time, equal times in file order; without a
            time column, rows must be oldest first.
        recommender: the recommender to serve; gives the item numbers and the history length.
        only: user ids, as text; None: all users.
        source: the source's columns and time unit, as the bundle records them.
    """

    def __init__(
        self, path: Path, recommender: Recommender, only: Sequence[str] | None = None, source: SourceLog = OWN
    ) -> None:
        classes = [spec["name"] for spec in recommender.user_features if spec["kind"] != "numeric"]
        path, source = Path(path), source if recommender.has_time else source._replace(time_unit="order")
        log, in_unit = read_events(path, classes, source)
        require(log, [c.USER_ID, c.ITEM_ID] + ([c.TIME] if recommender.needs_times else []), path, source)
        log = log.with_columns(ids.require_ids(log[name], path) for name in (c.USER_ID, c.ITEM_ID))
        if c.TIME in log.columns and (nulls := log[c.TIME].null_count()):
            raise ValueError(f"{nulls:,} of {len(log):,} rows have no {c.TIME} in {path}; fill in or drop them")
        if c.TIME in log.columns:
            log = sort_by_time(log, source, in_unit, path, recommender.newest_time)
        self.newest = int(log[c.TIME].max() or 0) if c.TIME in log.columns else 0  # type: ignore[arg-type]  # whole
        if only is not None:
            log = log.filter(ids.select(only, log[c.USER_ID], path))
        if not len(log):
            raise ValueError(f"{path} holds no events; expected one row for each event of each user")
        numbers = recommender.catalogue.numbers(log[c.ITEM_ID].to_list())
        if not numbers.any():
            given = ids.none_known(log[c.ITEM_ID].to_list(), f" in {path}")
            raise ValueError(f"{given}; expected ids such as {recommender.example_id!r}")
        if not numbers.all():
            logger.warning(
                "%s: skipping %s of %s events, of items the model does not know",
                path,
                f"{(numbers == 0).sum():,}",
                len(log),
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
        if not counts.all():
            self._warn_unknown(log, user, counts, recommender, path)
        self.last_times = np.zeros(len(self.user_ids), dtype=np.int64)  # of each user's newest event, seconds
        np.maximum.at(self.last_times, user, times.astype(np.int64))
        self.features = _user_features(log, user, len(self.user_ids), recommender, path)

    def _warn_unknown(
        self, log: pl.DataFrame, user: np.ndarray, counts: np.ndarray, recommender: Recommender, path: Path
    ) -> None:
        """Warns of users of whose items the model knows none."""
        first = int(np.argmin(counts))
        logger.warning(
            "%s: the model knows no item of %s of %s users, such as %r of user %r (known ids look like %r); they get "
            "the most popular items; check their item ids, or leave them out",
            *(path, f"{int((counts == 0).sum()):,}", f"{len(counts):,}", log[c.ITEM_ID][int((user == first).argmax())]),
            *(self.user_ids[first].item() if hasattr(self.user_ids[first], "item") else self.user_ids[first],),
            recommender.catalogue.items[c.ITEM_ID][0],
        )

    def read(self, part: slice) -> tuple[Padded, Ragged]:
        """Histories and seen items of a slice of the users."""
        starts, ends = self.offsets[:-1][part], self.offsets[1:][part]
        events = spans(starts, ends)
        newest = np.maximum(starts, ends - self.max_length)
        padded = left_aligned(self.items, self.times, newest, ends, self.ratings, self.actions)
        if self.features is not None:
            padded = padded._replace(user=tuple(values[part] for values in self.features))
        return padded, Ragged(self.items[events.values], events.offsets)


def _ratings(log: pl.DataFrame, recommender: Recommender, path: Path) -> np.ndarray | None:
    """Ratings of the events, (n,) float32; None if the model does not read them or the file has none."""
    if "ratings" not in recommender.input_fields or not _has_column(log, c.RATING, path):
        return None
    try:
        return fill_ratings(log[c.RATING].cast(pl.Float32).to_list())
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} has ratings that are no numbers: {str(error).splitlines()[0]}") from error


def _action_numbers(log: pl.DataFrame, recommender: Recommender, path: Path) -> np.ndarray | None:
    """Action types of the events, (n,) int64; None if the model does not read them or the file has none."""
    if not recommender.reads_actions or not _has_column(log, c.ACTION, path):
        return None
    return recommender.catalogue.action_numbers(log[c.ACTION].cast(pl.String).to_list(), path)


def _user_features(
    log: pl.DataFrame, user: np.ndarray, users: int, recommender: Recommender, path: Path
) -> Values | None:
    """User features, (users, P) for each declared feature; None if the file has none.

    Args:
        user: (n,) the user number of each row.
        users: the number of users.
    """
    specs = [spec for spec in recommender.user_features if spec["name"] not in EVENT_COLUMNS]  # never features
    present = [spec for spec in specs if spec["name"] in log.columns]
    if recommender.reads_user:
        present = [spec for spec in specs if _has_column(log, spec["name"], path)]
    known: list[dict[str, Any]] = [{} for _ in range(users)]
    for spec in present:
        name = spec["name"]
        pairs = pl.DataFrame({"user": user, "value": log[name]}).drop_nulls()
        for row, value in (
            pairs if pairs.schema["value"].is_nested() else pairs.unique(maintain_order=True)
        ).iter_rows():
            if spec["kind"] == "multi" and isinstance(value, str):
                value = value.split("|")
            if known[row].setdefault(name, value) != value:
                raise ValueError(
                    f"{path} has two values of {name} for one user, {known[row][name]!r} and {value!r}; keep one"
                )
    return encode_users(recommender.user_features, known, str(path)) if present else None


def _has_column(log: pl.DataFrame, name: str, path: Path) -> bool:
    if name not in log.columns:
        logger.warning("%s has no column %s, which the model reads; its values are taken as unknown", path, name)
    return name in log.columns


def resolve_target_actions(
    users: np.ndarray, action: str, recommender: Recommender, source: SourceLog = OWN
) -> np.ndarray:
    """Target action of each user, (n,) int64.

    Args:
        users: user ids.
        action: one action for all users; or a file with user_id and action, of a format in `event_files`, or a .json
            of {user_id: action}. Users without an action in the file get the recommender's default action.
        recommender: the recommender to serve.
        source: the source's columns, as in `FileRequests`.
    """
    if recommender.next_action == "none":
        raise ValueError(NO_TARGET_ACTION)
    if action in recommender.actions:
        return np.full(len(users), recommender.target_action_number(action))
    if not Path(action).is_file():
        raise ValueError(
            f"the target action is {action!r}, expected a file or one of the model's actions "
            f"{', '.join(recommender.actions)}"
        )
    named = read_target_actions(Path(action), source)
    number = {name: recommender.target_action_number(name) for name in set(named.values())}
    names = [named.get(str(user)) for user in users]
    if missing := names.count(None):
        default = recommender.next_action if recommender.default_action else "unknown"
        logger.warning(
            "%s has no action for %s of %s users; using %r", action, f"{missing:,}", f"{len(users):,}", default
        )
        if missing == len(users) and named:  # ids in two formats, perhaps
            logger.warning("%s has user ids such as %r, the requests %r", action, next(iter(named)), str(users[0]))
    return np.array([recommender.default_action if name is None else number[name] for name in names], dtype=np.int64)


def read_target_actions(path: Path, source: SourceLog = OWN) -> dict[str, str]:
    """Target actions in a file: user id, as text -> action name."""
    if path.suffix == ".json":
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text, object_pairs_hook=tuple)  # a dict hides repeated keys
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(content, tuple):
            raise ValueError(f"{path} holds a {type(content).__name__}, expected {{user_id: action}}")
        pairs = [(user, None if name is None else str(name)) for user, name in content]
        log = pl.DataFrame(pairs, schema={c.USER_ID: pl.String, c.ACTION: pl.String}, orient="row")
    else:
        log = read_log(path, source=source)
        require(log, [c.USER_ID, c.ACTION], path, source)
        log = log.with_columns(ids.require_ids(log[c.USER_ID], path))
    log = log.select(pl.col(c.USER_ID, c.ACTION).cast(pl.String)).drop_nulls()
    repeated = log.filter(pl.col(c.USER_ID).is_duplicated())[c.USER_ID].unique()
    if len(repeated):
        raise ValueError(f"{path} has more than one action for {len(repeated):,} users, for example {repeated[0]!r}")
    return dict(log.iter_rows())
