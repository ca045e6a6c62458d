"""The verb mine-negatives: candidate lists around targets that the retriever has never seen."""

import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recsys2stage import columns as c
from recsys2stage.artifacts import DATA, RUN, ParquetStream, atomic_write, write_manifest
from recsys2stage.data.batches import Ragged, in_chunks, places
from recsys2stage.data.dataset import At, Dataset, sample_users
from recsys2stage.mining.miners import Miner, Mixture, Popular, RankBand, Request, Uniform, specify_miner
from recsys2stage.ranking.lists import CANDIDATES, REQUESTS, STATES, lists, select_fold
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.ranking.signals.base import Signal, save_signals, specify
from recsys2stage.recommender import Recommender, load_for
from recsys2stage.trust import Trust, trusts

logger = logging.getLogger("recsys2stage")

Table = dict[str, np.ndarray]  # columns of like length


@trusts
def mine_negatives(
    data: Path = DATA,
    index: Path = RUN / "index",
    output: Path | None = None,
    miner: Miner | None = None,
    signals: list[Signal] | None = None,
    k: int = 200,
    targets: int | None = None,
    gap: int = 0,
    select: float = 0.2,
    users: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    strict: bool = True,
    trust: Trust = None,
) -> None:
    """Mine candidate lists around each user's validation targets, which the retriever has never been trained on.

    Candidates come through the path that serves: the index and the signals that name some, with the user's seen items
    excluded, and those that are withheld from all training. Every positive up to and including the target is kept out
    of the negatives; the test event is never consulted. With `repeats: keep` no seen item is excluded: it is a
    candidate and, unless it is the target itself, a negative, as it was not taken this time. Users kept to select the
    ranker get all candidates, in order, as they are served.

    Args:
        data: prepared dataset.
        index: folder written by export-index.
        output: folder to write; None: candidates, beside the index.
        miner: which negatives a training list gets; None: every candidate, 10 uniform and 10 popular items.
        signals: what the ranker is told of a candidate beside the retriever's opinion, counted in training events; some
            may name candidates of their own. None: nothing.
        k: candidates of each request.
        targets: so many of each user's newest validation targets, a list each; None: all.
        gap: only targets that come so many seconds after the event before them, at least, and `targets` of these; 3600
            leaves the beginnings of sessions, which the test requests of GlobalTime are.
        select: share of the users, by seeded hash, that select the ranker and do not train it.
        users: how many users to mine, drawn at random; None: all.
        batch_size: lists at a time.
        seed: of the draws.
        strict: whether a signal that the data cannot give is an error; else it is left out with a warning.
        trust: modules outside this package whose classes the index may name.
    """
    output, dataset = output or index.parent / "candidates", Dataset(data)
    recommender = load_for(dataset, index)
    if not 0 <= select < 1:
        raise ValueError(f"select is {select}, expected a share of the users from 0 to below 1")
    if targets is not None and targets < 1:
        raise ValueError(f"targets is {targets}, expected at least 1 of each user, or none given for all")
    if gap < 0:
        raise ValueError(f"gap is {gap}, expected a number of seconds, or 0 for all targets")
    if gap and not dataset.has_time:
        raise ValueError(f"gap is {gap} seconds, but {data} has an order and no times; leave it out")
    miner = miner or Mixture([RankBand(), Uniform(10), Popular(10)])
    mined, ends = dataset.val_targets(targets, gap)
    chosen = np.isin(mined, sample_users(np.unique(mined), users, seed))
    mined, ends = mined[chosen], ends[chosen]
    if not len(mined):
        raise ValueError(
            f"{data} has no user with a validation target and events before it{f' by {gap} seconds' if gap else ''}; "
            f"see the counts in {data / c.MANIFEST}"
        )
    recommender.signals = [signal for signal in signals or [] if is_given(signal, dataset, recommender.vectors, strict)]
    recommender.num_candidates = k
    names = [signal["name"] for signal in recommender.signal_names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"two signals give the number {twice}, and columns need names of their own; name each class once"
        )
    work = Mine(dataset, recommender, miner, select, seed)
    with atomic_write(output, "candidates") as folder:
        folder.mkdir()
        width = recommender.vectors.shape[1]
        states = np.lib.format.open_memmap(folder / STATES, "w+", np.float32, (len(mined), width))
        with ParquetStream(folder / CANDIDATES) as rows, ParquetStream(folder / REQUESTS) as requests:
            for part in tqdm(list(in_chunks(len(mined), batch_size)), desc="mine", unit="batch"):
                states[part], table, request = work.batch(mined[part], ends[part])
                table[c.REQUEST] += part.start
                rows.write(table)
                requests.write(request)
        states.flush()
        save_signals(recommender.signals, folder / SIGNALS)
        counts = {"lists": len(mined), "users": len(np.unique(mined)), **work.counts}
        write_manifest(
            folder,
            "candidates",
            options={
                "miner": specify_miner(miner),
                "signals": [specify(signal) for signal in recommender.signals],
                **{"k": k, "targets": targets, "gap": gap, "select": select, "users": users, "seed": seed},
            },
            parents={"index": index, "data": data},
            vector_dim=width,
            max_length=recommender.towers.max_length,
            signals=recommender.signal_names,
            scores_cold=recommender.towers.items.knows_cold,
            request_time=recommender.request_time,
            next_action=recommender.next_action,
            split_hash=dataset.manifest["split_hash"],
            counts=counts,
        )
    print(
        f"{output}: {counts['rows']:,} rows in {counts['lists']:,} lists of {counts['users']:,} users "
        f"({counts['train_lists']:,} lists train the ranker, {counts['select_lists']:,} select it); the target of "
        f"{counts['target_outside_candidates']:,} lies outside the {k} candidates"
    )


