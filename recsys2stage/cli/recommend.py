"""The command recommend: lists for the users of a dataset or a file."""

import logging
import time
from pathlib import Path

import numpy as np

from recsys2stage.artifacts import RUN
from recsys2stage.cli.examples import examples
from recsys2stage.data.batches import Padded, in_chunks
from recsys2stage.data.dataset import Dataset, no_items
from recsys2stage.data.ids import given_ids, read_id_lines
from recsys2stage.data.locks import locked
from recsys2stage.data.request_inputs import as_seconds, format_time
from recsys2stage.data.summary import print_summary, progress
from recsys2stage.options import Seen, check_integer, counted
from recsys2stage.ranking.beyond import Recommendations
from recsys2stage.ranking.bundle import bundle_data, bundle_log, check_split
from recsys2stage.recommender import Recommender
from recsys2stage.serving.formats import ListWriter
from recsys2stage.serving.item_files import read_allowed_items
from recsys2stage.serving.requests import DatasetRequests, FileRequests, resolve_target_actions
from recsys2stage.trust import Trust, trusts

logger = logging.getLogger("recsys2stage")


@trusts
def recommend(
    bundle: Path = RUN / "bundle",
    data: Path | None = None,
    histories: Path | None = None,
    users: list[str | int] | Path | None = None,
    output: Path | None = None,
    k: int = 10,
    request_time: int | None = None,
    action: str | None = None,
    seen: Seen | None = None,
    exclude: Path | None = None,
    allow: Path | None = None,
    batch_size: int = 32,
    show: int = 0,
    trust: Trust = None,
) -> None:
    """Recommend for users of the data, or for histories in a file.

    The file has the columns user_id, item_id, title (if known), score, rank and retriever_score, best item first.

    Args:
        bundle: folder written by export-bundle, or by export-index (first stage only).
        data: prepared dataset with the users; None: the one the bundle was made from.
        histories: a file with a row for each event: .csv, .tsv, .jsonl or .ndjson (also with .gz), .parquet or .pq,
            with the columns user_id, item_id and, for models with request time, time (seconds since 1970 or ISO text);
            oldest first if there is no time. Optional: rating, action (name of the action type) and the user features
            of the model. The columns may also have the names and the time unit of the log that was prepared. These
            users need not be in the data.
        users: user ids: a list, or a text file with one per line, compared as text (0012 is not 12); None: all.
        output: file to write: Parquet (.parquet), CSV (.csv) or JSON lines (.jsonl, .ndjson), text also with .gz; None:
            recommendations.parquet, next to the bundle.
        k: number of items per user.
        request_time: seconds since 1970, no earlier than any user's newest event; None: the log's newest event.
        action: target action, for models with next_action: one name for all users, a file like histories with
            user_id and action, or a .json of {user_id: action}. None, and for users not in the file: the model's
            next_action if it is an action, else unknown.
        seen: keep or filter seen items; None: keep if the data were prepared with repeats: keep, else filter.
        exclude: text file of item ids that are not recommended, one per line, compared as text; None: none.
        allow: text file of the only item ids that may be recommended; None: all. Where fewer than k are left, a user
            gets fewer.
        batch_size: users per batch.
        show: number of users whose newest events and recommendations are printed.
        trust: modules outside this package from which the bundle may load classes.
    """
    check_integer("k", k, example=10)
    check_integer("batch_size", batch_size, example=32)
    check_integer("show", show, 0)
    recommender, output = Recommender.load(bundle), output or bundle.parent / "recommendations.parquet"
    if isinstance(users, Path):
        if not users.is_file():
            raise ValueError(f"--users {users} is not a file; give one with an id per line or a list: --users '[5, 7]'")
        users = [line for line in read_id_lines(users) if line.strip()]
    only = None if users is None else given_ids(users)
    if histories is not None:
        requests: DatasetRequests | FileRequests = FileRequests(histories, recommender, only, bundle_log(bundle))
    else:
        dataset = Dataset(data or bundle_data(bundle))
        check_split(dataset, bundle)
        requests = DatasetRequests(dataset, recommender, only)
    if not len(requests.user_ids):
        raise ValueError("there are no users to recommend for: --users is empty")
    k = min(k, len(recommender.vectors) - 1)
    keep_seen = recommender.seen_rule(seen) == "keep"
    request_time, when = time_of_requests(request_time, recommender, requests)
    allowed = read_allowed_items(recommender, allow, exclude)
    target_action = (
        None if action is None else resolve_target_actions(requests.user_ids, action, recommender, bundle_log(bundle))
    )

    def rank(part: slice, k: int) -> tuple[Padded, Recommendations]:
        """Histories and lists of a slice of the users."""
        history, seen_items = requests.read(part)
        excluded = no_items(len(history.lengths)) if keep_seen else seen_items
        times = np.full(len(history.lengths), request_time)
        actions = None if target_action is None else target_action[part]
        return history, recommender.rank(history, excluded, times, k, actions, allowed)

    with locked(output), ListWriter.open(output, requests.user_ids, recommender.catalogue) as writer:
        for part in progress(list(in_chunks(len(requests.user_ids), batch_size)), "recommend"):
            writer.write(part, rank(part, k)[1])
    given = "1 user" if len(requests.user_ids) == 1 else f"each of {len(requests.user_ids):,} users"
    print_summary(
        output,
        f"{counted(writer.rows, 'row')}, {counted(k, 'item')} for {given}{when}",
        *(examples(requests.user_ids, recommender.catalogue, show, rank) if show else ()),
        then=f"recsys serve --bundle {bundle}",
    )


def time_of_requests(
    request_time: int | None, recommender: Recommender, requests: DatasetRequests | FileRequests
) -> tuple[int, str]:
    """Request time of all requests in seconds, and a text to print (empty for a model without request time).

    Args:
        request_time: the user's option; None: the time of the newest event of the log.
    """
    timed = recommender.request_time == "target"
    if request_time is None:
        if not timed:
            return 0, ""  # `requests.newest` would read the times of all events
        if requests.newest > time.time():
            logger.warning(
                "the newest event of the log, %s, lies in the future of this machine's clock, and its time is used as "
                "the time of all requests; pass --request_time",
                format_time(requests.newest),
            )
        return requests.newest, f", as of {format_time(requests.newest)}, the newest event of the log"
    now = int(as_seconds([request_time], "request_time", recommender.newest_time)[0])
    late = requests.last_times > now
    if recommender.has_time and late.any():
        first = int(late.argmax())
        raise ValueError(
            f"request_time is {now}, before the newest event of {int(late.sum()):,} of {len(late):,} users, such as "
            f"{requests.last_times[first]} of user {requests.user_ids[first]}; give a later time, or --histories with "
            "only the events before it"
        )
    if not timed:
        logger.warning("the model was trained without request time, so --request_time %s has no effect", now)
    return now, f", as of {format_time(now)}" if timed else ""
