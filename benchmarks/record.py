"""Copies the reports and manifests of finished runs to docs/measured, as evidence for published numbers.

    python benchmarks/record.py ml-1m runs/ml-1m-pair-seed0 runs/ml-1m-pair-seed1 runs/ml-1m-pair-seed2

Each run gets a folder in docs/measured/NAME with its report.json and a manifests.json: the command, options, hashes and
counts of every artifact of the run. Absolute paths are reduced to their last part. Refits get a NAME of their own:

    python benchmarks/record.py ml-1m-refit runs/ml-1m-pair-seed*/refit-all
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from tables import ROOT, commit

from recsys2stage.artifacts import locate_parent
from recsys2stage.columns import MANIFEST


def ancestors(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifests of an artifact and all its ancestors, by folder, oldest first."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifests: dict[str, dict[str, Any]] = {}
    for parent in manifest["parents"].values():
        source = locate_parent(folder, parent)
        manifests |= ancestors(source if source.is_dir() else source.parent)
    return manifests | {str(folder): manifest}


def shorten_paths(value: Any) -> Any:
    """Reduces absolute paths to their last part, also in commands."""
    if isinstance(value, dict):
        return {shorten_paths(key): shorten_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shorten_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    arguments = []
    for argument in value.split(" "):
        option, equals, path = argument.rpartition("=")
        arguments.append(f"{option}{equals}{Path(path).name}" if path.startswith("/") else argument)
    return " ".join(arguments)


def record(name: str, runs: list[Path], root: Path = ROOT) -> list[Path]:
    """Writes a folder for each run; returns their paths."""
    written = []
    for run in runs:
        report = run / "report.json"
        manifests = ancestors(run / "bundle")
        if not report.is_file() or not manifests:
            raise SystemExit(f"{run} has no report.json, or no bundle with its manifest; run make pipeline first")
        refitted = run.name.startswith("refit-")  # such as runs/ml-1m-seed0/refit-all
        folder = root / "docs/measured" / name / (run.parent if refitted else run).name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / report.name).write_bytes(report.read_bytes())
        facts = {"commit": commit(), "machine": platform.machine(), "artifacts": shorten_paths(manifests)}
        (folder / "manifests.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(folder)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the folder in docs/measured")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with report.json and bundle/")
    options = parser.parse_args()
    for folder in record(options.name, options.runs):
        print(folder)


if __name__ == "__main__":
    main()
