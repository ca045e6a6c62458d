"""The figures of the documentation, as SVG in docs/figures/: `make figures`.

tests/test_site.py compares the files with what this script draws.
"""

import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from docs.canvas import (
    BLUE,
    BLUE_TINT,
    CARD,
    GREEN,
    GREEN_TINT,
    INK,
    ORANGE,
    ORANGE_TINT,
    PAPER,
    QUIET,
    RED,
    RULE,
    Canvas,
)
from recsys2stage.evaluation.by_gap import EVERYTHING, GROUPS

HERE = Path(__file__).parent
FOLDER, MEASURED = HERE / "figures", HERE / "measured"
FEWEST = 20  # targets of a group that is drawn by gap
BY_GAP = MEASURED / "by_gap"  # a file for each protocol, in the order of their names


def flow() -> Canvas:
    """Verbs and artifacts of both stages."""
    c = Canvas(960, 420, "What flows where: raw events, dataset, retriever, index, candidates, ranker, bundle")
    c.box(188, 34, 752, 112, fill=BLUE_TINT, edge=BLUE_TINT)
    c.text(204, 52, "First stage", size=11, color=BLUE, weight="bold", ha="left")
    c.box(188, 176, 752, 112, fill=ORANGE_TINT, edge=ORANGE_TINT)
    c.text(204, 194, "Second stage", size=11, color=ORANGE, weight="bold", ha="left")
    width, height, top, low = 128, 52, 72, 214
    columns = [20, 252, 512, 772]
    first = [("raw events", "CSV, Parquet"), ("data/", "dataset"), ("retriever/", "best.ckpt")]
    first.append(("index/", "item vectors"))
    second = [("candidates/", "lists, signals"), ("ranker/", "best.ckpt"), ("bundle/", "both stages")]
    for y, at, names in ((top, columns, first), (low, columns[1:], second)):
        for x, (name, what) in zip(at, names, strict=True):
            c.box(x, y, width, height, name, what)
    for row, verbs in ((top, ["prepare-data", "fit", "export-index"]), (low, ["", "fit", "export-bundle"])):
        for (x, then), verb in zip(pairwise(columns), verbs, strict=True):
            if verb:
                c.arrow([(x + width, row + 26), (then - 2, row + 26)])
                c.text((x + width + then) / 2, row + 14, verb, size=12, mono=True)
    middle = 160
    index, candidates = columns[3] + width / 2, columns[1] + width / 2
    c.arrow([(index, top + height), (index, low - 2)])
    c.arrow([(index, middle), (candidates, middle)], head=False)
    c.arrow([(candidates, top + height), (candidates, low - 2)])
    c.text((columns[2] + columns[1] + width) / 2, middle - 10, "mine-negatives", size=12, mono=True)
    outputs = [("lists", "CSV, JSON lines, Parquet", "recommend"), ("report", "JSON, Markdown, figures", "evaluate")]
    outputs.append(("service", "HTTP and a page", "serve"))
    bus = 314
    c.arrow([(index, low + height), (index, bus)], head=False)
    for x, (name, what, verb) in zip(columns[1:], outputs, strict=True):
        c.arrow([(index, bus), (x + width / 2, bus), (x + width / 2, 346)])
        c.text(x + width / 2 - 8, 331, verb, size=12, mono=True, ha="right")
        c.box(x - 20, 348, width + 40, height, name, what)
    c.text(
        20, 370, "Boxes are folders or files.\nWords on arrows are\nrecsys commands.", size=11, color=QUIET, ha="left"
    )
    return c


