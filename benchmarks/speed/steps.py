"""CPU time and memory of a training step of the first stage at several catalogue sizes, of whole tables and by rows.

    python benchmarks/alternate.py --before ../before steps benchmarks/speed/steps.py

Prints milliseconds of CPU time per step, by phase, and the peak of memory above that of the imports. The histories are
the same at all sizes: their items are spread over the catalogue. A version without row-wise optimizers runs RecsysAdamW
only. Each case runs in a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from recsys2stage import optim
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.losses import InBatch, InfoNCE, Negatives, Uniform
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.shapes import History

OPTIMIZERS = [name for name in ("RecsysAdamW", "SparseAdamW", "RowwiseAdagrad") if hasattr(optim, name)]
NEGATIVES: dict[str, Callable[[], Negatives]] = {
    "in-batch": partial(InBatch),
    "256 per sequence": partial(Uniform, 256, per="sequence"),
    "256 per target": partial(Uniform, 256, per="event"),
}
DISTINCT = 10_000  # items of the histories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="catalogue sizes")
    parser.add_argument("--negatives", nargs="+", choices=NEGATIVES, default=["in-batch", "256 per sequence"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--batch", type=int, default=32, help="histories per batch")
    parser.add_argument("--length", type=int, default=100, help="events per history")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7, help="measured steps, after two others")
    options = parser.parse_args()
    numbers: dict[str, float] = {}
    for optimizer in options.optimizers:
        for negatives in options.negatives:
            for items in options.items:
                # forked, as each import of torch takes seconds
                with multiprocessing.get_context("fork").Pool(1) as process:
                    found = process.apply(measure, (optimizer, negatives, items, options))
                numbers |= {
                    f"{optimizer}, {negatives}, {items:,} items: {name}": value for name, value in found.items()
                }
    print(json.dumps(numbers))


def measure(optimizer: str, negatives: str, items: int, options: argparse.Namespace) -> dict[str, float]:
    """Medians over steps in milliseconds of CPU time, and the peak of memory in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Retriever(
        items,
        options.length,
        dim=options.dim,
        encoder=partial(Transformer, layers=options.layers),
        loss=InfoNCE(negatives=NEGATIVES[negatives]()),
        optimizer=getattr(optim, optimizer),
    )
    steps: Any = model.configure_optimizers()["optimizer"]
    numbers = torch.randint(DISTINCT, (options.batch, options.length + 1)) * (items // DISTINCT) + 1
    lengths = torch.full((options.batch,), options.length + 1)
    window = History(numbers, lengths, torch.arange(numbers.numel()).view_as(numbers), None)
    times: dict[str, list[float]] = {"forward and backward": [], "optimizer": [], "step": []}
    for _ in range(2 + options.steps):
        began = time.process_time()
        steps.zero_grad()
        model.losses(window)["loss"].backward()
        between = time.process_time()
        model.on_before_optimizer_step(steps)
        steps.step()
        ended = time.process_time()
        for name, seconds in zip(times, (between - began, ended - between, ended - began), strict=True):
            times[name].append(1000 * seconds)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {f"{name}, ms": median(values[2:]) for name, values in times.items()} | {"memory, MB": memory}


if __name__ == "__main__":
    main()
