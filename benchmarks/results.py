"""Mean metrics over several runs of one pipeline, for `make results`.

    python benchmarks/results.py runs/ml-1m-seed0 runs/ml-1m-seed1 runs/ml-1m-seed2

Prints the metrics of each run, their means, and the gain of each run's ranker over its retriever. All runs must have
the same protocol and users. Confidence intervals and tests of a run are in its report.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from recsys2stage.evaluation.report import metric_title, model_title, table

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a report.json")
    runs = parser.parse_args().runs
    reports = [read(run) for run in runs]
    check_comparable(runs, reports)
    print(f"{(runs[0] / 'report.md').read_text(encoding='utf-8').splitlines()[2]}\n\n{summary(reports)}")


if __name__ == "__main__":
    main()
