"""Training of the first stage: LightningModule of the two-tower retriever."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recsys2stage.checkpoints import SPLIT, UNTIL, read_checkpoint
from recsys2stage.data.dataset import Dataset
from recsys2stage.optim import RecsysAdamW, RecsysModule, check_schedule, rowwise_name, with_schedule
from recsys2stage.options import RequestTime, Seen, check_integer, check_option, check_untrained
from recsys2stage.processes import copy_from_first, global_mean
from recsys2stage.retrieval.catalogue_ranks import catalogue_ranks
from recsys2stage.retrieval.encoders import EncoderFactory, Transformer
from recsys2stage.retrieval.encoders.layers import without_autocast
from recsys2stage.retrieval.histories import Histories, Queries
from recsys2stage.retrieval.inputs import InputFactory, check_inputs
from recsys2stage.retrieval.items import ItemsFactory, ItemTable
from recsys2stage.retrieval.losses import Catalogue, InfoNCE, Loss, NormPenalty, Targets
from recsys2stage.retrieval.objectives import Cloze, NextItem, Objective
from recsys2stage.retrieval.rank_metrics import RankMetrics
from recsys2stage.retrieval.towers import TwoTower, full_precision
from recsys2stage.retrieval.users import UserFactory
from recsys2stage.shapes import History, Similarity


class Retriever(RecsysModule):
    """Trains and evaluates a TwoTower.

    Args:
        num_items: number of items V (set by the data).
        max_length: maximum history length L (set by the data).
        request_time: source of the request time (set by the data, kept for serving).
        dim: width D of item vectors and states.
        encoder: the sequence encoder, called with (dim, max_length).
        items: the item table, called with (num_items, dim, features).
        tied: whether histories and candidates share one item table.
        item_bias: whether each item has a bias, added to its score.
        similarity: score of query and item: cosine or dot product.
        inputs: event inputs added to the item embeddings: action type, rating, target action.
        user: tower of user features, such as UserTower; None: user features are ignored.
        features: declared item features (set by the data).
        user_features: declared user features (set by the data).
        actions: action types (set by the data).
        next_action: source of the target action (set by the data, kept for serving).
        objective: training objective; None: NextItem for causal encoders, Cloze for bidirectional ones.
        loss: loss of the targets against negatives.
        norm_penalty: penalty on the norm of states; None: none.
        optimizer: called with the parameters. SparseAdamW and RowwiseAdagrad update only the rows of item tables that a
            batch looks up, so that a step costs the same however many items there are.
        warmup_steps: steps of linear warmup of the learning rate.
        final_lr: share of the learning rate at the planned end, after cosine decay; 1: constant. With decay, increase
            the patience of early stopping.
        start: checkpoint of a retriever of the same architecture, trained on the same split, that initializes the
            weights; None: random initialization.
        compiled: whether torch.compile compiles the encoder, which is worth it on a GPU.
        recompute_rows: gradient checkpointing in chunks of this many histories: activations are recomputed in the
            backward pass, which takes much less memory and about a fifth more time. None: activations are kept.
        fold: fold of users left out of training (set by the data, kept for mining).
    """

    target_counts: Tensor
    last_times: Tensor
    popularity: Tensor

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
        similarity: Similarity = "cosine",
        inputs: list[InputFactory] | None = None,
        user: UserFactory | None = None,
        features: list[dict[str, Any]] | None = None,
        user_features: list[dict[str, Any]] | None = None,
        actions: list[str] | None = None,
        next_action: str = "none",
        objective: Objective | None = None,
        loss: Loss | None = None,
        norm_penalty: NormPenalty | None = None,
        optimizer: OptimizerCallable = RecsysAdamW,
        warmup_steps: int = 100,
        final_lr: float = 1.0,
        start: Path | None = None,
        compiled: bool = False,
        recompute_rows: int | None = None,
        fold: str | None = None,
    ) -> None:
        super().__init__()
        check_option("request_time", request_time, RequestTime)
        check_integer("recompute_rows", recompute_rows, other="null to keep all activations", example=32)
        check_schedule(warmup_steps, final_lr)
        self.save_hyperparameters(ignore=["objective", "loss", "norm_penalty", "start"])
        self.towers = TwoTower(
            num_items=num_items,
            max_length=max_length,
            dim=dim,
            encoder=encoder,
            items=items,
            tied=tied,
            item_bias=item_bias,
            similarity=similarity,
            inputs=inputs,
            user=user,
            features=features,
            user_features=user_features,
            actions=actions,
        )
        causal, name = self.towers.encoder.causal, type(self.towers.encoder).__name__
        self.objective = objective or (NextItem() if causal else Cloze())
        if self.objective.causal != causal:
            raise ValueError(
                f"{name} is {'causal' if causal else 'bidirectional, so it would see the targets'}: it cannot be "
                f"trained with {type(self.objective).__name__}; leave the objective out"
            )
        self.loss, self.norm_penalty = loss or InfoNCE(), norm_penalty
        self.optimizer, self.warmup_steps, self.final_lr = optimizer, warmup_steps, final_lr
        self.recompute_rows, self.start = recompute_rows, start
        self.seen_rule: Seen = "filter"  # replaced by that of the data in `load_item_tables`
        self.val_metrics, self.test_metrics = RankMetrics(), RankMetrics()
        self.evaluated_vectors: Tensor | None = None  # of all items, computed once for a whole evaluation
        for name in ("target_counts", "last_times"):
            self.register_buffer(name, torch.zeros(num_items + 1, dtype=torch.int64))
        self.register_buffer("popularity", torch.zeros(num_items + 1), persistent=False)  # training events of each item
        if compiled:
            self.towers.encoder.compile(dynamic=True)  # sequence length varies between batches

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # set outside Trainer.__init__
        if isinstance(data, Histories):
            self.popularity.copy_(torch.from_numpy(data.trained.train_counts))
        if stage == "fit":
            if self.use_sparse_gradients() and not isinstance(
                self.trainer.strategy, SingleDeviceStrategy | DDPStrategy
            ):
                raise ValueError(
                    f"trainer.strategy is {type(self.trainer.strategy).__name__}, but {rowwise_name(self.optimizer)} "
                    "updates rows of whole item tables; use --trainer.strategy ddp, or the optimizer RecsysAdamW"
                )
            histories: Histories = self.trainer.datamodule  # type: ignore[attr-defined]
            if self.towers.encoder.reads_times and not histories.dataset.has_time:
                raise ValueError(
                    f"the encoder ({type(self.towers.encoder).__name__}) has a time encoding, but {histories.path} "
                    "has an order and no times; add the overlay configs/with/no-time.yaml"
                )
            if self.objective.reads_times and not histories.dataset.has_time:
                raise ValueError(
                    f"the objective ({type(self.objective).__name__}) reads times, but {histories.path} has an order "
                    "and no times; leave the objective out"
                )
            check_inputs(self.towers.inputs, histories.dataset, histories.next_action)
            if self.start is not None:  # a resumed fit loads its own last checkpoint after this
                make = "recsys fit --config configs/NAME/retriever.yaml"
                options, weights = read_checkpoint(self.start, "towers", make)
                histories.dataset.check_split(self.start, options[SPLIT])
                if options[UNTIL] != histories.until:
                    check_untrained(
                        self.start, options[UNTIL], "val", "start from the retriever that it was refitted from"
                    )
                if histories.fold is not None and options.get("fold") != histories.fold:
                    fold = options.get("fold")
                    on = "on all users" if fold is None else f"with data.fold {fold}"
                    raise ValueError(
                        f"start is {self.start}, fitted {on}, "
                        f"but this fit leaves out the users of fold {histories.fold}, expected a retriever that did "
                        "the same; start from such a one, or leave start out"
                    )
                try:
                    self.towers.load_state_dict(weights)
                except RuntimeError as error:
                    raise ValueError(
                        f"{self.start} holds a model of another architecture, so it cannot initialize this one: {error}"
                    ) from error
            self.load_item_tables(histories.trained)

    def load_item_tables(self, dataset: Dataset) -> None:
        """Loads item counts, item features and user features from a dataset, once, before training."""
        self.seen_rule = dataset.seen_rule
        self.target_counts.copy_(torch.from_numpy(dataset.target_counts))
        self.last_times.copy_(torch.from_numpy(dataset.last_times))
        trained = torch.from_numpy(dataset.train_counts > 0)
        self.towers.load_item_tables(dataset.item_features, dataset.user_features, trained)

    @property
    def item_tables(self) -> list[nn.Embedding]:
        """The tables with a learned row per item."""
        own, untied = self.towers.items.table, self.towers.untied
        return [own, *([] if untied is None else [untied.table]), *filter(None, [self.towers.bias])]

    def use_sparse_gradients(self) -> bool:
        """Gives the item tables sparse gradients if the optimizer updates them by rows; returns whether it does.

        DistributedDataParallel must then leave them out, as NCCL cannot reduce sparse gradients: see
        `on_before_optimizer_step`.
        """
        rowwise = rowwise_name(self.optimizer) is not None
        sparse = rowwise and not self.loss.every_item  # the gradient of every row is better dense
        for table in self.item_tables:
            table.sparse = sparse
        self.leave_out_of_ddp(len(self.target_counts), [table.weight for table in self.item_tables if table.sparse])
        return rowwise

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.item_tables[0].sparse:  # as DistributedDataParallel does with all other weights
            copy_from_first(*(table.weight for table in self.item_tables))
        for part in (self.objective, self.loss):
            if part.scheduled:
                self.require_planned_steps(type(part).__name__)
        if self.final_lr < 1:
            self.require_planned_steps("the learning rate")

    def training_step(self, window: History, batch_idx: int) -> Tensor:
        losses = self.losses(window)
        for name, value in losses.items():
            self.log_mean(f"train/{name}", value, len(window.items))
        return losses["loss"]

    def losses(self, window: History) -> dict[str, Any]:
        """The loss of a batch under "loss", and further values to log."""
        training_batch = self.objective(window, self.progress)
        states = self.states(training_batch.history)[training_batch.target_positions]
        targets = Targets(
            items=training_batch.targets,
            rows=training_batch.target_positions.nonzero()[:, 0],
            # with repeats, seen items stay negatives: masking them would leave the target as the only seen candidate
            window_items=window.items if self.seen_rule == "filter" else torch.zeros_like(window.items),
            ratings=training_batch.ratings,
            weights=training_batch.weights,
            progress=self.progress,
        )
        catalogue = Catalogue(
            vectors=self.towers.item_vectors,
            counts=self.target_counts,
            last_times=self.last_times,
            similarity=self.towers.similarity,
            dim=states.size(-1),
        )
        weight = len(states) if targets.weights is None else targets.weights.sum()
        loss = global_mean(self.loss(self.towers.query_vectors(states), targets, catalogue), weight)
        facts: dict[str, Any] = dict(self.loss.facts(self.progress))
        if self.norm_penalty is not None:
            norm = global_mean(full_precision(states).norm(dim=-1).mean(), len(states))
            penalty = self.norm_penalty(norm)
            loss, facts = loss + penalty, {**facts, "state_norm": norm.detach(), "norm_penalty": penalty.detach()}
        return {"loss": loss, **facts}

    def states(self, history: History) -> Float[Tensor, "B L D"]:
        """States at every position, with gradient checkpointing if `recompute_rows` is set."""
        if self.recompute_rows is None:
            return self.towers(history)
        starts = range(0, len(history.items), self.recompute_rows)
        parts = [history.take(slice(start, start + self.recompute_rows)) for start in starts]
        return torch.cat([checkpoint(self.towers, part, use_reentrant=False) for part in parts])

    def validation_step(self, batch: Queries, batch_idx: int) -> None:
        self.val_metrics.update(self.ranks(batch))

    def test_step(self, batch: Queries, batch_idx: int) -> None:
        self.test_metrics.update(self.ranks(batch))

    def ranks(self, batch: Queries) -> Int[Tensor, " B"]:
        """Rank of each target in the whole catalogue, without excluded items.

        Requests without a history get the most popular items, as in serving: no training target has an empty history,
        so their query vectors are arbitrary.
        """
        queries = self.towers.queries(batch.history)
        items = self.evaluated_vectors if self.evaluated_vectors is not None else self.towers.all_item_vectors()
        target = batch.target[:, None]
        with without_autocast(queries):  # bf16 would produce many ties
            found = catalogue_ranks(queries.float(), items.float(), batch.excluded_rows, batch.excluded_items, target)
        ranks = found.ranks[:, 0]
        new = (batch.history.lengths == 0).nonzero()[:, 0]
        if len(new):
            none = batch.excluded_rows[:0]  # they have seen no item
            same, popularity = torch.ones(len(new), 1, device=new.device), self.popularity[1:, None]
            ranks[new] = catalogue_ranks(same, popularity, none, none, target[new]).ranks[:, 0]
        return ranks

    def on_validation_epoch_start(self) -> None:
        self.evaluated_vectors = self.towers.all_item_vectors()

    def on_test_epoch_start(self) -> None:
        self.evaluated_vectors = self.towers.all_item_vectors()

    def on_validation_epoch_end(self) -> None:
        self.evaluated_vectors = None
        for name, value in self.val_metrics.take("val/").items():
            self.log(name, value, prog_bar=name == "val/ndcg@10", sync_dist=True)

    def on_test_epoch_end(self) -> None:
        self.evaluated_vectors = None
        self.log_dict(self.test_metrics.take("test/"), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        parameters: list[Any] = list(self.parameters())
        if self.use_sparse_gradients():
            tables = [table.weight for table in self.item_tables]
            others = [weight for weight in parameters if not any(weight is table for table in tables)]
            parameters = [{"params": others}, {"params": tables, "rowwise": True}]
        optimizer = self.optimizer(parameters)
        return with_schedule(optimizer, self.warmup_steps, self.final_lr, lambda: self.progress)
