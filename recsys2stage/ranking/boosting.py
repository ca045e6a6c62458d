"""Fitting of what a scorer does not learn by gradients: boosted parts, and weights chosen by validation lists."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning import Trainer
from torch import Tensor

from recsys2stage.checkpoints import load_checkpoint
from recsys2stage.data.batches import in_chunks
from recsys2stage.ranking.candidates import Candidates, Lists
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import BoostedScorer, CalibratedScorer, ListTable
from recsys2stage.retrieval.histories import seed

MOST_LISTS = 5_000  # that the weights are fitted to: there are few weights
ROWS = 256  # lists that are read at once
WEIGHTS = "reranker.scorer.weights"  # of a calibrated scorer, in a ranker's checkpoint


class Booster:
    """Fits boosted and calibrated scorers on the mined lists; does nothing for other scorers.

    The features of boosted parts must not change while they grow. So the ranker's own weights, such as the scale of the
    retriever's score, stay as calibrated, and features that learned weights encode are 0 in the table of the lists,
    where nothing can split on them.

    Args:
        reranker: with the scorer.
        candidates: the mined lists.
        id_dropout: share of the lists with all IDs masked.
        cold_dropout: share of the candidates that are treated as cold.
    """

    def __init__(self, reranker: Reranker, candidates: Candidates, id_dropout: float, cold_dropout: float) -> None:
        self.reranker, self.candidates = reranker, candidates
        self.id_dropout, self.cold_dropout = id_dropout, cold_dropout
        self.parts: list[BoostedScorer] = [
            part for part in reranker.scorer.modules() if isinstance(part, BoostedScorer)
        ]
        self.calibrated = reranker.scorer if isinstance(reranker.scorer, CalibratedScorer) else None
        self.alone = bool(self.parts) and not any(True for _ in reranker.scorer.parameters())
        self.prepared = False

    def setup(self, trainer: Trainer) -> None:
        """Prepares the trainer and the weights before a fit.

        Raises:
            ValueError: for a fit in several processes, and where a part cannot be fitted.
        """
        if self.calibrated is None:
            return
        name = type(self.calibrated).__name__
        if trainer.world_size > 1:
            raise ValueError(
                f"the fit has {trainer.world_size} processes, expected 1 with the scorer {name}, which is fitted to "
                "all lists at once; set --trainer.devices 1 --trainer.num_nodes 1"
            )
        for part in self.parts:
            part.check_installed()
        if self.parts:
            for weight in self.reranker.parameters(recurse=False):
                weight.requires_grad_(False)
        if self.alone:
            trainer.limit_train_batches = 1  # an epoch is one step of growth; the batch only logs the loss
        if self.candidates.refit is not None:
            # the validation lists are training lists now: the weights of the selected fit stay
            path = self.candidates.refit / "best.ckpt"
            selected = load_checkpoint(path, f"recsys fit --output {self.candidates.refit}, without refit")
            weights = selected["state_dict"].get(WEIGHTS)
            if weights is None or weights.shape != self.calibrated.weights.shape:
                raise ValueError(
                    f"{path} has no weights of a {name} with {len(self.calibrated.weights)} parts, expected the ranker "
                    "that was selected with this scorer; refit with its config"
                )
            self.calibrated.weights.copy_(weights)

    def grow(self, epochs: int) -> bool:
        """Grows the boosted parts to this many epochs; False if nothing is left to train."""
        if not self.parts:
            return True
        if not self.prepared:
            table = self.read_table()
            for part in self.parts:
                part.prepare(table, seed())
            self.prepared = True
        grown = [part.grow(epochs) for part in self.parts]
        return not self.alone or any(grown)

    @torch.no_grad()
    def read_table(self) -> ListTable:
        """All training lists; the masks are sampled once, by the seed of the fit."""
        numbers = self.candidates.training_lists()
        sizes = np.diff(self.candidates.lists.offsets)[numbers]
        generator = torch.Generator().manual_seed(seed())
        learned, device = self.reranker.learned_features(), self.reranker.center.device
        features, base, label = np.empty((0, 0), np.float32), np.empty(sizes.sum(), np.float32), list[np.ndarray]()
        start, training = 0, self.reranker.training
        self.reranker.eval()
        for part in in_chunks(len(numbers), ROWS):
            lists = self.candidates.read(numbers[part])
            items = lists.candidates.items
            masked = (torch.rand(len(items), 1, generator=generator) < self.id_dropout).expand_as(items)
            cold = torch.rand(items.shape, generator=generator) < self.cold_dropout
            batch = type(lists.candidates)(*(value.to(device) for value in lists.candidates))
            own, inputs = self.reranker.scorer_inputs(batch, masked.to(device), cold.to(device))
            real = inputs.listed
            rows = inputs.features[real].float()
            rows[:, learned] = 0
            end = start + len(rows)
            if not features.size:
                features = np.empty((sizes.sum(), rows.size(1)), np.float32)
            features[start:end], base[start:end] = rows.cpu().numpy(), own[real].float().cpu().numpy()
            positive = torch.zeros(items.shape, dtype=torch.int8)
            label.append(positive.scatter_(1, lists.positive[:, None], 1)[real.cpu()].numpy())
            start = end
        self.reranker.train(training)
        return ListTable(features, base, np.concatenate(label), sizes)

    def calibrate(self, trainer: Trainer) -> None:
        """Fits the weights of a calibrated scorer to the validation lists; after a refit they stay."""
        if self.calibrated is None or self.candidates.refit is not None:
            return
        found = list(self._validation_logits(trainer))
        if found:
            width = max(logits.size(1) for logits, _, _ in found)
            padded = [pad(one, width) for one in found]
            logits, positive, real = (torch.cat(values) for values in zip(*padded, strict=True))
            with torch.no_grad():
                self.calibrated.calibrate(logits, positive, real)

    def _validation_logits(self, trainer: Trainer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Logits (B, C, K), positive (B,) and mask of real candidates (B, C) of lists with their target."""
        assert self.calibrated is not None
        count = 0
        for batch in self.candidates.val_dataloader():
            lists: Lists = trainer.strategy.batch_to_device(batch)
            chosen = lists.positive >= 0
            with torch.no_grad():
                base, inputs = self.reranker.scorer_inputs(lists.candidates)
                logits = torch.stack([base + part for part in self.calibrated.parts(inputs)], dim=-1)
            yield logits[chosen].float(), lists.positive[chosen], inputs.listed[chosen]
            count += int(chosen.sum())
            if count >= MOST_LISTS:
                return


def pad(
    lists: tuple[Float[Tensor, "B C K"], Int[Tensor, " B"], Bool[Tensor, "B C"]], width: int
) -> tuple[Float[Tensor, "B W K"], Int[Tensor, " B"], Bool[Tensor, "B W"]]:
    """Lists of one width."""
    logits, positive, real = lists
    more = width - logits.size(1)
    return torch.nn.functional.pad(logits, (0, 0, 0, more)), positive, torch.nn.functional.pad(real, (0, more))
