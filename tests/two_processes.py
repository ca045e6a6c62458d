"""What each of several processes runs for tests/cli/test_gloo.py, and what one process is compared with.

    NODE_RANK=0 MASTER_PORT=29500 python tests/two_processes.py FOLDER DATASET CANDIDATES

One start runs all jobs, in two copies of a process that has imported torch once: that takes longer than the jobs.
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from pipeline_fixtures import RANKER, recsys
from torch import Tensor

from recsys2stage.cli import training  # noqa: F401  # imported once, before both ranks are forked
from recsys2stage.cli.main import main
from recsys2stage.optim import RecsysAdamW, RowwiseAdagrad, SparseAdamW
from recsys2stage.processes import num_processes
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.losses import LambdaRank, Listwise
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.ranking.scorers import MLP
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.histories import BatchLoader, Histories
from recsys2stage.retrieval.losses import BPR, InBatch, InfoNCE, Mixed, NormPenalty, Uniform
from recsys2stage.retrieval.objectives import NextItem, TrainingBatch
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.shapes import History

PARTS = [[range(9), range(9, 12)], [range(12, 17), range(17, 27)]]  # rows of each process at each step, uneven


class Steps(Histories):
    """Training batches of PARTS: those of this process, or in one process those of both."""

    def train_dataloader(self) -> BatchLoader:
        return BatchLoader(self.read_windows, lambda: parts(self.trainer.global_rank, self.trainer.world_size))


class ListSteps(Candidates):
    """Training lists of PARTS."""

    whole = False  # whether this process has those of both

    def train_dataloader(self) -> BatchLoader:
        train = np.flatnonzero((self.lists.fold == "train") & (self.lists.positive >= 0))
        rank, processes = (0, 1) if self.whole else (self.trainer.global_rank, self.trainer.world_size)
        return BatchLoader(lambda batch: self.read(train[batch]), lambda: parts(rank, processes))


class CalibratedAlike(Ranker):
    """Calibrated on the lists of both processes: on those of the first, the start would be another one."""

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set outside Trainer.__init__
        data.whole = True
        super().setup(stage)
        data.whole = False


def parts(rank: int, processes: int) -> list[np.ndarray]:
    chosen = slice(None) if processes == 1 else slice(rank, rank + 1)
    return [np.array([row for part in step[chosen] for row in part]) for step in PARTS]


class Evenly(Uniform):
    """Samples that are the same in all, whatever the number of processes that share them: every seventh item."""

    def sample(self, shape: Any, catalogue: Any) -> Tensor:
        processes = num_processes()
        rank = torch.distributed.get_rank() if processes > 1 else 0
        return (torch.arange(shape[0]) * processes + rank) * 7 % (len(catalogue.counts) - 1) + 1


class Weighted(NextItem):
    """Targets of different weights."""

    def forward(self, window: History, progress: float = 0.0) -> TrainingBatch:
        batch = super().forward(window, progress)
        return batch._replace(weights=1.0 + batch.targets % 3)


class Gradients(Callback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        pl_module.on_before_optimizer_step(optimizer)  # Lightning calls it after the callbacks
        self.steps.append(
            {
                name: weight.grad.to_dense().clone()
                for name, weight in pl_module.named_parameters()
                if weight.grad is not None
            }
        )


def trainer(devices: int, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": devices,
        "strategy": DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
    }
    return Trainer(callbacks=list(callbacks), **settings | options)


def retriever(data: Histories, **options: Any) -> Retriever:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "dim": 16,
        "encoder": partial(Transformer, dropout=0.0, layers=1),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "warmup_steps": 0,
    }
    return Retriever(data.num_items, data.max_length, data.request_time, **(settings | options))


RETRIEVERS: dict[str, dict[str, Any]] = {
    "in-batch negatives": {"loss": InfoNCE()},
    "masks, and a norm penalty": {
        "loss": InfoNCE(same_sequence=True, near=0.3, hard=4),
        "norm_penalty": NormPenalty(0.1, cap=0.5),
    },
    "mixed negatives": {"loss": InfoNCE(negatives=Mixed(Evenly(None, "batch"), share=0.4, alpha=0.5))},
    "local negatives": {"loss": InfoNCE(negatives=InBatch(gather=False))},
    "pairs": {"loss": BPR(negatives=InBatch())},
    "weights": {"objective": Weighted()},
    "rows by AdamW": {
        "optimizer": partial(SparseAdamW, lr=0.01, weight_decay=0.1),
        "tied": False,
        "item_bias": True,
        "similarity": "dot",
    },
    "rows by Adagrad": {"optimizer": partial(RowwiseAdagrad, lr=0.01, table_lr=0.02)},
    "whole tables by AdamW": {"optimizer": partial(RecsysAdamW, lr=0.01)},
}
RANKERS: dict[str, Any] = {"softmax of lists": Listwise, "LambdaRank": LambdaRank}


def trained(model: LightningModule, data: LightningDataModule, devices: int) -> dict[str, Any]:
    """Gradients of each step, the weights after the last, and the logged loss."""
    kept = Gradients()
    fit = trainer(devices, kept, gradient_clip_val=1.0)
    fit.fit(model, datamodule=data)
    return {
        "gradients": kept.steps,
        "weights": model.state_dict(),
        "values": {name: value for name, value in fit.callback_metrics.items() if name.startswith(("train", "val"))},
    }


def fit_retriever(name: str, dataset: Path, devices: int) -> dict[str, Any]:
    data = Steps(dataset, max_length=10, eval_batch_size=7)
    return trained(retriever(data, **RETRIEVERS[name]), data, devices)


def fit_ranker(name: str, candidates: Path, devices: int) -> dict[str, Any]:
    data = ListSteps(candidates, batch_size=16)
    torch.manual_seed(0)
    model = CalibratedAlike(
        data.num_items,
        data.vector_dim,
        data.features,
        signals=data.signals,
        id_dropout=0.0,
        cold_dropout=0.0,
        scorer=partial(MLP, hidden=(8,), dropout=0.0),
        loss=RANKERS[name](),
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    return trained(model, data, devices)


def different_starts(dataset: Path, devices: int) -> list[float]:
    """Sums of the item table of processes that began with different weights, after a fit."""
    data = Steps(dataset, max_length=10)
    model = retriever(data, optimizer=SparseAdamW)
    if torch.distributed.get_rank():
        torch.nn.init.normal_(model.towers.items.table.weight)
    trainer(devices, limit_val_batches=0).fit(model, datamodule=data)
    own = model.towers.items.table.weight.detach().double().sum()
    sums = [torch.zeros_like(own) for _ in range(devices)]
    torch.distributed.all_gather(sums, own)
    return [float(value) for value in sums]


def stopped(dataset: Path, folder: Path, **words: Any) -> dict[str, Any]:
    """A fit by `recsys fit`; returns where it stopped."""
    output = folder / str(words.pop("output"))
    config = folder / "retriever.yaml"
    if not config.is_file():
        config.write_text(CONFIG.format(dataset=dataset))
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    sys.argv = ["recsys", "fit", "--config", str(config), "--output", str(output), *options]
    ends: dict[str, Any] = {}

    def end(fit: Trainer) -> None:
        ends.update(epochs=fit.current_epoch, steps=fit.global_step, stopped=fit.should_stop)

    with mock.patch.object(Trainer, "_teardown", autospec=True, side_effect=Trainer._teardown) as teardown:
        main()
    end(teardown.call_args.args[0])
    return ends


CONFIG = """
trainer: {{max_epochs: 3, accelerator: cpu, devices: 2, enable_progress_bar: false}}
model:
  class_path: Retriever
  init_args:
    dim: 16
    warmup_steps: 5
    encoder: {{class_path: Transformer, init_args: {{layers: 1}}}}
    optimizer: {{class_path: SparseAdamW, init_args: {{lr: 0.01}}}}
