"""The report of `recsys tune`: report.json, report.md and two figures."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from recsys2stage.artifacts import atomic_write, write_json
from recsys2stage.cli.tune_study import BEST, ERROR, SECONDS, Study
from recsys2stage.evaluation.plots import Figure, new_figure

if TYPE_CHECKING:  # an extra, and slow to import
    import optuna

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}
COLOURS = {"complete": "C0", "pruned": "0.6"}
FIGURES = {"history.png": "Trials in order, and the best so far", "slices.png": "Trials by each option"}
FEW = 8  # complete trials below which importances are noise
ROWS = 20  # of the table in report.md


def write_report(study: Study, command: str, trial_options: Mapping[str, Any]) -> list[str]:
    """Writes report.json, report.md, history.png and slices.png into the folder of a study.

    Args:
        study: a study with a complete trial.
        command: that fits the best options.
        trial_options: options of the trials alone.

    Returns:
        Lines for the summary of the command.
    """
    trials = [trial_row(study, frozen) for frozen in study.frozen()]
    best = study.best
    assert best is not None
    counts = {state: sum(trial["state"] == state for trial in trials) for state in STATES.values()}
    report = {
        "metric": study.metric,
        "mode": study.mode,
        "split": "val",
        "best": {"trial": best.number, "value": best.value, **trials[best.number]},
        "command": command,
        "trial_options": dict(trial_options),
        "counts": counts,
        "seconds": round(sum(trial["seconds"] for trial in trials), 1),
        "importances": importances(study),
        "ranges": study.identity["ranges"],
        "search": {"sampler": study.sampler, "pruner": study.pruner, "seed": study.seed, "startup": study.startup},
        "data": study.identity["data"],
        "trials": trials,
    }
    for name, figure in (("history.png", history_figure(report)), ("slices.png", slices_figure(report))):
        with atomic_write(study.output / name) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    with atomic_write(study.output / "report.md") as temporary:
        temporary.write_text(as_markdown(report), encoding="utf-8")
    write_json(study.output / "report.json", report)
    files = ["report.json", "best.yaml", *FIGURES]
    return [counts_text(counts), *(str(study.output / name) for name in files)]


def trial_row(study: Study, frozen: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    """A trial as an entry of report.json: its best validation, also where it was pruned, and its options."""
    best = frozen.user_attrs.get(BEST) or {}
    return {
        "number": frozen.number,
        "state": STATES[frozen.state.name],
        "value": best.get("value"),
        "epoch": best.get("epoch"),
        "epochs": 1 + max(frozen.intermediate_values, default=-1),
        "seconds": frozen.user_attrs.get(SECONDS, 0.0),
        "error": frozen.user_attrs.get(ERROR),
        "options": study.options(frozen.params),
    }


def importances(study: Study) -> dict[str, float] | None:
    """Share of each option in the variance of good trials (PED-ANOVA); None for few trials."""
    import optuna

    if len(study.frozen("COMPLETE")) < FEW:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = optuna.importance.get_param_importances(study.study)
    return {name: round(float(share), 4) for name, share in found.items()}


def counts_text(counts: Mapping[str, int]) -> str:
    """How the trials ended."""
    return f"trials: {', '.join(f'{count} {state}' for state, count in counts.items() if count)}"


def history_figure(report: Mapping[str, Any]) -> Figure:
    """Best validation of each trial by its number, and the best complete trial so far."""
    figure, (ax,) = new_figure(7, 4)
    for state, colour in COLOURS.items():
        rows = [trial for trial in report["trials"] if trial["state"] == state and trial["value"] is not None]
        ax.scatter([row["number"] for row in rows], [row["value"] for row in rows], color=colour, s=18, label=state)
    complete = [trial for trial in report["trials"] if trial["state"] == "complete"]
    values = np.array([trial["value"] for trial in complete])
    best = (np.maximum if report["mode"] == "max" else np.minimum).accumulate(values)
    ax.step([trial["number"] for trial in complete], best, where="post", color="C1", label="best so far")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("trial")
    ax.set_ylabel(f"{report['metric']}, best epoch")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def slices_figure(report: Mapping[str, Any]) -> Figure:
    """Best validation of each trial by the value of each option, a panel for each; the best trial is marked."""
    ranges, best = report["ranges"], report["best"]["trial"]
    columns = min(3, len(ranges))
    rows = -(-len(ranges) // columns)
    figure, axes = new_figure(4 * columns, 3.2 * rows, rows, columns)
    for ax, (name, one) in zip(axes, ranges.items(), strict=False):
        labels = [str(choice) for choice in one["choices"] or ()]
        for state, colour in COLOURS.items():
            shown = [trial for trial in report["trials"] if trial["state"] == state and trial["value"] is not None]
            at = [trial["options"][name] for trial in shown]
            at = [labels.index(str(value)) for value in at] if labels else at
            ax.scatter(at, [trial["value"] for trial in shown], color=colour, s=18, label=state)
            for place, trial in zip(at, shown, strict=True):
                if trial["number"] == best:
                    ax.scatter([place], [trial["value"]], facecolors="none", edgecolors="C1", s=90, label="best")
        if labels:
            ax.set_xticks(range(len(labels)), [label if len(label) < 16 else f"{label[:15]}…" for label in labels])
        if one["log"]:
            ax.set_xscale("log")
        share = (report["importances"] or {}).get(name)
        ax.set_xlabel(short(name) + ("" if share is None else f" (importance {share:.2f})"))
        ax.grid(alpha=0.3)
    for number, ax in enumerate(axes):
        if number % columns == 0:
            ax.set_ylabel(f"{report['metric']}, best epoch")
        if number >= len(ranges):
            ax.remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def short(name: str) -> str:
    """A dotted option without init_args and without the model or the data before it."""
    parts = [part for part in name.split(".") if part != "init_args"]
    return ".".join(parts[1:] if len(parts) > 1 and parts[0] in ("model", "data") else parts)


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    best, sign = report["best"], 1 if report["mode"] == "max" else -1
    measured = [trial for trial in report["trials"] if trial["value"] is not None]
    measured.sort(key=lambda trial: (trial["state"] != "complete", -sign * trial["value"], trial["number"]))
    names = list(report["ranges"])
    head = ["trial", report["metric"], "epoch", "seconds", "state", *map(short, names)]
    rows = [
        [
            str(trial["number"]),
            f"{trial['value']:.4f}",
            f"{trial['epoch']} of {trial['epochs']}",
            f"{trial['seconds']:,.0f}",
            trial["state"],
            *(str(trial["options"][name]).replace("|", "\\|") for name in names),
        ]
        for trial in measured[:ROWS]
    ]
    search, shares, failed = report["search"], report["importances"], [one for one in report["trials"] if one["error"]]
    parts = [
        "# Tuning",
        f"Trial {best['trial']} is the best: {report['metric']} {best['value']:.4f} in epoch {best['epoch']}. "
        "Trials are chosen by validation; test events were not read. The value of the best of many trials is "
        "flattering: fit it with other seeds before you compare it.",
        f"```bash\n{report['command']}\n```",
        f"{counts_text(report['counts']).capitalize()}. Sampler {search['sampler']} with seed {search['seed']}, the "
        f"first {search['startup']} trials at random; pruner {search['pruner']}. {report['seconds']:,.0f} s of fits.",
    ]
    if report["trial_options"]:
        listed = ", ".join(f"{name} {value}" for name, value in report["trial_options"].items())
        parts.append(f"Options of the trials alone, which the command above does not set: {listed}.")
    parts.append("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)))
    if len(measured) > ROWS:
        parts.append(f"The other {len(measured) - ROWS} trials are in report.json.")
    if shares is None:
        parts.append(f"Importances of the options need {FEW} complete trials.")
    else:
        listed = ", ".join(f"{short(name)} {share:.2f}" for name, share in shares.items())
        parts.append(f"Importance (PED-ANOVA, shares of 1): {listed}.")
    parts += [f"- trial {trial['number']} failed: {trial['error']}" for trial in failed[:ROWS]]
    parts += [f"![{title}]({file})" for file, title in FIGURES.items()]
    return "\n\n".join(parts) + "\n"
