"""Comparison of two models or runs on the same users: paired differences, intervals and p-values."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import read_json, take
from recsys2stage.evaluation.targets import Targets
from recsys2stage.metrics import bootstrap, compute_metrics, interval, randomization_test
from recsys2stage.options import STRETCH

TARGET = "target"  # column of ranks.parquet: each user's target item
STAGES = ("retriever", "ranker")  # the models compared between two runs

# protocol entries that must be equal for ranks to be comparable: which items are ranked, and how
PROTOCOL_KEYS = (
    *("evaluated", "ranking", "negatives_seed", "seen_filter", "score_ties", "candidates", "min_rating", "core"),
    *("repeats", "cold_items"),
)


class BaselineRun(NamedTuple):
    """The run to compare with, from its report and ranks."""

    folder: Path
    protocol: dict[str, Any]
    items: int  # V of its catalogue
    ranks: dict[str, np.ndarray]  # user, target and rank by each model, (n,) each, sorted by user and place


def paired_differences(
    one: dict[str, np.ndarray],
    other: dict[str, np.ndarray],
    resamples: int,
    seed: int,
    users: np.ndarray | None = None,
) -> dict[str, dict[str, float | None]]:
    """Differences of two models in each metric, with intervals and p-values; exactly 0 if the models are equal.

    Args:
        one: metric -> (n,) values of n targets, from `compute_metrics`.
        other: the same for the other model, on the same targets.
        resamples: of the bootstrap and of the randomization test.
        seed: of both.
        users: (n,) user of each target; None: each is another user's.
    """
    differences = np.stack([one[metric] - other[metric] for metric in one], axis=1)
    means = bootstrap(differences, resamples, seed, users)
    base = bootstrap(np.stack([other[metric] for metric in one], axis=1), resamples, seed, users)  # of the same users
    low, high = interval(means)
    p = randomization_test(differences, resamples, seed, users)
    has_ratio: np.ndarray = np.all(base > 0, axis=0)  # in every resample
    ratio_low, ratio_high = interval(1 + means / np.where(has_ratio, base, 1))
    return {
        metric: {
            "difference": float(differences[:, j].mean()),
            "low": float(low[j]),
            "high": float(high[j]),
            "p": float(p[j]),
            "ratio": float(one[metric].mean() / other[metric].mean()) if other[metric].any() else None,
            "ratio_low": float(ratio_low[j]) if has_ratio[j] else None,
            "ratio_high": float(ratio_high[j]) if has_ratio[j] else None,
            "share_of_resamples_above_zero": float((means[:, j] > 0).mean()),
        }
        for j, metric in enumerate(one)
    }


def read_baseline_run(folder: Path, mark: str) -> BaselineRun:
    """Reads the report and ranks of the baseline run.

    Args:
        folder: folder of its report.
        mark: suffix of its file names, such as -sampled-100; empty for full ranking.
    """
    report_file, ranks_file = folder / f"report{mark}.json", folder / f"ranks{mark}.parquet"
    how = f"recsys evaluate --bundle BUNDLE --output {folder}" + (f" --protocol {mark[1:]}" if mark else "")
    for file in (report_file, ranks_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; to create the baseline run: {how}")
    report = read_json(report_file, dict, how)
    try:
        ranks = pl.read_parquet(ranks_file)
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"{ranks_file} cannot be read as Parquet ({str(error).splitlines()[0]}); run: {how}"
        ) from error
    if TARGET not in ranks.columns or "items" not in report:
        raise ValueError(f"{folder} was written by an older version and lacks targets or catalogue size; run: {how}")
    order = [name for name in (c.USER, c.PLACE) if name in ranks.columns]
    columns = {column.name: column.to_numpy() for column in ranks.sort(order)}
    return BaselineRun(
        folder, take(report, "protocol", dict, report_file), take(report, "items", int, report_file), columns
    )


def check_baseline_run(
    other: BaselineRun,
    protocol: dict[str, Any],
    items: int,
    users: np.ndarray,
    targets: np.ndarray,
    places: np.ndarray | None = None,
) -> list[str]:
    """Checks that two runs are comparable and returns their allowed differences, one short text each.

    Runs are comparable if they rank the same targets of the same users in the same way among as many items. Training
    data and model inputs may differ.

    Args:
        other: the baseline run.
        protocol: of this run, from `describe`.
        items: V of its catalogue.
        users: (n,) user of each target, ascending.
        targets: (n,) items.
        places: (n,) event index of each target, ascending; None: each user has one target.

    Raises:
        ValueError: if the runs are not comparable.
    """
    both = {name: (protocol.get(name), other.protocol.get(name)) for name in [*protocol, *other.protocol]}
    changed = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    if wrong := [name for name in PROTOCOL_KEYS if name in changed]:
        pairs = "; ".join(f"{name} is {changed[name][0]!r} here and {changed[name][1]!r} there" for name in wrong)
        raise ValueError(f"{other.folder} has another evaluation protocol: {pairs}; evaluate both with the same one")
    if other.items != items:
        raise ValueError(
            f"{other.folder} ranks among {other.items:,} items, this run among {items:,}; prepare both from the same "
            "events"
        )
    theirs, own = np.unique(other.ranks[c.USER]), np.unique(users)
    if not np.array_equal(theirs, own):
        common = len(np.intersect1d(theirs, own))
        raise ValueError(
            f"{other.folder} was evaluated on {len(theirs):,} users, this run on {len(own):,}, and {common:,} are in "
            "both; evaluate both on the same users"
        )
    several = len(own) < max(len(users), len(other.ranks[c.USER]))  # then a target is named by its event, too
    if several:
        same = places is not None and c.PLACE in other.ranks and np.array_equal(other.ranks[c.PLACE], places)
        if not same:
            raise ValueError(
                f"{other.folder} has {len(other.ranks[c.USER]):,} targets of these users, this run {len(users):,}, and "
                "they are not the same events; prepare both with the same split and tie_break"
            )
    if moved := int((other.ranks[TARGET] != targets).sum()):
        raise ValueError(
            f"{moved:,} of {len(users):,} {'targets are' if several else 'users have'} another "
            f"{'item' if several else 'target'} in {other.folder}; prepare both with the same split and tie_break"
        )
    if "refit" in changed:
        here, there = (f"learned from {one or STRETCH['val']}" for one in changed.pop("refit"))
        changed.pop("validation_item", None)  # says the same
        changed["retriever and signals"] = (here, there)
    texts = [f"{name} {pair[0]} here, {pair[1]} there" for name, pair in changed.items() if name != "split_hash"]
    return texts + (["the events before the targets or the training events differ"] if "split_hash" in changed else [])


def compare(
    ranks: dict[str, np.ndarray],
    other: BaselineRun,
    differs: list[str],
    resamples: int,
    seed: int,
    targets: Targets | None = None,
) -> dict[str, Any]:
    """Compares the stages that both runs have; an entry of the report.

    Args:
        ranks: model -> (n,) ranks of this run.
        other: the baseline run.
        differs: differences from `check_baseline_run`.
        resamples: of intervals and tests.
        seed: of both.
        targets: the targets of both runs; None: one per user.
    """
    metrics = compute_metrics if targets is None else targets.metrics
    users = None if targets is None else targets.requests().users
    return {
        "folder": str(other.folder),
        "differs": differs,
        "models": {
            name: paired_differences(metrics(ranks[name]), metrics(other.ranks[name]), resamples, seed, users)
            for name in STAGES
            if name in ranks and name in other.ranks
        },
    }
