"""The model card of a bundle or an index: README.md, written from manifests at export, completed by an evaluation.

The card has no checksum in the manifest: completing or editing it changes neither the identity of the folder nor what
is served. A comment in its first line names the manifest that it describes. Later commands replace the sections between
comments; everything else is left as it is.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from recsys2stage import columns as c
from recsys2stage.artifacts import atomic_write, fingerprint, locate_parent, read_json
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.summary import DROPPED
from recsys2stage.evaluation.card_model import (
    code,
    codes,
    day,
    describe_model,
    describe_use,
    escape,
    list_limits,
    name_class,
)
from recsys2stage.evaluation.report import (
    MAIN_METRICS,
    as_table,
    cohort_tables,
    exposure_table,
    interval_text,
    metric_title,
    paired_table,
)
from recsys2stage.options import STRETCH, Until
from recsys2stage.ranking.bundle import bundle_manifest, bundle_until
from recsys2stage.retrieval.index import DESCRIPTION

IDENTITY = re.compile(r"<!-- recsys2stage model card of the manifest ([0-9a-f]{64}) -->")
EVALUATED = re.compile(r"<!-- evaluation: (none|(val|test) targets of (\d+) users) -->$", re.MULTILINE)
END_EVALUATION = "<!-- end of evaluation -->"
NO_DATA, END_DATA = "<!-- data: not found -->", "<!-- end of data -->"
MAX_CARD_BYTES = 1 << 20
PARTS = {"train": "training", "val": "validation", "test": "test"}


class Evaluation(NamedTuple):
    """A full-ranking evaluation, as the card shows it."""

    report: dict[str, Any]  # the content of report.json
    line: str  # the protocol, from `protocol_line`

    @property
    def weight(self) -> tuple[bool, int]:
        """Evaluations of more weight replace others: test before validation targets, then the number of users."""
        return self.report["protocol"]["evaluated"] == "test", int(self.report["users"])


def write_card(folder: Path, dataset: Dataset | None = None, name: Path | None = None) -> None:
    """Writes the card of a folder whose manifest is complete, without an evaluation.

    Args:
        folder: bundle or index.
        dataset: the prepared dataset; None: the one in the manifest, if it is still there.
        name: final path of the folder, if it is written elsewhere first; parents are looked up relative to it.
    """
    with atomic_write(folder / c.CARD) as temporary:
        temporary.write_text(model_card(folder, dataset or find_dataset(name or folder, folder)), encoding="utf-8")


def find_dataset(place: Path, folder: Path) -> Dataset | None:
    """The dataset in the manifest of a folder; None if it is gone or has changed."""
    parent = bundle_manifest(folder)["parents"]["data"]
    path = locate_parent(place, parent)
    try:
        return Dataset(path) if parent.get("hash") and fingerprint(path) == parent["hash"] else None
    except (OSError, ValueError):  # damaged: the folder serves without it
        return None


def complete_card(folder: Path, identity: str | None, dataset: Dataset, evaluation: Evaluation) -> str:
    """Writes an evaluation into the card of a folder, and the card if there is none.

    An evaluation of more weight stays (see `Evaluation.weight`), and so does a README.md of other origin.

    Args:
        folder: bundle or index.
        identity: fingerprint of the folder when the model was loaded.
        dataset: the prepared dataset.
        evaluation: what to write.

    Returns:
        What was done, as a line of text.
    """
    path = folder / c.CARD
    if fingerprint(folder) != identity:
        return f"{path} was not changed: {folder} was replaced during the evaluation"
    old = _read(path)
    try:
        if old is None:
            text = model_card(folder, dataset, evaluation)
        else:
            found, shown, end = IDENTITY.match(old), EVALUATED.search(old), old.find(END_EVALUATION)
            if found is None or shown is None or end < shown.end():
                return f"{path} was not changed: it is not a card of this package; remove it to get a new one"
            if found[1] != identity:  # copied from another model
                text = model_card(folder, dataset, evaluation)
            else:
                if shown[2] and (shown[2] == "test", int(shown[3])) > evaluation.weight:
                    return f"{path} was not changed: it shows {shown[2]} targets of {int(shown[3]):,} users"
                text = old[: shown.start()] + evaluation_section(evaluation) + old[end + len(END_EVALUATION) :]
                start, stop = text.find(NO_DATA), text.find(END_DATA)
                if 0 <= start < stop:
                    text = text[:start] + data_section(dataset) + text[stop + len(END_DATA) :]
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"the model card could not be written ({error})"
    return str(path)


def _read(path: Path) -> str | None:
    """The text of a card; empty for what cannot be one; None if there is none."""
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def model_card(folder: Path, dataset: Dataset | None, evaluation: Evaluation | None = None) -> str:
    """The model card as Markdown. Names from data and configs stand in code spans, on one line.

    Args:
        folder: bundle or index.
        dataset: the prepared dataset; None: it was not found.
        evaluation: the latest evaluation; None: not evaluated yet.
    """
    manifest = bundle_manifest(folder)
    both, until = manifest["kind"] == "bundle", bundle_until(folder)
    index = read_json(folder / DESCRIPTION, dict, "recsys export-index")
    data_name = Path(manifest["parents"]["data"]["path"]).name
    stages = "retriever and ranker" if both else "retriever without a ranker"
    parts = [
        f"<!-- recsys2stage model card of the manifest {fingerprint(folder)} -->",
        f"# Model card: {stages} for {code(data_name)}",
        f"This folder recommends {manifest['items']:,} items to users given by their histories of events. "
        + (
            f"The retriever finds {manifest['candidates']:,} candidates for a request, and the ranker sorts them."
            if both
            else "It has the first stage only: items are sorted by the retriever's scores."
        )
        + ("" if until == "val" else f" It was refitted: retriever and signals learned from {STRETCH[until]}."),
        "## Model",
        describe_model(folder, manifest, index),
        "## Data",
        data_section(dataset),
        "## Evaluation",
        evaluation_section(evaluation, until),
        "## Intended use",
        "Ranking items of this catalogue for users with a history, in the service and the period that the data are "
        "from. Offline metrics measure how well held-out events are predicted; they do not measure the effect of "
        "recommendations on users, so test online before you rely on them. The model is not meant for decisions about "
        "individuals, such as credit or hiring.",
        "## Limits",
        list_limits(folder, manifest, None if dataset is None else dataset.manifest),
        "## How to load and serve it",
        describe_use(folder, manifest, index),
        "## Versions and hashes",
        versions(folder, manifest),
    ]
    return "\n\n".join(parts) + "\n"


def data_section(dataset: Dataset | None) -> str:
    """Name, counts, time span and split of the data, between comments."""
    if dataset is None:
        missing = "The prepared data were not found when this card was written. `recsys evaluate` adds them."
        return f"{NO_DATA}\n\n{missing}\n\n{END_DATA}"
    manifest = dataset.manifest
    counts, protocol, ties = manifest["counts"], manifest["protocol"], manifest.get("ties") or {}
    source = manifest.get("options", {}).get("source") or {}
    files = [Path(str(path)).name for path in manifest.get("inputs") or []]
    parts = [f"{counts[f'{part}_events']:,} {title}" for part, title in PARTS.items()]
    targets = {
        part: f"{counts[f'{part}_targets']:,} " if f"{part}_targets" in counts else "" for part in ("val", "test")
    }
    lines = [
        f"Prepared dataset {code(dataset.path.name)}, read by {name_class(source)}"
        + (f" from {codes(files)}" if files else ""),
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['events']:,} events",
        f"{', '.join(parts[:-1])} and {parts[-1]} events; {counts['val_users']:,} users have {targets['val']}"
        f"validation targets, {counts['test_users']:,} have {targets['test']}test targets",
        _time_span(dataset),
        f"Split: {code(protocol['split'])}"
        + "".join(f", {code(f'{name}={protocol[name]}')}" for name in ("val", "test") if name in protocol)
        + f"; equal times in {code(protocol['tie_break'])}; repeats: {code(protocol['repeats'])}",
        f"Dropped: {_dropped(manifest)}",
    ]
    if dataset.has_time and isinstance(share := ties.get("events_share"), float) and share:
        lines.append(f"{100 * share:.1f} % of the events share their time with another event of the same user")
    for owner in ("items", "users"):
        if features := [feature["name"] for feature in manifest["features"][owner]]:
            lines.append(f"Features of {owner}: {codes(features)}")
    if dataset.action_names:
        lines.append(f"Action types: {codes(dataset.action_names)}")
    return "<!-- data -->\n\n" + "\n".join(f"- {line}" for line in lines) + f"\n\n{END_DATA}"


def _time_span(dataset: Dataset) -> str:
    if not dataset.has_time or not len(dataset.times):
        return "Time span: the data have an order of events, but no times"
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    full = starts < ends  # events are sorted by user and time
    first, last = int(dataset.times[starts[full]].min()), int(dataset.times[ends[full] - 1].max())
    return f"Time span: {day(first)} to {day(last)} (UTC)"


def _dropped(manifest: dict[str, Any]) -> str:
    counts = manifest["counts"]
    reasons = {
        name: text for name, text in DROPPED.items() if name != "repeats" or manifest["protocol"]["repeats"] != "keep"
    }
    dropped = [f"{counts[name]:,} events ({text})" for name, text in reasons.items() if counts.get(name)]
    dropped += [f"{counts['rejected']:,} bad rows"] if counts.get("rejected") else []
    dropped += (
        [f"from the evaluation {counts['users_too_short']:,} users with too few events"]
        if counts.get("users_too_short")
        else []
    )
    return "; ".join(dropped) or "no events"


def evaluation_section(evaluation: Evaluation | None, until: Until = "val") -> str:
    """Metrics, the difference of the stages, and cohorts, between comments.

    Args:
        evaluation: None: not evaluated.
        until: where the training events of the retriever end.
    """
    if evaluation is None:
        todo = (
            "There are no metrics of this folder: it learned from all events, those of the test too."
            if until == "end"
            else "Not evaluated yet. This command writes the metrics here: `recsys evaluate --bundle BUNDLE`"
        )
        return f"<!-- evaluation: none -->\n\n{todo}\n\n{END_EVALUATION}"
    report, line = evaluation
    users, part = int(report["users"]), report["protocol"]["evaluated"]
    stages = [name for name in ("retriever", "ranker") if name in report["models"]]
    parts = [
        f"<!-- evaluation: {part} targets of {users} users -->",
        escape(line[0].upper() + line[1:] + "."),
        as_table(report),
        f"Each value has its 95 % interval, a {interval_text(report)}.",
    ]
    if "ranker_ids_masked" in report["models"]:
        parts[-1] += (
            " `ranker, ids masked` is the ranker with all inputs derived from item ids set to zero: how it ranks items "
            "that it was not trained on."
        )
    if "comparison" in report:
        compared = {metric: report["comparison"][metric] for metric in MAIN_METRICS if metric in report["comparison"]}
        parts += [
            "### Ranker against retriever",
            _verdict(compared["ndcg@10"]),
            paired_table("ranker − retriever", compared),
            "p: two-sided randomization test with random signs of the users' differences.",
        ]
    if "ranker" in stages:
        k, recall = report["candidates"]["k"], report["candidates"]["recall"]
        mean = ", as a mean over baskets," if "baskets" in report else ""
        parts.append(
            f"Candidates' recall: {recall:.4f} of the targets{mean} are among the {k:,} candidates. The ranker sorts "
            "only these, so this share is the upper bound of its "
            f"recall@k for k up to {k:,}."
        )
    parts.append("### Cohorts")
    parts += cohort_tables(report, stages)
    if "exposure" in report:
        parts += ["### Beyond accuracy", exposure_table(report)]
    if "calibration" in report:
        parts.append(
            "Expected calibration error of the ranker's probability for its first item: "
            f"{report['calibration']['ece']:.4f}."
        )
    return "\n\n".join([*parts, END_EVALUATION])


def _verdict(difference: dict[str, Any]) -> str:
    """The difference in NDCG@10 as a sentence."""
    low, high = difference["low"], difference["high"]
    if low > 0:
        what = "The ranker is better than the retriever"
    elif high < 0:
        what = "The ranker is worse than the retriever"
    else:
        what = "The interval contains 0, so no difference is shown"
    return (
        f"{what}: {metric_title('ndcg@10')} differs by {difference['difference']:+.4f}, 95 % interval "
        f"[{low:+.4f}, {high:+.4f}], p = {difference['p']:.4f}."
    )


def versions(folder: Path, manifest: dict[str, Any]) -> str:
    """When the folder was written, by which versions, and the SHA-256 of what it was made from."""
    made = manifest.get("versions") or {}
    lines = [
        f"Exported {code(manifest.get('created'))} by recsys2stage {code(made.get('recsys2stage'))} with Python "
        f"{code(made.get('python'))} and NumPy {code(made.get('numpy'))}; format {code(manifest['format'])}",
        f"Manifest: SHA-256 {code(fingerprint(folder))}; `/v1/info` of the server shows its beginning",
        f"Split: SHA-256 {code(manifest['split_hash'])}",
        *(f"Made from {code(name)}: SHA-256 {code(parent['hash'])}" for name, parent in manifest["parents"].items()),
    ]
    text = (
        f"`{c.MANIFEST}` lists the SHA-256 of every file, and they are checked when the folder is loaded. This card is "
        "not among them; edit it as you like. `recsys evaluate` replaces only what stands between the comments."
    )
    return "\n".join(f"- {line}" for line in lines) + f"\n\n{text}"
