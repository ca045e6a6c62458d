"""Comparison of retrievers at equal CPU time: encoders, transformer parts, losses, user features and tie breaks.

    python benchmarks/tables.py encoders        all encoders on ml-1m, request time none, last_event and target
    python benchmarks/tables.py parts           parts of a transformer on ml-latest-small, three seeds each
    python benchmarks/tables.py losses          all losses, their negatives and corrections on ml-1m
    python benchmarks/tables.py finalist        a TAAC 2025 finalist's parts on ml-latest-small, added one by one
    python benchmarks/tables.py users           user features and event inputs on ml-1m
    python benchmarks/tables.py ties            tie breaks for events of the same second, four epochs each
    python benchmarks/tables.py losses --show   print the table only

A second run measures only the missing rows. Each row is a `recsys fit` that ends when its process has used its CPU
time, or by early stopping, and a `recsys test` of its best checkpoint. Schedules follow the share of CPU time used. A
table without a CPU time (ties) fixes the number of epochs instead.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, LightningModule, Trainer

from recsys2stage.retrieval.retriever import Retriever

ROOT = Path(__file__).resolve().parent.parent
MODEL = "--model.init_args"


class Table(NamedTuple):
    """A table: for each row label, options on top of the dataset's retriever config and of `common`."""

    dataset: str
    minutes: float | None  # CPU time; None: the rows set their own end
    seeds: tuple[int, ...]
    rows: dict[str, list[str]]
    common: tuple[str, ...] = ()
    cohort: str | None = None  # cohorts of which each row also has the test NDCG@10

    def describe(self, label: str) -> str:
        """Describes what a row measures; if this has changed, the row is measured again."""
        budget = [] if self.minutes is None else [f"{self.minutes} min"]
        return " ".join([self.dataset, *budget, *self.rows[label], *self.common])


def overlays(*names: str) -> list[str]:
    return [argument for name in names for argument in ("--config", f"configs/with/{name}.yaml")]


def option(name: str, value: object) -> str:
    """A command-line option of the model; a class without arguments is given by its name."""
    return f"{MODEL}.{name}={value if isinstance(value, str) else json.dumps(value)}"


def part(**options: object) -> list[str]:
    """Command-line options of the encoder."""
    return [option(f"encoder.init_args.{name}", value) for name, value in options.items()]


def spec(name: str, **options: object) -> dict[str, object]:
    """A class with its arguments, as in YAML."""
    return {"class_path": name, "init_args": options}


def loss(name: str, **options: object) -> list[str]:
    return [option("loss", spec(name, **options))]


def inputs(*names: str) -> list[str]:
    return [option("inputs", list(names))]


