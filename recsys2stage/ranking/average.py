"""The average of several rankers of one set of candidate lists, such as those of several seeds."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from recsys2stage.checkpoints import build
from recsys2stage.columns import PAD
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.shapes import CandidateBatch

MAX_MEMBERS = 16
EQUAL = ("num_items", "dim", "features", "feature_dim", "signals", "scores_cold")  # options that members share
AGAIN = "make it again: recsys export-bundle"
MOST_LISTS = 1_000  # that the spread of a ranker's logits is measured on


class Average(nn.Module):
    """Scores candidates by the weighted mean of several rankers' logits, (B, C).

    With weights 1 / (K s_k), s_k the spread of a ranker's logits within lists, all rankers count alike, whatever the
    scale of their losses.

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


def spread(scored: Iterable[tuple[Float[Tensor, "B C"], Bool[Tensor, "B C"]]]) -> float:
    """Root mean square of logits around the mean of their list, over at most MOST_LISTS lists; 0 if they never differ.

    Args:
        scored: batches of logits, each with the mask of its real candidates.
    """
    squares, count, lists = 0.0, 0, 0
    for logits, real in scored:
        values = logits.double().where(real, 0)
        mean = values.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        squares += float((values - mean)[real].square().sum())
        count, lists = count + int(real.sum()), lists + len(real)
        if lists >= MOST_LISTS:
            break
    return (squares / max(count, 1)) ** 0.5


def score(ranker: Reranker, batches: Iterable[CandidateBatch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of batches of candidates and the masks of the real ones, for `spread`."""
    for batch in batches:
        with torch.no_grad():
            logits = ranker(batch)
        yield logits, batch.items != PAD


def equal_weights(spreads: Sequence[float]) -> Float[Tensor, " K"]:
    """Weights with which rankers of these spreads count alike; the scale of their mean is the mean of their scales."""
    values = torch.tensor(spreads, dtype=torch.float64)
    shares = torch.where(values > 0, values.mean() / values.clamp(min=1e-12), 1)
    return (shares / len(values)).float()


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
