"""A report as a reader sees it: tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "popularity": "popularity",
    "markov": "markov",
    "retriever": "retriever",
    "ranker": "ranker",
    "ranker_ids_masked": "ranker, ids masked",
}
HEADLINE = ("hr@10", "ndcg@10", "mrr", "recall@100")


def as_table(report: dict[str, Any], metrics: tuple[str, ...] = HEADLINE) -> str:
    """The headline as a Markdown table: value [95 % interval]."""
    rows = [
        [TITLES[name], *("{value:.4f} [{low:.4f}, {high:.4f}]".format(**model[metric]) for metric in metrics)]
        for name, model in report["models"].items()
    ]
    return table(["model", *map(title_of, metrics)], rows)


def title_of(metric: str) -> str:
    """NDCG@10 for ndcg@10."""
    return metric.replace("hr", "HR").replace("ndcg", "NDCG").replace("mrr", "MRR").replace("rec", "Rec")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other in plain text, too."""
    widths = [max(len(row[j]) for row in [head, *rows]) for j in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in [head, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def paired_table(title: str, metrics: Mapping[str, dict[str, float | None]]) -> str:
    """Differences of two models on the same users, one metric a row."""
    rows = []
    for metric, d in metrics.items():
        ratio = "" if d["ratio"] is None else f"{d['ratio']:.3f}"
        interval = f"[{d['low']:+.4f}, {d['high']:+.4f}]"
        rows.append([title_of(metric), f"{d['difference']:+.4f}", interval, ratio, f"{d['p']:.4f}"])
    return table([title, "difference", "95 % interval, paired", "ratio", "p"], rows)


def against_text(report: dict[str, Any], metrics: Sequence[str] | None = None) -> str:
    """Both stages against those of another run, and what else is different between the two.

    Args:
        metrics: only these; None: all but recall, which is HR.
    """
    against = report["against"]
    parts = [f"Against {against['folder']}, on the same {report['users']:,} users and targets."]
    if against["differs"]:
        parts.append("Not alike in the two runs: " + "; ".join(against["differs"]) + ".")
    for name, found in against["models"].items():
        chosen = [m for m in found if not m.startswith("recall")] if metrics is None else metrics
        parts.append(paired_table(f"{TITLES[name]} − theirs", {m: found[m] for m in chosen}))
    return "\n\n".join(parts)


def exposure_table(report: dict[str, Any]) -> str:
    """What the ten items that each user is shown are like, one model a row."""
    rows = [
        [TITLES[name], f"{x['coverage']:.4f}", f"{x['novelty']:.2f}", f"{x['popularity']:,.1f}", f"{x['gini']:.4f}"]
        for name, x in report["exposure"].items()
    ]
    return table(["shown in the top 10", "coverage@10", "novelty, bits", "popularity (ARP)", "Gini"], rows)


def calibration_text(calibration: dict[str, Any]) -> str:
    """The probabilities of what the ranker puts first, and how often it is right."""
    rows = [
        [f"{row['users']:,}", f"{row['confidence']:.4f}", f"{row['hits']:.4f}"]
        for row in [*calibration["bins"], calibration]
    ]
    rows[-1][0] += ", all"
    return (
        "Probability (softmax over the candidates) of the item that the ranker puts first, and how often it is the "
        "target; a target outside the candidates is a miss. Expected calibration error, in bins of as many users: "
        f"{calibration['ece']:.4f}.\n\n" + table(["users", "mean probability", "share of hits"], rows)
    )


def cohort_table(cohort: str, groups: dict[str, Any], names: Sequence[str]) -> str:
    """NDCG@10 of some models by cohort."""
    rows = [
        [label, f"{group['users']:,}", *(f"{group[name]['ndcg@10']:.4f}" for name in names)]
        for label, group in groups.items()
    ]
    return table([cohort.replace("_", " "), "users", *(f"{TITLES[name]} NDCG@10" for name in names)], rows)


def as_markdown(
    report: dict[str, Any], line: str, figures: Mapping[str, str] | None = None, missing: Sequence[str] = ()
) -> str:
    """The whole report for a reader.

    Args:
        report: as it stands in report.json.
        line: the protocol.
        figures: file name of each figure -> its title.
        missing: why others are not there.
    """
    parts = ["# Report", line, as_table(report), f"95 % intervals: bootstrap over {report['users']:,} users."]
    if "comparison" in report:
        compared = {m: d for m, d in report["comparison"].items() if not m.startswith("recall")}
        parts.append(paired_table("ranker − retriever", compared))
        parts.append("p: two-sided randomisation test, signs of the users' differences drawn anew.")
        parts.append(
            f"Target among the candidates (the ranker's ceiling in full ranking): {report['candidates']['recall']:.4f} "
            f"at K = {report['candidates']['k']}."
        )
    if "against" in report:
        parts.append(against_text(report))
    names = [name for name in report["models"] if name != "markov"]
    parts += [cohort_table(cohort, groups, names) for cohort, groups in report["cohorts"].items()]
    if "exposure" in report:
        parts.append(exposure_table(report))
    if "calibration" in report:
        parts.append(calibration_text(report["calibration"]))
    parts += [f"![{title}]({file})" for file, title in (figures or {}).items()] + [*missing]
    return "\n\n".join(parts) + "\n"
