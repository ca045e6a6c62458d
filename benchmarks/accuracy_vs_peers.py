"""Accuracy against RecTools' SASRec and HSTU: same split, same CPU time, same definition of rank.

    python benchmarks/accuracy_vs_peers.py --install-peers runs/peers    # in a separate environment
    python benchmarks/accuracy_vs_peers.py --peers runs/peers            # measure all contestants
    python benchmarks/accuracy_vs_peers.py --show --bundle runs/ml-1m    # print only, with an earlier run

A second run measures only the missing rows. Each contestant trains alone in a process until it has used its CPU time,
including validation. The weights with the best validation NDCG@10 are tested: rank of each user's test target among
all items, seen items filtered, ties counted against the target. The input of a test request is the whole history
before the target, including the validation event, which is never trained on.

Ours is `recsys fit` and `recsys test` of the dataset's retriever config. A peer receives the same training events, the
first validation event of each user and the histories of the test requests, but no test targets. It writes user and
item vectors; the ranks are computed here. Its settings are those of RecTools' documentation:

ours                         the config as it is
ours, without times      without event and request times (configs/with/no-time.yaml)
ours, SASRec                 the encoder SASRec, without event and request times
RecTools SASRec              the defaults of its SASRecModel, with 200 events instead of 100
RecTools SASRec, width 64    with two heads of 32, for faster epochs
... our steps                with our batch size and learning rate: 32 and 2e-3 instead of 128 and 1e-3
RecTools HSTU                its HSTU tutorial for MovieLens-1M: width 50, 128 sampled negatives
RecTools HSTU, full softmax  with the loss of its SASRec

Request time `none`: the model uses only the order of the history. `target`: it also uses the times of the events and
of the request, which is the time of the target.

Differences by design: RecTools trains on a user's newest 201 events, ours on all. Items without training events are
unknown to RecTools and rank last (`unknown_targets`), as do the targets of users without known items (`unserved`).
Ours may stop early, as configured.
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
from exchange import export, ranks
from train import hardware, install

from recsys2stage.data.dataset import Dataset
from recsys2stage.metrics import compute_metrics

SCRIPT = Path(__file__).parent / "peers/rectools_vectors.py"
METRICS = ("hr@10", "ndcg@10", "recall@100")
SASREC = {"n_blocks": 2, "n_heads": 4, "n_factors": 256, "loss": "softmax"}
SHARED = {"session_max_len": 200, "dropout_rate": 0.2, "lr": 1e-3, "batch_size": 128}
OURS = {"lr": 2e-3, "batch_size": 32}  # of configs/ml-1m: four times the steps of an epoch
HSTU = {"n_blocks": 2, "n_heads": 1, "n_factors": 50, "loss": "sampled_softmax", "n_negatives": 128}
TIMES = {"relative_time_attention": True, "relative_pos_attention": True, "lightning_module_kwargs": {"logits_t": 0.05}}


class Contestant(NamedTuple):
    """A model to compare.

    Args:
        overlays: of ours: names in configs/with, on top of the dataset's retriever config.
        model: RecTools' SASRec or HSTU; None: ours.
        options: arguments of the RecTools model.
    """

    overlays: tuple[str, ...] = ()
    model: str | None = None
    options: dict[str, Any] = {}  # noqa: RUF012  NamedTuples are not changed

    @property
    def timed(self) -> bool:
        """Whether a RecTools model uses times."""
        return "relative_time_attention" in self.options


CONTESTANTS = {
    "ours": Contestant(),
    "ours, without times": Contestant(("no-time",)),
    "ours, SASRec": Contestant(("sasrec", "no-time")),
    "RecTools SASRec": Contestant(model="SASRec", options=SASREC | SHARED),
    "RecTools SASRec, width 64": Contestant(model="SASRec", options=SASREC | SHARED | {"n_factors": 64, "n_heads": 2}),
    "RecTools SASRec, width 64, our steps": Contestant(
        model="SASRec", options=SASREC | SHARED | {"n_factors": 64, "n_heads": 2} | OURS
    ),
    "RecTools HSTU": Contestant(model="HSTU", options=HSTU | SHARED | TIMES),
    "RecTools HSTU, our steps": Contestant(model="HSTU", options=HSTU | SHARED | TIMES | OURS),
    "RecTools HSTU, full softmax": Contestant(model="HSTU", options=HSTU | SHARED | TIMES | {"loss": "softmax"}),
}


def measure(label: str, dataset: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one contestant and returns its row."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in label)
    folder = tables.ROOT / "runs/tables/peers" / f"{options.data.name}-{slug}-{options.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    measured = (measure_peer if CONTESTANTS[label].model else measure_ours)(label, dataset, folder, options)
    return {
        "label": label,
        "seed": options.seed,
        "words": describe(label, dataset, options),
        "minutes": options.minutes,
        "threads": options.threads,
        **measured,
        "commit": tables.commit(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(""),
    }


def measure_peer(label: str, dataset: Dataset, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fits and tests one RecTools model."""
    python = options.peers / "bin/python"
    if not python.is_file():
        raise RuntimeError(f"{python} does not exist; first run {sys.argv[0]} --install-peers {options.peers}")
    contestant = CONTESTANTS[label]
    np.savez(folder / "events.npz", **export(dataset))  # type: ignore[arg-type]  # may not be `allow_pickle`
    job = {"model": contestant.model, "options": contestant.options, "folder": str(folder), "seed": options.seed}
    job |= {"minutes": options.minutes, "threads": options.threads}
    run([str(python), str(SCRIPT), json.dumps(job)], folder / "fit.log", options.threads)
    with np.load(folder / "vectors.npz") as file:
        vectors = dict(file)
    metrics = compute_metrics(ranks(dataset, vectors))
    users = dataset.users("test")
    missing = {
        "unserved": len(np.setdiff1d(users, vectors["users"])),
        "unknown_targets": int((~np.isin(dataset.targets(users, "test"), vectors["items"])).sum()),
    }
    used = json.loads((folder / "used.json").read_text())
    setting = {"told": f"request time: {'target' if contestant.timed else 'none'}"}
    return setting | used | {f"test_{name}": round(float(metrics[name].mean()), 4) for name in METRICS} | missing


