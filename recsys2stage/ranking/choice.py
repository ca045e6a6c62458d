"""Choice between the best ranker of a fit and its own parts, so that the second stage is not beaten by one of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from recsys2stage.artifacts import atomic_write
from recsys2stage.checkpoints import OPTIONS, load_checkpoint
from recsys2stage.columns import PAD
from recsys2stage.metrics import compute_metrics, compute_rank
from recsys2stage.ranking.candidates import Candidates, Lists
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.shapes import CandidateBatch

FOLDS = 5  # of the cross-validation over the validation users
NOT_RETRIEVED = 1 << 30  # rank of a target that is not among the candidates
METRIC = "ndcg@10"


def choose_part(reranker: Reranker, candidates: Candidates, best: Path, device: torch.device) -> dict[str, Any]:
    """Finds which part of a ranker is the best one, and stores in best.ckpt whether its IDs are always masked.

    Args:
        reranker: of the fit; it keeps its weights.
        candidates: the lists of the fit.
        best: the checkpoint that the fit has selected.
        device: of the weights.

    Returns:
        For the manifest: "chosen" (ranker, linear or retriever, each perhaps "with IDs masked"), and under "validation"
        NDCG@10 on the validation lists, without and with IDs masked. Empty if there are no validation lists.
    """
    if not (candidates.lists.fold == "select").any():
        return {}
    checkpoint = load_checkpoint(best, f"recsys fit --output {best.parent}")
    trained = {name: value.clone() for name, value in reranker.state_dict().items()}
    own = {
        name.removeprefix("reranker."): value
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("reranker.")
    }
    training = reranker.training
    try:
        reranker.load_state_dict(own)
        reranker.eval()
        values, users = validation_values(reranker, candidates, device)
        linear = reranker.wide is not None and bool(reranker.wide.weight.any())
    finally:
        reranker.load_state_dict(trained)
        reranker.train(training)
    gains = values[True] - values[False]
    chosen = "ranker" if checkpoint["global_step"] else "linear" if linear else "retriever"
    if is_gain(gains, users):
        chosen = f"{chosen} with IDs masked"
        checkpoint[OPTIONS]["mask_ids"] = True
        with atomic_write(best) as temporary:
            torch.save(checkpoint, temporary)
    names = {False: METRIC, True: f"masked_{METRIC}"}
    return {"chosen": chosen, "validation": {names[masked]: float(value.mean()) for masked, value in values.items()}}


@torch.no_grad()
def validation_values(
    reranker: Reranker, candidates: Candidates, device: torch.device
) -> tuple[dict[bool, Float[np.ndarray, " N"]], np.ndarray]:
    """NDCG@10 of each validation list, without and with IDs masked, and its user, (N,)."""
    numbers = np.flatnonzero(candidates.lists.fold == "select")
    values: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for start in range(0, len(numbers), candidates.batch_size):
        lists = candidates.read(numbers[start : start + candidates.batch_size])
        batch = CandidateBatch(*(part.to(device) for part in lists.candidates))
        for masked, found in values.items():
            logits = reranker(batch, torch.full_like(batch.items, masked, dtype=torch.bool))
            found.append(compute_metrics(ranks(logits.cpu(), lists).numpy())[METRIC])
    return {masked: np.concatenate(found) for masked, found in values.items()}, candidates.lists.user[numbers]


def ranks(logits: Float[Tensor, "B C"], lists: Lists) -> Tensor:
    """Rank of each list's target, (B,) int64; NOT_RETRIEVED where it is not among the candidates."""
    rank = compute_rank(logits.masked_fill(lists.candidates.items == PAD, -torch.inf), lists.positive.clamp(min=0))
    return torch.where(lists.positive >= 0, rank, NOT_RETRIEVED)


def is_gain(gains: Float[np.ndarray, " N"], users: np.ndarray) -> bool:
    """Whether the alternative is better, in cross-validation over users.

    For each fold the alternative is taken if it is better on the other folds' users; it must then have gained on the
    fold's users in sum, and on all of them. A difference that a few users make is not taken.

    Args:
        gains: metric of the alternative minus that of the usual choice, for each list.
        users: (N,) user of each list.
    """
    fold = np.unique(users, return_inverse=True)[1].reshape(-1) % FOLDS
    measured = 0.0
    for number in range(FOLDS):
        inside = fold == number
        if (~inside).any() and gains[~inside].sum() > 0:
            measured += float(gains[inside].sum())
    return measured > 0 and float(gains.sum()) > 0
