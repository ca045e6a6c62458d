"""Speed of training and validation: against RecTools and RePlay, by encoder and by history length.

    python benchmarks/train.py --install-peers runs/peers    # RecTools and RePlay, in a separate environment
    python benchmarks/train.py --peers runs/peers --output runs/train.json

peers       Events per second of SASRec at the same width, depth, heads, batch size and dropout (including attention
            dropout). Events are targets; padding does not count. Each contestant trains in its own process with its
            library's data loader, training_step and optimizer in a plain loop; contestants alternate and warm-up is
            excluded. Our batches cover all lengths evenly; the others' all have one length, since they train on a
            user's newest `length` events only. `ours / it` is the median ratio over rounds.
encoders    Time of a training step of each encoder; encoders alternate on the same batches in one process.
lengths     The same on full-length histories, with the same number of events per batch at each length.
validation  A complete validation: every user's target ranked among all items.

Run it on an idle machine: two threads next to another busy process take several times as long.
With `--accelerator gpu` everything runs in bf16 autocast and our encoders use torch.compile. `of matrix rate` is the
model's rate of floating-point operations relative to that of one large matrix product in the same process: encoder and
logits (Training.work in peers/ours.py), forward and backward, without padding.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import venv
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).parent / "peers"
PEERS = ["rectools[torch]==0.19.*", "replay-rec[torch]==0.22.*"]
ALL_LENGTHS = 8  # number of our batches that cover all lengths
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours, full softmax": ("ours.py", {"loss": "FullSoftmax", "steps": ALL_LENGTHS}),
    "ours, 16 histories' activations at a time": (
        "ours.py",
        {"loss": "FullSoftmax", "steps": ALL_LENGTHS, "recompute_rows": 16},
    ),
    "RecTools, full softmax": ("rectools_sasrec.py", {"loss": "softmax"}),
    "RecTools, 256 negatives": ("rectools_sasrec.py", {"loss": "256"}),
    "RePlay, full softmax": ("replay_sasrec.py", {}),
    "RePlay, full softmax, in length buckets": ("replay_sasrec.py", {"bucketed": True}),
}
OURS = next(iter(CONTESTANTS))
SECTIONS = ("peers", "encoders", "lengths", "validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install-peers", type=Path, metavar="DIR", help="install RecTools and RePlay in DIR and exit")
    parser.add_argument(
        "--peers", type=Path, default=Path("runs/peers"), metavar="DIR", help="environment with the peers"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m-plain"), help="prepared dataset")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[64, 256], help="of section peers; others use the first"
    )
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128, help="histories per batch")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--loss", default="FullSoftmax", help="of all sections except peers")
    parser.add_argument("--encoders", nargs="+", default=[], help="of section encoders; default: all")
    parser.add_argument("--scaled", nargs="+", default=["Transformer", "HSTU", "Mamba4Rec"], help="of section lengths")
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 100, 200, 500, 1000])
    parser.add_argument("--events", type=int, default=12_800, help="events per batch of section lengths")
    parser.add_argument("--rounds", type=int, default=3, help="of section peers")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="measured time per contestant and round; half of it per length"
    )
    parser.add_argument("--warmup", type=int, help="warm-up steps; default: 1 on a CPU, 20 on a GPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    parser.add_argument("--output", type=Path, help="JSON with every run")
    options = parser.parse_args()
    if options.install_peers:
        install(options.install_peers)
        return
    gpu = options.accelerator == "gpu"
    options.warmup = options.warmup or (20 if gpu else 1)
    options.precision = options.precision or ("bf16" if gpu else "fp32")
    options.compile = gpu if options.compile is None else options.compile
    report = Report(options)
    for section in SECTIONS:
        if section in options.sections:
            {"peers": peers, "encoders": encoders, "lengths": lengths, "validation": validation}[section](report)
            report.save()
    print("\n" + "\n".join(f"{name}: {fact}" for name, fact in report.save().items()))


def install(folder: Path) -> None:
    """Creates an environment with the peers and the torch version of this one, so that no other is downloaded.

    Other versions of constraints.txt cannot be kept: RecTools needs numpy below 2, RePlay polars below 2.
    """
    venv.create(folder, with_pip=True)
    torch = f"torch=={version('torch')}"  # with its local version: 2.13.0+cpu stays without CUDA
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", torch, *PEERS], check=True)


@dataclass
class Report:
    """Runs contestants in processes, prints tables and collects all results."""

    options: argparse.Namespace
    runs: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def run(self, script: str, *arguments: str, **job: Any) -> dict[str, Any]:
        """Runs a contestant and returns its result; `job` overrides the options."""
        o = self.options
        shared = ("heads", "layers", "length", "batch", "dropout", "seconds", "warmup", "threads", "accelerator")
        job = {name: getattr(o, name) for name in shared} | {"data": str(o.data), "precision": o.precision} | job
        ours = script == "ours.py"
        python = Path(sys.executable) if ours else o.peers / "bin/python"
        if not python.is_file():
            sys.exit(f"{python} does not exist; first run {sys.argv[0]} --install-peers {o.peers}")
        environment = os.environ | {name: str(o.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        command = [str(python), str(FOLDER / script), json.dumps(job | {"compile": o.compile}), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stderr}\n{' '.join(command)} ended with status {done.returncode}; see its stderr above")
        result = json.loads(done.stdout.splitlines()[-1])
        self.versions |= {
            name: number for name, number in result["versions"].items() if ours or name not in self.versions
        }
        self.device = result["device"]
        self.runs.append({"script": script, "words": arguments, "job": job, **result})
        return result

    def table(self, title: str, rows: list[dict[str, str]]) -> None:
        """Prints rows as Markdown; the first column is text, the others numbers."""
        lines = [list(rows[0]), ["---"] + ["---:"] * (len(rows[0]) - 1), *(list(row.values()) for row in rows)]
        print(f"\n### {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines), flush=True)

    def save(self) -> dict[str, str]:
        """Writes the results so far; returns the facts of the measurement: versions, hardware, date and so on."""
        facts = {
            "commit": commit(),
            "command": " ".join([Path(sys.executable).name, *sys.argv]),
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            "hardware": hardware(self.device),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
        }
        if self.options.output:
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            self.options.output.write_text(json.dumps({**facts, "runs": self.runs}, indent=1))
        return facts


def peers(report: Report) -> None:
    for width in report.options.widths:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
        for number in range(report.options.rounds):
            for name, (script, job) in CONTESTANTS.items():
                section = ["peers"] if script == "ours.py" else []
                runs[name].append(report.run(script, *section, width=width, **job))
                rate = runs[name][-1]["rate"]
                print(f"width {width}, round {number + 1}: {name} {rate:,.0f} events/s", file=sys.stderr, flush=True)
        rows = []
        for name, done in runs.items():
            rates = [one["rate"] for one in done]
            ratios = [ours["rate"] / one["rate"] for ours, one in zip(runs[OURS], done, strict=True)]
            row = {
                "": name,
                "events/s": f"{median(rates):,.0f}",
                "least to most": f"{min(rates):,.0f} to {max(rates):,.0f}",
                "ours / it": f"{median(ratios):.2f}",
                "positions not padding": f"{100 * median(one['real'] for one in done):.0f} %",
                "peak MB above imports": f"{median(one['peak_mb'] for one in done):,.0f}",
            }
            if "gpu_mb" in done[0]:
                row["peak GPU MB"] = f"{median(one['gpu_mb'] for one in done):,.0f}"
            row["of matrix rate"] = share(done[0], done[0]["matrix_tflops"]) if name == OURS else ""
            rows.append(row)
        report.table(f"Peers, width {width}", rows)


def encoders(report: Report) -> None:
    o = report.options
    result = report.run("ours.py", "encoders", *o.encoders, width=o.widths[0], loss=o.loss, steps=ALL_LENGTHS)
    first = result["encoders"][0]["rate"]
    rows = [
        {
            "": one["encoder"],
            "parameters": f"{one['parameters']:,}",
            "ms per 1,000 events": f"{1e6 / one['rate']:.1f}",
            f"times {result['encoders'][0]['encoder']}": f"{first / one['rate']:.2f}",
            "events/s": f"{one['rate']:,.0f}",
            "of matrix rate": share(one, result["matrix_tflops"]),
        }
        for one in result["encoders"]
    ]
    report.table(f"Encoders, width {o.widths[0]}, {o.loss}", rows)


def lengths(report: Report) -> None:
    o, rows = report.options, [{"": name} for name in report.options.scaled]
    for length in o.lengths:
        size = {"length": length, "batch": max(1, o.events // length), "width": o.widths[0], "loss": o.loss}
        result = report.run("ours.py", "lengths", *o.scaled, **size, seconds=o.seconds / 2, steps=3)
        for row, one in zip(rows, result["encoders"], strict=True):
            row[f"{length}"] = f"{1e6 / one['rate']:.1f} ({share(one, result['matrix_tflops'])})"
    report.table(f"Milliseconds per 1,000 events by length (of matrix rate), width {o.widths[0]}, {o.loss}", rows)


def validation(report: Report) -> None:
    o = report.options
    one = report.run("ours.py", "validation", width=o.widths[0], loss=o.loss)
    row = {"users": f"{one['users']:,}", "seconds": f"{one['seconds']:.2f}"}
    report.table(f"Validation, width {o.widths[0]}", [row | {"users/s": f"{one['users'] / one['seconds']:,.0f}"}])


def share(one: dict[str, Any], matrix: float) -> str:
    return f"{100 * one['tflops'] / matrix:.0f} %"


def commit() -> str:
    """The checked-out commit, marked if files have changed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=, changed"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def hardware(device: str) -> str:
    cpus = Path("/proc/cpuinfo")
    models = [line for line in cpus.read_text().splitlines() if line.startswith("model name")] if cpus.is_file() else []
    model = models[0].split(":")[1].strip() if models else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{device and device + ', '}{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


if __name__ == "__main__":
    main()
