"""A copy of the make rules and configs, with a stand-in for `recsys` that writes what each verb would, without work."""

import os
import shutil
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Prepared data hold the raw files and the config without its comments; every manifest is new, as its date is.
STAND_IN = """#!/usr/bin/env bash
echo "$@" >> calls.txt
verb=$1; output=; raw=; config=
while [ $# -gt 0 ]; do
    case $1 in --output) output=$2 ;; --source.path) raw=$2 ;; --config) config=$2 ;; esac; shift
done
new() { echo "$EPOCHREALTIME $RANDOM$RANDOM"; }
manifest() { new > "$output/manifest.json"; }
case $verb in
    simulate) mkdir -p "$output"; echo ratings > "$output/ratings.csv" ;;
    prepare-data)
        mkdir -p "$output"; touch inputs.txt
        grep -v '^#' "$config" > "$output/events.npy"
        { echo "$raw"; cat inputs.txt; } | while IFS= read -r path; do
            if [ -d "$path" ]; then cat "$path"/*; elif [ -e "$path" ]; then cat "$path"; fi
        done >> "$output/events.npy"
        { echo '{'; echo "  \\"created\\": \\"$(new)\\","; echo '  "inputs": ['
          sed 's/.*/    "&",/' inputs.txt; echo '  ],'; echo '  "counts": {}'; echo '}'; } > "$output/manifest.json" ;;
    recommend) new > "$output" ;;
    evaluate) touch "$output/report.md" "$output/ranks.parquet"; new > "$output/report.json" ;;
    fit) mkdir -p "$output"; echo "$config" > "$output/best.ckpt"; echo "$config" > "$output/last.ckpt"
         [ -e kill ] && exit 1; manifest ;;
    *) mkdir -p "$output"; manifest ;;
esac
"""
ALL = ["fit", "export-index", "mine-negatives", "fit", "export-bundle", "evaluate", "recommend"]
REFITTED = ["fit", "export-index", "export-bundle", "evaluate", "recommend"]


class Project:
    """A copy of the Makefile and the configs with the stand-in installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "configs", folder / "configs")
        for name in ("pyproject.toml", "constraints.txt", "raw.zip"):
            (folder / name).touch()
        recsys = folder / ".venv/bin/recsys"
        recsys.parent.mkdir(parents=True)
        recsys.write_text(STAND_IN)
        recsys.chmod(0o755)
        for path in folder.rglob("*"):
            os.utime(path, (1, 1))
        (folder / ".venv/ready").touch()

    def make(self, *words: str) -> list[str]:
        """The verbs make called, each with its options."""
        (self.folder / "calls.txt").write_text("")
        time.sleep(0.01)  # a later touch must have a later date
        done = subprocess.run(["make", *words], cwd=self.folder, capture_output=True, text=True)
        self.said = done.stdout + done.stderr
        return (self.folder / "calls.txt").read_text().splitlines()

    def change(self, name: str, text: str = "changed: 1\n") -> None:
        """Appends to a file."""
        with (self.folder / name).open("a") as file:
            file.write(text)


def verbs(calls: list[str]) -> list[str]:
    return [call.split()[0] for call in calls]
