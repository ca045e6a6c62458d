"""RecTools' SASRec and HSTU, trained for a given CPU time, to user and item vectors; runs in the peers' environment.

It reads training events, validation events and the histories of test requests, but no test targets. Data loaders,
training step, loss and optimizer are the library's. Validation after each epoch ranks each user's validation event
among all items except its input, and the weights with the best NDCG@10 are kept. The library's validation step would
compute the training loss at every position of every history instead, which takes a third of an epoch.
"""

import json
import resource
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.lightning import TransformerLightningModule
from rectools.models.rank import Distance
from torch import Tensor

MODELS = {"SASRec": SASRecModel, "HSTU": HSTUModel}
MONITOR = "val_ndcg@10"


class Ranking(TransformerLightningModule):
    """The library's training step, with a validation by ranking."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        states = self.torch_model.encode_sessions(batch, self.item_embs)[:, -1]
        scores = self.torch_model.similarity_module(states, self.item_embs)  # (B, 1 + items), column 0 is padding
        target = scores.gather(1, batch["y"])
        scores.scatter_(1, batch["x"], -torch.inf)
        scores[:, 0] = -torch.inf
        scores.scatter_(1, batch["y"], target)  # seen targets are not filtered
        rank = (~(scores < target)).sum(1)
        gain = torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0)
        self.log(MONITOR, gain.mean(), on_step=False, on_epoch=True, batch_size=len(rank))


class Budget(Callback):
    """Ends a fit when its process has used its CPU time, including validation, and keeps the best weights.

    Args:
        minutes: CPU time from the start of the fit.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes, self.used, self.best, self.best_epoch = minutes, 0.0, -1.0, 0
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: object) -> None:
        if time.process_time() - self.start > 60 * self.minutes:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        value = float(trainer.callback_metrics[MONITOR])
        if value > self.best:
            self.best, self.best_epoch = value, trainer.current_epoch + 1
            self.weights = {name: weight.clone() for name, weight in module.state_dict().items()}

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        self.used = time.process_time() - self.start
        self.epochs = trainer.global_step / trainer.num_training_batches


def fit(job: dict[str, Any], events: dict[str, np.ndarray]) -> tuple[Any, Budget]:
    """Fits a model; returns it with its best weights, and the callback with the cost of the fit."""
    held = events["train_held"]

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Budget(job["minutes"])],
        )

    model = MODELS[job["model"]](
        **job["options"],
        item_net_block_types=(IdEmbeddingsItemNet,),
        lightning_module_type=Ranking,
        get_val_mask_func=lambda _: held,
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )
    model.fit(Dataset.construct(frame(events, "train")))
    budget = next(callback for callback in model.fit_trainer.callbacks if isinstance(callback, Budget))  # a copy
    model.lightning_model.load_state_dict(budget.weights)
    return model, budget


def vectors(model: Any, events: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """User and item vectors, with the ids of the events; their dot products are the scores of `recommend`."""
    context = frame(events, "request") if model.require_recommend_context else None
    users = events["request_user"]
    requests = model._custom_transform_dataset_u2i(
        Dataset.construct(frame(events, "history")), users, "ignore", context
    )
    loader = model.data_preparator.get_dataloader_recommend(requests, model.recommend_batch_size)
    states, items = model.lightning_model._get_user_item_embeddings(loader, "cpu")
    similarity = model.torch_model.similarity_module
    if similarity.distance == Distance.COSINE:
        states, items = similarity._get_embeddings_norm(states), similarity._get_embeddings_norm(items)
    padding = model.data_preparator.n_item_extra_tokens
    return {
        "users": requests.user_id_map.external_ids.astype(np.int64),
        "user_vectors": states.numpy(),
        "items": model.data_preparator.get_known_item_ids().astype(np.int64),
        "item_vectors": items[padding:].detach().numpy(),
    }


def frame(events: dict[str, np.ndarray], name: str) -> pd.DataFrame:
    """Events as a RecTools frame; equal times keep their order, since RecTools sorts stably."""
    columns = {
        Columns.User: events[f"{name}_user"],
        Columns.Weight: 1.0,
        Columns.Datetime: pd.to_datetime(events[f"{name}_time"], unit="s"),
    }
    if f"{name}_item" in events:
        columns[Columns.Item] = events[f"{name}_item"]
    return pd.DataFrame(columns)


def main() -> None:
    warnings.filterwarnings("ignore")
    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])
    torch.set_num_threads(job["threads"])
    seed_everything(job["seed"])
    with np.load(folder / "events.npz") as file:
        events = dict(file)
    model, budget = fit(job, events)
    np.savez(folder / "vectors.npz", **vectors(model, events))  # type: ignore[arg-type]  # may not be `allow_pickle`
    facts = {
        "best_epoch": budget.best_epoch,
        MONITOR: round(budget.best, 4),
        "parameters": sum(weight.numel() for weight in model.torch_model.parameters()),
        "cpu_seconds": round(budget.used, 1),
        "epochs": round(budget.epochs, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "versions": {name: version(name) for name in ("rectools", "pytorch-lightning", "torch", "numpy")},
    }
    (folder / "used.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