def measure_ours(label: str, dataset: Dataset, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Fits and tests one of our models by `recsys fit` and `recsys test`."""
    recsys = str(Path(sys.executable).with_name("recsys"))
    overlays = [f"configs/with/{name}.yaml" for name in CONTESTANTS[label].overlays]
    arguments = [argument for config in (options.config, *overlays) for argument in ("--config", str(config))]
    arguments += [f"--data.init_args.path={dataset.path.resolve()}", "--output", str(folder / "retriever")]
    arguments += ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=1000"]  # CpuBudget ends it
    budget = ["--trainer.callbacks+=tables.CpuBudget", f"--trainer.callbacks.minutes={options.minutes}"]
    budget += [f"--trainer.callbacks.output={folder / 'used.json'}", f"--seed_everything={options.seed}"]
    logger = f"--trainer.logger={json.dumps(tables.csv_logger(folder))}"
    run([recsys, "fit", *arguments, *budget], folder / "fit.log", options.threads)
    run([recsys, "test", *arguments, logger], folder / "test.log", options.threads)
    fit = tables.read(folder / "retriever/log/version_0/metrics.csv")
    best = max((float(row["val/ndcg@10"]), int(row["epoch"])) for row in fit if row.get("val/ndcg@10"))
    test = tables.read(folder / "test/version_0/metrics.csv")[-1]
    metrics = {f"test_{name}": round(float(test[f"test/{name.replace('recall', 'hr')}"]), 4) for name in METRICS}
    versions = {name: version(name) for name in ("recsys2stage", "lightning", "torch", "numpy")}
    used = json.loads((folder / "used.json").read_text())
    data = yaml.safe_load((folder / "retriever/log/version_0/config.yaml").read_text())["data"]["init_args"]
    used |= {"told": f"request time: {data['request_time']}"}
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


def describe(label: str, dataset: Dataset, options: argparse.Namespace) -> str:
    """Describes what a row measures; if this has changed, the row is measured again."""
    contestant = CONTESTANTS[label]
    configured = contestant.options if contestant.model else [str(options.config), *contestant.overlays]
    settings = f"{options.minutes:g} CPU min, {options.threads} threads, split {dataset.manifest['split_hash'][:12]}"
    return f"{options.data.name}, {settings}: {contestant.model or 'recsys fit'} {json.dumps(configured)}"


def trained_before(folder: Path, dataset: Dataset) -> list[dict[str, Any]]:
    """Rows of an earlier run's report.json.

    Raises:
        FileNotFoundError: there is no report.json.
        ValueError: it has other targets, or is not in full ranking.
    """
    if not (folder / "report.json").is_file():
        raise FileNotFoundError(f"{folder}/report.json does not exist; run recsys evaluate, or give another --bundle")
    report = json.loads((folder / "report.json").read_text())
    protocol = report["protocol"]
    if protocol["split_hash"] != dataset.manifest["split_hash"] or protocol["evaluated"] != "test":
        raise ValueError(f"{folder}/report.json is not of the test targets of {dataset.path}; evaluate it on them")
    if not protocol["ranking"].startswith("full"):
        raise ValueError(f"{folder}/report.json is {protocol['ranking']}; evaluate it with protocol: full")
    setting = "request time: " + protocol["request_time"]
    return [
        {"label": f"ours, {folder}: {name}", "told": setting}
        | {f"test_{metric}": report["models"][name][metric]["value"] for metric in METRICS}
        for name in ("retriever", "ranker")
        if name in report["models"]
    ]


def show(rows: list[dict[str, Any]]) -> None:
    heads = ["model", "seed", "setting", "val NDCG@10", "HR@10", "NDCG@10", "Recall@100", "parameters", "epochs (best)"]
    print(f"\n| {' | '.join([*heads, 'CPU s'])} |\n|{'---|' * (len(heads) + 1)}")
    for row in rows:
        metrics = [f"{row[key]:.4f}" if key in row else "" for key in ["val_ndcg@10", *(f"test_{m}" for m in METRICS)]]
        cost = ["", "", ""]
        if "epochs" in row:
            cost = [f"{row['parameters']:,}", f"{row['epochs']:.1f} ({row['best_epoch']})", f"{row['cpu_seconds']:.0f}"]
        print(f"| {' | '.join([row['label'], str(row.get('seed', '')), row['told'], *metrics, *cost])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install-peers", type=Path, metavar="DIR", help="install RecTools and RePlay in DIR and exit")
    parser.add_argument(
        "--peers", type=Path, default=Path("runs/peers"), metavar="DIR", help="environment with RecTools"
    )
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"), help="prepared dataset")
    parser.add_argument(
        "--config", type=Path, help="config of our retriever; default: configs/NAME OF DATA/retriever.yaml"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="CPU time per contestant")
    parser.add_argument(
        "--only", nargs="+", choices=CONTESTANTS, metavar="NAME", help=f"contestants: {'; '.join(CONTESTANTS)}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bundle", type=Path, metavar="RUN", help="folder of an earlier run, to print its report")
    parser.add_argument("--rows", type=Path, default=tables.ROOT / "docs/measured/peers.jsonl", help="file of the rows")
    parser.add_argument("--show", action="store_true", help="print the measured rows only")
    options = parser.parse_args()
    if options.install_peers:
        install(options.install_peers)
        return
    options.config = options.config or Path("configs") / options.data.name / "retriever.yaml"
    options.peers = Path(os.path.abspath(options.peers))  # not resolved: bin/python is a symbolic link
    dataset = Dataset(options.data)
    wanted = options.only or list(CONTESTANTS)
    if not dataset.has_time and (timed := [label for label in wanted if CONTESTANTS[label].timed]):
        sys.exit(f"{options.data} has no event times, but {'; '.join(timed)} need them; choose others with --only")
    before = trained_before(options.bundle, dataset) if options.bundle else []
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    current = {label: describe(label, dataset, options) for label in CONTESTANTS}
    rows = [row for row in rows if current.get(row["label"]) == row["words"]]
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