def two_stages() -> Canvas:
    """One request: from all items to the list that is shown."""
    c = Canvas(
        960, 360, "One request: retriever and signals propose candidates among all items, the ranker orders them"
    )
    c.text(30, 34, "A request: the events of one user, oldest first", size=12, color=QUIET, ha="left")
    for number in range(6):
        c.box(30 + 34 * number, 50, 26, 26, fill=BLUE_TINT if number < 5 else BLUE, edge=BLUE, radius=4)
    c.text(250, 63, "newest", size=11, color=QUIET, ha="left")
    c.box(30, 118, 196, 58, "Encoder", "events to a query vector", fill=BLUE_TINT, edge=BLUE)
    c.arrow([(128, 80), (128, 116)])
    c.box(30, 240, 196, 58, "Signals", "counts of the training events", fill=ORANGE_TINT, edge=ORANGE)
    c.box(290, 118, 150, 58, "Index", "query · item vector", fill=BLUE_TINT, edge=BLUE)
    c.arrow([(226, 147), (288, 147)])
    c.text(365, 102, "scores all items", size=11, color=QUIET)
    c.box(500, 118, 150, 58, "Candidates", "200 items")
    c.arrow([(440, 147), (498, 147)])
    c.arrow([(226, 260), (520, 260), (520, 178)])
    c.text(370, 250, "propose more candidates", size=11, color=QUIET)
    c.box(700, 118, 230, 58, "Ranker", "retriever's score + correction", fill=ORANGE_TINT, edge=ORANGE)
    c.arrow([(650, 147), (698, 147)])
    c.arrow([(226, 284), (724, 284), (724, 178)])
    c.text(475, 298, "features of each candidate at the request time", size=11, color=QUIET)
    c.box(750, 222, 180, 110, fill=CARD)
    c.arrow([(840, 176), (840, 220)])
    c.text(766, 240, "Recommendations", weight="bold", ha="left")
    for number, share in enumerate((1.0, 0.82, 0.7)):
        y = 264 + 22 * number
        c.text(774, y, str(number + 1), size=11, color=QUIET)
        c.box(788, y - 6, 126 * share, 12, fill=ORANGE, edge=ORANGE, radius=3)
    c.text(365, 196, "First stage: fast, all items", size=11, color=BLUE, weight="bold")
    c.text(815, 102, "Second stage: precise, few items", size=11, color=ORANGE, weight="bold")
    return c


EVENTS = {  # share of the time line, of each user
    "user 1": [0.06, 0.17, 0.29, 0.44, 0.52, 0.6],
    "user 2": [0.22, 0.38, 0.57, 0.68, 0.76, 0.9],
    "user 3": [0.12, 0.5, 0.61, 0.73, 0.83, 0.95],
    "user 4": [0.02, 0.1, 0.2, 0.33, 0.71],
}
VALIDATION, TEST = 0.65, 0.8
GAP = 0.105  # of the time line: an event after it begins a session


def split() -> Canvas:
    """Leave-one-out, two cut times, and session beginnings."""
    title = "The split: the last events of each user, the events after two cut times, or each user's session beginnings"
    c = Canvas(960, 630, title)
    panels = [
        (20, 0, "LeaveOneOut: the last events of each user", _left_out),
        (500, 0, "GlobalTime: two cut times for all users", _by_time),
        (20, 280, "SessionStarts: the newest session beginnings", _session_starts),
    ]
    for left, top, name, parts_of in panels:
        c.text(left + 70, top + 30, name, weight="bold", ha="left")
        start, width = left + 80, 340
        for row, (user, events) in enumerate(EVENTS.items()):
            y = top + 76 + 48 * row
            c.text(left + 4, y, user, size=12, color=QUIET, ha="left")
            c.arrow([(start - 10, y), (start + width, y)], color=RULE, head=False)
            for at, part in zip(events, parts_of(events), strict=True):
                color = {"train": BLUE, "validation": ORANGE, "test": GREEN}.get(part.removesuffix("+"), QUIET)
                later = part.endswith("+")
                c.dot(start + at * width, y, 7, fill=PAPER if later else color, edge=color if later else None)
        c.arrow([(start - 10, top + 262), (start + width + 4, top + 262)], color=QUIET)
        c.text(start + width + 4, top + 276, "time", size=11, color=QUIET, ha="right")
        if parts_of is _by_time:
            for at, name in ((VALIDATION, "validation"), (TEST, "test")):
                x = start + at * width
                c.arrow([(x, 52), (x, 262)], color=ORANGE if name == "validation" else GREEN, head=False, dashed=True)
                c.text(x, 276, name, size=11, color=ORANGE if name == "validation" else GREEN)
    notes = [
        "A session begins with an event that comes some time",
        "after the user's event before it. Here the newest such",
        "event of each user tests, and the one before validates;",
        "test: 3 and val: 5 take up to three and five of them.",
        "",
        "Baskets does the same with events of equal time: the",
        "last basket of each user tests whole, as one set.",
    ]
    for number, note in enumerate(notes):
        c.text(570, 350 + 22 * number, note, size=12, color=QUIET, ha="left")
    keys = [(BLUE, "trains the retriever", False), (ORANGE, "validation target, trains the ranker", False)]
    keys += [(GREEN, "test target", False), (QUIET, "later event: no target of the report", True)]
    x = 34.0
    for color, text, ring in keys:
        c.dot(x, 598, 6, fill=PAPER if ring else color, edge=color if ring else None)
        c.text(x + 13, 598, text, size=12, ha="left")
        x += 40 + 6.6 * len(text)
    return c


