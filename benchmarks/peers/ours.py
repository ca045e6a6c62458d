"""recsys2stage itself: its own data module, and Retriever.training_step, optimiser and schedule in a plain loop."""

import inspect
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import Job, Work, compete, endless, timed, total, wait

from recsys2stage.retrieval import encoders, losses
from recsys2stage.retrieval.encoders import Encoder, EncoderFactory, SASRec, Transformer
from recsys2stage.retrieval.encoders.blocks import AttentiveEncoder
from recsys2stage.retrieval.encoders.layers import GELU
from recsys2stage.retrieval.encoders.times import LogBuckets
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.objectives import Cloze
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.shapes import History, Lengths

PUBLISHED_WITH_TIME = {"HSTU", "FuXi"}  # biases in log buckets
GOLDEN = (5**0.5 - 1) / 2


def peers(job: Job) -> dict[str, Any]:
    """The peers' own architecture: learned positions, pre-norm, a GELU of the width itself, no norm at the input."""
    encoder = partial(
        SASRec,
        layers=job.layers,
        heads=job.heads,
        dropout=job.dropout,
        input_norm=False,
        feed_forward=partial(GELU, expansion=1.0),
    )
    histories = Histories(Path(job.data), max_length=job.length, batch_size=job.batch)
    training = Training(job, encoder, histories.num_items)
    training.retriever.load_item_tables(histories.dataset)
    return timed(partial(spread, histories), training.step, job)


def compare(job: Job, names: list[str]) -> dict[str, Any]:
    """Encoders on the same batches of the dataset, which are read before."""
    histories = Histories(Path(job.data), max_length=job.length, batch_size=job.batch, request_time="target")
    trainings = {name: Training(job, factory(name, job), histories.num_items) for name in names or known()}
    for training in trainings.values():
        training.retriever.load_item_tables(histories.dataset)
    return {"encoders": in_turn(trainings, endless(partial(spread, histories)), job)}


def scale(job: Job, names: list[str]) -> dict[str, Any]:
    """Encoders on made-up histories, all of the full length."""
    num_items = Histories(Path(job.data)).num_items
    trainings = {name: Training(job, factory(name, job), num_items) for name in names}
    return {"encoders": in_turn(trainings, iter(lambda: full(job.batch, job.length, num_items), None), job)}


def validate(job: Job) -> dict[str, Any]:
    """All of a validation: every user's rank in the whole catalogue, and the metrics."""
    histories = Histories(Path(job.data), max_length=job.length, request_time="target")
    training = Training(job, factory("Transformer", job), histories.num_items)
    retriever, users = training.retriever.eval(), 0
    with torch.inference_mode(), autocast(job):
        for batch in islice(histories.val_dataloader(), job.warmup):
            retriever.validation_step(moved(batch, job.device), 0)
        retriever.val_metrics.take("")
        wait(job.device)
        start = time.perf_counter()
        for batch in histories.val_dataloader():
            retriever.validation_step(moved(batch, job.device), 0)
            users += len(batch.users)
        retriever.val_metrics.take("")
        wait(job.device)
    return {"users": users, "seconds": time.perf_counter() - start}


class Training:
    """A retriever on its device, with all that a step needs."""

    def __init__(self, job: Job, encoder: EncoderFactory, num_items: int) -> None:
        warnings.filterwarnings("ignore", ".*self.trainer. reference is not registered.*")  # nobody listens to its logs
        loss = getattr(losses, job.loss)()
        options = {"dim": job.width, "recompute_rows": job.recompute_rows, "compiled": job.compile}
        self.job, self.retriever = job, Retriever(num_items, job.length, encoder=encoder, loss=loss, **options)
        self.retriever.to(job.device).train()
        configured = self.retriever.configure_optimizers()
        self.optimizer, self.schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def step(self, window: History) -> Work:
        self.optimizer.zero_grad()
        with autocast(self.job):
            loss = self.retriever.training_step(moved(window, self.job.device), 0)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return self.work(window)

    def work(self, window: History) -> Work:
        """Targets, places, and the arithmetic of encoder and logits, padding left out."""
        encoder, objective, dim = self.retriever.towers.encoder, self.retriever.objective, self.job.width
        targets = (window.lengths - 1).clamp(min=0)
        lengths, asked = (window.lengths, objective.rate) if isinstance(objective, Cloze) else (targets, 1.0)
        columns = self.retriever.towers.items.num_items
        if isinstance(self.retriever.loss, losses.InfoNCE):  # one for each distinct answer
            columns = int(torch.bincount(window.items[:, 1:].flatten())[1:].count_nonzero())
        flops = encoder_flops(encoder, lengths, dim) + 6.0 * asked * int(lengths.sum()) * columns * dim
        return Work(int(targets.sum()), len(window.items) * (window.items.size(1) - encoder.causal), flops)


