"""Two models on the same users: how far one is above the other, and whether that can be chance."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.artifacts import read_json, take
from recsys2stage.metrics import bootstrap, compute_metrics, interval, randomisation_test

TARGET = "target"  # column of ranks.parquet: the item that each user took
STAGES = ("retriever", "ranker")  # what is compared between two runs

# what decides which items a target is ranked among, and how; with any other value ranks are of another task
DECISIVE = (
    *("evaluated", "ranking", "negatives_seed", "seen_filter", "score_ties", "candidates", "min_rating", "core"),
    *("repeats", "cold_items"),
)


class Opponent(NamedTuple):
    """Another run, as its report and its ranks say."""

    folder: Path
    protocol: dict[str, Any]
    items: int  # V of its catalogue
    ranks: dict[str, np.ndarray]  # user, target and each model's rank, (n,) each, by user


def paired(
    one: dict[str, np.ndarray], other: dict[str, np.ndarray], resamples: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """How far one model is above another in each metric; exactly 0 where they are equal.

    Args:
        one: metric -> (n,) values of n users, as `metrics_of` gives them.
        other: the other model's on the same users.
        resamples: of the bootstrap interval and of the randomisation test.
        seed: of both.
    """
    differences = np.stack([one[metric] - other[metric] for metric in one], axis=1)
    means = bootstrap(differences, resamples, seed)
    low, high = interval(means)
    p = randomisation_test(differences, resamples, seed)
    return {
        metric: {
            "difference": float(differences[:, j].mean()),
            "low": float(low[j]),
            "high": float(high[j]),
            "p": float(p[j]),
            "ratio": float(one[metric].mean() / other[metric].mean()) if other[metric].any() else None,
            "share_of_resamples_above_zero": float((means[:, j] > 0).mean()),
        }
        for j, metric in enumerate(one)
    }


def read_baseline_run(folder: Path, mark: str) -> Opponent:
    """The run to compare with.

    Args:
        folder: of its report.
        mark: what its files have after their names, such as -sampled-100; nothing in full ranking.
    """
    report_file, ranks_file = folder / f"report{mark}.json", folder / f"ranks{mark}.parquet"
    how = f"recsys evaluate --bundle BUNDLE --output {folder}" + (f" --protocol {mark[1:]}" if mark else "")
    for file in (report_file, ranks_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist, so there is nothing to compare with; run: {how}")
    report = read_json(report_file, dict, how)
    try:
        ranks = pl.read_parquet(ranks_file)
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"{ranks_file} cannot be read as Parquet ({str(error).splitlines()[0]}); run: {how}"
        ) from error
    if TARGET not in ranks.columns or "items" not in report:
        raise ValueError(
            f"{folder} does not say what its targets and its catalogue are; an older version wrote it: {how}"
        )
    columns = {column.name: column.to_numpy() for column in ranks.sort(c.USER)}
    return Opponent(
        folder, take(report, "protocol", dict, report_file), take(report, "items", int, report_file), columns
    )


def check_baseline_run(
    other: Opponent, protocol: dict[str, Any], items: int, users: np.ndarray, targets: np.ndarray
) -> list[str]:
    """What is different in the other run and yet leaves its ranks comparable, one short text each.

    The same task is the same targets of the same users, ranked in the same way among as many items. What was trained on
    may differ, and so may what a model is told of a request.

    Args:
        protocol: of this run, as `describe` gives it.
        items: V of its catalogue.
        users: (n,) ascending.
        targets: (n,) items.

    Raises:
        ValueError: where the two runs did not do the same task.
    """
    both = {name: (protocol.get(name), other.protocol.get(name)) for name in [*protocol, *other.protocol]}
    unlike = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    if wrong := [name for name in DECISIVE if name in unlike]:
        said = "; ".join(f"{name} is {unlike[name][0]!r} here and {unlike[name][1]!r} there" for name in wrong)
        raise ValueError(f"{other.folder} was measured in another protocol: {said}; evaluate both in the same one")
    if other.items != items:
        raise ValueError(
            f"{other.folder} ranks among {other.items:,} items, this run among {items:,}; prepare both from the same "
            "events"
        )
    theirs = other.ranks[c.USER]
    if not np.array_equal(theirs, users):
        common = len(np.intersect1d(theirs, users))
        raise ValueError(
            f"{other.folder} was measured on {len(theirs):,} users, this run on {len(users):,}, and {common:,} are in "
            "both; evaluate both on the same users"
        )
    if moved := int((other.ranks[TARGET] != targets).sum()):
        raise ValueError(
            f"{moved:,} of {len(users):,} users have another target in {other.folder}; prepare both with the same "
            "split and tie_break"
        )
    texts = [f"{name} {pair[0]} here, {pair[1]} there" for name, pair in unlike.items() if name != "split_hash"]
    return texts + (["the events before the targets or the training events differ"] if "split_hash" in unlike else [])


def compare(
    ranks: dict[str, np.ndarray], other: Opponent, differs: list[str], resamples: int, seed: int
) -> dict[str, Any]:
    """Both stages against those of the other run, as far as both have them, for the report.

    Args:
        ranks: model -> (n,) ranks of this run.
        differs: what `check_opponent` found.
    """
    return {
        "folder": str(other.folder),
        "differs": differs,
        "models": {
            name: paired(compute_metrics(ranks[name]), compute_metrics(other.ranks[name]), resamples, seed)
            for name in STAGES
            if name in ranks and name in other.ranks
        },
    }
