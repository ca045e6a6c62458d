"""Time and peak memory of every stage on simulated data of the size of MovieLens-20M.

    .venv/bin/python benchmarks/full_size.py --folder runs/full-size

Each stage runs in its own process. Training is limited to 200 steps per stage (retriever batches of 32, not 128),
mining and recommending to 5,000 users, evaluation to 10,000: this tests that each stage fits the machine, not model
quality. Stages with an existing result are skipped; rows are kept in FOLDER/rows.json and printed as a table.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEPS, MINED, EVALUATED = 200, 5_000, 10_000


def stages(folder: Path) -> list[tuple[str, Path, str]]:
    """Name, result file and command of each stage."""
    raw, data, run = folder / "raw", folder / "data", folder / "run"
    fit = f"--trainer.max_steps {STEPS} --trainer.limit_val_batches 8 --trainer.enable_progress_bar false"
    return [
        ("simulate", raw / "ratings.csv", f"simulate --size ml-20m --output {raw}"),
        (
            "prepare-data",
            data / "manifest.json",
            f"prepare-data --config configs/ml-20m/prepare.yaml --source.path {raw} --output {data}",
        ),
        (
            f"fit retriever, {STEPS} steps",
            run / "retriever/manifest.json",
            f"fit --config configs/ml-20m/retriever.yaml --data.init_args.path {data} --output {run}/retriever {fit} "
            "--data.init_args.batch_size 32",  # the configured 128 would take four times as long
        ),
        (
            "export-index",
            run / "index/manifest.json",
            f"export-index --retriever {run}/retriever/best.ckpt --data {data} --output {run}/index",
        ),
        (
            f"mine-negatives, {MINED:,} users",
            run / "candidates/manifest.json",
            f"mine-negatives --config configs/ml-20m/mine.yaml --data {data} --index {run}/index "
            f"--output {run}/candidates --users {MINED}",
        ),
        (
            f"fit ranker, {STEPS} steps",
            run / "ranker/manifest.json",
            f"fit --config configs/ml-20m/ranker.yaml --data.init_args.path {run}/candidates "
            f"--output {run}/ranker {fit}",
        ),
        (
            "export-bundle",
            run / "bundle/manifest.json",
            f"export-bundle --index {run}/index --ranker {run}/ranker/best.ckpt --output {run}/bundle",
        ),
        (
            f"evaluate, {EVALUATED:,} users",
            run / "report.json",
            f"evaluate --bundle {run}/bundle --output {run} --users {EVALUATED}",
        ),
        (
            f"recommend, {MINED:,} users",
            run / "recommendations.parquet",
            f"recommend --bundle {run}/bundle --output {run}/recommendations.parquet --users {folder}/users.txt",
        ),
    ]


def measure(options: str) -> dict[str, float]:
    """Runs a `recsys` command in its own process; returns seconds and peak resident MB."""
    start = time.monotonic()
    recsys = Path(sys.executable).with_name("recsys")
    process = subprocess.Popen([recsys, *options.split()], stdout=subprocess.DEVNULL, stderr=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"recsys {options} ended with status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/full-size"), help="output folder")
    parser.add_argument("--until", type=int, default=None, help="only the first stages, this many")
    folder, until = vars(parser.parse_args()).values()
    folder.mkdir(parents=True, exist_ok=True)
    rows_file = folder / "rows.json"
    rows = json.loads(rows_file.read_text()) if rows_file.is_file() else {}
    (folder / "users.txt").write_text("\n".join(map(str, range(1, MINED + 1))))
    for name, result, options in stages(folder)[:until]:
        if not (result.is_file() and name in rows):
            rows[name] = measure(options)
            rows_file.write_text(json.dumps(rows, indent=2))
        print(f"| {name} | {rows[name]['seconds']:,} s | {rows[name]['peak_mb']:,} MB |", flush=True)


if __name__ == "__main__":
    main()
