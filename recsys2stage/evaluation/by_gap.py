"""Metrics by the time since the event before: intervals of each stage and of their difference."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys2stage.columns import YEAR_2100
from recsys2stage.evaluation.compare import paired_differences
from recsys2stage.metrics import bootstrap, interval
from recsys2stage.retrieval.encoders.times import DAY

METRICS = ("hr@10", "ndcg@10")
EVERYTHING = "all"  # the group of all requests, in the tables of several runs
BEGINNINGS = "an hour or more"  # session beginnings: the last two groups together
GROUPS = {  # label -> seconds since the event before, from and below
    "the same second": (0, 1),
    "under a minute": (1, 60),
    "a minute to an hour": (60, 3_600),
    "an hour to a day": (3_600, DAY),
    "a day or more": (DAY, YEAR_2100),
    BEGINNINGS: (3_600, YEAR_2100),
}

Values = dict[str, dict[str, np.ndarray]]  # model -> metric -> (G,) values of requests


def metrics_by_gap(values: Values, gap: np.ndarray, users: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Metrics of the groups that have requests, as stored in a report.

    Args:
        values: of each model.
        gap: (G,) seconds since the event before; negative without one, and then in no group.
        users: (G,) user of each request.
        resamples: of intervals and tests, which sample users with all their requests of a group.
        seed: of both.

    Returns:
        Label -> {"users", "targets", "models": model -> metric -> {"value", "low", "high"}, "comparison": metric ->
        entry of `paired_differences`}; the comparison, ranker − retriever, only where both are among the models.
    """
    groups = {}
    for label, (low, high) in GROUPS.items():
        member = (gap >= low) & (gap < high)
        if member.any():
            chosen = {name: {m: own[m][member] for m in METRICS} for name, own in values.items()}
            groups[label] = group_metrics(chosen, users[member], resamples, seed)
    return groups


def group_metrics(values: Values, users: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """An entry of `metrics_by_gap`, of all the given requests."""
    columns = [(name, metric) for name, own in values.items() for metric in own]
    table = np.stack([values[name][metric] for name, metric in columns], axis=1)
    low, high = interval(bootstrap(table, resamples, seed, users))
    models: dict[str, dict[str, dict[str, float]]] = {name: {} for name in values}
    for j, (name, metric) in enumerate(columns):
        models[name][metric] = {"value": float(table[:, j].mean()), "low": float(low[j]), "high": float(high[j])}
    group: dict[str, Any] = {"users": len(np.unique(users)), "targets": len(users), "models": models}
    if "ranker" in values and "retriever" in values:
        group["comparison"] = paired_differences(values["ranker"], values["retriever"], resamples, seed, users)
    return group


def gap_rows(groups: dict[str, Any], metric: str = "ndcg@10") -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table by gap: both stages, their difference and their ratio, each with its interval.

    Args:
        groups: from `metrics_by_gap`.
        metric: the metric shown.
    """
    title = metric.upper()
    stages: Sequence[str] = [name for name in ("retriever", "ranker") if name in next(iter(groups.values()))["models"]]
    head = ["time since the event before", "targets", "users", *(f"{name} {title}" for name in stages)]
    both = len(stages) == 2
    rows = []
    for label, group in groups.items():
        row = [label, f"{group['targets']:,}", f"{group['users']:,}"]
        row += ["{value:.4f} [{low:.4f}, {high:.4f}]".format(**group["models"][name][metric]) for name in stages]
        if both:
            paired = group["comparison"][metric]
            row += ["{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**paired), _ratio(paired)]
        rows.append(row)
    return head + (["ranker − retriever", "ratio"] if both else []), rows


def _ratio(paired: dict[str, Any]) -> str:
    """The ratio with its interval; empty where the retriever's mean is 0."""
    if paired["ratio"] is None:
        return ""
    bounds = "" if paired["ratio_low"] is None else f" [{paired['ratio_low']:.3f}, {paired['ratio_high']:.3f}]"
    return f"{paired['ratio']:.3f}{bounds}"
