"""What every contestant is told and how it is timed: the same for all, and without anything but torch."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Job:
    """What a contestant trains, and for how long.

    Args:
        data: prepared dataset.
        loss: of ours a class of recsys2stage.retrieval.losses, of RecTools `softmax` or a number of sampled negatives.
        recompute_rows: of ours, how many histories at a time keep their activations; None: all.
        bucketed: whether the encoder of RePlay takes a batch in buckets of like length.
        width: of item vectors and states, D.
        heads: of attention.
        layers: blocks.
        length: longest history L.
        batch: histories in a batch.
        dropout: everywhere a library has dropout, attention weights included.
        seconds: of measuring; the step in which they end is finished.
        steps: that are measured at least.
        warmup: steps before measuring, at least 1.
        threads: of a CPU.
        accelerator: cpu or gpu.
        precision: fp32, or bf16 for autocast.
        compile: whether our encoder goes through torch.compile.
    """

    data: str
    width: int
    heads: int
    layers: int
    length: int
    batch: int
    dropout: float
    seconds: float
    warmup: int
    threads: int
    accelerator: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    loss: str = "softmax"
    bucketed: bool = False
    steps: int = 1
    recompute_rows: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.accelerator == "gpu" else "cpu")

    @property
    def lightning_precision(self) -> str:
        return {"fp32": "32-true", "bf16": "bf16-mixed"}[self.precision]


class Work(NamedTuple):
    """What a step did."""

    events: torch.Tensor | int  # targets trained on
    places: int  # of the batch, padding included
    flops: float = 0.0  # a model of this size needs, forward and backward


def timed(epoch: Callable[[], Iterable[Any]], step: Callable[[Any], Work], job: Job) -> dict[str, float]:
    """Trains, reading of batches included, and counts after the warm-up; `epoch` gives an epoch's batches anew."""
    done: list[Work] = []
    start = 0.0
    for number, batch in enumerate(endless(epoch)):
        done.append(step(batch))
        if number + 1 == job.warmup:
            wait(job.device)
            start = time.perf_counter()
            done.clear()
        elif number + 1 >= job.warmup + job.steps and time.perf_counter() - start >= job.seconds:
            break
    wait(job.device)
    return total(done, time.perf_counter() - start)


def total(done: list[Work], seconds: float) -> dict[str, float]:
    """What was done in so many seconds: targets a second, and which share of the places was no padding."""
    events, places = sum(int(work.events) for work in done), sum(work.places for work in done)
    flops = sum(work.flops for work in done)
    return {
        "steps": len(done),
        "events": events,
        "seconds": seconds,
        "rate": events / seconds,
        "real": events / places,
        "tflops": flops / seconds / 1e12,
    }


def endless(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from epoch()


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb() -> float:
    """Highest resident memory of this process so far; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compete(train: Callable[[Job], dict[str, Any]]) -> None:
    """Runs a contestant in this process: the job is JSON in the first argument, the result JSON on stdout."""
    imported = peak_mb()
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    result = train(job)
    result["peak_mb"] = peak_mb() - imported
    result["device"] = ""
    if job.device.type == "cuda":
        result["gpu_mb"], result["device"] = torch.cuda.max_memory_allocated() / 2**20, torch.cuda.get_device_name()
    print(json.dumps(result))
