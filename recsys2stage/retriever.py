"""The first stage in training: a two-tower model that learns which item comes next."""

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recsys2stage.data import Histories, Queries
from recsys2stage.dataset import RequestTime
from recsys2stage.encoders import EncoderFactory, Transformer
from recsys2stage.items import ItemTable
from recsys2stage.losses import InfoNCE, Loss
from recsys2stage.metrics import RankMetrics, rank_of
from recsys2stage.objectives import Cloze, NextItem, Objective
from recsys2stage.optim import RecsysAdamW, with_warmup
from recsys2stage.shapes import History
from recsys2stage.towers import ItemsFactory, TwoTower


class Retriever(LightningModule):
    """Trains a TwoTower.

    Args:
        num_items: number of items V (set by the data).
        max_length: longest history L (set by the data).
        request_time: whose time a request has (set by the data, kept for serving).
        dim: width D of item vectors and states.
        encoder: the sequence encoder, built with (dim, max_length).
        items: the item table, built with (num_items, dim).
        tied: whether candidates are the vectors that histories are read with.
        item_bias: whether each item has a bias, added to its cosine.
        objective: what a history is asked; None: the next item, or Cloze where the encoder sees both sides.
        loss: how answers are compared with other items.
        optimizer: built with the parameters.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        compiled: whether the encoder goes through torch.compile, which pays on a GPU.
        recompute_rows: so many histories at a time keep their activations, the others' are computed again for the
            gradient: much less memory, about a fifth more time. None: all keep them.
    """

    log_popularity: Tensor

    def __init__(
        self,
        num_items: int,
        max_length: int,
        request_time: RequestTime = "none",
        dim: int = 64,
        encoder: EncoderFactory = Transformer,
        items: ItemsFactory = ItemTable,
        tied: bool = True,
        item_bias: bool = False,
        objective: Objective | None = None,
        loss: Loss | None = None,
        optimizer: OptimizerCallable = RecsysAdamW,
        warmup_steps: int = 100,
        compiled: bool = False,
        recompute_rows: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["objective", "loss"])
        self.towers = TwoTower(num_items, max_length, dim, encoder, items, tied, item_bias)
        causal, name = self.towers.encoder.causal, type(self.towers.encoder).__name__
        self.objective = objective or (NextItem() if causal else Cloze())
        if self.objective.causal != causal:
            raise ValueError(
                f"{name} sees {'only what came before' if causal else 'both sides, and with them the answers'}, and "
                f"{type(self.objective).__name__} does not suit it; leave the objective out"
            )
        self.loss = loss or InfoNCE()
        self.optimizer, self.warmup_steps, self.recompute_rows = optimizer, warmup_steps, recompute_rows
        self.val_metrics, self.test_metrics = RankMetrics(), RankMetrics()
        self.register_buffer("log_popularity", torch.zeros(num_items + 1))
        if recompute_rows is not None and recompute_rows < 1:
            raise ValueError(f"recompute_rows is {recompute_rows}, expected at least 1, or null to keep everything")
        if compiled:
            self.towers.encoder.compile(dynamic=True)  # histories are as long as their batch needs

    def setup(self, stage: str) -> None:
        if stage == "fit":
            histories: Histories = self.trainer.datamodule  # type: ignore[attr-defined]
            if self.towers.encoder.reads_times and not histories.dataset.has_time:
                raise ValueError(
                    f"the encoder has a clock ({type(self.towers.encoder).__name__} with a time encoding), but "
                    f"{histories.path} has an order and no times; put configs/with/no-time.yaml on top"
                )
            self.log_popularity.copy_(histories.log_popularity())

    def training_step(self, window: History, batch_idx: int) -> Tensor:
        question = self.objective(window)
        queries = self.states(question.history)[question.places]
        loss = self.loss(queries, question.answers, self.towers.item_vectors, self.log_popularity)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(queries))
        return loss

    def states(self, history: History) -> Float[Tensor, "B L E"]:
        """What the towers say at every place, with activations kept for all rows or for some at a time."""
        if self.recompute_rows is None:
            return self.towers(history)
        items, lengths, times, request = history
        states = []
        for start in range(0, len(items), self.recompute_rows):
            rows = slice(start, start + self.recompute_rows)
            part = History(items[rows], lengths[rows], times[rows], None if request is None else request[rows])
            states.append(checkpoint(self.towers, part, use_reentrant=False))
        return torch.cat(states)

    def validation_step(self, batch: Queries, batch_idx: int) -> None:
        self.val_metrics.update(self.ranks(batch))

    def test_step(self, batch: Queries, batch_idx: int) -> None:
        self.test_metrics.update(self.ranks(batch))

    def ranks(self, batch: Queries) -> Int[Tensor, " B"]:
        """Rank of each target in the whole catalogue, known items filtered."""
        queries, items = self.towers.queries(batch.history), self.towers.every_item()
        with torch.autocast(queries.device.type, enabled=False):  # in bf16 many scores would tie
            scores = queries @ items.T  # (B, V)
        scores[batch.known_rows, batch.known_items - 1] = -torch.inf
        return rank_of(scores, batch.target - 1)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_metrics.take("val/").items():
            self.log(name, value, prog_bar=name == "val/ndcg@10")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.take("test/"))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return with_warmup(self.optimizer(self.parameters()), self.warmup_steps)
