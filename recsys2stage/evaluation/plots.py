"""Figures of a report, as PNG; and the learning curves that Lightning's CSV logs hold. Needs no display."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recsys2stage.artifacts import atomic_write, fingerprint, read_manifest
from recsys2stage.evaluation.compare import STAGES
from recsys2stage.evaluation.report import TITLES, title_of
from recsys2stage.ranking.bundle import bundle_manifest

COLOURS = {"retriever": "C0", "ranker": "C1"}
MONITORED, LOSS = "val/ndcg@10", "train/loss"  # columns of a log
FIRST_STAGE = "val/retriever_ndcg@10"  # of the ranker's log: the retriever on the same lists
FIGURES = {  # the file of each figure and its title
    "cohorts.png": "NDCG@10 by cohort",
    "ceiling.png": "Share of users whose target is among the first K candidates",
    "learning.png": "Learning curves",
    "calibration.png": "Probability of the first item and share of hits",
}

Curve = tuple[np.ndarray, np.ndarray]  # steps and values
Figure = Any  # matplotlib's, which only `empty` imports: it is long to import, and most verbs draw nothing
Axes = Any


class Curves(NamedTuple):
    """The learning curves of one fit, by column of its log; what the log does not have is missing."""

    stage: str
    columns: dict[str, Curve]


def empty(width: float | int, height: float | int, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches, and its axes in reading order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def cohorts_figure(report: dict[str, Any]) -> Figure:
    """NDCG@10 of both stages, a panel for each kind of cohort."""
    cohorts = report["cohorts"]
    stages = [name for name in STAGES if name in report["models"]]
    figure, axes = empty(10, 3.2 * ((len(cohorts) + 1) // 2), (len(cohorts) + 1) // 2, 2)
    for ax, (cohort, groups) in zip(axes, cohorts.items(), strict=False):
        at = np.arange(len(groups))
        for place, name in enumerate(stages):
            values = [group[name]["ndcg@10"] for group in groups.values()]
            high = 0.8 / len(stages)
            ax.barh(at + place * high, values, high, align="edge", color=COLOURS[name], label=TITLES[name])
        labels = [f"{label} ({group['users']:,} users)" for label, group in groups.items()]
        ax.set_yticks(at + 0.4, labels)
        ax.invert_yaxis()
        ax.set_title(cohort.replace("_", " "))
        ax.set_xlabel(title_of("ndcg@10"))
    for ax in axes[len(cohorts) :]:
        ax.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(stages))
    return figure


def ceiling_figure(place: np.ndarray, k: int) -> Figure:
    """Recall of the first candidates against their number: what no second stage can exceed.

    Args:
        place: (n,) place of each target among the candidates, from 1; above k where it is not there.
        k: candidates of each user.
    """
    figure, (ax,) = empty(6, 4)
    ax.plot(np.arange(1, k + 1), ceiling(place, k), color="C0")
    ax.set_xlim(1, max(k, 2))
    ax.set_ylim(0, 1)
    ax.set_xlabel("K, first candidates")
    ax.set_ylabel("share of targets among them")
    ax.grid(alpha=0.3)
    return figure


def ceiling(place: np.ndarray, k: int) -> np.ndarray:
    """Share of targets among the first 1, 2, ..., k candidates, (k,)."""
    return np.bincount(np.minimum(place, k + 1), minlength=k + 2)[1 : k + 1].cumsum() / len(place)


def calibration_figure(calibration: dict[str, Any]) -> Figure:
    """Reliability: in each bin of users the mean probability of the first item, and how often it is the target."""
    bins = calibration["bins"]
    confidence, hits = ([row[key] for row in bins] for key in ("confidence", "hits"))
    end = max(*confidence, *hits, 0.01) * 1.05
    figure, (ax,) = empty(5, 4.5)
    ax.plot([0, end], [0, end], color="0.6", linestyle="--", label="calibrated")
    ax.plot(confidence, hits, "o-", color=COLOURS["ranker"], label=f"ranker, ECE {calibration['ece']:.4f}")
    ax.set_xlim(0, end)
    ax.set_ylim(0, end)
    ax.set_xlabel("mean probability of the first item")
    ax.set_ylabel("share of users whose target it is")
    ax.legend()
    return figure


def learning_figure(fits: Sequence[Curves]) -> Figure:
    """Training loss and validation NDCG@10 by step, a panel for each stage."""
    figure, axes = empty(5 * len(fits), 3.6, 1, len(fits))
    for ax, (stage, columns) in zip(axes, fits, strict=True):
        if LOSS in columns:
            other = ax.twinx()
            other.plot(*columns[LOSS], color="0.6", linestyle=":", marker=".")
            other.set_ylabel("training loss (dotted)")
        for column, colour, label in ((MONITORED, COLOURS[stage], stage), (FIRST_STAGE, "C0", "retriever, same users")):
            if column in columns:
                ax.plot(*columns[column], color=colour, label=label, marker=".")
        if ax.lines:
            ax.legend()
        ax.set_title(stage)
        ax.set_xlabel("step")
        ax.set_ylabel("validation NDCG@10")
    return figure


def fits_behind(bundle: Path) -> tuple[list[Curves], list[str]]:
    """The learning curves of the fits that a bundle or an index was made from, and why some are missing.

    They are found through the parents that the manifests name. A parent that is gone, or has another content than the
    one recorded, has no curve: its log may be of another fit.

    Args:
        bundle: a bundle, or an index for the first stage alone.
    """
    manifest = bundle_manifest(bundle)
    parents = dict(manifest["parents"])
    if "index" in parents and as_recorded(parents["index"]):
        parents = read_manifest(parents["index"]["path"], "index", "recsys export-index")["parents"] | parents
    fits, missing = [], []
    for stage in STAGES if "ranker" in parents else STAGES[:1]:
        parent = parents.get(stage)
        if parent is None or not as_recorded(parent):
            where = parents["index" if parent is None else stage]["path"]
            missing.append(f"No learning curve of the {stage}: {where} is gone or was made anew.")
            continue
        log = Path(parent["path"]).parent / "log"
        if columns := read_log(log):
            fits.append(Curves(stage, columns))
        else:
            missing.append(f"No learning curve of the {stage}: {log} has no metrics.csv with {MONITORED} or {LOSS}.")
    return fits, missing


def as_recorded(parent: dict[str, Any]) -> bool:
    """Whether a parent that a manifest names is still there and still the same."""
    return parent["hash"] is not None and fingerprint(parent["path"]) == parent["hash"]


def read_log(log: Path) -> dict[str, Curve]:
    """The curves in log/version_*/metrics.csv, which CSVLogger writes, one version for each start of a fit.

    A fit that was resumed goes on in a new version, from the step where it took up, so a version replaces what older
    ones say of its steps.
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


def draw(report: dict[str, Any], place: np.ndarray, bundle: Path, output: Path) -> tuple[dict[str, str], list[str]]:
    """Writes the figures of a report into a folder.

    Args:
        report: as it stands in report.json.
        place: (n,) place of each target among the candidates, from 1.
        bundle: what was measured.
        output: the folder.

    Returns:
        File name -> title of the figures that are there now, and why others are missing.
    """
    fits, missing = fits_behind(bundle)
    figures = {"cohorts.png": cohorts_figure(report), "ceiling.png": ceiling_figure(place, report["candidates"]["k"])}
    if fits:
        figures["learning.png"] = learning_figure(fits)
    if "calibration" in report:
        figures["calibration.png"] = calibration_figure(report["calibration"])
    for name, figure in figures.items():
        with atomic_write(output / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return {name: FIGURES[name] for name in figures}, missing