def cumulative(parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Each row with the options of all rows before it."""
    options: list[str] = []
    return {label: (options := [*options, *more]) for label, more in parts.items()}


def with_request_time(name: object) -> list[str]:
    """A time encoding with request time."""
    return [*part(time=name), "--data.init_args.request_time=target"]


DOT = [option("similarity", "dot")]
MIXED = spec("Mixed", share=0.5)
UNIFORM = {per: spec("Uniform", count=256, per=per) for per in ("event", "sequence", "batch")}
FINALIST = spec("Mixed", alpha=0.75, share=0.5)
CURRICULUM = spec("Mixed", alpha=0.75, share=[[0, 0.5], [0.6, 0.25]])
FILTERS = {"same_sequence": True, "near": 0.99}
HARDER = [[0, None], [0.15, 2048], [0.3, 1024], [0.45, 512], [0.6, 256], [0.8, 128]]

TABLES = {
    "encoders": Table(
        dataset="ml-1m-plain",
        minutes=8,
        seeds=(0,),
        rows={
            "Transformer": [],
            "SASRec": overlays("sasrec"),
            "SASRec, original": overlays("sasrec-original"),
            "LiGR": overlays("ligr"),
            "BERT4Rec": overlays("bert4rec"),
            "Mamba4Rec": overlays("mamba4rec"),
            "HSTU": overlays("hstu", "no-time"),
            "FuXi": overlays("fuxi", "no-time"),
            "Transformer, time bias, last_event": overlays("log-buckets", "last-event"),
            "Transformer, time bias, target": overlays("log-buckets"),
            "HSTU, last_event": overlays("hstu", "last-event"),
            "HSTU, target": overlays("hstu"),
            "FuXi, last_event": overlays("fuxi", "last-event"),
            "FuXi, target": overlays("fuxi"),
        },
    ),
    "parts": Table(
        dataset="ml-latest-small",
        minutes=1,
        seeds=(0, 1, 2),
        common=(option("optimizer.init_args.lr", 2e-3),),  # the config's 1e-3 is too slow for one minute
        rows={
            "base: rotary, RMSNorm first, SwiGLU 4, serial, no time": [],
            "position: none": part(position="Position"),
            "position: learned": part(position="Learned"),
            "position: sinusoidal": part(position="Sinusoidal"),
            "position: rotary and learned": part(position=spec("Combined", parts=["Rotary", "Learned"])),
            "position: a bias for each distance": part(position="PerDistance"),
            "position: T5's buckets": part(position="T5Buckets"),
            "norm: LayerNorm": part(norm="LayerNorm"),
            "norm: after each branch": part(block="PostNorm"),
            "feed-forward: GELU": part(feed_forward="GELU"),
            "feed-forward: SwiGLU at GELU's parameters": part(feed_forward=spec("SwiGLU", equal_parameters=True)),
            "feed-forward: GeGLU": part(feed_forward="GeGLU"),
            "feed-forward: SwiGLU with biases": part(feed_forward=spec("SwiGLU", bias=True)),
            "feed-forward: SwiGLU 2": part(feed_forward=spec("SwiGLU", expansion=2.0)),
            "attention and feed-forward: parallel": part(block="Parallel"),
            "attention and feed-forward: gated": part(block="Gated"),
            "time: calendar of the event": [*part(time="Calendar")],
            "time: gap to the request": with_request_time("RequestGap"),
            "time: log buckets": with_request_time("LogBuckets"),
            "time: log-spaced to 30 days": with_request_time("LogSpaced"),
            "time: hybrid timestamp": with_request_time("HybridTimestamp"),
        },
    ),
    "losses": Table(
        dataset="ml-1m-plain",
        minutes=6,
        seeds=(0,),
        rows={
            "InfoNCE in batch, both corrected": loss("InfoNCE"),
            "InfoNCE in batch, both, q ~ count^.75": loss("InfoNCE", negatives=spec("InBatch", alpha=0.75)),
            "InfoNCE in batch, negatives corrected": loss("InfoNCE", correct="negatives"),
            "InfoNCE in batch, uncorrected": loss("InfoNCE", correct="none"),
            "InfoNCE in batch, uncorrected, dot": loss("InfoNCE", correct="none") + DOT,
            "InfoNCE mixed, both corrected": loss("InfoNCE", negatives=MIXED),
            "InfoNCE mixed, negatives corrected": loss("InfoNCE", negatives=MIXED, correct="negatives"),
            "InfoNCE mixed, uncorrected": loss("InfoNCE", negatives=MIXED, correct="none"),
            "DCL in batch, both corrected": loss("DCL"),
            "full softmax": loss("FullSoftmax"),
            "full softmax, dot": loss("FullSoftmax") + DOT,
            "sampled softmax, 256 for each event": loss("InfoNCE", negatives=UNIFORM["event"], correct="none"),
            "sampled softmax, 256 for each sequence": loss("InfoNCE", negatives=UNIFORM["sequence"], correct="none"),
            "sampled softmax, 256 for the batch": loss("InfoNCE", negatives=UNIFORM["batch"], correct="none"),
            "gBCE, 256 for each event, dot": loss("GBCE") + DOT,
            "BCE, 1 for each event, dot": loss("BCE") + DOT,
            "BPR, 1 for each event, dot": loss("BPR") + DOT,
            "MSE of ratings, 1 for each event, dot": loss("MSE") + DOT,
        },
    ),
}
TABLES["finalist"] = Table(
    dataset="ml-latest-small",
    minutes=1,
    seeds=(0, 1, 2),
    common=(option("optimizer.init_args.lr", 2e-3),),
    rows=cumulative(
        {
            "HSTU as the finalist's, in batch, uncorrected": [
                *overlays("hstu-taac", "no-time"),
                *loss("InfoNCE", correct="none"),
            ],
            "+ log q of targets and negatives, q ~ count^.75": loss(
                "InfoNCE", correct="both", negatives=spec("InBatch", alpha=0.75)
            ),
            "+ item tower": [option("items", "ItemTower")],
            "+ as many negatives from the catalogue": loss("InfoNCE", negatives=FINALIST),
            "+ without items of the window and items like the target": loss("InfoNCE", negatives=FINALIST, **FILTERS),
            "+ only the hardest, fewer and fewer": loss("InfoNCE", negatives=FINALIST, **FILTERS, hard=HARDER),
            "+ fewer from the catalogue, from .6 of the run": loss(
                "InfoNCE", negatives=CURRICULUM, **FILTERS, hard=HARDER
            ),
            "+ hour and weekday": part(time="Calendar"),
            "+ bias of log-spaced times, with request time": with_request_time(
                spec("Combined", parts=["LogSpaced", "Calendar"])
            ),
            "+ the target's action type": [*inputs("NextAction"), "--data.init_args.next_action=target"],
        }
    ),
)
TABLES["users"] = Table(
    dataset="ml-1m-plain",
    minutes=4,
    seeds=(0,),
    rows={
        "neither": [],
        "users: first token": [option("user", spec("UserTower", film=False))],
        "users: FiLM": [option("user", spec("UserTower", token=False))],
        "users: both": overlays("user-tower"),
        "items: tower": overlays("item-tower"),
        "events: ratings": overlays("event-ratings"),
        "the target's rating": [*inputs("NextAction"), "--data.init_args.next_action=target"],
        "ratings of events, and of the target": overlays("next-action"),
    },
)
TIE_BREAKS = {name: f"--data.init_args.path=data/ml-1m-{name}" for name in ("plain", "item_id", "hash")}
TABLES["ties"] = (
    Table(  # data/ml-1m-hash: prepare-data with --tie_break hash --output data/ml-1m-hash; same for item_id
        dataset="ml-1m-plain",
        minutes=None,
        seeds=(0,),
        common=("--trainer.max_epochs=4",),
        cohort="gap_to_request",
        rows={
            f"{name.replace('plain', 'file_order')}, {setting}": [*overlays(*names), data]
            for name, data in TIE_BREAKS.items()
            for setting, names in {"none": ["hstu", "no-time"], "target": ["hstu"]}.items()
        },
    )
)


class CpuBudget(Callback):
    """Ends a fit when its process has used its CPU time, scales schedules to that time, and writes the cost.

    Args:
        minutes: CPU time from the start of the fit; None: the fit ends by its own options.
        output: JSON file with parameters, CPU time, epochs and peak memory.
    """

    def __init__(self, minutes: float | None, output: str) -> None:
        self.minutes, self.output = minutes, Path(output)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        if self.minutes is None:
            return
        share = (time.process_time() - self.start) / (60 * self.minutes)
        if isinstance(module, Retriever):
            module.planned_steps = trainer.global_step / share
        if share > 1:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        used = time.process_time() - self.start
        steps = trainer.global_step / trainer.num_training_batches
        facts = {
            "parameters": sum(weight.numel() for weight in module.parameters()),
            "cpu_seconds": round(used, 1),
            "epochs": round(steps, 2),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        self.output.write_text(json.dumps(facts))


def measure(name: str, label: str, seed: int, table: Table) -> dict[str, Any]:
    """Fits and tests one row."""
    output = ROOT / "runs/tables" / name / f"{''.join(c if c.isalnum() else '-' for c in label)}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    arguments = ["--config", f"configs/{table.dataset}/retriever.yaml", *table.rows[label], *table.common]
    arguments += ["--output", str(output / "retriever"), "--trainer.enable_progress_bar=false"]
    budget = ["--trainer.callbacks+=tables.CpuBudget", f"--trainer.callbacks.minutes={json.dumps(table.minutes)}"]
    budget += [f"--trainer.callbacks.output={output / 'used.json'}"]
    recsys("fit", *arguments, f"--seed_everything={seed}", *budget, log=output / "fit.log")
    recsys("test", *arguments, f"--trainer.logger={json.dumps(csv_logger(output))}", log=output / "test.log")
    fit = read(output / "retriever/log/version_0/metrics.csv")
    best = max((float(row["val/ndcg@10"]), int(row["epoch"])) for row in fit if row.get("val/ndcg@10"))
    test = read(output / "test/version_0/metrics.csv")[-1]
    used = json.loads((output / "used.json").read_text())
    return {
        "label": label,
        "seed": seed,
        "words": table.describe(label),
        "commit": commit(),
        "minutes": table.minutes,
        "best_epoch": best[1] + 1,
        "val_ndcg@10": round(best[0], 4),
        "test_hr@10": round(float(test["test/hr@10"]), 4),
        "test_ndcg@10": round(float(test["test/ndcg@10"]), 4),
        **used,
        **({} if table.cohort is None else {"cohorts": cohorts(output, arguments, table.cohort)}),
    }


def cohorts(output: Path, arguments: list[str], cohort: str) -> dict[str, list[float]]:
    """Number of test users in each cohort, and the retriever's NDCG@10 on them."""
    data = next(option.partition("=")[2] for option in arguments if option.startswith("--data.init_args.path="))
    index = str(output / "index")
    retriever = str(output / "retriever/best.ckpt")
    exported = ["--retriever", retriever, "--data", data, "--output", index, "--measured=0"]
    recsys("export-index", *exported, log=output / "index.log")
    recsys("evaluate", "--bundle", index, "--data", data, "--output", str(output), log=output / "evaluate.log")
    groups = json.loads((output / "report.json").read_text(encoding="utf-8"))["cohorts"][cohort]
    return {label: [group["users"], round(group["retriever"]["ndcg@10"], 4)] for label, group in groups.items()}


def csv_logger(output: Path) -> dict[str, Any]:
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(output), "name": "test"}}