def _left_out(events: list[float]) -> list[str]:
    """The part of each of a user's events."""
    return ["train"] * (len(events) - 2) + ["validation", "test"]


def _by_time(events: list[float]) -> list[str]:
    """The part of each event; those after the first of their part are later events, which the report does not rank."""
    parts = ["test" if at >= TEST else "validation" if at >= VALIDATION else "train" for at in events]
    return [part if part == "train" or part not in parts[:number] else "later+" for number, part in enumerate(parts)]


def _session_starts(events: list[float]) -> list[str]:
    """The part of each event with one test and one validation target; events after a target are later events."""
    starts = [number for number in range(1, len(events)) if events[number] - events[number - 1] >= GAP]
    parts = {number: part for number, part in zip(reversed(starts), ("test", "validation"), strict=False)}
    first = min(parts, default=len(events))
    return [parts.get(number, "train" if number < first else "later+") for number in range(len(events))]


def request_time() -> Canvas:
    """What the model knows of time under each of the three options."""
    c = Canvas(960, 400, "Request time: the order of events, their gaps, or also the gap to the request")
    events, request = [230.0, 330.0, 380.0, 560.0], 800.0
    c.text(30, 60, "What happened", weight="bold", ha="left")
    c.arrow([(200, 60), (930, 60)])
    for x in events:
        c.dot(x, 60, 7, fill=BLUE)
    c.text(events[-1], 36, "newest event", size=11, color=QUIET)
    c.dot(request, 60, 8, fill=PAPER, edge=ORANGE)
    c.text(request, 36, "request: what next?", size=11, color=ORANGE, weight="bold")
    c.text(930, 78, "time", size=11, color=QUIET, ha="right")
    rows = [
        ("none", "the order of the events", "No times. The log may have an order only."),
        ("last_event", "the gaps between events", "No time after the newest event."),
        ("target", "and the gap to the request", "A server knows the time of the request."),
    ]
    for number, (name, what, note) in enumerate(rows):
        y = 140 + 92 * number
        c.arrow([(20, y - 44), (940, y - 44)], color=RULE, head=False)
        c.text(30, y - 8, name, mono=True, weight="bold", ha="left")
        c.text(30, y + 14, what, size=11, color=QUIET, ha="left")
        at = [events[0] + 70 * step for step in range(4)] if name == "none" else events
        for x in at:
            c.dot(x, y - 8, 7, fill=BLUE)
        if name == "none":
            for step, x in enumerate(at):
                c.text(x, y + 14, str(step + 1), size=11, color=QUIET)
        else:
            end = [*at, request] if name == "target" else at
            for x, then in pairwise(end):
                color = ORANGE if then == request else BLUE
                c.arrow([(x + 9, y - 8), (then - 10, y - 8)], color=color)
                c.text((x + then) / 2, y + 14, _gap(then - x), size=11, color=color)
            if name == "target":
                c.dot(request, y - 8, 8, fill=PAPER, edge=ORANGE)
        if name != "target":
            c.text(930, y - 8, note, size=11, color=QUIET, ha="right")
        else:
            c.text(930, y + 36, note, size=11, color=QUIET, ha="right")
    return c


