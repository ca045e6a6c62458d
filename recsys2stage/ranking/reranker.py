"""The second stage: the retriever's calibrated score, corrected by a scorer that sees user, item and item features.

Knows nothing of training. Everything it looks up by item lies in buffers, so its weights stand alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.columns import PAD
from recsys2stage.features import FeatureTable
from recsys2stage.ranking.scorers import RankerInputs, ScorerFactory
from recsys2stage.retrieval.towers import unit
from recsys2stage.shapes import CandidateBatch

PARTS = ("score", "rank", "margin", "popularity", "features", "state", "vectors", "recent")  # what may be left out


class Reranker(nn.Module):
    """Scores candidates, (B, C).

        logit = scale · (retriever score − center) + scorer(user state, item vectors, newest events, features)

    Features of a candidate: the calibrated score (the first term), log rank, the calibrated distance to the list's best
    score, `is_unknown`, the popularity z-score, the declared item features, as a FeatureTable makes numbers of them,
    and the signals, standardised. State and vectors are made unit for the scorer, whatever the retriever's similarity.

    Where an id is masked, everything that comes from the item's id is zero: vector, retriever score, rank, margin, the
    signals that say so, and the base logit; `is_unknown` is 1. Popularity and declared features stay.

    A cold item, one that no training event shows, goes by what may be known of it: its id is masked, and popularity
    and the signals that count its events are zero too, the means of the catalogue and of the candidates (DropoutNet,
    Volkovs et al., NeurIPS 2017). The retriever's score stays where its item tower made it of features.

    Args:
        num_items: V.
        dim: width D of the retriever's vectors.
        features: name, kind, size and width of each declared item feature.
        scorer: called with (D, F).
        feature_dim: width of the vector that a feature becomes, but for numeric ones.
        signals: {"name", "by_id", "counted"} of each of the S numbers of signals; a name is SIGNAL.NUMBER.
        scores_cold: whether the retriever's score of a cold item means something.
        without: what the scorer is not shown (it sees zeros): parts of its input (score, rank, margin, popularity,
            features, state, vectors, recent), signals, or single numbers of signals. None: it sees everything.
    """

    vectors: Tensor
    popularity: Tensor
    center: Tensor
    signal_mean: Tensor
    signal_scale: Tensor
    signal_by_id: Tensor
    signal_counted: Tensor
    cold: Tensor
    hidden: Tensor

    def __init__(
        self,
        num_items: int,
        dim: int,
        features: Sequence[dict[str, Any]],
        scorer: ScorerFactory,
        feature_dim: int = 16,
        signals: Sequence[dict[str, Any]] = (),
        scores_cold: bool = False,
        without: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.scores_cold = scores_cold
        self.without = frozenset(without or ())
        names = [signal["name"] for signal in signals]
        shown = {*PARTS, *names, *(name.partition(".")[0] for name in names)}
        if unknown := sorted(self.without - shown):
            raise ValueError(f"without names {', '.join(unknown)}, expected some of {', '.join(sorted(shown))}")
        self.register_buffer("vectors", torch.zeros(num_items + 1, dim))  # as the retriever made them
        self.register_buffer("popularity", torch.zeros(num_items + 1))
        self.register_buffer("cold", torch.zeros(num_items + 1, dtype=torch.bool))
        self.features = FeatureTable(num_items, features, feature_dim) if features else None
        hidden = [bool({name, name.partition(".")[0]} & self.without) for name in names]
        self.register_buffer("hidden", torch.tensor(hidden, dtype=torch.bool), persistent=False)
        self.register_buffer("signal_mean", torch.zeros(len(names)))
        self.register_buffer("signal_scale", (~self.hidden).float())  # 0 where a number is not shown
        for flag in ("by_id", "counted"):
            self.register_buffer(f"signal_{flag}", torch.tensor([signal[flag] for signal in signals], dtype=torch.bool))
        # score, log rank, margin, is_unknown, popularity
        width = 5 + (self.features.width if self.features else 0) + len(names)
        self.scorer = scorer(dim, width)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("center", torch.zeros(()))

    def forward(
        self, listed: CandidateBatch, masked: Bool[Tensor, "B C"], cold: Bool[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B C"]:
        """
        Args:
            listed: candidates, and what is told of each request.
            masked: where ids are masked.
            cold: which are taken for cold beside those that are; None: no others.
        """
        cold = self.cold[listed.items] if cold is None else cold | self.cold[listed.items]
        scored = ~masked if self.scores_cold else ~(masked | cold)
        masked, real = masked | cold, listed.items != PAD
        best = listed.score.masked_fill(~real, -torch.inf).amax(dim=1, keepdim=True)
        base = self.log_scale.exp() * (listed.score - self.center) * scored
        margin = (self.log_scale.exp() * (listed.score - best)).where(real, 0) * scored
        own = [
            self.shown("score", base),
            self.shown("rank", listed.rank.to(base.dtype).log() * scored),
            self.shown("margin", margin),
            masked.to(base.dtype),
            self.shown("popularity", self.popularity[listed.items] * ~cold),
        ]
        signals = ((listed.signals - self.signal_mean) * self.signal_scale).clamp(-5, 5)  # far out means little more
        hidden = self.signal_by_id & masked[..., None] | self.signal_counted & cold[..., None]
        signals = signals.masked_fill(hidden, 0)
        features = torch.cat([torch.stack(own, dim=-1), self.item_features(listed.items), signals], dim=-1)
        there = listed.recent != PAD
        shown = RankerInputs(
            state=self.shown("state", unit(listed.state)),
            vectors=self.shown("vectors", unit(self.vectors[listed.items]) * ~masked[..., None]),
            features=features,
            recent=unit(self.vectors[listed.recent]),
            ages=listed.ages,
            real=torch.zeros_like(there) if "recent" in self.without else there,
        )
        return base + self.scorer(shown)

    @property
    def reads_ages(self) -> bool:
        """Whether the scorer looks at how long ago the newest events were."""
        return self.scorer.reads_ages and "recent" not in self.without

    def shown(self, part: str, values: Tensor) -> Tensor:
        return torch.zeros_like(values) if part in self.without else values

    def item_features(self, items: Int[Tensor, "B C"]) -> Float[Tensor, "B C G"]:
        """The declared features as vectors."""
        if self.features is None:
            return self.popularity.new_zeros(*items.shape, 0)
        distinct, place = torch.unique(items, return_inverse=True)  # a batch repeats its candidates many times
        return self.shown("features", self.features(distinct))[place]

    def load_item_tables(self, vectors: Tensor, counts: np.ndarray, features: Sequence[dict[str, Any]]) -> None:
        """Fills the buffers.

        Args:
            vectors: the retriever's item vectors, (V + 1, D).
            counts: training events of each item, (V + 1,).
            features: declared features with their arrays, as `Dataset.item_features` gives them.
        """
        self.vectors.copy_(vectors)
        log_share = np.log((counts[1:] + 1) / (counts[1:].sum() + len(counts) - 1))
        self.popularity[1:] = torch.from_numpy((log_share - log_share.mean()) / (log_share.std() + 1e-6))
        self.cold[1:] = torch.from_numpy(counts[1:] == 0)
        if self.features is not None:
            self.features.load_item_tables(features)

    def standardise(self, signals: Float[Tensor, "N S"]) -> None:
        """Takes the means and spreads of signals from those of some candidates."""
        if not signals.numel():
            return
        values = signals.double()
        spread = values.std(dim=0, correction=0)
        self.signal_mean.copy_(values.mean(dim=0))
        self.signal_scale.copy_(torch.where((spread > 1e-6) & ~self.hidden, 1 / spread, 0))

    def calibrate(self, score: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]) -> None:
        """Sets scale and center so that the softmax of the base logits fits the positives of some lists best.

        Args:
            score: retriever scores.
            positive: place of the positive in each list.
            real: which places hold a candidate.
        """
        count = real.sum(1, keepdim=True).clamp(min=1)
        apart = score - score.where(real, 0).sum(1, keepdim=True) / count  # all of a score that a softmax feels
        spread = apart[real].square().mean().sqrt()
        # cosines of a list lie within some tenths, dot products may lie hundreds apart: the grid is in units of spread
        scales = torch.logspace(-1, 2, 61, device=score.device) / torch.where(spread > 0, spread, 1)
        losses = [nn.functional.cross_entropy((s * apart).masked_fill(~real, -torch.inf), positive) for s in scales]
        with torch.no_grad():
            self.log_scale.copy_(scales[int(torch.stack(losses).argmin())].log())
            self.center.copy_(score[real].mean())
