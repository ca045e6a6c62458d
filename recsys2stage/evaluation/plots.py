"""Figures of a report as PNG files, and learning curves from Lightning's CSV logs. Needs no display."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.artifacts import atomic_write, fingerprint, locate_parent, read_manifest
from recsys2stage.evaluation.by_gap import EVERYTHING, GROUPS
from recsys2stage.evaluation.compare import STAGES
from recsys2stage.evaluation.report import GAP_COHORTS, metric_title, model_title
from recsys2stage.ranking.bundle import bundle_manifest

COLOURS = {"retriever": "C0", "ranker": "C1"}
MONITORED, LOSS = "val/ndcg@10", "train/loss"  # columns of a log
FIRST_STAGE = "val/retriever_ndcg@10"  # in the ranker's log: the retriever on the same lists
SAME_USERS = "retriever, users of the ranker"
LEGEND = ["retriever", "ranker", SAME_USERS, "training loss"]  # of the learning curves
FIGURES = {  # file name -> title
    "cohorts.png": "NDCG@10 by cohort",
    "gaps.png": "NDCG@10 by time since the event before, 95 % intervals",
    "ceiling.png": "Recall of the first K candidates, the upper bound of the recall@k of a ranker that sorts them",
    "learning.png": "Learning curves",
    "calibration.png": "Probability of the first item and share of hits",
}

Curve = tuple[np.ndarray, np.ndarray]  # steps and values
Figure = Any  # matplotlib's; only `new_figure` imports it, as the import is slow and most verbs plot nothing
Axes = Any


class Curves(NamedTuple):
    """The learning curves of one fit, by log column; columns that the log lacks are missing."""

    stage: str
    columns: dict[str, Curve]


def new_figure(width: float | int, height: float | int, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure, its size in inches, and its axes in row order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def cohorts_figure(report: dict[str, Any]) -> Figure:
    """NDCG@10 of both stages, a panel for each cohort type; that of gaps only if `gaps_figure` does not show them."""
    cohorts = {name: own for name, own in report["cohorts"].items() if name != GAP_COHORTS or not report.get("by_gap")}
    stages = [name for name in STAGES if name in report["models"]]
    figure, axes = new_figure(10, 3.2 * ((len(cohorts) + 1) // 2), (len(cohorts) + 1) // 2, 2)
    for ax, (cohort, groups) in zip(axes, cohorts.items(), strict=False):
        at = np.arange(len(groups))
        for row, name in enumerate(stages):
            values = [group[name]["ndcg@10"] for group in groups.values()]
            high = 0.8 / len(stages)
            ax.barh(at + row * high, values, high, align="edge", color=COLOURS[name], label=model_title(name))
        labels = [f"{label} ({group['users']:,} users)" for label, group in groups.items()]
        ax.set_yticks(at + 0.4, labels)
        ax.invert_yaxis()
        ax.set_title(cohort.replace("_", " "))
        ax.set_xlabel(metric_title("ndcg@10"))
    for ax in axes[len(cohorts) :]:
        ax.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(stages))
    return figure


def gaps_figure(reports: Mapping[str, dict[str, Any]], metric: str = "ndcg@10") -> Figure:
    """A metric of both stages by the time since the event before, with 95 % intervals; a panel for each report.

    Args:
        reports: title of the panel -> content of a report.json with times, or of a file that `benchmarks/results.py`
            wrote; such as those of several splits.
        metric: hr@10 or ndcg@10.

    Raises:
        ValueError: for a report without metrics by gap.
    """
    if without := [title for title, report in reports.items() if not report.get("by_gap")]:
        raise ValueError(
            f"the reports {', '.join(without)} have no metrics by gap, expected reports of data with times; evaluate "
            "again: recsys evaluate"
        )
    labels = [label for label in (EVERYTHING, *GROUPS) if any(label in report["by_gap"] for report in reports.values())]
    columns = min(len(reports), 2)
    rows = -(-len(reports) // columns)
    figure, axes = new_figure(1.5 + 4.5 * columns, 0.8 + (0.6 + 0.45 * len(labels)) * rows, rows, columns)
    handles: dict[str, Any] = {}
    for ax, (title, report) in zip(axes, reports.items(), strict=False):
        groups = report["by_gap"]
        measured = next(iter(groups.values()))["models"]
        for row, name in enumerate(name for name in STAGES if name in measured):
            shown = [(at, groups[label]["models"][name][metric]) for at, label in enumerate(labels) if label in groups]
            at = np.array([at for at, _ in shown]) + 0.2 * row - 0.1
            value, low, high = (np.array([one[key] for _, one in shown]) for key in ("value", "low", "high"))
            handles[model_title(name)] = ax.errorbar(
                value, at, xerr=np.maximum([value - low, high - value], 0), fmt="o", capsize=3, color=COLOURS[name]
            )
        counts = [f"{groups[label]['targets']:,}" if label in groups else "no" for label in labels]
        names = [f"{label}\n({count} targets)" for label, count in zip(labels, counts, strict=True)]
        ax.set_yticks(np.arange(len(labels)), names)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(title)
        ax.set_xlabel(metric_title(metric))
    for ax in axes[len(reports) :]:
        ax.remove()
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    return figure


def ceiling_figure(candidate_rank: np.ndarray, k: int, weights: np.ndarray | None = None) -> Figure:
    """Recall of the first candidates against their number: the upper bound of the ranker's recall@k.

    Args:
        candidate_rank: (n,) rank of each target among the candidates, from 1; above k if not among them.
        k: candidates of each user.
        weights: (n,) of the targets, `Targets.weights`; None: equal ones.
    """
    figure, (ax,) = new_figure(6, 4)
    ax.plot(np.arange(1, k + 1), ceiling(candidate_rank, k, weights), color="C0")
    ax.set_xlim(1, max(k, 2))
    ax.set_ylim(0, 1)
    ax.set_xlabel("K, first candidates")
    ax.set_ylabel("recall, upper bound of the ranker's recall@k")
    ax.grid(alpha=0.3)
    return figure


def ceiling(candidate_rank: np.ndarray, k: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Recall of the first 1, 2, ..., k candidates, (k,): the share of targets among them.

    Args:
        candidate_rank: as of `ceiling_figure`.
        k: candidates of each user.
        weights: as of `ceiling_figure`.
    """
    whole = len(candidate_rank) if weights is None else weights.sum()
    return np.bincount(np.minimum(candidate_rank, k + 1), weights, k + 2)[1 : k + 1].cumsum() / whole


