"""The closing lines of a command: what it wrote, the counts that matter, and the next command."""

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from recsys2stage import columns as c

HINTS = "RECSYS_HINTS"  # environment variable: 1, set by the command line: name the next command; 0: do not
T = TypeVar("T")


def print_summary(path: Path, headline: str, *details: str, then: str | None = None) -> None:
    """Prints what a command wrote, in the format of all commands.

    Args:
        path: the file or folder that it wrote.
        headline: the counts that matter most, one line.
        details: further lines.
        then: the command that usually comes next; printed on the command line, unless RECSYS_HINTS is 0.
    """
    print(f"{path}: {headline}", *(f"  {line}".rstrip() for line in details), sep="\n")
    if then:
        print_hint(then)
    sys.stdout.flush()


def print_hint(then: str) -> None:
    """Prints the next command, on the command line only and unless RECSYS_HINTS is 0."""
    if os.environ.get(HINTS, "0") != "0":
        print(f"next: {then}", flush=True)


def config_option(stage: str, name: str) -> str:
    """The option --config of a stage's next command: the config of `name` where there is one, else a placeholder."""
    path = Path("configs") / name / f"{stage}.yaml"
    return f"--config {path if path.is_file() else Path('configs/NAME') / path.name}"


def on_terminal() -> bool:
    """Whether progress bars can be drawn: on a terminal or in a notebook, but not in a log file."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")  # of a notebook


def progress(parts: Collection[T], desc: str, unit: str = "batch") -> Iterator[T]:
    """Iterates with a progress bar, which is drawn on a terminal only.

    Args:
        parts: what to iterate over; its length is the bar's.
        desc: text before the bar.
        unit: what is counted.
    """
    yield from tqdm(parts, desc=desc, unit=unit, disable=not on_terminal())


DROPPED = {  # counts in the manifest of a dataset: events that were read and are not in it
    "removed_by_rating": "below min_rating",
    "repeats": "repeats",
    "removed_by_core": "by the k-core filter",
    "cold_events": "of cold items before the test",
}


def dataset_summary(output: Path, manifest: Mapping[str, Any]) -> None:
    """Prints the summary of a prepared dataset.

    Args:
        output: its folder.
        manifest: its manifest.
    """
    counts, protocol = manifest["counts"], manifest["protocol"]
    dropped = {name: counts.get(name, 0) for name in DROPPED}
    if protocol["repeats"] == "keep":
        dropped["repeats"] = 0
    reasons = ", ".join(f"{count:,} {DROPPED[name]}" for name, count in dropped.items() if count)
    quarantined = f"{counts['rejected']:,} bad rows ({output / c.REJECTED})" if counts["rejected"] else "no bad rows"
    listed = "targets" in manifest  # several targets per user
    options = [f"{name} {protocol[name]:,}" for name in ("gap", "test", "val") if listed and name in protocol]
    held = f" of {protocol['val']} validation events" if not listed and protocol.get("val", 1) > 1 else ""
    held = f" ({', '.join(options)})" if options else held
    val, test = (
        f"{counts[f'{part}_targets']:,} targets of {counts[f'{part}_users']:,}"
        if listed
        else f"of {counts[f'{part}_users']:,}"
        for part in ("val", "test")
    )
    rules = [f"{name} {protocol[name]}" for name in ("min_rating", "core", "cold_items") if protocol[name]]
    print_summary(
        output,
        f"{counts['users']:,} users, {counts['items']:,} items, {counts['events']:,} events",
        f"events: {counts['train_events']:,} training, {counts['val_events']:,} validation ({val} users), "
        f"{counts['test_events']:,} test ({test} users)",
        f"dropped: {reasons or 'no events'}; quarantined: {quarantined}",
        "; ".join(
            [
                f"protocol: {protocol['split']} split{held}",
                f"equal times in {protocol['tie_break']}",
                f"repeats: {protocol['repeats']}",
                f"time in {protocol['time']}" if manifest["has"]["time"] else "an order and no times",
                *rules,
            ]
        ),
        then=f"recsys fit {config_option('retriever', output.name)} --data.init_args.path {output} "
        f"--output runs/{output.name}/retriever",
    )
