"""The verb mine-negatives: candidate lists with labels, signals and hard negatives for each validation target."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys2stage import columns as c
from recsys2stage.artifacts import DATA, RUN, atomic_write, write_manifest
from recsys2stage.data.batches import Ragged, in_chunks, padded_indices
from recsys2stage.data.dataset import Dataset, sample_users
from recsys2stage.data.folds import Fold, without_fold
from recsys2stage.data.locks import locked
from recsys2stage.data.parquet import ParquetStream
from recsys2stage.data.summary import config_option, print_summary, progress
from recsys2stage.mining.draws import ListDraws
from recsys2stage.mining.fold_targets import fold_targets
from recsys2stage.mining.miners import Miner, Mixture, Popular, RankBand, Request, Uniform, specify_miner
from recsys2stage.options import check_integer, check_number, check_seed, check_untrained
from recsys2stage.ranking.bundle import bundle_manifest, bundle_until
from recsys2stage.ranking.lists import CANDIDATES, REQUESTS, STATES, ExactRanks, build_lists, validation_users
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.ranking.signals.base import Proposer, Signal, save_signals, specify
from recsys2stage.recommender import Recommender, load_recommender
from recsys2stage.retrieval.catalogue_ranks import catalogue_ranks
from recsys2stage.trust import Trust, trusts

logger = logging.getLogger("recsys2stage")

LEAVE_OUT = re.compile(r"(;|, or) leave \w+ out$")  # the next step of a signal's error, done already with strict=False

Table = dict[str, np.ndarray]  # columns of equal length


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
    fold: str | None = None,
    match: bool = True,
    select: float = 0.2,
    users: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    strict: bool = True,
    trust: Trust = None,
) -> None:
    """Mine candidate lists for the ranker, around targets that the retriever was not trained on.

    Without a fold these are the validation targets of all users. With a fold they are events of its users, of whom the
    index's retriever was trained on none; all lists train the ranker, as further `data.folds` of it, so the ranker's
    validation users have none. Signals count the training events of the other users only.

    The targets are all validation events or, with the splits SessionStarts and Baskets, the validation targets only.
    Candidates come from the serving code path: the index and the signals that propose candidates, without the user's
    seen items and the items withheld as cold. The target and all earlier positives are excluded from the negatives;
    test events are never read. With `repeats: keep` seen items are not excluded: each is a candidate and, unless it is
    the target, a negative. Lists of the validation users contain all candidates in the order of serving.

    Args:
        data: prepared dataset.
        index: folder written by export-index.
        output: folder to write; None: the folder `candidates` next to the index.
        miner: negatives of a training list; None: all candidates, 10 uniform and 10 popular items.
        signals: additional ranker features of the candidates, fitted on training events; some also propose candidates.
            None: no signals.
        k: number of candidates per request.
        targets: number of newest validation targets to mine per user, one list each; None: all. With a fold, the mean
            number of lists per user; None: as many as match closely, or all events if `match` is false.
        gap: mine only targets at least this many seconds after the previous event; `targets` counts these only. 3600
            selects session starts, as the test requests of GlobalTime are.
        fold: NUMBER/TOTAL, such as 0/5, the fold of users that the index's retriever was fitted without; None: the
            retriever was fitted on all users.
        match: with a fold, whether its events are sampled such that gaps, history lengths and request times are
            distributed as those of the validation targets; if not, all its events are equally likely.
        select: share of the users, by seeded hash, used to validate the ranker and not to train it.
        users: number of users to mine, sampled at random; None: all.
        batch_size: lists per batch.
        seed: seed of all sampling.
        strict: whether a signal that the data do not support is an error; if False it is left out with a warning.
        trust: modules outside this package from which the index may load classes.
    """
    check_integer("k", k, example=200)
    check_integer("targets", targets, other="null for all", example=5)
    check_integer("gap", gap, 0, example=3600)
    if fold is not None:
        Fold.parse(fold)
    check_number("select", select, low=0, below=1, example=0.2, what="a share of the users")
    check_integer("users", users, other="null for all", example=1000)
    check_integer("batch_size", batch_size, example=256)
    check_seed("seed", seed)
    output, dataset = output or index.parent / "candidates", Dataset(data)
    k = min(k, dataset.num_items)
    check_untrained(index, bundle_until(index), "val", "mine with the index of the retriever that it was refitted from")
    check_fold(index, fold)
    recommender = load_recommender(dataset, index)
    if gap and not dataset.has_time:
        raise ValueError(f"gap is {gap} seconds, but {data} has an order and no times; leave it out")
    miner = miner or Mixture([RankBand(), Uniform(10), Popular(10)])
    facts: dict[str, Any] = {}
    if fold is None:
        mined, ends = dataset.val_targets(targets, gap)
        chosen = np.isin(mined, sample_users(np.unique(mined), users, seed))
        mined, ends = mined[chosen], ends[chosen]
        check_lists(dataset, mined, gap, select, users, seed)
        counted = dataset
    else:
        sampled = fold_targets(dataset, Fold.parse(fold), targets, gap, match, select, users, seed)
        mined, ends, counted = sampled.users, sampled.places, without_fold(dataset, Fold.parse(fold))
        facts = {"fold": fold, "eligible": sampled.eligible, "distances": sampled.distances}
    recommender.signals = [
        signal for signal in signals or [] if fit_signal(signal, counted, recommender.vectors, strict)
    ]
    recommender.num_candidates = k
    names = [signal["name"] for signal in recommender.signal_names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"two signals give the value {twice}, expected distinct column names; use each signal class once"
        )
    builder = ListBuilder(counted, recommender, miner, select, seed)
    with locked(output), atomic_write(output, "candidates") as folder:
        folder.mkdir()
        width = recommender.vectors.shape[1]
        states = None  # those of a fold's retriever mean nothing beside the vectors that the ranker reads
        if fold is None:
            states = np.lib.format.open_memmap(folder / STATES, "w+", np.float32, (len(mined), width))
        with ParquetStream(folder / CANDIDATES) as rows, ParquetStream(folder / REQUESTS) as requests:
            for part in progress(list(in_chunks(len(mined), batch_size)), "mine"):
                queries, table, request = builder.build(mined[part], ends[part])
                if states is not None:
                    states[part] = queries
                table[c.REQUEST] += part.start
                rows.write(table)
                requests.write(request)
        if states is not None:
            states.flush()
        save_signals(recommender.signals, folder / SIGNALS)
        counts = {"lists": len(mined), "users": len(np.unique(mined)), **builder.counts}
        write_manifest(
            folder,
            "candidates",
            options={
                "miner": specify_miner(miner),
                "signals": [specify(signal) for signal in recommender.signals],
                **{"k": k, "targets": targets, "gap": gap, "fold": fold, "match": match},
                **{"select": select, "users": users, "seed": seed},
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
            **facts,
        )
    inside = counts["lists"] - counts["target_outside_candidates"]
    if fold is not None:
        how = ", ".join(f"{name} {distance:.3f}" for name, distance in facts["distances"].items())
        lines = [
            f"{counts['train_lists']:,} training lists, whose target is among the candidates, of {facts['eligible']:,} "
            f"events of fold {fold}",
            f"total variation distance from the validation targets: {how}" if how else "all events equally likely",
        ]
        then = f"recsys fit {config_option('ranker', output.parent.name)} --data.init_args.folds [{output}]"
    else:
        lines = [
            f"{counts['train_lists']:,} training lists, whose target is among the candidates, and "
            f"{counts['select_lists']:,} validation lists"
        ]
        then = f"recsys fit {config_option('ranker', output.parent.name)} --data.init_args.path {output}"
        then += f" --output {output.parent / 'ranker'}"
    print_summary(
        output,
        f"{counts['lists']:,} lists of {counts['users']:,} users, {counts['rows']:,} rows",
        *lines,
        f"the target is among the {k} candidates in {inside / counts['lists']:.1%} of the lists, an upper bound of the "
        "ranker's hit rate",
        then=then,
    )


def check_fold(folder: Path, fold: str | None) -> None:
    """Raises a ValueError unless an index's retriever was fitted without this fold of users, or on all of them.

    Args:
        folder: written by export-index.
        fold: NUMBER/TOTAL; None: no fold.
    """
    own = bundle_manifest(folder).get("fold")
    if own != fold:
        given, held = ("all users" if one is None else f"the users outside fold {one}" for one in (fold, own))
        step = "leave fold out" if own is None else f"set fold to {str(own)[:20]}"
        raise ValueError(
            f"fold is {'null' if fold is None else fold}, expected a retriever fitted on {given}, but that of {folder} "
            f"was fitted on {held}; {step}, or give the index of another retriever"
        )


def check_lists(dataset: Dataset, mined: np.ndarray, gap: int, select: float, users: int | None, seed: int) -> None:
    """Raises a ValueError if no list could train the ranker, or none validate it.

    Args:
        mined: user of each list.
        gap: as given, for the error.
        select: share of validation users.
        users: as given, for the error.
        seed: of the choice of validation users.
    """
    if not len(mined):
        raise ValueError(
            f"{dataset.path} has no user with a validation target and events before it"
            f"{f' by {gap} seconds' if gap else ''}; see the counts in {dataset.path / c.MANIFEST}"
        )
    validates = validation_users(np.unique(mined), select, seed)
    if select and not validates.any():
        raise ValueError(
            f"select is {select}, so none of the {len(validates):,} mined users validates the ranker, expected at "
            f"least one; raise select{'' if users is None else f', or users above {users:,}'}"
        )
    if validates.all():
        raise ValueError(
            f"select is {select}, so all {len(validates):,} mined users validate the ranker, expected some to train "
            f"it; lower select{'' if users is None else f', or raise users above {users:,}'}"
        )


def fit_signal(signal: Signal, dataset: Dataset, vectors: np.ndarray, strict: bool) -> bool:
    """Fits a signal; returns False, with a warning, if the dataset lacks what it needs and `strict` is False."""
    if isinstance(signal, Proposer):
        signal.candidates = min(signal.candidates, dataset.num_items)
    try:
        signal.fit(dataset, vectors)
    except ValueError as error:
        if strict:
            raise
        why = LEAVE_OUT.sub("", str(error)).replace(f" of {dataset.path} ", " ").replace(str(dataset.path), "the log")
        logger.warning("the signal %s is not used: %s", type(signal).__name__, why)
        return False
    return True


class ListBuilder:
    """Builds candidate lists batch by batch, and counts them.

    Args:
        dataset: prepared dataset.
        recommender: the first stage, with fitted signals.
        miner: negatives of a training list.
        select: share of validation users.
        seed: seed of the sampled negatives and of the choice of validation users.
    """

    def __init__(self, dataset: Dataset, recommender: Recommender, miner: Miner, select: float, seed: int) -> None:
        self.dataset, self.recommender, self.miner, self.select, self.seed = dataset, recommender, miner, select, seed
        cold = dataset.cold
        self.withheld = cold if cold.any() else None  # (V + 1,) bool
        ranked = slice(1, None) if self.withheld is None else np.flatnonzero(~cold)[1:]
        self.ranked_vectors = torch.from_numpy(recommender.vectors[ranked])  # of the items that are not withheld
        self.counts = dict.fromkeys(("train_lists", "select_lists", "target_outside_candidates", "rows"), 0)

    def build(self, users: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, Table, Table]:
        """The lists of B targets.

        Args:
            users: (B,) user of each target.
            at: (B,) index of each target among all events.

        Returns:
            (B, D) query vectors, a table with a row for each candidate, and one with a row for each list.
        """
        dataset, recommender = self.dataset, self.recommender
        padded = dataset.histories(users, at, recommender.towers.max_length)
        seen, target = dataset.filtered_items(users, at), dataset.targets(users, at)
        request_time = dataset.request_times(users, at)
        queries = recommender.queries(padded, request_time, dataset.target_action(users, at, recommender.next_action))
        allowed = None if self.withheld is None else ~self.withheld[1:]
        retrieved = recommender.candidates(queries, seen, padded, request_time, allowed=allowed)
        validation = validation_users(users, self.select, self.seed)
        together = dataset.co_targets(users, at)
        rows, items = np.concatenate([seen.rows, together.rows]), np.concatenate([seen.values, together.values])
        request = Request.from_exclusions(retrieved.items, target, rows, items, dataset.train_counts, self.withheld)
        negatives = self.miner.choose(request, ListDraws.of(self.seed, users, at))
        exact = self.exact_ranks(queries, seen)
        table = build_lists(request.candidates, request.target, retrieved.score, negatives, exact, validation)
        row = table.pop("row")
        length = np.bincount(row, minlength=len(users))
        if empty := int((length == 0).sum()):
            raise ValueError(
                f"the miner left {empty} of {len(users)} lists empty; with k = {recommender.num_candidates}, skip_top "
                "must be lower or k higher"
            )
        index, real = padded_indices(np.cumsum(length) - length, np.cumsum(length))
        items = np.where(real, table[c.ITEM][index], c.PAD)
        values = recommender.compute_signals(items, queries, retrieved, padded, request_time)
        hit = (retrieved.items == target[:, None]).any(1)
        self.counts["train_lists"] += int((~validation & hit).sum())
        self.counts["select_lists"] += int(validation.sum())
        self.counts["target_outside_candidates"] += int((~hit).sum())
        self.counts["rows"] += len(row)
        table = {c.REQUEST: row.astype(np.int32), c.USER: users[row].astype(np.int32), **table}
        columns = zip(recommender.signal_names, values[real].T, strict=True)
        fold = np.where(validation, "select", "train")
        return (
            queries,
            table | {signal["name"]: column for signal, column in columns},
            {
                c.USER: users,
                c.PLACE: at,
                c.TIME: recommender.ranker_request_time(padded, request_time),
                c.FOLD: fold,
                c.ROWS: length,
            },
        )

    def exact_ranks(self, queries: np.ndarray, seen: Ragged) -> ExactRanks:
        """Scores and ranks of items by the retriever, among all items that are neither seen nor withheld.

        Args:
            queries: (B, D).
            seen: items that are filtered.
        """

        def numbered(items: np.ndarray) -> np.ndarray:
            """Numbers of items among those that are not withheld, from 1; 0 for padding and withheld items."""
            items = np.maximum(items, c.PAD)
            if self.withheld is None:
                return items
            return np.where(self.withheld, 0, np.cumsum(~self.withheld) - 1)[items]

        def ranks(rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            row, excluded = np.full(len(queries), -1), numbered(seen.values)
            row[rows] = np.arange(len(rows))
            own = (row[seen.rows] >= 0) & (excluded > 0)
            found = catalogue_ranks(
                torch.from_numpy(queries[rows]),
                self.ranked_vectors,
                torch.from_numpy(row[seen.rows][own]),
                torch.from_numpy(excluded[own]),
                torch.from_numpy(numbered(items)),
            )
            return found.scores.numpy(), found.ranks.numpy()

        return ranks