def calibration_figure(calibration: dict[str, Any]) -> Figure:
    """Reliability diagram: mean probability of the top item against its hit rate, by bin of lists."""
    bins = calibration["bins"]
    confidence, hits = ([row[key] for row in bins] for key in ("confidence", "hits"))
    end = max(*confidence, *hits, 0.01) * 1.05
    figure, (ax,) = new_figure(5, 4.5)
    ax.plot([0, end], [0, end], color="0.6", linestyle="--", label="calibrated")
    ax.plot(confidence, hits, "o-", color=COLOURS["ranker"], label=f"ranker, ECE {calibration['ece']:.4f}")
    ax.set_xlim(0, end)
    ax.set_ylim(0, end)
    ax.set_xlabel("mean probability of the first item")
    ax.set_ylabel("share of lists whose target it is")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def learning_figure(fits: Sequence[Curves]) -> Figure:
    """Training loss and validation NDCG@10 by step, a panel for each stage; the legend is above the panels."""
    figure, axes = new_figure(5 * len(fits), 3.9, 1, len(fits))
    lines: dict[str, Any] = {}  # label -> line, once for all panels
    for ax, (stage, columns) in zip(axes, fits, strict=True):
        if LOSS in columns:
            other = ax.twinx()
            (lines["training loss"],) = other.plot(*columns[LOSS], color="0.6", linestyle=":", marker=".")
            other.set_ylabel("training loss")
        for column, colour, style, label in (
            (MONITORED, COLOURS[stage], "-", stage),
            (FIRST_STAGE, COLOURS["retriever"], "--", SAME_USERS),
        ):
            if column in columns:
                (lines[label],) = ax.plot(*columns[column], color=colour, linestyle=style, marker=".")
        ax.set_title(stage)
        ax.set_xlabel("step")
        ax.set_ylabel("validation NDCG@10")
    labels = sorted(lines, key=LEGEND.index)
    figure.legend([lines[label] for label in labels], labels, loc="outside upper center", ncols=2 * len(fits))
    return figure


