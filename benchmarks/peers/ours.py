"""Contestant recsys2stage: its data module, and training_step, optimizer and schedule of Retriever in a plain loop."""

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

PUBLISHED_WITH_TIME = {"HSTU", "FuXi"}  # their time bias in log buckets
GOLDEN_RATIO = (5**0.5 - 1) / 2


def peers(job: Job) -> dict[str, Any]:
    """SASRec as in the peers: learned positions, pre-norm, GELU with expansion 1, no norm at the input."""
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
    """Times encoders on the same batches of the dataset, without data loading."""
    histories = Histories(Path(job.data), max_length=job.length, batch_size=job.batch, request_time="target")
    trainings = {name: Training(job, factory(name, job), histories.num_items) for name in names or all_encoders()}
    for training in trainings.values():
        training.retriever.load_item_tables(histories.dataset)
    return {"encoders": in_turn(trainings, endless(partial(spread, histories)), job)}


def scale(job: Job, names: list[str]) -> dict[str, Any]:
    """Times encoders on random histories of full length."""
    num_items = Histories(Path(job.data)).num_items
    trainings = {name: Training(job, factory(name, job), num_items) for name in names}
    return {"encoders": in_turn(trainings, iter(lambda: full(job.batch, job.length, num_items), None), job)}


def validate(job: Job) -> dict[str, Any]:
    """Times a complete validation: ranks among all items, and the metrics."""
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
    """A retriever on its device, with optimizer and schedule."""

    def __init__(self, job: Job, encoder: EncoderFactory, num_items: int) -> None:
        warnings.filterwarnings("ignore", ".*self.trainer. reference is not registered.*")  # no trainer
        loss = getattr(losses, job.loss)()
        self.job, self.retriever = (
            job,
            Retriever(
                num_items,
                job.length,
                dim=job.width,
                encoder=encoder,
                loss=loss,
                recompute_rows=job.recompute_rows,
                compiled=job.compile,
            ),
        )
        self.retriever.to(job.device).train()
        configured: Any = self.retriever.configure_optimizers()
        self.optimizer, self.schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def step(self, window: History) -> Work:
        self.optimizer.zero_grad()
        with autocast(self.job):
            loss = self.retriever.training_step(moved(window, self.job.device), 0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch: no types
        self.optimizer.step()
        self.schedule.step()
        return self.work(window)

    def work(self, window: History) -> Work:
        """Targets, positions, and the floating-point operations of encoder and logits without padding."""
        encoder, objective, dim = self.retriever.towers.encoder, self.retriever.objective, self.job.width
        targets = (window.lengths - 1).clamp(min=0)
        lengths, target_share = (window.lengths, objective.rate) if isinstance(objective, Cloze) else (targets, 1.0)
        columns = self.retriever.towers.items.num_items
        if isinstance(self.retriever.loss, losses.InfoNCE):  # one per distinct target
            columns = int(torch.bincount(window.items[:, 1:].flatten())[1:].count_nonzero())
        flops = encoder_flops(encoder, lengths, dim) + 6.0 * target_share * int(lengths.sum()) * columns * dim
        return Work(int(targets.sum()), len(window.items) * (window.items.size(1) - encoder.causal), flops)


def encoder_flops(encoder: Encoder, lengths: Lengths, dim: int) -> float:
    """FLOPs of an encoder, forward and backward: 6 per weight and position, 12 D per layer and attending pair.

    Multiply-add is 2, backward is twice forward; attention is q·k and the weighted mean of v. Biases, norms and
    recurrences are not counted.
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
    """Trains all models on each window, in rotating order; data loading is not timed."""
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
    """The batches of an epoch, ordered so that any first few cover all lengths evenly (golden-ratio sequence)."""
    loader = histories.train_dataloader()
    spans = histories.window_ends - histories.window_starts
    plan = sorted(loader.plan(), key=lambda batch: spans[batch].max())
    points = np.arange(1, len(plan) + 1) * GOLDEN_RATIO % 1
    for number in np.argsort(np.argsort(points)):
        yield loader.read(plan[number])


def full(rows: int, length: int, num_items: int) -> History:
    """Windows of length + 1 random items, with gaps from a minute to a month."""
    gaps = torch.exp(torch.empty(rows, length + 1).uniform_(4.0, 15.0)).long()
    times = 10**9 + gaps.cumsum(1)
    request_times = torch.cat([times[:, 1:], times[:, -1:]], dim=1)
    items = torch.randint(1, num_items + 1, (rows, length + 1))
    return History(items, torch.full((rows,), length + 1), times, request_times)


def factory(name: str, job: Job) -> EncoderFactory:
    """An encoder in its published form, with the sizes and dropout of the job."""
    if name not in all_encoders():
        sys.exit(f"there is no encoder {name!r}; there are {', '.join(all_encoders())}")
    encoder = all_encoders()[name]
    options: dict[str, Any] = {"layers": job.layers, "dropout": job.dropout}
    if issubclass(encoder, AttentiveEncoder):
        options["heads"] = job.heads
    if name in PUBLISHED_WITH_TIME:
        options["time"] = LogBuckets
    return partial(encoder, **options)


def all_encoders() -> dict[str, type[Encoder]]:
    """Every encoder of the package, the Transformer first."""
    exported = {
        name: value
        for name, value in vars(encoders).items()
        if inspect.isclass(value) and issubclass(value, Encoder) and not inspect.isabstract(value)
    }
    return {"Transformer": Transformer, **exported}


def matrix_tflops(job: Job) -> float:
    """TFLOP/s of a large matrix product on this device."""
    size, dtype = (8192, torch.bfloat16) if job.device.type == "cuda" else (2048, torch.float32)
    if job.precision == "fp32":
        dtype = torch.float32
    left, right = (torch.randn(size, size, device=job.device, dtype=dtype) for _ in range(2))
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
    """Moves a named tuple, including nested tuples, to a device."""
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
