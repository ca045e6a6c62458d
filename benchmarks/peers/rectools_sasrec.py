"""Contestant RecTools SASRec, with its own data loader and training step; runs in the environment of the peers.

It trains on a user's newest length + 1 events, left-padded to `length`.
"""

import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from clock import Job, Work, compete, timed
from lightning_fabric import Fabric
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def train(job: Job) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    model = SASRecModel(
        n_blocks=job.layers,
        n_heads=job.heads,
        n_factors=job.width,
        dropout_rate=job.dropout,
        session_max_len=job.length,
        batch_size=job.batch,
        **{"loss": "softmax"} if job.loss == "softmax" else {"loss": "sampled_softmax", "n_negatives": int(job.loss)},
    )
    model._build_model_from_dataset(Dataset.construct(interactions(Path(job.data))))  # the first half of its fit
    fabric = Fabric(accelerator=job.accelerator, devices=1, precision=job.lightning_precision)
    optimizer = model.lightning_model.configure_optimizers()
    model.lightning_model.on_train_start()  # initial weights
    module, optimizer = fabric.setup(model.lightning_model, optimizer)
    module.train()

    def step(batch: dict[str, torch.Tensor]) -> Work:
        work = Work((batch["y"] != 0).sum(), batch["y"].numel())
        optimizer.zero_grad()
        fabric.backward(module.training_step(fabric.to_device(batch), 0))
        optimizer.step()
        return work

    measured = timed(model.data_preparator.get_dataloader_train, step, job)
    return {
        **measured,
        "versions": {name: version(name) for name in ("rectools", "pytorch-lightning", "torch", "numpy")},
    }


def interactions(data: Path) -> pd.DataFrame:
    """All training events."""
    offsets, ends = np.load(data / "users.offsets.npy"), np.load(data / "users.train_end.npy")
    count = ends - offsets[:-1]
    positions = np.arange(count.sum()) + np.repeat(offsets[:-1] - np.cumsum(count) + count, count)
    return pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(len(count)), count),
            Columns.Item: np.load(data / "events.item.npy")[positions],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(np.load(data / "events.time.npy")[positions], unit="s"),
        }
    )


if __name__ == "__main__":
    compete(train)
