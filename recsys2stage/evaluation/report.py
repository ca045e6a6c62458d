"""Reports as Markdown: tables of metrics, comparisons, exposure, calibration and cohorts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recsys2stage.evaluation.by_gap import gap_rows

TITLES = {
    "popularity": "popularity",
    "markov": "markov",
    "personal_top_frequency": "personal top frequency",
    "transition_graph": "transition graph",
    "item_knn": "ItemKNN",
    "ease": "EASE",
    "retriever": "retriever",
    "ranker": "ranker",
    "ranker_ids_masked": "ranker, ids masked",
}
STAGES = ("retriever", "ranker", "ranker_ids_masked")
GAP_COHORTS = "gap_to_request"  # shown by `by_gap` instead, with intervals, where a report has it
MAIN_METRICS = ("hr@10", "ndcg@10", "mrr", "recall@100")


def model_title(name: str) -> str:
    """Title of a stage or a baseline; that of an unknown baseline is its name."""
    return TITLES.get(name, name.replace("_", " "))


def as_table(report: dict[str, Any], metrics: tuple[str, ...] = MAIN_METRICS) -> str:
    """The main metrics as a Markdown table: value [95 % interval]."""
    rows = [
        [model_title(name), *("{value:.4f} [{low:.4f}, {high:.4f}]".format(**model[metric]) for metric in metrics)]
        for name, model in report["models"].items()
    ]
    return table(["model", *map(metric_title, metrics)], rows)


def metric_title(metric: str) -> str:
    """NDCG@10 for ndcg@10."""
    return metric.replace("hr", "HR").replace("ndcg", "NDCG").replace("mrr", "MRR").replace("rec", "Rec")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that its columns align as plain text."""
    widths = [max(len(row[j]) for row in [head, *rows]) for j in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def paired_table(title: str, metrics: Mapping[str, dict[str, float | None]]) -> str:
    """Differences of two models on the same users, one row per metric."""
    rows = []
    for metric, d in metrics.items():
        ratio = "" if d["ratio"] is None else f"{d['ratio']:.3f}"
        interval = f"[{d['low']:+.4f}, {d['high']:+.4f}]"
        rows.append([metric_title(metric), f"{d['difference']:+.4f}", interval, ratio, f"{d['p']:.4f}"])
    return table([title, "difference", "95 % interval, paired", "ratio", "p"], rows)


def against_text(report: dict[str, Any], metrics: Sequence[str] | None = None) -> str:
    """Both stages compared with a baseline run, and the other differences between the runs.

    Args:
        metrics: metrics to include; None: all, as in `distinct_metrics`.
    """
    against = report["against"]
    users, targets = int(report["users"]), count_targets(report)
    same = f"{users:,} users and targets" if users == targets else f"{users:,} users and {targets:,} targets"
    parts = [f"Against {against['folder']}, on the same {same}."]
    if against["differs"]:
        parts.append("Other differences between the runs: " + "; ".join(against["differs"]) + ".")
    for name, differences in against["models"].items():
        chosen = distinct_metrics(report, differences) if metrics is None else metrics
        parts.append(paired_table(f"{model_title(name)} − theirs", {m: differences[m] for m in chosen}))
    return "\n\n".join(parts)


def distinct_metrics(report: Mapping[str, Any], metrics: Iterable[str]) -> list[str]:
    """All metrics, without recall where it equals HR: only a basket has several targets."""
    return [metric for metric in metrics if "baskets" in report or not metric.startswith("recall")]


def exposure_table(report: dict[str, Any]) -> str:
    """Beyond-accuracy metrics of the top 10, one row per model."""
    rows = [
        [
            model_title(name),
            f"{x['coverage']:.4f}",
            f"{x['novelty']:.2f}",
            f"{x['popularity']:,.1f}",
            f"{x['gini']:.4f}",
        ]
        for name, x in report["exposure"].items()
    ]
    return table(["top 10", "coverage@10", "novelty, bits", "popularity (ARP)", "Gini"], rows)


def calibration_text(calibration: dict[str, Any]) -> str:
    """Calibration of the ranker's top item: mean probability and hit rate by bin of lists."""
    rows = [
        [f"{row['users']:,}", f"{row['confidence']:.4f}", f"{row['hits']:.4f}"]
        for row in [*calibration["bins"], calibration]
    ]
    rows[-1][0] += ", all"
    return (
        "Probability (softmax over the candidates) of the ranker's top item, and how often it is the target; a target "
        "outside the candidates is a miss. Expected calibration error, in bins of equally many lists: "
        f"{calibration['ece']:.4f}.\n\n" + table(["lists", "mean probability", "share of hits"], rows)
    )


def cohort_table(cohort: str, groups: dict[str, Any], names: Sequence[str]) -> str:
    """NDCG@10 of the named models by cohort; counts targets where users have several."""
    several = any(count_targets(group) != group["users"] for group in groups.values())
    rows = [
        [
            label,
            f"{count_targets(group) if several else group['users']:,}",
            *(f"{group[name]['ndcg@10']:.4f}" for name in names),
        ]
        for label, group in groups.items()
    ]
    counted = "targets" if several else "users"
    return table([cohort.replace("_", " "), counted, *(f"{model_title(name)} NDCG@10" for name in names)], rows)


def count_targets(group: Mapping[str, Any]) -> int:
    """Number of targets of a report or cohort; earlier versions did not write it, as each user had one."""
    return int(group.get("targets", group["users"]))


def interval_text(report: Mapping[str, Any]) -> str:
    """How the intervals of a report are made, such as "bootstrap over 6,040 users"."""
    users, targets = int(report["users"]), count_targets(report)
    if "baskets" in report:
        held = f" with {report['baskets']:,} baskets of {targets:,} targets"
    else:
        held = "" if targets == users else f" with {targets:,} targets"
    return f"{'clustered bootstrap' if held else 'bootstrap'} over {users:,} users{held}"


def gap_table(groups: dict[str, Any]) -> str:
    """NDCG@10 of both stages by the time since the event before, with intervals (`metrics_by_gap`)."""
    return table(*gap_rows(groups))


def cohort_tables(report: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A table for each cohort type; that of gaps has intervals.

    Args:
        report: the content of report.json.
        names: models in the tables without intervals.
    """
    parts = []
    for cohort, groups in report["cohorts"].items():
        gaps = report.get("by_gap") if cohort == GAP_COHORTS else None
        parts.append(gap_table(gaps) if gaps else cohort_table(cohort, groups, names))
    return parts


def as_markdown(
    report: dict[str, Any], line: str, figures: Mapping[str, str] | None = None, missing: Sequence[str] = ()
) -> str:
    """The whole report as Markdown.

    Args:
        report: the content of report.json.
        line: the protocol, from `protocol_line`.
        figures: file name of each figure -> its title.
        missing: reasons for missing figures.
    """
    parts = ["# Report", line, as_table(report), f"95 % intervals: {interval_text(report)}."]
    if "comparison" in report:
        compared = report["comparison"]
        shown = {metric: compared[metric] for metric in distinct_metrics(report, compared)}
        parts.append(paired_table("ranker − retriever", shown))
        parts.append("p: two-sided randomization test with random signs of the users' differences.")
        parts.append(
            "Recall of the candidates (in full ranking the upper bound of the ranker's recall@k for k up to K): "
            f"{report['candidates']['recall']:.4f} at K = {report['candidates']['k']}."
        )
    if "against" in report:
        parts.append(against_text(report))
    names = [name for name in report["models"] if name in ("popularity", *STAGES)]
    parts += cohort_tables(report, names)
    if "exposure" in report:
        parts.append(exposure_table(report))
    if "calibration" in report:
        parts.append(calibration_text(report["calibration"]))
    parts += [f"![{title}]({file})" for file, title in (figures or {}).items()] + [*missing]
    return "\n\n".join(parts) + "\n"