def _gap(pixels: float) -> str:
    return {100: "2 h", 50: "1 min", 180: "3 days", 240: "1 week"}[round(pixels)]


def repeats() -> Canvas:
    """Seen items are filtered, or may be recommended again."""
    c = Canvas(960, 300, "Repeats: seen items leave the candidates unless the data were prepared with repeats: keep")
    seen, catalogue = ["A", "C", "A", "F"], list("ABCDEFGH")
    c.text(30, 46, "History", weight="bold", ha="left")
    for number, item in enumerate(seen):
        c.box(250 + 62 * number, 28, 48, 36, item, fill=BLUE_TINT, edge=BLUE, ink=BLUE)
    c.text(520, 46, "the user had A twice, C and F", size=12, color=QUIET, ha="left")
    rows = [
        ("repeats: first", "one event per user and item;\nseen items are filtered", False, "films, articles, jobs"),
        ("repeats: keep", "all events are kept;\nseen items are candidates", True, "music, groceries, games"),
    ]
    for row, (option, what, keep, example) in enumerate(rows):
        y = 128 + 98 * row
        c.arrow([(20, y - 44), (940, y - 44)], color=RULE, head=False)
        c.text(30, y - 16, option, mono=True, weight="bold", ha="left")
        c.text(30, y + 16, what, size=11, color=QUIET, ha="left")
        for number, item in enumerate(catalogue):
            x = 250 + 62 * number
            out = item in seen and not keep
            again = item in seen and keep
            c.box(
                x,
                y - 22,
                48,
                40,
                item,
                fill=PAPER if out else GREEN_TINT if again else CARD,
                edge=RULE if out else GREEN if again else QUIET,
                dashed=out,
                ink=QUIET if out else GREEN if again else INK,
            )
            if out:
                c.arrow([(x + 8, y + 12), (x + 40, y - 16)], color=RED, head=False)
        c.text(930, y - 2, f"for {example}", size=11, color=QUIET, ha="right")
    return c


def cold_items() -> Canvas:
    """Which parts find an item without events."""
    c = Canvas(960, 372, "A cold item is found by the item tower and the signal Content, not by an item table")
    c.box(30, 120, 190, 120, fill=CARD, edge=QUIET)
    c.text(46, 142, "A cold item", weight="bold", ha="left")
    c.text(46, 186, "genre: drama\nyear: 2024\nprice: 12.5", size=12, ha="left")
    c.text(46, 226, "0 training events", size=12, color=RED, weight="bold", ha="left")
    rows = [
        ("ItemTable", "a vector for each id", "never trained: not retrieved", False),
        ("ItemTower", "id and features to a vector", "found by its features", True),
        ("Content", "a signal: items like the user's, by features", "a candidate", True),
    ]
    for row, (name, what, outcome, found) in enumerate(rows):
        y = 60 + 92 * row
        color = GREEN if found else RED
        c.arrow([(220, 180), (262, 180), (262, y + 26), (288, y + 26)], dashed=not found)
        c.box(290, y, 290, 52, name, what, fill=BLUE_TINT if row < 2 else ORANGE_TINT, edge=BLUE if row < 2 else ORANGE)
        c.text(592, y + 12, outcome, size=12, color=color, weight="bold", ha="left")
        c.arrow([(580, y + 26), (762 if found else 640, y + 26)], color=color, dashed=not found)
        if not found:
            c.text(652, y + 26, "×", size=18, color=color)
    c.box(764, 142, 176, 130, fill=ORANGE_TINT, edge=ORANGE)
    c.text(852, 164, "Ranker", weight="bold")
    c.text(852, 212, "its id is masked,\nits counts are hidden,\nits features remain", size=12, color=QUIET)
    c.text(852, 256, "cold_dropout: 0.05", size=11, color=ORANGE, mono=True)
    note = "cold_dropout treats some candidates as cold in training, so that the ranker learns to score such items."
    c.text(30, 334, note, size=12, color=QUIET, ha="left")
    c.text(290, 40, "What finds it?", size=12, color=QUIET, ha="left")
    return c


