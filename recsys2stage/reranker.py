"""The second stage: the retriever's calibrated score, corrected by a scorer that sees user, item and item features.

Knows nothing of training. Everything it looks up by item lies in buffers, so its weights stand alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.features import FeatureTable
from recsys2stage.scorers import ScorerFactory
from recsys2stage.towers import unit


class Reranker(nn.Module):
    """Scores candidates, (B, C).

        logit = scale · (retriever score − center) + scorer(user state, item vector, product, features)

    Features of a candidate: the calibrated score (the first term), log rank, `is_unknown`, the popularity z-score and
    the declared item features, as a FeatureTable makes numbers of them. State and vectors are made unit for the scorer,
    whatever the retriever's similarity is.

    Where an id is masked, everything that comes from the item's id is zero: vector, product, retriever score, rank and
    the base logit; `is_unknown` is 1. Popularity and declared features stay.

    Args:
        num_items: V.
        dim: width D of the retriever's vectors.
        features: name, kind, size and width of each declared item feature.
        scorer: called with (D, F).
        feature_dim: width of the vector that a feature becomes, but for numeric ones.
    """

    vectors: Tensor
    popularity: Tensor
    center: Tensor

    def __init__(
        self, num_items: int, dim: int, features: Sequence[dict[str, Any]], scorer: ScorerFactory, feature_dim: int = 16
    ) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_items + 1, dim))  # as the retriever made them
        self.register_buffer("popularity", torch.zeros(num_items + 1))
        self.features = FeatureTable(num_items, features, feature_dim) if features else None
        width = 4 + (self.features.width if self.features else 0)  # score, log rank, is_unknown, popularity
        self.scorer = scorer(dim, width)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("center", torch.zeros(()))

    def forward(
        self,
        state: Float[Tensor, "B D"],
        items: Int[Tensor, "B C"],
        score: Float[Tensor, "B C"],
        rank: Int[Tensor, "B C"],
        masked: Bool[Tensor, "B C"],
    ) -> Float[Tensor, "B C"]:
        """
        Args:
            state: query vectors of the users.
            items: candidates.
            score: the retriever's score: product of the user's query and the item's vector.
            rank: the retriever's rank, from 1.
            masked: where ids are masked.
        """
        known = (~masked).to(score.dtype)
        base = self.log_scale.exp() * (score - self.center) * known
        by_id = torch.stack([base, rank.to(score.dtype).log() * known, masked.to(score.dtype)], dim=-1)
        vectors = unit(self.vectors[items]) * known[..., None]
        features = torch.cat([by_id, self.item_features(items)], dim=-1)
        return base + self.scorer(unit(state), vectors, features)

    def item_features(self, items: Int[Tensor, "B C"]) -> Float[Tensor, "B C G"]:
        """What is known of items beside their ids."""
        distinct, place = torch.unique(items, return_inverse=True)  # a batch repeats its candidates many times
        known = self.popularity[distinct, None]
        if self.features is not None:
            known = torch.cat([known, self.features(distinct)], dim=-1)
        return known[place]

    def look_up(self, vectors: Tensor, counts: np.ndarray, features: Sequence[dict[str, Any]]) -> None:
        """Fills the buffers.

        Args:
            vectors: the retriever's item vectors, (V + 1, D).
            counts: training events of each item, (V + 1,).
            features: declared features with their arrays, as `Dataset.item_features` gives them.
        """
        self.vectors.copy_(vectors)
        log_share = np.log((counts[1:] + 1) / (counts[1:].sum() + len(counts) - 1))
        self.popularity[1:] = torch.from_numpy((log_share - log_share.mean()) / (log_share.std() + 1e-6))
        if self.features is not None:
            self.features.look_up(features)

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
        scales = torch.logspace(-1, 2, 61) / torch.where(spread > 0, spread, 1)
        losses = [nn.functional.cross_entropy((s * apart).masked_fill(~real, -torch.inf), positive) for s in scales]
        with torch.no_grad():
            self.log_scale.copy_(scales[int(torch.stack(losses).argmin())].log())
            self.center.copy_(score[real].mean())
