"""Speed of two versions of the package, as ratios in one run: a script runs with one, then the other, in turn.

    git worktree add ../before ba74d47
    python benchmarks/alternate.py --before ../before --rounds 5 requests benchmarks/speed/request_stages.py --users 200

The script prints one JSON object of numbers, name -> value, as its last line; everything else it prints is shown when
it fails. It runs in a process of its own with PYTHONPATH set to the version, one thread, and one core (--cores). The
median of each number is printed and appended to docs/measured/fast.jsonl with the commits, the command and the
processor. Run it on an idle machine.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs/measured/fast.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier version; without it, only this one runs")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each version")
    parser.add_argument("--cores", type=int, default=1, help="cores that each run may use, with as many threads")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("name", help="name of the row in docs/measured/fast.jsonl")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="script and its arguments")
    options = parser.parse_args()
    versions = {"before": options.before, "after": ROOT} if options.before else {"after": ROOT}
    runs: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
    for _ in range(options.rounds):
        for version, checkout in versions.items():
            runs[version].append(run(checkout.resolve(), options.script, options.cores))
    medians = {version: medians_of(results) for version, results in runs.items()}
    row: dict[str, Any] = {
        "name": options.name,
        "command": shlex.join(options.script),
        "date": date.today().isoformat(),
        "commits": {version: commit(checkout) for version, checkout in versions.items()},
        "processor": processor(),
        "cores": options.cores,
        "rounds": options.rounds,
        **medians,
    }
    if options.before:
        row["ratio"] = {
            name: medians["before"][name] / value
            for name, value in medians["after"].items()
            if value and name in medians["before"]
        }
    print("| | " + " | ".join([*medians, *(["ratio"] if "ratio" in row else [])]) + " |")
    print("|---" * (1 + len(medians) + ("ratio" in row)) + "|")
    for name in medians["after"]:
        cells = [f"{values[name]:.4g}" if name in values else "" for values in medians.values()]
        if "ratio" in row:
            cells.append(f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if not options.no_record:
        record(row)


def run(checkout: Path, script: list[str], cores: int) -> dict[str, float]:
    """Runs the script with the package of a checkout; returns the numbers that it prints."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    done = subprocess.run(
        [sys.executable, *script],
        env={**os.environ, **threads, "POLARS_MAX_THREADS": str(cores), "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(script)} failed with the package of {checkout}:\n{done.stdout}")
    numbers: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def medians_of(results: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number over the rounds."""
    return {name: median(result[name] for result in results) for name in results[0]}


def record(row: dict[str, Any]) -> None:
    """Appends a row; an older one of the same name is replaced."""
    rows = []
    if MEASURED.is_file():
        rows = [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]
    rows = [old for old in rows if old["name"] != row["name"]] + [row]
    MEASURED.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def commit(checkout: Path) -> str:
    """The checkout's commit, with a + if files of it have changed."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """The processor's name and the vector instructions that torch uses."""
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    name = names[0].partition(":")[2].strip() if names else "unknown"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
