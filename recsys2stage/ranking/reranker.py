"""The ranking model: the retriever's calibrated score plus the correction of a scorer.

Item tables (vectors, popularity, features) are buffers, so the state_dict is self-contained.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.columns import PAD
from recsys2stage.options import MAX_WIDTH, check_integer
from recsys2stage.ranking.linear import LinearFit, LinearLists, fit_linear
from recsys2stage.ranking.scorers import RankerInputs, ScorerFactory
from recsys2stage.ranking.scorers.base import fit_scale
from recsys2stage.ranking.scorers.deep import DIRECT_SCALE, Deep, Wide
from recsys2stage.retrieval.features import FeatureTable
from recsys2stage.retrieval.towers import unit
from recsys2stage.shapes import CandidateBatch

PARTS = ("score", "rank", "margin", "popularity", "features", "state", "vectors", "recent")  # removable by `without`
VECTOR_PARTS = ("state", "vectors", "recent")  # of them, those that are vectors of the retriever
MAX_KEPT = 1 << 24  # numbers of a table of all items that is computed once, 4 bytes each


class Reranker(nn.Module):
    """Scores candidates, (B, C).

        logit = scale · (retriever score − center) + scorer(user state, item vectors, newest events, features)

    Features of a candidate: the calibrated score (the first term), log rank, margin (calibrated difference to the best
    score of the list), `is_unknown`, popularity z-score, declared item features encoded by a FeatureTable, and
    standardized signal features. State and vectors are L2-normalized, whatever the retriever's similarity.

    If an ID is masked, all ID-based inputs are zero: vector, retriever score, rank, margin, ID-based signal features
    and the base logit; `is_unknown` is 1. Popularity and declared features stay.

    For a cold item (no training events), the ID is masked, and popularity and the signal features that count its events
    are zero too: the means of the catalogue and of the candidates (DropoutNet, Volkovs et al., NeurIPS 2017). The
    retriever's score stays if its item tower computes it from features.

    Args:
        num_items: V.
        dim: width D of the retriever's vectors.
        features: name, kind, size and width of each declared item feature.
        scorer: called with (D, F).
        feature_dim: width of the embedding of a categorical or multi-valued feature.
        signals: {"name", "by_id", "counted"} of each of the S signal features; a name is SIGNAL.FEATURE.
        scores_cold: whether the retriever's scores of cold items are usable.
        without: inputs removed from the scorer (set to zero): parts (score, rank, margin, popularity, features, state,
            vectors, recent), signals, or single signal features. None: nothing is removed.
        rotated: whether user states are rotated to the space of the vectors, as beside a refitted retriever.
        mask_ids: whether the IDs of all candidates are always masked.
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
    encoded: Tensor | None
    rotation: Tensor | None
    units: Tensor | None

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
        rotated: bool = False,
        mask_ids: bool = False,
    ) -> None:
        super().__init__()
        check_integer("feature_dim", feature_dim, 1, MAX_WIDTH, example=16)
        self.scores_cold, self.mask_ids = scores_cold, mask_ids
        self.without = frozenset(without or ())
        names = [signal["name"] for signal in signals]
        inputs = {*PARTS, *names, *(name.partition(".")[0] for name in names)}
        if unknown := sorted(self.without - inputs):
            raise ValueError(
                f"without has {', '.join(unknown)}, expected some of {', '.join(sorted(inputs))}; leave the others out"
            )
        self.register_buffer("vectors", torch.zeros(num_items + 1, dim))  # of the retriever, not normalized
        self.register_buffer("rotation", torch.eye(dim) if rotated else None)
        self.register_buffer("popularity", torch.zeros(num_items + 1))
        self.register_buffer("cold", torch.zeros(num_items + 1, dtype=torch.bool))
        self.features = FeatureTable(num_items, features, feature_dim) if features else None
        # the features and the normalized vectors of all items, see `freeze`
        self.register_buffer("encoded", None, persistent=False)
        self.register_buffer("units", None, persistent=False)
        hidden = [bool({name, name.partition(".")[0]} & self.without) for name in names]
        self.register_buffer("hidden", torch.tensor(hidden, dtype=torch.bool), persistent=False)
        self.register_buffer("signal_mean", torch.zeros(len(names)))
        self.register_buffer("signal_scale", (~self.hidden).float())  # 0 if the feature is removed
        for flag in ("by_id", "counted"):
            self.register_buffer(f"signal_{flag}", torch.tensor([signal[flag] for signal in signals], dtype=torch.bool))
        # score, log rank, margin, is_unknown, popularity
        width = 5 + (self.features.width if self.features else 0) + len(names)
        self.scorer = scorer(dim, width)
        for module in self.scorer.modules():
            if isinstance(module, Deep):
                module.without = self.without & {"state", "vectors"}
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("center", torch.zeros(()))

    def forward(
        self, batch: CandidateBatch, masked: Bool[Tensor, "B C"] | None = None, cold: Bool[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B C"]:
        """
        Args:
            batch: candidates and ranker inputs of each request.
            masked: True where IDs are masked; None: nowhere.
            cold: True for candidates to treat as cold, in addition to the cold items; None: no others.
        """
        base, inputs = self.scorer_inputs(batch, masked, cold)
        return base + self.scorer(inputs)

    def scorer_inputs(
        self, batch: CandidateBatch, masked: Bool[Tensor, "B C"] | None = None, cold: Bool[Tensor, "B C"] | None = None
    ) -> tuple[Float[Tensor, "B C"], RankerInputs]:
        """The base logits, and what the scorer reads; arguments as in `forward`."""
        if self.mask_ids:
            masked = torch.ones_like(batch.items, dtype=torch.bool)
        cold = self.cold[batch.items] if cold is None else cold | self.cold[batch.items]
        if masked is None and not cold.any():  # as most requests are: nothing is hidden
            return self._assemble(batch, None, None, None)
        masked = torch.zeros_like(cold) if masked is None else masked
        return self._assemble(batch, masked | cold, cold, ~masked if self.scores_cold else ~(masked | cold))

    def _assemble(
        self, batch: CandidateBatch, masked: Tensor | None, cold: Tensor | None, scored: Tensor | None
    ) -> tuple[Float[Tensor, "B C"], RankerInputs]:
        """The inputs with hidden parts, (B, C) each: None hides nothing.

        Args:
            batch: as in `forward`.
            masked: where inputs that are based on the ID are hidden.
            cold: where inputs that count the item's events are hidden.
            scored: where the retriever's score is shown.
        """
        real, scale = batch.items != PAD, self.log_scale.exp()
        best = batch.score.masked_fill(~real, -torch.inf).amax(dim=1, keepdim=True)
        base = shown(scale * (batch.score - self.center), scored)
        rank = batch.rank.to(base.dtype).log()
        own = [
            self.ablate("score", base),
            self.ablate("rank", shown(rank, scored)),
            self.ablate("margin", shown((scale * (batch.score - best)).where(real, 0), scored)),
            torch.zeros_like(base) if masked is None else masked.to(base.dtype),
            self.ablate("popularity", shown(self.popularity[batch.items], None if cold is None else ~cold)),
        ]
        signals = ((batch.signals - self.signal_mean) * self.signal_scale).clamp(-5, 5)  # limits outliers
        if masked is not None and cold is not None:
            hidden = self.signal_by_id & masked[..., None] | self.signal_counted & cold[..., None]
            signals = signals.masked_fill(hidden, 0)
        features = torch.cat([torch.stack(own, dim=-1), self.item_features(batch.items), signals], dim=-1)
        recent_real = batch.recent != PAD
        if "vectors" in self.without:
            vectors = self.vectors.new_zeros(()).expand(*batch.items.shape, self.vectors.shape[1])
        else:
            vectors = shown(self.unit_vectors(batch.items), None if masked is None else ~masked[..., None])
        inputs = RankerInputs(
            state=self.ablate("state", unit(batch.state if self.rotation is None else batch.state @ self.rotation)),
            vectors=vectors,
            features=features,
            recent=self.unit_vectors(batch.recent),
            ages=batch.ages,
            real=torch.zeros_like(recent_real) if "recent" in self.without else recent_real,
            base=base,
            listed=real,
        )
        return base, inputs

    def learned_features(self) -> list[int]:
        """The scorer's features that learned weights encode, such as embeddings of classes: their columns."""
        first = 5  # after score, log rank, margin, is_unknown, popularity
        return [first + column for column in self.features.encoder.learned_columns()] if self.features else []

    @property
    def reads_ages(self) -> bool:
        """Whether the scorer reads the ages of the newest events."""
        return self.scorer.reads_ages and "recent" not in self.without

    def ablate(self, part: str, values: Tensor) -> Tensor:
        """Zeros if `part` is in `without`, else `values`."""
        return torch.zeros_like(values) if part in self.without else values

    def item_features(self, items: Int[Tensor, "B C"]) -> Float[Tensor, "B C G"]:
        """The encoded declared features."""
        if self.features is None or "features" in self.without:
            width = 0 if self.features is None else self.features.width
            return self.popularity.new_zeros(*items.shape, width)
        if self.encoded is not None:
            return F.embedding(items, self.encoded)
        distinct, inverse = torch.unique(items, return_inverse=True)  # a batch repeats its candidates many times
        return self.features(distinct)[inverse]

    def unit_vectors(self, items: Int[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
        """The normalized item vectors."""
        # an embedding's look-up of rows is several times as fast as an index
        return unit(F.embedding(items, self.vectors)) if self.units is None else F.embedding(items, self.units)

    @torch.no_grad()
    def freeze(self) -> "Reranker":
        """Switches to evaluation and computes what does not depend on the request, where it takes little memory.

        The weights must not change afterwards, until `train` is called.
        """
        self.eval()
        rows = len(self.popularity)
        if self.vectors.numel() <= MAX_KEPT:
            self.units = unit(self.vectors)
        features = None if "features" in self.without else self.features
        if features is not None and rows * features.width <= MAX_KEPT:
            self.encoded = features(torch.arange(rows, device=self.popularity.device))
        return self

    def train(self, mode: bool = True) -> "Reranker":
        self.encoded = self.units = None
        return super().train(mode)

    def load_item_tables(self, vectors: Tensor, counts: np.ndarray, features: Sequence[dict[str, Any]]) -> None:
        """Fills the buffers.

        Args:
            vectors: the retriever's item vectors, (V + 1, D).
            counts: training events of each item, (V + 1,).
            features: declared features with their arrays, as in `Dataset.item_features`.
        """
        self.vectors.copy_(vectors)
        log_share = np.log((counts[1:] + 1) / (counts[1:].sum() + len(counts) - 1))
        self.popularity[1:] = torch.from_numpy((log_share - log_share.mean()) / (log_share.std() + 1e-6))
        self.cold[1:] = torch.from_numpy(counts[1:] == 0)
        if self.features is not None:
            self.features.load_item_tables(features)

    def standardise(self, signals: Float[Tensor, "N S"]) -> None:
        """Fits the means and standard deviations of signal features to N candidates."""
        if not signals.numel():
            return
        values = signals.double()
        spread = values.std(dim=0, correction=0)
        self.signal_mean.copy_(values.mean(dim=0))
        self.signal_scale.copy_(torch.where((spread > 1e-6) & ~self.hidden, 1 / spread, 0))

    @property
    def wide(self) -> Wide | None:
        """The linear term of the scorer's features; None for scorers without one."""
        wide = getattr(self.scorer, "wide", None)
        return wide if isinstance(wide, Wide) else None

    @torch.no_grad()
    def fit_linear_term(self, batch: CandidateBatch, positive: Int[Tensor, " B"], users: np.ndarray) -> LinearFit:
        """Fits the linear term to lists; the scorer's other outputs must be 0, as before training.

        The declared features, whose encodings are learned, have weight 0.

        Args:
            batch: candidates.
            positive: index of the positive in each list.
            users: (B,) user of each list.
        """
        assert self.wide is not None
        base, inputs = self.scorer_inputs(batch)
        features = inputs.features.clone()
        features[..., 5 : 5 + (self.features.width if self.features else 0)] = 0
        fitted = fit_linear(LinearLists(base, features, positive, batch.items != PAD), users)
        self.wide.weight.copy_(fitted.weights[None] / DIRECT_SCALE)
        return fitted

    def calibrate(self, score: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]) -> None:
        """Fits the scale of the base logits (see `fit_scale`) and their center to a sample of lists.

        Args:
            score: retriever scores.
            positive: index of the positive in each list.
            real: False at padding.
        """
        with torch.no_grad():
            self.log_scale.fill_(math.log(fit_scale(score, positive, real)))
            self.center.copy_(score[real].mean())


def shown(values: Tensor, where: Tensor | None) -> Tensor:
    """Zeros but for `where`; None: all are shown."""
    return values if where is None else values * where