def learning_curves(bundle: Path) -> tuple[list[Curves], list[str]]:
    """Learning curves of the fits behind a bundle or an index, and the reasons for missing ones.

    The fits are the parents recorded in the manifests. A parent that is gone or has changed since has no curve: its
    log may belong to another fit.

    Args:
        bundle: a bundle, or an index for the first stage alone.
    """
    manifest = bundle_manifest(bundle)
    parents = _located(bundle, manifest)
    if "index" in parents and is_unchanged(parents["index"]):
        index = Path(parents["index"]["path"])
        parents = _located(index, read_manifest(index, "index", "recsys export-index")) | parents
    fits, missing = [], []
    for stage in STAGES if "ranker" in parents else STAGES[:1]:
        parent = parents.get(stage)
        if parent is None or not is_unchanged(parent):
            where = parents["index" if parent is None else stage]["path"]
            missing.append(f"No learning curve of the {stage}: {where} is gone or has changed.")
            continue
        log = Path(parent["path"]).parent / "log"
        if columns := read_log(log):
            fits.append(Curves(stage, columns))
        else:
            missing.append(f"No learning curve of the {stage}: {log} has no metrics.csv with {MONITORED} or {LOSS}.")
    return fits, missing


def _located(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parents in a manifest, each with the path where it is now."""
    parents = manifest["parents"]
    return {name: parent | {"path": str(locate_parent(folder, parent))} for name, parent in parents.items()}


def is_unchanged(parent: dict[str, Any]) -> bool:
    """Whether a parent recorded in a manifest still exists with the same content."""
    return parent.get("hash") is not None and fingerprint(parent["path"]) == parent["hash"]


def read_log(log: Path) -> dict[str, Curve]:
    """Reads the curves in log/version_*/metrics.csv, written by CSVLogger, one version per start of a fit.

    A resumed fit writes a new version from its first step on, so later versions replace those steps of earlier ones.
    """
    points: dict[str, dict[int, float]] = {}
    versions = {file: file.parent.name.removeprefix("version_") for file in log.glob("version_*/metrics.csv")}
    for file in sorted((file for file, n in versions.items() if n.isdigit()), key=lambda file: int(versions[file])):
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        for column in (MONITORED, FIRST_STAGE, LOSS):
            new = {int(row["step"]): float(row[column]) for row in rows if row.get(column) and row.get("step")}
            if new:
                old = {step: value for step, value in points.get(column, {}).items() if step < min(new)}
                points[column] = old | new
    return {column: (np.array(list(curve)), np.array(list(curve.values()))) for column, curve in points.items()}


def write_figures(
    report: dict[str, Any],
    candidate_rank: np.ndarray,
    bundle: Path,
    output: Path,
    weights: np.ndarray | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Writes the figures of a report into a folder.

    Args:
        report: the content of report.json.
        candidate_rank: (n,) rank of each target among the candidates, from 1.
        bundle: the evaluated bundle.
        output: the folder.
        weights: (n,) of the targets, `Targets.weights`; None: equal ones.

    Returns:
        File name -> title of the written figures, and the reasons for missing ones.
    """
    fits, missing = learning_curves(bundle)
    figures = {
        "cohorts.png": cohorts_figure(report),
        **({"gaps.png": gaps_figure({"time since the event before": report})} if report.get("by_gap") else {}),
        "ceiling.png": ceiling_figure(candidate_rank, report["candidates"]["k"], weights),
    }
    if fits:
        figures["learning.png"] = learning_figure(fits)
    if "calibration" in report:
        figures["calibration.png"] = calibration_figure(report["calibration"])
    for name, figure in figures.items():
        with atomic_write(output / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {name: FIGURES[name] for name in figures}, missing
