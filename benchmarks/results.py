"""Mean metrics over several runs of one pipeline, for `make results`.

    python benchmarks/results.py runs/ml-1m-seed0 runs/ml-1m-seed1 runs/ml-1m-seed2
    python benchmarks/results.py runs/ml-1m-seed? --json docs/measured/by_gap/1-ml-1m.json --title "leave-one-out"

Prints the metrics of each run, their means, and the gain of each run's ranker over its retriever. All runs must have
the same protocol and users. Confidence intervals and tests of a run are in its report.md.

With times, also prints NDCG@10 by the time since the event before: means over the runs, with intervals that sample
users, of the retriever, the ranker, their difference and their ratio. --json writes these for the figure of the docs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recsys2stage import columns as c
from recsys2stage.evaluation.by_gap import EVERYTHING, group_metrics, metrics_by_gap
from recsys2stage.evaluation.by_gap import METRICS as GAP_METRICS
from recsys2stage.evaluation.compare import STAGES, TARGET
from recsys2stage.evaluation.report import gap_table, metric_title, model_title, table
from recsys2stage.evaluation.targets import BASKET, GAP, Targets

METRICS = ("hr@10", "ndcg@10", "mrr", "recall@100")


def read(run: Path) -> dict[str, Any]:
    path = run / "report.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; first run: make pipeline, or recsys evaluate --output {run}")
    return json.loads(path.read_text(encoding="utf-8"))


def check_comparable(runs: list[Path], reports: list[dict[str, Any]]) -> None:
    """Exits if the reports differ in protocol, users or models."""
    for run, report in zip(runs[1:], reports[1:], strict=True):
        for name, value in reports[0]["protocol"].items():
            if report["protocol"].get(name) != value:
                other = report["protocol"].get(name)
                raise SystemExit(f"{run} has {name}: {other} and {runs[0]} has {value}; give runs of one protocol")
        if (report["users"], sorted(report["models"])) != (reports[0]["users"], sorted(reports[0]["models"])):
            raise SystemExit(f"{run} has other users or models than {runs[0]}; give runs of one pipeline")


def summary(reports: list[dict[str, Any]]) -> str:
    """Two Markdown tables: means with the values of each run, and the ranker over its retriever."""
    rows = []
    for name in reports[0]["models"]:
        row = [model_title(name)]
        for metric in METRICS:
            values = [report["models"][name][metric]["value"] for report in reports]
            row.append(f"{sum(values) / len(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        rows.append(row)
    parts = [table(["mean (each run)", *map(metric_title, METRICS)], rows)]
    if all("comparison" in report for report in reports):
        rows = []
        for metric in METRICS[:3]:
            gains = [report["comparison"][metric] for report in reports]
            stages = [
                [report["models"][name][metric]["value"] for report in reports] for name in ("ranker", "retriever")
            ]
            ratio = sum(stages[0]) / sum(stages[1]) if sum(stages[1]) else float("nan")
            each = "; ".join(
                f"{d['difference']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], p {d['p']:.4f}" for d in gains
            )
            rows.append([metric_title(metric), f"{ratio:.3f}", each])
        parts.append(table(["ranker over its retriever", "ratio of the means", "difference of each run"], rows))
        ceilings = ", ".join(f"{report['candidates']['recall']:.4f}" for report in reports)
        parts.append(f"Targets among the {reports[0]['candidates']['k']} candidates: {ceilings}.")
    return "\n\n".join(parts)


def by_gap(runs: list[Path], resamples: int = 1000) -> dict[str, Any]:
    """Metrics by the time since the event before, of each target's mean over the runs; {} without times.

    Args:
        runs: folders with a ranks.parquet.
        resamples: of intervals and tests.

    Returns:
        As `metrics_by_gap`, of both stages, with a first entry `all`.
    """
    keys = (c.USER, c.PLACE, TARGET, BASKET, GAP)
    tables = []
    for run in runs:
        ranks = pl.read_parquet(run / "ranks.parquet")
        if c.PLACE not in ranks.columns:
            print(f"\nNo results by gap: {run} was evaluated by an older version; run recsys evaluate again.")
            return {}
        tables.append(ranks.sort(c.USER, c.PLACE))
    first = tables[0].select(name for name in keys if name in tables[0].columns)
    for run, ranks in zip(runs[1:], tables[1:], strict=True):
        if not first.equals(ranks.select(name for name in keys if name in ranks.columns)):
            raise SystemExit(f"{run} has other targets than {runs[0]}; give runs of one dataset")
    if GAP not in first.columns:
        return {}
    columns = {name: first[name].to_numpy() for name in first.columns}
    targets = Targets(columns[c.USER], columns[c.PLACE], columns.get(BASKET))
    values: dict[str, dict[str, np.ndarray]] = {}
    for name in (name for name in STAGES if name in tables[0].columns):
        each = [targets.metrics(ranks[name].to_numpy()) for ranks in tables]
        values[name] = {metric: np.mean([own[metric] for own in each], axis=0) for metric in GAP_METRICS}
    requests = targets.requests()
    gap = columns[GAP][np.searchsorted(columns[c.PLACE], requests.events)]
    return {
        EVERYTHING: group_metrics(values, requests.users, resamples, seed=0),
        **metrics_by_gap(values, gap, requests.users, resamples, seed=0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a report.json")
    parser.add_argument("--json", type=Path, help="also write the metrics by gap to this file")
    parser.add_argument("--title", default="", help="title of these runs in the figure by gap")
    options = parser.parse_args()
    runs = options.runs
    reports = [read(run) for run in runs]
    check_comparable(runs, reports)
    print(f"{(runs[0] / 'report.md').read_text(encoding='utf-8').splitlines()[2]}\n\n{summary(reports)}")
    groups = by_gap(runs)
    if groups:
        print(f"\n{gap_table(groups)}")
    if options.json:
        protocol = reports[0]["protocol"]
        title = options.title or f"{protocol['split']}, equal times in {protocol['tie_break']}"
        content = {"title": title, "runs": [run.name for run in runs], "protocol": protocol, "by_gap": groups}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