def encoder_flops(encoder: Encoder, lengths: Lengths, dim: int) -> float:
    """Of an encoder's forward and backward: 6 for each weight and place, 12 D for each layer and pair that attends.

    A multiplication and an addition are 2, backward is twice forward; attention is q·k and the mean of v. What biases,
    norms and recurrences add is not counted.
    """
    weights = sum(
        weight.numel()
        for name, weight in encoder.named_parameters()
        if weight.ndim > 1 and not name.startswith(("position.", "time."))
    )
    n = lengths.double()
    pairs = n * (n + 1) / 2 if encoder.causal else n * n
    attention = 12.0 * dim * encoder.layers * float(pairs.sum()) if isinstance(encoder, AttentiveEncoder) else 0.0
    return 6.0 * weights * float(n.sum()) + attention


def in_turn(trainings: dict[str, Training], windows: Iterable[History], job: Job) -> list[dict[str, Any]]:
    """Each window is trained on by one after the other, beginning with another each time; reading is not counted."""
    done: dict[str, list[Work]] = {name: [] for name in trainings}
    seconds = dict.fromkeys(trainings, 0.0)
    names = list(trainings)
    for number, window in enumerate(windows):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wait(job.device)
            start = time.perf_counter()
            work = trainings[name].step(window)
            wait(job.device)
            if number >= job.warmup:
                seconds[name] += time.perf_counter() - start
                done[name].append(work)
        if number + 1 >= job.warmup + job.steps and sum(seconds.values()) >= job.seconds * len(names):
            break
    parameters = {name: _size(training.retriever.towers.encoder) for name, training in trainings.items()}
    return [{"encoder": name, "parameters": parameters[name], **total(done[name], seconds[name])} for name in names]


def spread(histories: Histories) -> Iterator[History]:
    """An epoch's batches in an order in which the first few cover all lengths evenly, however few are taken."""
    loader = histories.train_dataloader()
    spans = histories.window_ends - histories.window_starts
    plan = sorted(loader.plan(), key=lambda batch: spans[batch].max())
    points = np.arange(1, len(plan) + 1) * GOLDEN % 1
    for place in np.argsort(np.argsort(points)):
        yield loader.read(plan[place])


def full(rows: int, length: int, num_items: int) -> History:
    """Windows of length + 1 random items, from a minute to a month apart."""
    gaps = torch.exp(torch.empty(rows, length + 1).uniform_(4.0, 15.0)).long()
    times = 10**9 + gaps.cumsum(1)
    asked = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
    items = torch.randint(1, num_items + 1, (rows, length + 1))
    return History(items, torch.full((rows,), length + 1), times, asked)


def factory(name: str, job: Job) -> EncoderFactory:
    """An encoder in its published form, but for the sizes and dropout that the job asks for."""
    if name not in known():
        sys.exit(f"there is no encoder {name!r}; there are {', '.join(known())}")
    kind = known()[name]
    options: dict[str, Any] = {"layers": job.layers, "dropout": job.dropout}
    if issubclass(kind, AttentiveEncoder):
        options["heads"] = job.heads
    if name in PUBLISHED_WITH_TIME:
        options["time"] = LogBuckets
    return partial(kind, **options)


def known() -> dict[str, type[Encoder]]:
    """Every encoder of the package, the Transformer first."""
    found = {
        name: kind
        for name, kind in vars(encoders).items()
        if inspect.isclass(kind) and issubclass(kind, Encoder) and not inspect.isabstract(kind)
    }
    return {"Transformer": Transformer, **found}


def matrix_tflops(job: Job) -> float:
    """How many floating-point operations a second a large product of matrices reaches here, in 10^12."""
    size, kind = (8192, torch.bfloat16) if job.device.type == "cuda" else (2048, torch.float32)
    if job.precision == "fp32":
        kind = torch.float32
    left, right = (torch.randn(size, size, device=job.device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(10):
        wait(job.device)
        start = time.perf_counter()
        left @ right
        wait(job.device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12


def autocast(job: Job) -> torch.autocast:
    return torch.autocast(job.device.type, torch.bfloat16, enabled=job.precision == "bf16")


def moved(batch: Any, device: torch.device) -> Any:
    """The same named tuple, and the tuples in it, on a device."""
    if batch is None or isinstance(batch, torch.Tensor):
        return None if batch is None else batch.to(device)
    parts = [moved(part, device) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def _size(encoder: Encoder) -> int:
    return sum(weight.numel() for weight in encoder.parameters())


def run(job: Job) -> dict[str, Any]:
    section, *names = sys.argv[2:]
    sections = {"peers": peers, "validation": validate}
    sections |= {"encoders": partial(compare, names=names), "lengths": partial(scale, names=names)}
    return {
        **sections[section](job),
        "matrix_tflops": matrix_tflops(job),
        "versions": {name: version(name) for name in ("recsys2stage", "lightning", "torch", "numpy")},
    }


if __name__ == "__main__":
    compete(run)
