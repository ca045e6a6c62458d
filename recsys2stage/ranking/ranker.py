"""Training of the second stage: LightningModule of the ranker."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from recsys2stage.columns import PAD
from recsys2stage.metrics import compute_rank
from recsys2stage.optim import RecsysAdamW, RecsysModule, check_schedule, with_schedule
from recsys2stage.options import check_number
from recsys2stage.processes import copy_from_first, global_mean
from recsys2stage.ranking.boosting import Booster
from recsys2stage.ranking.candidates import Candidates, Lists
from recsys2stage.ranking.choice import NOT_RETRIEVED as NOT_RETRIEVED
from recsys2stage.ranking.choice import choose_part
from recsys2stage.ranking.losses import ListLoss, Listwise
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import MLP, ScorerFactory
from recsys2stage.retrieval.rank_metrics import RankMetrics
from recsys2stage.shapes import CandidateBatch

LINEAR_LISTS = 1_000  # training lists up to which there is a linear start; it is fitted to at most so many


class Ranker(RecsysModule):
    """Trains and validates a Reranker.

    Args:
        num_items: number of items V (set by the data).
        vector_dim: width D of the retriever's vectors (set by the data).
        features: declared item features (set by the data).
        num_candidates: candidates per request in serving (set by the data, kept for serving).
        signals: signal features (set by the data).
        scores_cold: whether the retriever's scores of cold items are usable (set by the data).
        recent: number of newest events in the input (set by the data, kept for serving).
        without: inputs removed from the scorer (ablation): parts (score, rank, margin, popularity, features, state,
            vectors, recent), signals, or single signal features as SIGNAL.FEATURE. None: nothing is removed.
        scorer: called with (D, number of features).
        loss: ranking loss of a list.
        feature_dim: width of the embedding of a categorical or multi-valued feature.
        id_dropout: probability in training that all IDs of a list are masked.
        cold_dropout: probability in training that a candidate is treated as a cold item (no training events), so that
            the ranker learns to score cold items among others.
        optimizer: called with the parameters.
        warmup_steps: steps of linear warmup of the learning rate.
        final_lr: share of the learning rate at the planned end, after cosine decay; 1: constant.
        linear_start: whether training starts from a penalized linear model of the features; if not, it starts from the
            retriever's order. Both are validated before the first step. None: with up to 1,000 training lists, from
            which gradient descent learns too little.
        mask_ids: whether the IDs of all candidates are always masked. If not, this is chosen at the end of a fit if the
            best ranker is better so on the validation users, in cross-validation.
    """

    def __init__(
        self,
        num_items: int,
        vector_dim: int,
        features: list[dict[str, Any]],
        num_candidates: int = 200,
        signals: list[dict[str, Any]] | None = None,
        scores_cold: bool = False,
        recent: int = 20,
        without: list[str] | None = None,
        scorer: ScorerFactory = MLP,
        loss: ListLoss | None = None,
        feature_dim: int = 16,
        id_dropout: float = 0.1,
        cold_dropout: float = 0.05,
        optimizer: OptimizerCallable = RecsysAdamW,
        warmup_steps: int = 20,
        final_lr: float = 1.0,
        linear_start: bool | None = None,
        mask_ids: bool = False,
    ) -> None:
        super().__init__()
        for name, value, usual in (("id_dropout", id_dropout, 0.1), ("cold_dropout", cold_dropout, 0.05)):
            check_number(name, value, low=0, high=1, example=usual, what="a probability")
        check_schedule(warmup_steps, final_lr)
        self.save_hyperparameters(ignore=["loss"])
        self.reranker = Reranker(
            num_items, vector_dim, features, scorer, feature_dim, signals or (), scores_cold, without, mask_ids=mask_ids
        )
        self.loss = loss or Listwise()
        self.id_dropout, self.cold_dropout, self.optimizer = id_dropout, cold_dropout, optimizer
        self.warmup_steps, self.final_lr, self.linear_start = warmup_steps, final_lr, linear_start
        self.manifest_facts: dict[str, Any] = {}  # for the manifest of the fit
        self.metrics, self.retriever_metrics, self.masked_metrics = RankMetrics(), RankMetrics(), RankMetrics()

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        self.manifest_facts = {}  # an earlier fit of this module has its own
        candidates: Candidates = self.trainer.datamodule  # type: ignore[attr-defined]
        if candidates.folds and "state" not in self.reranker.without:
            raise ValueError("folds have states of other retrievers; remove them: --model.init_args.without '[state]'")
        if candidates.refit is not None:
            self.hparams["mask_ids"] = candidates.masks_ids  # as chosen after training; for serving only
        dataset = candidates.dataset
        self.leave_out_of_ddp(len(self.reranker.vectors))
        self.reranker.load_item_tables(candidates.item_vectors(), dataset.train_counts, dataset.item_features)
        lists = [batch for batch, _ in zip(candidates.train_dataloader(), range(16), strict=False)]
        width = max(batch.candidates.items.size(1) for batch in lists)
        score, items = (
            torch.cat([torch.nn.functional.pad(value, (0, width - value.size(1))) for value in values])
            for values in ([b.candidates.score for b in lists], [b.candidates.items for b in lists])
        )
        self.reranker.calibrate(score, torch.cat([b.positive for b in lists]), items != PAD)
        self.reranker.standardise(torch.cat([b.candidates.signals[b.candidates.items != PAD] for b in lists]))
        self.booster = Booster(self.reranker, candidates, self.id_dropout, self.cold_dropout)
        self.booster.setup(self.trainer)

    def on_train_start(self) -> None:
        """Validates step 0, in the retriever's order and from the linear start, so that best.ckpt is no worse."""
        super().on_train_start()
        if self.final_lr < 1:
            self.require_planned_steps("the learning rate")
        if self.global_step:
            return
        self.validate_start()
        candidates: Candidates = self.trainer.datamodule  # type: ignore[attr-defined]
        # a refit starts as the chosen run did, which did not train on the validation lists
        few = ((candidates.lists.fold == "train") & (candidates.lists.positive >= 0)).sum() <= LINEAR_LISTS
        if self.reranker.wide is None or not (few if self.linear_start is None else self.linear_start):
            return
        lists, users = candidates.sample_lists(LINEAR_LISTS)
        batch = CandidateBatch(*(part.to(self.device) for part in lists.candidates))
        fitted = self.reranker.fit_linear_term(batch, lists.positive.to(self.device), users)
        copy_from_first(self.reranker.wide.weight)
        facts = {"penalty": fitted.penalty, "base": fitted.base, "loss": fitted.loss, "lists": len(users)}
        self.manifest_facts["linear_start"] = facts
        self.validate_start()

    def validate_start(self) -> None:
        """Validates before the first step, and saves best.ckpt if that is the best so far."""
        checkpoint = self.trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint):
            return
        checkpoint._last_global_step_saved = -1  # otherwise the callback assumes that step 0 is saved
        self.trainer.validating = True
        self.trainer.fit_loop.epoch_loop.val_loop.run()
        self.trainer.training = True
        self.train()
        if checkpoint.monitor in (None, *self.trainer.callback_metrics):  # not a metric of training steps
            checkpoint.on_train_epoch_end(self.trainer, self)  # the callback saves at the end of an epoch

    def training_step(self, lists: Lists, batch_idx: int) -> Tensor:
        items = lists.candidates.items
        base, inputs = self.reranker.scorer_inputs(lists.candidates, self.drop_ids(items), self.drop_counts(items))
        scorer = self.reranker.scorer
        parts = scorer.corrections(inputs) or [scorer(inputs)]  # without any, the loss is only logged
        losses = [self.loss(base + correction, lists.positive, items != PAD) for correction in parts]
        loss = global_mean(torch.stack(losses).sum(), len(items))
        self.log_mean("train/loss", loss, len(items))
        return loss

    def on_train_epoch_start(self) -> None:
        """Grows the parts of the scorer that are not trained by gradients."""
        if not self.booster.grow(self.current_epoch + 1):
            self.trainer.should_stop = True

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        """As in Lightning; does nothing if no gradient reaches a weight, as with trees alone."""
        if loss.requires_grad:
            super().backward(loss, *args, **options)

    def on_validation_epoch_start(self) -> None:
        """Fits the weights of a calibrated scorer to the validation lists, in a fit after step 0."""
        if self.trainer.state.fn == "fit" and self.global_step:
            self.booster.calibrate(self.trainer)

    def drop_ids(self, items: Int[Tensor, "B C"]) -> Bool[Tensor, "B C"]:
        """Masks all IDs of a list with probability `id_dropout`.

        Candidates compete within their list: if single IDs were masked, the ranker would only learn that masked
        candidates lose to unmasked ones.
        """
        return (torch.rand(len(items), 1, device=items.device) < self.id_dropout).expand_as(items)

    def drop_counts(self, items: Int[Tensor, "B C"]) -> Bool[Tensor, "B C"]:
        """Treats each candidate, targets included, as cold with probability `cold_dropout`.

        Independently per candidate, unlike ID dropout: in serving, cold items compete with others in the same list.
        """
        return torch.rand(items.shape, device=items.device) < self.cold_dropout

    def validation_step(self, lists: Lists, batch_idx: int) -> None:
        real, retrieved = lists.candidates.items != PAD, lists.positive >= 0
        positive = lists.positive.clamp(min=0)
        for metric, masks in ((self.metrics, False), (self.masked_metrics, True)):
            logits = self.reranker(lists.candidates, torch.full_like(real, masks))
            ranks = compute_rank(logits.masked_fill(~real, -torch.inf), positive)
            metric.update(torch.where(retrieved, ranks, NOT_RETRIEVED))
        own = lists.candidates.rank.gather(1, positive[:, None]).squeeze(1)
        self.retriever_metrics.update(torch.where(retrieved, own, NOT_RETRIEVED))

    def on_validation_epoch_end(self) -> None:
        """Logs metrics of the ranker, of the retriever on the same users, and of the ranker with all IDs masked."""
        values = self.metrics.take("val/") | self.retriever_metrics.take("val/retriever_")
        for name, value in (values | self.masked_metrics.take("val/masked_")).items():
            self.log(name, value, prog_bar=name.endswith("ndcg@10"), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if (start := self.manifest_facts.get("linear_start")) is not None:
            checkpoint["linear_start"] = start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (start := checkpoint.get("linear_start")) is not None:
            self.manifest_facts["linear_start"] = start

    def on_train_end(self) -> None:
        self.finish_fit()

    def finish_fit(self) -> None:
        """Chooses between the best ranker and its parts; not in a refit, whose validation users were trained on.

        Once per fit: at the end of training, or before the manifest if a resumed fit had no step left to train.
        """
        if "chosen" in self.manifest_facts:
            return
        checkpoint = self.trainer.checkpoint_callback
        if not isinstance(checkpoint, ModelCheckpoint) or not self.trainer.is_global_zero or self.trainer.interrupted:
            return
        best = Path(checkpoint.best_model_path)
        if checkpoint.monitor is not None and checkpoint.best_model_path and best.is_file():
            candidates: Candidates = self.trainer.datamodule  # type: ignore[attr-defined]
            self.manifest_facts |= choose_part(self.reranker, candidates, best, self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer(self.parameters())
        if getattr(optimizer, "rowwise", False):
            raise ValueError(
                f"optimizer is {type(optimizer).__name__}, which updates rows of learned item tables, and a ranker has "
                "none; use RecsysAdamW"
            )
        return with_schedule(optimizer, self.warmup_steps, self.final_lr, lambda: self.progress)
