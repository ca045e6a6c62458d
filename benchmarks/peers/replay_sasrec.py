"""Contestant RePlay SASRec, with its own data module and training step; runs in the environment of the peers.

It trains on a user's newest length + 1 events, left-padded to `length`. Model, loss (full softmax) and batches are
those of its templates. `bucketed` adds two options of RePlay: batches are cut to their longest history, and the encoder
splits a batch into four buckets of similar length.
"""

import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from clock import Job, Work, compete, timed
from lightning.fabric import Fabric
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.sequential import SasRec
from replay.nn.sequential.length_bucket import LengthBucketedQueryEncoder
from replay.nn.transform import GroupTransform, NextTokenTransform, RenameTransform, UnsqueezeTransform
from replay.nn.transform.template import make_default_sasrec_transforms
from replay.nn.transform.trim import TargetAwareAdaptiveTrimTransform

ITEM = "item_id"


def train(job: Job) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    items = np.load(Path(job.data) / "events.item.npy")
    schema = TensorSchema(
        [
            TensorFeatureInfo(
                ITEM,
                feature_type=FeatureType.CATEGORICAL,
                is_seq=True,
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, ITEM)],
                cardinality=int(items.max()),
                padding_value=int(items.max()),
                embedding_dim=job.width,
            )
        ]
    )
    model = SasRec.from_params(schema, job.width, job.heads, job.layers, job.length, job.dropout)
    transforms = make_default_sasrec_transforms(schema)
    if job.bucketed:
        model.body.encoder = LengthBucketedQueryEncoder(model.body.encoder, bucket_size=job.batch // 4)
        transforms["train"] = trimmed(schema)
    module = LightningModule(model)
    fabric = Fabric(accelerator=job.accelerator, devices=1, precision=job.lightning_precision)
    module, optimizer = fabric.setup(module, module.configure_optimizers())
    module.train()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "train.parquet")
        pq.write_table(histories(Path(job.data), items - 1), file)
        metadata = {"train": {ITEM: {"shape": job.length + 1, "padding": schema[ITEM].padding_value}}}
        data = ParquetModule(job.batch, metadata, transforms, train_path=file)
        data.setup("fit")
        transform = data.compiled_transforms["train"].to(fabric.device)

        def batches() -> Iterator[dict[str, Any]]:
            for batch in data.train_dataloader():
                yield transform(fabric.to_device(batch))  # as in the module after a device transfer

        def step(batch: dict[str, Any]) -> Work:
            optimizer.zero_grad()
            fabric.backward(module.training_step(batch))
            optimizer.step()
            real = batch["target_padding_mask"]
            return Work(real.sum(), real.numel())

        measured = timed(batches, step, job)
    return {**measured, "versions": {name: version(name) for name in ("replay-rec", "lightning", "torch", "numpy")}}


def trimmed(schema: TensorSchema) -> list[torch.nn.Module]:
    """The default training transforms, which also cut a batch to its longest row."""
    return [
        NextTokenTransform(label_name=ITEM, shift=1),
        RenameTransform({f"{ITEM}_mask": "padding_mask", "positive_labels_mask": "target_padding_mask"}),
        TargetAwareAdaptiveTrimTransform([ITEM, "positive_labels"]),
        UnsqueezeTransform("target_padding_mask", -1),
        UnsqueezeTransform("positive_labels", -1),
        GroupTransform({"feature_tensors": schema.names}),
    ]


def histories(data: Path, items: np.ndarray) -> pa.Table:
    """The training events, one row per user."""
    offsets, ends = np.load(data / "users.offsets.npy"), np.load(data / "users.train_end.npy")
    rows = [items[start:end].astype(np.int64) for start, end in zip(offsets, ends, strict=False)]
    return pa.table({ITEM: pa.array(rows, pa.list_(pa.int64()))})


if __name__ == "__main__":
    compete(train)
