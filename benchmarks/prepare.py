"""Time and memory of `recsys prepare-data` against a plain polars read, sort, map and save of the same ratings.csv.

    recsys simulate --size ml-20m --output data/raw/ml-20m-simulated
    python benchmarks/prepare.py --raw data/raw/ml-20m-simulated

The two run alternately in separate processes, so that peak memory is separate; the file is read once before, so that
it is in the page cache. Goal at 20 million rows: at most twice the time, 3 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl


def plain(raw: Path, output: Path) -> int:
    """Plain polars, as in a notebook."""
    events = pl.read_csv(raw / "ratings.csv").sort(["userId", "timestamp"], maintain_order=True)
    ids = events["movieId"].unique().sort()
    numbers = pl.DataFrame({"movieId": ids, "item": np.arange(1, len(ids) + 1, dtype=np.int32)})
    events = events.join(numbers, on="movieId", how="left", maintain_order="left")
    output.mkdir()
    for name in ("item", "timestamp", "rating"):
        np.save(output / f"{name}.npy", events[name].to_numpy())
    np.save(output / "offsets.npy", np.flatnonzero(np.diff(events["userId"].to_numpy(), prepend=-1)))
    return len(events)


def ours(raw: Path, output: Path) -> int:
    from recsys2stage.data.prepare import prepare
    from recsys2stage.data.sources import MovieLens

    return int(prepare(MovieLens(raw), output)["counts"]["events"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder with ratings.csv and movies.csv")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each")
    parser.add_argument("--contestant", choices=("plain", "ours"), help="run one in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.contestant:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            rows = {"plain": plain, "ours": ours}[arguments.contestant](arguments.raw, Path(folder) / "out")
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        print(json.dumps({"rows": rows, "seconds": seconds, "peak_gib": peak}))
        return
    with (arguments.raw / "ratings.csv").open("rb") as file:
        while file.read(1 << 24):
            pass
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for name in ("plain", "ours"):
            command = [sys.executable, __file__, "--raw", str(arguments.raw), "--contestant", name]
            run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"{name:6} {run['rows']:>12,} rows {run['seconds']:8.2f} s {run['peak_gib']:7.2f} GiB", flush=True)
            best[name] = min(best.get(name, run), run, key=lambda one: one["seconds"])
    ratio = best["ours"]["seconds"] / best["plain"]["seconds"]
    print(f"ours / plain, best of {arguments.rounds}: {ratio:.2f} x the time, {best['ours']['peak_gib']:.2f} GiB")


if __name__ == "__main__":
    main()
