"""Appends a row of docs/measured/fast.jsonl from what `benchmarks/serve.py --output` wrote for one or two versions.

    python benchmarks/record_serve.py "serve, raw histories" --before before.json --after after.json \\
        --command "benchmarks/serve.py --workers 2 --bundle runs/ml-1m/bundle --data data/ml-1m"

A row of the same name is replaced, except for `before`, which stays where none is given.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from alternate import MEASURED, processor, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the row")
    parser.add_argument("--before", type=Path, help="JSON file of the earlier version")
    parser.add_argument("--before-commit", help="commit of the earlier version, where serve.py is of another checkout")
    parser.add_argument("--after", type=Path, required=True, help="JSON file of this version")
    parser.add_argument("--command", required=True, help="the command as typed, without its output")
    options = parser.parse_args()
    after = read(options.after)
    row: dict[str, Any] = {
        "name": options.name,
        "command": options.command,
        "date": date.today().isoformat(),
        "commits": {"after": after["commit"]},
        "processor": processor(),
        "cores": after["cores"],
        "rounds": 1,
    }
    rows = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]
    earlier: dict[str, Any] = next((old for old in rows if old["name"] == options.name), {})
    if options.before:
        before = read(options.before)
        row["commits"] = {"before": options.before_commit or before["commit"], **row["commits"]}
        row["before"] = summary(before)
    elif "before" in earlier:
        row["commits"] = {"before": earlier["commits"]["before"], **row["commits"]}
        row["before"] = earlier["before"]
    row["after"] = summary(after)
    record(row)


def read(path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    facts["commit"] = facts["commit"].replace("-dirty", "+")  # as alternate.py writes it
    return facts


def summary(facts: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of a run."""
    loads = {}
    for load in facts["loads"]:
        kept = {name: round(load[name], 2) for name in ("rate", "p50_ms", "p95_ms", "p99_ms", "cpu_ms", "batch")}
        kept["stages_ms"] = {stage: round(value, 2) for stage, value in load["stages_ms"].items()}
        if load.get("added_ms") is not None:
            kept["added_ms"] = round(load["added_ms"], 2)
        loads[load["load"]] = kept
    return {
        "saturation": round(facts["saturation"], 1),
        "memory_mib": round(facts["memory_mib_after"]),
        "loads": loads,
    }


if __name__ == "__main__":
    main()
