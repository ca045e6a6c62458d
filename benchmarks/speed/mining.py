"""CPU seconds and peak memory of mining and of evaluating, as one JSON object.

    python benchmarks/alternate.py --before ../before mining benchmarks/speed/mining.py --items 1000000 --users 5000

On a generated log, in which every item occurs and popularity follows a power law, and a retriever of random weights
(Transformer, two layers of width 64, cosine): how long they take does not depend on what is learned. The log and the
index are made once, in --folder, by the version that runs first. Each command runs in a process of its own.

mine       recsys mine-negatives with --signals, 200 candidates, 10 uniform and 10 popular negatives
evaluate   recsys evaluate of the first stage and both baselines, full ranking

With --data and --index an existing run is measured instead of the generated one.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

DIM, LAYERS, HEADS, LENGTH = 64, 2, 2, 50
EVENTS = 3  # per item, at least
SIGNALS = {
    "PopularityAsOf": {"candidates": 20},
    "Transitions": {"candidates": 60, "top": 64},
    "Neighbours": {"candidates": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000, help="size of the catalogue")
    parser.add_argument("--users", type=int, default=1_000, help="users to mine and to evaluate")
    parser.add_argument("--signals", nargs="*", choices=[*SIGNALS], default=["PopularityAsOf", "Transitions"])
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--only", choices=["mine", "evaluate"], default=None, help="one of both")
    parser.add_argument("--folder", type=Path, default=Path("runs/speed-mining"), help="of generated data and output")
    parser.add_argument("--data", type=Path, default=None, help="prepared dataset; with --index, instead of a new one")
    parser.add_argument("--index", type=Path, default=None, help="exported index")
    options = parser.parse_args()
    folder: Path = options.folder / str(options.items)
    data, index = options.data or folder / "data", options.index or folder / "index"
    if options.data is None and not (data / "manifest.json").is_file():
        generate(folder, options.items, options.users)
    if options.index is None and not (index / "manifest.json").is_file():
        export(folder, data, index)
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "mine.json"
    signals = [{"class_path": name, "init_args": SIGNALS[name]} for name in options.signals]
    config.write_text(json.dumps({"signals": signals}), encoding="utf-8")
    common = ("--data", data, "--users", options.users, "--batch_size", options.batch_size)
    commands = {
        "mine": ("mine-negatives", "--config", config, "--index", index, "--output", folder / "candidates"),
        "evaluate": ("evaluate", "--bundle", index, "--output", folder / "report", "--plots", "false"),
    }
    numbers: dict[str, float] = {}
    for name, words in commands.items():
        if options.only in (None, name):
            cpu, peak = measure(*words, *common)
            numbers |= {f"{name}_cpu_s": cpu, f"{name}_peak_mib": peak}
    print(json.dumps(numbers))


def generate(folder: Path, items: int, users: int) -> None:
    """Prepares a log of at least EVENTS events for each item and LENGTH events for each user."""
    from recsys2stage.data.prepare import prepare
    from recsys2stage.data.sources import Table

    random = np.random.default_rng(0)
    users = max(users, EVENTS * items // LENGTH)
    chosen = np.minimum(items * random.random(users * LENGTH) ** 3, items - 1).astype(np.int64)
    chosen[:items] = np.arange(items)  # every item occurs
    chosen = random.permutation(items)[random.permutation(chosen)]
    user = np.arange(users).repeat(LENGTH)
    time = 10**9 + 3_600 * np.tile(np.arange(LENGTH), users) + 86_400 * user % 10**7
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"user_id": user, "item_id": chosen, "timestamp": time}
    pl.DataFrame(columns).write_parquet(folder / "events.parquet")
    prepare(Table(folder / "events.parquet"), folder / "data")


def export(folder: Path, data: Path, index: Path) -> None:
    """Exports a retriever of random weights."""
    import torch

    from recsys2stage import __version__
    from recsys2stage.checkpoints import add_metadata
    from recsys2stage.cli.export import export_index
    from recsys2stage.data.dataset import Dataset
    from recsys2stage.retrieval.towers import TwoTower
    from recsys2stage.trust import arguments

    dataset = Dataset(data)
    torch.manual_seed(0)
    encoder = {"class_path": "Transformer", "init_args": {"layers": LAYERS, "heads": HEADS}}
    towers = {"num_items": dataset.num_items, "max_length": LENGTH, "dim": DIM, "encoder": encoder}
    weights = TwoTower(**arguments(TwoTower, towers, folder)).state_dict()
    checkpoint = {
        "hyper_parameters": {**towers, "request_time": "none", "next_action": "none", "actions": None},
        "state_dict": {f"towers.{name}": value for name, value in weights.items()},
    }
    add_metadata(checkpoint, dataset.manifest["split_hash"], __version__)
    torch.save(checkpoint, folder / "retriever.ckpt")
    export_index(folder / "retriever.ckpt", data, index, measured=0)


def measure(*words: object) -> tuple[float, float]:
    """CPU seconds and peak resident MiB of a command in a process of its own."""
    command = [sys.executable, "-m", "recsys2stage", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