def is_given(signal: Signal, dataset: Dataset, vectors: np.ndarray, strict: bool) -> bool:
    """Fits a signal; whether the data have what it needs."""
    try:
        signal.fit(dataset, vectors)
    except ValueError as error:
        if strict:
            raise
        logger.warning("%s is left out: %s", type(signal).__name__, error)
        return False
    return True


def excluded_items(dataset: Dataset, users: np.ndarray, at: At) -> Ragged:
    """Items excluded from a list: filtered seen items (none with `repeats: keep`), and those withheld as cold."""
    known, withheld = dataset.known(users, at), np.flatnonzero(dataset.cold)
    if not len(withheld):
        return known
    rows = np.concatenate([known.rows, np.repeat(np.arange(len(users)), len(withheld))])
    values = np.concatenate([known.values, np.tile(withheld, len(users))])
    ends = np.cumsum(np.bincount(rows, minlength=len(users)))
    return Ragged(values[np.argsort(rows, kind="stable")], np.concatenate([[0], ends]))


class Mine:
    """Makes lists, batch after batch, and counts them.

    Args:
        dataset: prepared dataset.
        recommender: the first stage, with fitted signals.
        miner: which negatives a training list gets.
        select: share of the users whose lists select the ranker.
        seed: of the draws.
    """

    def __init__(self, dataset: Dataset, recommender: Recommender, miner: Miner, select: float, seed: int) -> None:
        self.dataset, self.recommender, self.miner, self.select, self.seed = dataset, recommender, miner, select, seed
        self.rng = np.random.default_rng(seed)
        self.counts = dict.fromkeys(("train_lists", "select_lists", "target_outside_candidates", "rows"), 0)

    def batch(self, users: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, Table, Table]:
        """The lists of B targets.

        Args:
            users: (B,) whose targets they are.
            at: (B,) their places among all events.

        Returns:
            (B, D) query vectors, the rows of all lists, and a row for each list.
        """
        dataset, recommender = self.dataset, self.recommender
        padded = dataset.histories(users, at, recommender.towers.max_length)
        excluded, target, now = (
            excluded_items(dataset, users, at),
            dataset.targets(users, at),
            dataset.request_times(users, at),
        )
        queries = recommender.queries(padded, now, dataset.target_action(users, at, recommender.next_action))
        found = recommender.candidates(queries, excluded, padded, now)
        selects = select_fold(users, self.select, self.seed)
        request = Request.of(found.items, target, excluded.rows, excluded.values, dataset.train_counts)
        every = queries @ recommender.vectors.T  # (B, V + 1)
        every[:, c.PAD] = every[excluded.rows, excluded.values] = -np.inf
        table = lists(
            request.candidates, request.target, found.score, self.miner.choose(request, self.rng), every, selects
        )
        row = table.pop("row")
        length = np.bincount(row, minlength=len(users))
        if empty := int((length == 0).sum()):
            raise ValueError(
                f"the miner left {empty} of {len(users)} lists empty; with k = {recommender.num_candidates}, skip_top "
                "must be lower or k higher"
            )
        index, real = places(np.cumsum(length) - length, np.cumsum(length))
        target_action = np.where(real, table[c.ITEM][index], c.PAD)
        numbers = recommender.measure_signals(target_action, queries, found, padded, now)
        hit = (found.items == target[:, None]).any(1)
        self.counts["train_lists"] += int((~selects & hit).sum())
        self.counts["select_lists"] += int(selects.sum())
        self.counts["target_outside_candidates"] += int((~hit).sum())
        self.counts["rows"] += len(row)
        table = {c.REQUEST: row.astype(np.int32), c.USER: users[row].astype(np.int32), **table}
        named = zip(recommender.signal_names, numbers[real].T, strict=True)
        fold = np.where(selects, "select", "train")
        return (
            queries,
            table | {signal["name"]: values for signal, values in named},
            {
                c.USER: users,
                c.PLACE: at,
                c.TIME: recommender.request_seconds_of(padded, now),
                c.FOLD: fold,
                c.ROWS: length,
            },
        )
