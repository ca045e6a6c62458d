"""Keeps what is needed to check a published number: the report and the manifests of finished runs.

    python benchmarks/record.py ml-1m runs/ml-1m-pair-seed0 runs/ml-1m-pair-seed1 runs/ml-1m-pair-seed2

Each run gets a folder in docs/measured/NAME with report.json as it is, and manifests.json: every artifact that the run
was made from, each with its command, options, hashes and counts. Absolute paths keep their last part only.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from tables import ROOT, commit

from recsys2stage.columns import MANIFEST


def ancestors(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifests of an artifact and of all artifacts it was made from, by folder, the oldest first."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    manifest = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for parent in manifest["parents"].values():
        place = Path(parent["path"])
        found |= ancestors(place if place.is_dir() else place.parent)
    return found | {str(folder): manifest}


def without_places(value: Any) -> Any:
    """Absolute paths, which say nothing elsewhere, by their last part; also as words of a command."""
    if isinstance(value, dict):
        return {without_places(key): without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if not isinstance(value, str):
        return value
    words = []
    for word in value.split(" "):
        option, equals, path = word.rpartition("=")
        words.append(f"{option}{equals}{Path(path).name}" if path.startswith("/") else word)
    return " ".join(words)


def record(name: str, runs: list[Path], root: Path = ROOT) -> list[Path]:
    """Writes the folders and gives their paths."""
    written = []
    for run in runs:
        report = run / "report.json"
        manifests = ancestors(run / "bundle")
        if not report.is_file() or not manifests:
            raise SystemExit(f"{run} has no report.json, or no bundle with its manifest; run make pipeline first")
        folder = root / "docs/measured" / name / run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / report.name).write_bytes(report.read_bytes())
        facts = {"commit": commit(), "machine": platform.machine(), "artifacts": without_places(manifests)}
        (folder / "manifests.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(folder)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the folder in docs/measured")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with report.json and bundle/")
    options = parser.parse_args()
    for folder in record(options.name, options.runs):
        print(folder)


if __name__ == "__main__":
    main()