data: {{class_path: Histories, init_args: {{path: {dataset}, max_length: 12, batch_size: 16}}}}
"""


def jobs(folder: Path, dataset: Path, candidates: Path) -> dict[str, Any]:
    results: dict[str, Any] = {name: fit_retriever(name, dataset, 2) for name in RETRIEVERS}
    results |= {name: fit_ranker(name, candidates, 2) for name in RANKERS}
    results["different starts"] = different_starts(dataset, 2)
    straight = stopped(dataset, folder, output="straight")
    stopped(dataset, folder, output="resumed", **{"trainer.max_epochs": 1})
    last = {"ckpt_path": folder / "resumed/last.ckpt"}
    results["resumed"] = [straight, stopped(dataset, folder, output="resumed", **last)]
    never_better = {"early_stopping.patience": 1, "model.init_args.optimizer.init_args.lr": 0.0}
    early = stopped(dataset, folder, output="early", **never_better)
    last = {"ckpt_path": folder / "early/last.ckpt"}
    results["early"] = [early, stopped(dataset, folder, output="early", **never_better, **last)]
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    paths = ("--data.init_args.path", candidates, "--output", folder / "ranker")
    (folder / "ranker.yaml").write_text(RANKER)
    recsys("fit", "--config", folder / "ranker.yaml", *paths, *two)
    return results


def fork(folder: Path) -> list[int]:
    """Two copies of this process, whose output goes to files; in a copy it returns nothing, here their process ids."""
    copies = []
    for rank in range(2):
        copies.append(os.fork())
        if not copies[-1]:
            os.environ["LOCAL_RANK"] = str(rank)
            with (folder / f"said{rank}").open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            return []
    return copies


if __name__ == "__main__":
    folder, dataset, candidates = map(Path, sys.argv[1:4])
    copies = fork(folder)
    if copies:
        sys.exit(max(os.waitpid(copy, 0)[1] for copy in copies) != 0)
    torch.save(jobs(folder, dataset, candidates), folder / f"results{os.environ['LOCAL_RANK']}.pt")
