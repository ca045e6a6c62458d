"""Accuracy against RecTools' SASRec and HSTU, on one split, at one budget of CPU time, under one definition of rank.

    python benchmarks/accuracy_vs_peers.py --install-peers runs/peers    # in an environment of its own
    python benchmarks/accuracy_vs_peers.py --peers runs/peers            # each contestant in turn
    python benchmarks/accuracy_vs_peers.py --show --bundle runs/ml-1m    # only print, beside a run made before

Run again, it goes on with the rows that are missing. Each contestant trains alone in a process of so many threads until
the process has used its CPU time, its validations included, and the weights with the best NDCG@10 on the validation
targets are tested: rank of each user's test target in the whole catalogue, known items filtered, ties counted against.
The input at test time is all that came before, the validation event included; it is never trained on.

Ours is `recsys fit` and `recsys test` of the dataset's own retriever config. A peer is given the same training events,
the first validation event of each user and the histories of the test requests, and no test target; it writes the
vectors that it ranks by, and the ranks are computed here. Its settings are those of RecTools' documentation:

ours                         the config, whatever it is told
ours, not told of times      the same without a clock (configs/with/no-time.yaml)
ours, SASRec                 the same with the encoder SASRec, without a clock
RecTools SASRec              the defaults of its SASRecModel, of 200 events instead of 100
RecTools SASRec, width 64    the same with two heads of 32, so that an epoch costs less
RecTools HSTU                its HSTU tutorial for MovieLens-1M: width 50, 128 sampled negatives
RecTools HSTU, full softmax  the same with the loss of its SASRec

`told` says what a model knows of times. `request time: none` is the order of the history alone; with `target` it also
knows when each event was and when the request comes, which is the target's own time.

What differs by design: RecTools trains on a user's newest 201 events, ours on all of them. An item without training
events is not known to RecTools and ranks last (`unknown_targets`); so does whatever a user without known items takes
(`unserved`). Ours may end before its time by the early stopping of its config.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tables
import yaml
from peers.exchange import export, ranks
from train import hardware, install

from recsys2stage.data.dataset import Dataset
from recsys2stage.metrics import compute_metrics

SCRIPT = Path(__file__).parent / "peers/rectools_vectors.py"
SHOWN = ("hr@10", "ndcg@10", "recall@100")
SASREC = {"n_blocks": 2, "n_heads": 4, "n_factors": 256, "loss": "softmax"}
SHARED = {"session_max_len": 200, "dropout_rate": 0.2, "lr": 1e-3, "batch_size": 128}
HSTU = {"n_blocks": 2, "n_heads": 1, "n_factors": 50, "loss": "sampled_softmax", "n_negatives": 128}
TIMES = {"relative_time_attention": True, "relative_pos_attention": True, "lightning_module_kwargs": {"logits_t": 0.05}}


class Contestant(NamedTuple):
    """Who takes part.

    Args:
        overlays: of ours, names of configs/with on top of the dataset's retriever config.
        model: of RecTools, SASRec or HSTU; None: ours.
        options: of that model.
    """

    overlays: tuple[str, ...] = ()
    model: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  NamedTuples are not changed

    @property
    def timed(self) -> bool:
        """Whether a peer is told of times."""
        return "relative_time_attention" in self.options


CONTESTANTS = {
    "ours": Contestant(),
    "ours, not told of times": Contestant(("no-time",)),
    "ours, SASRec": Contestant(("sasrec", "no-time")),
    "RecTools SASRec": Contestant(model="SASRec", options=SASREC | SHARED),
    "RecTools SASRec, width 64": Contestant(model="SASRec", options=SASREC | SHARED | {"n_factors": 64, "n_heads": 2}),
    "RecTools HSTU": Contestant(model="HSTU", options=HSTU | SHARED | TIMES),
    "RecTools HSTU, full softmax": Contestant(model="HSTU", options=HSTU | SHARED | TIMES | {"loss": "softmax"}),
}


def measure(label: str, dataset: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """A contestant's row."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in label)
    folder = tables.ROOT / "runs/tables/peers" / f"{options.data.name}-{slug}-{options.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = (measure_peer if CONTESTANTS[label].model else measure_ours)(label, dataset, folder, options)
    return {
        "label": label,
        "seed": options.seed,
        "words": words(label, dataset, options),
        "minutes": options.minutes,
        "threads": options.threads,
        **found,
        "commit": tables.commit(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(""),
    }


def measure_peer(label: str, dataset: Dataset, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One fit of a peer and its test."""
    python = options.peers / "bin/python"
    if not python.is_file():
        raise RuntimeError(f"{python} does not exist; first run {sys.argv[0]} --install-peers {options.peers}")
    contestant = CONTESTANTS[label]
    np.savez(folder / "events.npz", **export(dataset))
    job = {"model": contestant.model, "options": contestant.options, "folder": str(folder), "seed": options.seed}
    job |= {"minutes": options.minutes, "threads": options.threads}
    run([str(python), str(SCRIPT), json.dumps(job)], folder / "fit.log", options.threads)
    with np.load(folder / "vectors.npz") as file:
        vectors = dict(file)
    found = compute_metrics(ranks(dataset, vectors))
    users = dataset.users("test")
    last = {
        "unserved": len(np.setdiff1d(users, vectors["users"])),
        "unknown_targets": int((~np.isin(dataset.targets(users, "test"), vectors["items"])).sum()),
    }
    used = json.loads((folder / "used.json").read_text())
    told = {"told": f"request time: {'target' if contestant.timed else 'none'}"}
    return told | used | {f"test_{name}": round(float(found[name].mean()), 4) for name in SHOWN} | last


def measure_ours(label: str, dataset: Dataset, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One `recsys fit` and its `recsys test`."""
    recsys = str(Path(sys.executable).with_name("recsys"))
    overlays = [f"configs/with/{name}.yaml" for name in CONTESTANTS[label].overlays]
    words = [word for config in (options.config, *overlays) for word in ("--config", str(config))]
    words += [f"--data.init_args.path={dataset.path.resolve()}", "--output", str(folder / "retriever")]
    words += ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1000"]  # the budget ends it
    budget = ["--trainer.callbacks+=tables.CpuBudget", f"--trainer.callbacks.minutes={options.minutes}"]
    budget += [f"--trainer.callbacks.output={folder / 'used.json'}", f"--seed_everything={options.seed}"]
    logger = f"--trainer.logger={json.dumps(tables.csv_logger(folder))}"
    run([recsys, "fit", *words, *budget], folder / "fit.log", options.threads)
    run([recsys, "test", *words, logger], folder / "test.log", options.threads)
    fit = tables.read(folder / "retriever/log/version_0/metrics.csv")
    best = max((float(row["val/ndcg@10"]), int(row["epoch"])) for row in fit if row.get("val/ndcg@10"))
    test = tables.read(folder / "test/version_0/metrics.csv")[-1]
    metrics = {f"test_{name}": round(float(test[f"test/{name.replace('recall', 'hr')}"]), 4) for name in SHOWN}
    versions = {name: version(name) for name in ("recsys2stage", "lightning", "torch", "numpy")}
    used = json.loads((folder / "used.json").read_text())
    told = yaml.safe_load((folder / "retriever/log/version_0/config.yaml").read_text())["data"]["init_args"]
    used |= {"told": f"request time: {told['request_time']}"}
    return used | {"best_epoch": best[1] + 1, "val_ndcg@10": round(best[0], 4)} | metrics | {"versions": versions}


def run(command: list[str], log: Path, threads: int) -> None:
    environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment["PYTHONPATH"] = f"{tables.ROOT}:{Path(__file__).parent}"
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=tables.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ended with status {done.returncode}; see {log}")


def words(label: str, dataset: Dataset, options: argparse.Namespace) -> str:
    """What a row measures: a row whose words have changed is measured anew."""
    contestant = CONTESTANTS[label]
    what = contestant.options if contestant.model else [str(options.config), *contestant.overlays]
    settings = f"{options.minutes:g} CPU min, {options.threads} threads, split {dataset.manifest['split_hash'][:12]}"
    return f"{options.data.name}, {settings}: {contestant.model or 'recsys fit'} {json.dumps(what)}"


def trained_before(folder: Path, dataset: Dataset) -> list[dict[str, Any]]:
    """Rows of a run's report.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of other targets, or not in full ranking.
    """
    if not (folder / "report.json").is_file():
        raise FileNotFoundError(f"{folder}/report.json does not exist; run recsys evaluate, or name another --bundle")
    report = json.loads((folder / "report.json").read_text())
    protocol = report["protocol"]
    if protocol["split_hash"] != dataset.manifest["split_hash"] or protocol["evaluated"] != "test":
        raise ValueError(f"{folder}/report.json is not of the test targets of {dataset.path}; evaluate it on them")
    if not protocol["ranking"].startswith("full"):
        raise ValueError(f"{folder}/report.json is {protocol['ranking']}; evaluate it with protocol: full")
    told = "request time: " + protocol["request_time"]
    return [
        {"label": f"ours, {folder}: {name}", "told": told}
        | {f"test_{metric}": report["models"][name][metric]["value"] for metric in SHOWN}
        for name in ("retriever", "ranker")
        if name in report["models"]
    ]


def show(rows: list[dict[str, Any]]) -> None:
    heads = ["model", "seed", "told", "val NDCG@10", "HR@10", "NDCG@10", "Recall@100", "parameters", "epochs (best)"]
    print(f"\n| {' | '.join([*heads, 'CPU s'])} |\n|{'---|' * (len(heads) + 1)}")
    for row in rows:
        metrics = [f"{row[key]:.4f}" if key in row else "" for key in ["val_ndcg@10", *(f"test_{m}" for m in SHOWN)]]
        cost = ["", "", ""]
        if "epochs" in row:
            cost = [f"{row['parameters']:,}", f"{row['epochs']:.1f} ({row['best_epoch']})", f"{row['cpu_seconds']:.0f}"]
        print(f"| {' | '.join([row['label'], str(row.get('seed', '')), row['told'], *metrics, *cost])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install-peers", type=Path, metavar="DIR", help="install RecTools and RePlay there, and end")
    parser.add_argument("--peers", type=Path, default=Path("runs/peers"), metavar="DIR", help="where it is installed")
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"), help="prepared dataset")
    parser.add_argument("--config", type=Path, help="of our retriever; default: configs/NAME OF DATA/retriever.yaml")
    parser.add_argument("--minutes", type=float, default=30.0, help="of CPU time for each contestant")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"of {'; '.join(CONTESTANTS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bundle", type=Path, metavar="RUN", help="folder of a run made before, to print its report")
    parser.add_argument("--rows", type=Path, default=tables.ROOT / "docs/measured/peers.jsonl", help="where rows go")
    parser.add_argument("--show", action="store_true", help="print what has been measured, and measure nothing")
    options = parser.parse_args()
    if options.install_peers:
        install(options.install_peers)
        return
    options.config = options.config or Path("configs") / options.data.name / "retriever.yaml"
    options.peers = Path(os.path.abspath(options.peers))  # not resolved: bin/python is a link out of the environment
    dataset = Dataset(options.data)
    wanted = options.only or list(CONTESTANTS)
    if not dataset.has_time and (timed := [label for label in wanted if CONTESTANTS[label].timed]):
        sys.exit(f"{options.data} has an order and no times, but {'; '.join(timed)} read them; name others with --only")
    before = trained_before(options.bundle, dataset) if options.bundle else []
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    known = {label: words(label, dataset, options) for label in CONTESTANTS}
    rows = [row for row in rows if known.get(row["label"]) == row["words"]]
    done = {row["label"] for row in rows if row["seed"] == options.seed}
    failed = []
    for label in [] if options.show else [label for label in wanted if label not in done]:
        try:
            row = measure(label, dataset, options)
        except RuntimeError as error:
            print(f"{label}: {error}", file=sys.stderr, flush=True)
            failed.append(label)
            continue
        rows.append(row)
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        with options.rows.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    order = list(CONTESTANTS)
    show(sorted(rows, key=lambda row: (order.index(row["label"]), row["seed"])) + before)
    if failed:
        sys.exit(f"not measured: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
