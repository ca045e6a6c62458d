"""Job and timing of every contestant; depends on torch only, so that it runs in every environment."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch


@dataclass(frozen=True)
class Job:
    """The model that a contestant trains, and the length of the measurement.

    Args:
        data: prepared dataset.
        loss: ours: a class of recsys2stage.retrieval.losses; RecTools: `softmax` or a number of sampled negatives.
        recompute_rows: ours: number of histories whose activations are kept at a time; None: all.
        bucketed: RePlay: whether the encoder splits a batch into buckets of similar length.
        width: size D of item vectors and states.
        heads: attention heads.
        layers: number of blocks.
        length: maximum history length L.
        batch: histories per batch.
        dropout: at every dropout of the library, including attention weights.
        seconds: minimum measured time; the last step is completed.
        steps: minimum number of measured steps.
        warmup: steps before the measurement, at least 1.
        threads: CPU threads.
        accelerator: cpu or gpu.
        precision: fp32, or bf16 for autocast.
        compile: whether our encoder uses torch.compile.
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
    def lightning_precision(self) -> Literal["32-true", "bf16-mixed"]:
        return "bf16-mixed" if self.precision == "bf16" else "32-true"


class Work(NamedTuple):
    """Work done in a training step."""

    events: torch.Tensor | int  # number of targets
    positions: int  # positions of the batch, including padding
    flops: float = 0.0  # of the model, forward and backward


def timed(epoch: Callable[[], Iterable[Any]], step: Callable[[Any], Work], job: Job) -> dict[str, float]:
    """Trains and measures after the warm-up, including data loading; `epoch` returns the batches of a new epoch."""
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
    """Totals of the steps: `rate` is targets per second, `real` the share of positions that are not padding."""
    events, positions = sum(int(work.events) for work in done), sum(work.positions for work in done)
    flops = sum(work.flops for work in done)
    return {
        "steps": len(done),
        "events": events,
        "seconds": seconds,
        "rate": events / seconds,
        "real": events / positions,
        "tflops": flops / seconds / 1e12,
    }


def endless(epoch: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    while True:
        yield from epoch()


def wait(device: torch.device) -> None:
    """Waits until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb() -> float:
    """Peak resident memory of this process in MiB; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compete(train: Callable[[Job], dict[str, Any]]) -> None:
    """Runs a contestant in this process: reads the job as JSON from argv[1], prints the result as JSON."""
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
