"""The average of several rankers of one set of candidate lists, such as those of several seeds."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.checkpoints import build
from recsys2stage.columns import PAD
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers.base import fit_scale
from recsys2stage.shapes import CandidateBatch

MAX_MEMBERS = 16
EQUAL = ("num_items", "dim", "features", "feature_dim", "signals", "scores_cold")  # options that members share
AGAIN = "make it again: recsys export-bundle"
MOST_LISTS = 2_000  # that a ranker's logits are calibrated on

# logits (B, C), index of the positive in each list (B,), −1 if it is missing, and the mask of real candidates (B, C)
Logits = tuple[Tensor, Tensor, Tensor]


class Average(nn.Module):
    """Scores candidates by the weighted mean of several rankers' logits, (B, C).

    The weights make the logits of each ranker those of calibrated probabilities, whatever the scale of its loss; their
    mean is then the logarithm of the geometric mean of the probabilities, up to a constant of the list.

    Args:
        members: the rankers, of one set of items, features and signals.
        weights: (K,).
    """

    weights: Tensor

    def __init__(self, members: Sequence[Reranker], weights: Float[Tensor, " K"]) -> None:
        super().__init__()
        self.members: Sequence[Reranker] = nn.ModuleList(members)  # type: ignore[assignment]  # torch: of modules
        self.register_buffer("weights", weights.float())

    def forward(
        self, batch: CandidateBatch, masked: Bool[Tensor, "B C"] | None = None, cold: Bool[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B C"]:
        """Arguments as of `Reranker`."""
        return torch.stack([member(batch, masked, cold) for member in self.members], dim=-1) @ self.weights

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the factor of the retriever's score in the mean logit."""
        return (torch.stack([member.log_scale.exp() for member in self.members]) @ self.weights).log()

    @property
    def vectors(self) -> Tensor:
        return self.members[0].vectors

    @property
    def signal_mean(self) -> Tensor:
        return self.members[0].signal_mean

    @property
    def reads_ages(self) -> bool:
        """Whether any scorer reads the ages of the newest events."""
        return any(member.reads_ages for member in self.members)

    @torch.no_grad()
    def freeze(self) -> "Average":
        """As `Reranker.freeze`; the rankers then share one table of item vectors."""
        first, *others = self.members
        for member in self.members:
            member.freeze()
        for member in others:
            if torch.equal(member.vectors, first.vectors):
                member.vectors, member.units = first.vectors, first.units
        return self.eval()


SecondStage = Reranker | Average


def average_weights(scored: Sequence[Sequence[Logits]]) -> Float[Tensor, " K"]:
    """Weights of a mean of calibrated logits: each ranker's are scaled so that their softmax fits the positives.

    Args:
        scored: of each ranker, batches of logits of the same lists; at most MOST_LISTS lists are used.
    """
    scales = []
    for batches in scored:
        width = max((logits.size(1) for logits, _, _ in batches), default=0)
        padded = [
            (F.pad(logits, (0, width - logits.size(1))), positive, F.pad(real, (0, width - real.size(1))))
            for logits, positive, real in batches
        ]
        logits, positive, real = (torch.cat(parts)[:MOST_LISTS] for parts in zip(*padded, strict=True))
        chosen = positive >= 0
        scales.append(fit_scale(logits[chosen], positive[chosen], real[chosen]))
    return torch.tensor(scales) / len(scales)


def score_lists(ranker: Reranker, lists: Iterable[tuple[CandidateBatch, Tensor]]) -> list[Logits]:
    """Logits of batches of lists, for `average_weights`."""
    scored, count = [], 0
    for batch, positive in lists:
        with torch.no_grad():
            scored.append((ranker(batch), positive, batch.items != PAD))
        count += len(positive)
        if count >= MOST_LISTS:
            break
    return scored


def shared_weights(parts: Sequence[dict[str, Tensor]], weights: Float[Tensor, " K"]) -> dict[str, Tensor]:
    """The weights of an average from those of its rankers; the table of item vectors is stored once."""
    return {"weights": weights} | {
        f"members.{number}.{name}": parts[0][name]
        if name == "vectors" and torch.equal(value, parts[0][name])
        else value
        for number, part in enumerate(parts)
        for name, value in part.items()
    }


def build_average(options: Sequence[dict[str, Any]], weights: dict[str, Tensor], where: str | Path) -> Average:
    """Builds an average from options and weights of a file.

    Args:
        options: of each ranker.
        weights: as `shared_weights` gives them.
        where: the file they come from, for the error.

    Raises:
        ValueError: if options and weights are not those of one average.
    """
    if not 2 <= len(options) <= MAX_MEMBERS:
        raise ValueError(f"{where} has an average of {len(options)} rankers, expected 2 to {MAX_MEMBERS}; {AGAIN}")
    for name in EQUAL:
        if any(one.get(name) != options[0].get(name) for one in options):
            raise ValueError(f"{where} has rankers that differ in {name}, expected equal ones; {AGAIN}")
    parts: list[dict[str, Tensor]] = [{} for _ in options]
    for name, value in weights.items():
        _, _, rest = name.partition("members.")
        number, _, own = rest.partition(".")
        if name == "weights":
            continue
        if not (number.isdecimal() and int(number) < len(parts) and own):
            raise ValueError(f"{where} has the weights {name[:80]!r}, which no ranker of the average has; {AGAIN}")
        parts[int(number)][own] = value
    shares = weights.get("weights")
    if not isinstance(shares, Tensor) or shares.shape != (len(options),) or not (shares > 0).all():
        raise ValueError(f"{where} lacks the weights of {len(options)} rankers, numbers above 0; {AGAIN}")
    members = [build(Reranker, one, part, where) for one, part in zip(options, parts, strict=True)]
    return Average(members, shares).eval()