def results() -> Canvas:
    """NDCG@10 of this project and published numbers."""
    bars = {name: results_of(name) for name in ("ml-1m", "amazon-beauty")}
    rows = max(len(one) for one in bars.values())
    c = Canvas(
        960, 171 + 30 * rows, "NDCG@10 of this project and of published models, on MovieLens-1M and Amazon Beauty"
    )
    titles = {"ml-1m": "MovieLens-1M", "amazon-beauty": "Amazon Beauty"}
    for left, (name, found) in zip((24, 500), bars.items(), strict=True):
        c.text(left, 32, titles[name], size=15, weight="bold", ha="left")
        c.text(left + 366, 56, "NDCG@10", size=11, color=QUIET, ha="right")
        c.text(left + 430, 56, "HR@10", size=11, color=QUIET, ha="right")
        start, width = left + 176, 134
        longest = max(row["ndcg@10"] for row in found)
        for number, row in enumerate(found):
            y = 80 + 30 * number
            ours = row["source"] == "ours"
            stage = row["name"].partition(" + ")[0].partition(", ")[0].rstrip("*")
            color = {"ranker": ORANGE, "retriever": BLUE}.get(stage, QUIET)
            c.text(left + 168, y, row["name"], size=12, ha="right", weight="bold" if ours else "normal")
            fill = CARD if stage in ("markov", "popularity", "transition graph") else color
            c.box(start, y - 8, max(width * row["ndcg@10"] / longest, 2), 16, fill=fill, edge=color, radius=2)
            c.text(left + 366, y, f"{row['ndcg@10']:.4f}", size=12, ha="right", weight="bold" if ours else "normal")
            c.text(left + 430, y, f"{row['hr@10']:.4f}", size=12, ha="right", color=QUIET)
    y = 171 + 30 * rows - 81
    notes = [
        "Leave-one-out, all items ranked, seen items filtered. Bold: this project, test set, mean of three seeds "
        "(* one seed); the others are published.",
        "+ time: the model knows the time of the request. The rankers of three seeds also use a second retriever. "
        "Our copy of MovieLens-1M has",
        "10.3 % of its timestamps estimated, so its targets are not all those of the published numbers. "
        "Our copy of Amazon Beauty has no times.",
        "refit: trained again on all events before the test targets, with the options that validation chose.",
    ]
    for number, note in enumerate(notes):
        c.text(24, y + 19 * number, note, size=11, color=QUIET, ha="left")
    return c


def results_of(dataset: str) -> list[dict[str, Any]]:
    """Rows of the figure of results, best first: name, ndcg@10, hr@10, source."""
    published = json.loads((MEASURED / "published.json").read_text(encoding="utf-8"))
    rows = [{**row, "name": labelled(row)} for row in published if row["dataset"] == dataset]
    if dataset == "amazon-beauty":
        for folder, mark, models in (
            ("amazon-beauty", "", ("popularity", "markov", "retriever", "ranker")),
            ("amazon-beauty-refit", ", refit", ("transition_graph", "retriever", "ranker")),
        ):
            paths = sorted(MEASURED.glob(f"{folder}/*/report.json"))
            reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            for model in models:
                values = {
                    metric: float(np.mean([report["models"][model][metric]["value"] for report in reports]))
                    for metric in ("ndcg@10", "hr@10")
                }
                rows.append({"name": f"{model.replace('_', ' ')}{mark}", "source": "ours", **values})
    else:
        ours = json.loads((MEASURED / "ml-1m.json").read_text(encoding="utf-8"))
        rows += [{**row, "name": labelled(row), "source": "ours"} for row in ours]
    return sorted(rows, key=lambda row: -row["ndcg@10"])


