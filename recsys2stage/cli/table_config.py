"""The configs that `recsys init` writes for a table of one's own: configs/small with its columns filled in."""

from pathlib import Path

import yaml

from recsys2stage.data.raw_table import RawTable, events_per_user, look_into
from recsys2stage.data.recognise import OWN_TEXT, Events, Side, recognise_events, recognise_side
from recsys2stage.data.sources.questions import OPEN, QUESTIONS

NEEDS = ("times", "ratings", "item features", "user features")  # comments of signals in configs/small/mine.yaml
VALIDATION = 5  # most validation targets of a user
SHARE = 4  # at most one of this many events of a user is a validation target


class TableConfig:
    """What was recognized in the tables, as configs and as a summary.

    Args:
        events: events, or None if they are not known yet.
        items: item table, if any.
        users: user table, if any.
    """

    def __init__(self, events: Path | None, items: Path | None = None, users: Path | None = None) -> None:
        self.table = None if events is None else look_into(events)
        paths = {"items": items, "users": users}
        self.tables = {name: look_into(path) for name, path in paths.items() if path is not None}
        if self.table is None:
            self.events = Events(questions={name: QUESTIONS[name] for name in ("user", "item", "time")})
        else:
            self.events = recognise_events(self.table, self.tables.get("items"), self.tables.get("users"))
        own = {"items": ("item", self.events.item), "users": ("user", self.events.user)}
        self.sides = {name: recognise_side(table, *own[name]) for name, table in self.tables.items()}
        count = None
        if self.table is not None and self.events.user is not None:
            count = events_per_user(self.table, self.events.user)
        self.median = count
        self.val = VALIDATION if count is None else max(1, min(VALIDATION, int(count) // SHARE))

    @property
    def questions(self) -> list[str]:
        """Options that are left open."""
        path = [] if self.table is not None else ["path"]
        return [*path, *self.events.questions, *(f"{name}.id" for name, side in self.sides.items() if side.id is None)]

    @property
    def has(self) -> set[str]:
        """Those of NEEDS that the tables give."""
        times = self.events.time_unit != "order" or "time" in self.events.questions
        return {
            need
            for need, given in zip(
                NEEDS,
                (
                    times,
                    self.events.rating,
                    *(name in self.sides and self.sides[name].features for name in ("items", "users")),
                ),
                strict=True,
            )
            if given
        }

    def prepare(self, name: str) -> str:
        """The text of prepare.yaml."""
        path = OPEN if self.table is None else str(self.table.path.resolve())
        about = path if self.table is None else self.table.path.name
        lines = [
            f"# {about if self.table else 'A table of events'}, as recsys init recognized it."
            f"  recsys prepare-data --config configs/{name}/prepare.yaml",
            "source:",
            "  class_path: Table",
            "  init_args:",
        ]
        if self.table is None:
            lines.append(
                f"    # QUESTION: {QUESTIONS['path']} A CSV, TSV or Parquet file, a folder or glob of them, or a zip"
            )
        lines.append(f"    path: {scalar(path)}")
        if self.table is not None and self.table.separator != "," and self.table.path.suffix not in (".tsv", ".tab"):
            lines.append(f"    separator: {scalar(self.table.separator, always=True)}")
        for own in ("user", "item", "time"):
            lines += self._column(own)
        lines.append(f"    time_unit: {'iso' if 'time' in self.events.questions else self.events.time_unit}")
        if "time" in self.events.questions:
            lines[-1] += "  # or seconds, milliseconds, order"
        for own in ("rating", "action"):
            value = getattr(self.events, own)
            if value is not None:
                lines.append(f"    {own}: {scalar(value)}")
        for own, side in self.sides.items():
            lines += self._side(own, self.tables[own], side)
        if self.median is None:
            why = "five lists a user for the ranker; 1 for short histories"
        else:
            why = f"half of the users have at least {self.median:g} events; the last one of each user is for the test"
        return "\n".join(
            [
                *lines,
                f"output: data/{name}",
                f"split: {{class_path: LeaveOneOut, init_args: {{val: {self.val}}}}}  # {why}",
                "tie_break: file_order",
                "repeats: first  # of events with the same user and item; keep: all, and recommend seen items again",
                "on_bad_rows: error  # or quarantine: bad rows go to a file of their own",
                "",
            ]
        )

    def _column(self, own: str) -> list[str]:
        value, question, note = (getattr(self.events, own), self.events.questions.get(own), self.events.notes.get(own))
        if question is not None:
            return [f"    # QUESTION: {question}", f"    {own}: {OPEN}"]
        return [f"    {own}: {'null' if value is None else scalar(value)}{f'  # {note}' if note else ''}"]

    def _side(self, own: str, table: RawTable, side: Side) -> list[str]:
        lines = [f"    {own}:", f"      path: {scalar(str(table.path.resolve()))}"]
        if side.id is None:
            listed = ", ".join(table.columns)
            lines += [f"      # QUESTION: {QUESTIONS[f'{own}.id']} columns: {listed}", f"      id: {OPEN}"]
        else:
            lines.append(f"      id: {scalar(side.id)}")
        base = "," if self.table is None else self.table.separator
        if table.separator != base and table.path.suffix not in (".tsv", ".tab", ".parquet", ".pq"):
            lines.append(f"      separator: {scalar(table.separator, always=True)}")
        if side.title is not None:
            lines.append(f"      title: {scalar(side.title)}")
        elif own == "items":
            lines.append("      # title: COLUMN  # optional: the text that is shown with recommendations")
        if side.features:
            lines.append("      columns:")
        for column, (kind, separator) in side.features.items():
            split = "" if separator is None else f", separator: {scalar(separator, always=True)}"
            lines.append(f"        {scalar(column)}: {{kind: {kind}{split}}}")
        return lines + [f"      # {line}" for line in _not_used(own, side)]

    def mine(self, text: str) -> str:
        """mine.yaml of the starter, without the signals that need what the tables do not have."""
        lines = []
        for line in text.splitlines():
            need = line.rpartition("  # ")[2]
            missing = line.startswith("  - ") and need in NEEDS and need not in self.has
            lines.append(f"  # {line.strip()[2:].partition('  # ')[0]}: the data have no {need}" if missing else line)
        return "\n".join(lines) + "\n"

    def summary(self) -> list[str]:
        """A line for each column of ours: what was recognized, and what is open."""
        found = self.events
        lines = [f"  {own:<8}{self._said(own)}" for own in ("user", "item", "time", "rating", "action")]
        for own, side in self.sides.items():
            features = ", ".join(f"{column} ({kind})" for column, (kind, _) in side.features.items()) or "no features"
            title = f"; title {side.title}" if side.title else ""
            lines.append(f"  {own:<8}id {side.id or OPEN}{title}; {features}")
            lines += [f"          {line}" for line in _not_used(own, side)]
        used = {found.user, found.item, found.time, found.rating, found.action}
        if unused := [] if self.table is None else [column for column in self.table.columns if column not in used]:
            lines.append(f"  unused  {', '.join(unused)}")
        return lines

    def _said(self, own: str) -> str:
        value, note = getattr(self.events, own), self.events.notes.get(own)
        if own in self.events.questions:
            return f"{OPEN}  {self.events.questions[own]}"
        unit = f" ({self.events.time_unit})" if own == "time" and value is not None else ""
        return f"{value or '-'}{unit}{f'  {note}' if note else ''}"


def _not_used(own: str, side: Side) -> list[str]:
    """For each column that is no feature: why, and whether it may be the title."""
    lines = []
    for column, why in side.skipped.items():
        lines.append(f"{column} is not used as a feature: {why}")
        if why == OWN_TEXT and own == "items" and side.title is None:
            lines[-1] += f"; if it is the name of the item, write title: {scalar(column)}"
    return lines


def scalar(text: str, always: bool = False) -> str:
    """Text as a YAML scalar of one line, quoted where it must be, or always."""
    style = '"' if always else None
    return yaml.safe_dump(text, default_style=style, allow_unicode=True, width=2**31).removesuffix("...\n").strip()