def recsys(*arguments: str, log: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    with log.open("w") as file:
        command = [str(Path(sys.executable).with_name("recsys")), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"recsys {arguments[0]} failed; see {log}")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    """The checked-out commit, with "-dirty" if tracked files outside docs/measured have changed."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!docs/measured")
    return git("describe", "--always") + ("-dirty" if changed else "")


def show(name: str, rows: list[dict[str, Any]]) -> None:
    table = TABLES[name]
    print("| model | val NDCG@10 | test HR@10 | test NDCG@10 | parameters | epochs (best) | CPU s an epoch | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for label in table.rows:
        own = sorted((row for row in rows if row["label"] == label), key=lambda row: row["seed"])
        if not own:
            continue

        def mean(key: str, digits: int = 4, own: list[dict[str, Any]] = own) -> str:
            each = [row[key] for row in own]
            spread = f" ± {(max(each) - min(each)) / 2:.{digits}f}" if len(each) > 1 else ""
            return f"{sum(each) / len(each):.{digits}f}{spread}"

        epochs = "; ".join(f"{row['epochs']:.1f} ({row['best_epoch']})" for row in own)
        pace = sum(row["cpu_seconds"] / row["epochs"] for row in own) / len(own)
        print(
            f"| {label} | {mean('val_ndcg@10')} | {mean('test_hr@10')} | {mean('test_ndcg@10')} "
            f"| {own[0]['parameters']:,} | {epochs} | {pace:.1f} | {max(row['peak_mb'] for row in own):,} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--workers", type=int, default=2, help="parallel fits, one thread each")
    parser.add_argument("--only", nargs="*", help="labels of the rows to measure; default: all")
    parser.add_argument("--show", action="store_true", help="print the measured rows only")
    options = parser.parse_args()
    name, table = options.table, TABLES[options.table]
    file = ROOT / f"docs/measured/{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    rows = [row for row in rows if row["label"] in table.rows and row["words"] == table.describe(row["label"])]
    done = {(row["label"], row["seed"]) for row in rows}
    wanted = [(label, seed) for seed in table.seeds for label in options.only or table.rows]
    missing = [] if options.show else [row for row in wanted if row not in done]

    def work(row: tuple[str, int]) -> None:
        try:
            measured = measure(name, *row, table)
        except RuntimeError as error:
            print(f"{row}: {error}", file=sys.stderr, flush=True)
            return
        rows.append(measured)
        with file.open("a") as out:
            out.write(json.dumps(measured) + "\n")
        print(json.dumps(measured), file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work, missing))
    show(name, rows)
    done = {(row["label"], row["seed"]) for row in rows}
    if left := [row for row in wanted if row not in done]:
        sys.exit(f"not measured: {'; '.join(f'{label}, seed {seed}' for label, seed in left)}")


if __name__ == "__main__":
    main()