def labelled(row: dict[str, Any]) -> str:
    time = " + time" if row.get("request_time") == "target" else ""
    return f"{row['name']}{time}{'*' if row.get('seeds') == 1 else ''}"


def by_gap(panels: Sequence[dict[str, Any]] | None = None) -> Canvas:
    """NDCG@10 of both stages by the time since the event before, a panel for each protocol.

    Args:
        panels: title and by_gap of each, as `benchmarks/results.py --json` writes them; None: the measured ones, by the
            names of their files.
    """
    if panels is None:
        panels = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(BY_GAP.glob("*.json"))]
    labels = [label for label in (EVERYTHING, *GROUPS) if any(label in panel["by_gap"] for panel in panels)]
    step = 30
    height = 92 + step * len(labels)
    rows = -(-len(panels) // 2)
    c = Canvas(
        960, 64 + height * rows, "NDCG@10 of both stages by the time since the event before, with 95 % intervals"
    )
    for number, panel in enumerate(panels):
        left, top = 20 + 475 * (number % 2), 16 + height * (number // 2)
        shown = {label: group for label, group in panel["by_gap"].items() if group["targets"] >= FEWEST}
        models = [one["ndcg@10"] for group in shown.values() for one in group["models"].values()]
        longest = max(one["high"] for one in models)
        start, width = left + 196, 236 if len(panels) > 1 else 680
        c.text(left, top + 16, panel["title"], weight="bold", ha="left")
        c.arrow([(start, top + 40), (start, top + 44 + step * len(labels))], color=RULE, head=False)
        for at, label in enumerate(labels):
            y = top + 56 + step * at
            group = panel["by_gap"].get(label)
            c.text(left, y, label, size=12, ha="left", color=INK if group else QUIET)
            c.text(start - 10, y, f"{group['targets']:,}" if group else "–", size=11, color=QUIET, ha="right")
            for offset, (name, color) in zip((-5, 5), (("retriever", BLUE), ("ranker", ORANGE)), strict=True):
                if label not in shown or name not in group["models"]:
                    continue
                one = group["models"][name]["ndcg@10"]
                low, value, high = (start + width * one[key] / longest for key in ("low", "value", "high"))
                c.arrow([(low, y + offset), (high, y + offset)], color=color, head=False)
                c.dot(value, y + offset, 4, fill=color)
        foot = top + 56 + step * len(labels)
        c.text(start, foot, "0", size=11, color=QUIET)
        c.text(start + width, foot, f"{longest:.2f}", size=11, color=QUIET)
    y = 16 + height * rows + 14
    c.dot(30, y, 5, fill=BLUE)
    c.text(42, y, "retriever", size=12, ha="left")
    c.dot(130, y, 5, fill=ORANGE)
    c.text(142, y, "both stages", size=12, ha="left")
    note = "NDCG@10, test; lines: 95 % intervals over users; next to the groups: targets, not drawn below 20."
    c.text(250, y, note, size=11, color=QUIET, ha="left")
    return c


FIGURES: dict[str, Callable[[], Canvas]] = {
    "flow": flow,
    "two_stages": two_stages,
    "split": split,
    "request_time": request_time,
    "repeats": repeats,
    "cold_items": cold_items,
    "results": results,
    **({"by_gap": by_gap} if any(BY_GAP.glob("*.json")) else {}),
}


def main(folder: Path = FOLDER) -> None:
    """Writes all figures."""
    folder.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
