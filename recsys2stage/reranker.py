"""The second stage: the retriever's calibrated score, corrected by a scorer that sees user, item and item features.

Knows nothing of training. Everything it looks up by item lies in buffers, so its weights stand alone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.columns import UNKNOWN
from recsys2stage.scorers import ScorerFactory


class Reranker(nn.Module):
    """Scores candidates, (B, C).

        logit = scale · (retriever score − center) + scorer(user state, item vector, product, features)

    Features of a candidate: the retriever's score and log rank, `is_unknown`, the popularity z-score and the declared
    item features (an embedding of each categorical value, the mean embedding of multi-valued ones, numeric ones
    standardised with a flag for "not known").

    Where an id is masked, everything that comes from the item's id is zero: vector, product, retriever score, rank and
    the base logit; `is_unknown` is 1. Popularity and declared features stay.

    Args:
        num_items: V.
        dim: width D of the retriever's vectors.
        features: name, kind, size and width of each declared item feature.
        scorer: called with (D, F).
        feature_dim: width of the embedding of a categorical or multi-valued feature.
    """

    vectors: Tensor
    popularity: Tensor
    center: Tensor

    def __init__(
        self, num_items: int, dim: int, features: Sequence[dict[str, Any]], scorer: ScorerFactory, feature_dim: int = 16
    ) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("vectors", torch.zeros(num_items + 1, dim))
        self.register_buffer("popularity", torch.zeros(num_items + 1))
        self.embeddings = nn.ModuleDict()
        width = 4  # score, log rank, is_unknown, popularity
        for number, feature in enumerate(features):
            name, rows = f"feature{number}", num_items + 1  # by number: a module cannot hold parts named type or a.b
            if feature["kind"] == "numeric":
                self.register_buffer(f"values_of_{name}", torch.zeros(rows, 2))  # standardised value, "is known"
                width += 2
            else:
                self.register_buffer(f"values_of_{name}", torch.zeros(rows, feature["values"], dtype=torch.int32))
                padding = UNKNOWN if feature["kind"] == "multi" else None
                self.embeddings[name] = nn.EmbeddingBag(feature["size"], feature_dim, mode="mean", padding_idx=padding)
                width += feature_dim
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
            state: unit query vectors of the users.
            items: candidates.
            score: the retriever's score (cosine).
            rank: the retriever's rank, from 1.
            masked: where ids are masked.
        """
        known = (~masked).to(score.dtype)
        by_id = torch.stack([score * self.log_scale.exp(), rank.to(score.dtype).log(), masked.to(score.dtype)], dim=-1)
        by_id[..., :2] *= known[..., None]
        vectors = self.vectors[items] * known[..., None]
        features = torch.cat([by_id, self.item_features(items)], dim=-1)
        base = self.log_scale.exp() * (score - self.center) * known
        return base + self.scorer(state, vectors, features)

    def item_features(self, items: Int[Tensor, "B C"]) -> Float[Tensor, "B C G"]:
        """What is known of items beside their ids."""
        distinct, place = torch.unique(items, return_inverse=True)  # a batch repeats its candidates many times
        columns = [self.popularity[distinct, None]]
        for number, feature in enumerate(self.features):
            values = self.get_buffer(f"values_of_feature{number}")[distinct]
            columns.append(values if feature["kind"] == "numeric" else self.embeddings[f"feature{number}"](values))
        return torch.cat(columns, dim=-1)[place]

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
        for number, feature in enumerate(features):
            values = torch.from_numpy(np.asarray(feature["values"]))
            if feature["kind"] == "numeric":
                known = values.isfinite()
                real = values[known].double()
                standard = (values - real.mean()) / (real.std(correction=0) + 1e-6) if len(real) else values
                values = torch.stack([torch.where(known, standard, 0), known], dim=-1)
            self.get_buffer(f"values_of_feature{number}").copy_(values.view(len(values), -1))

    def calibrate(self, score: Float[Tensor, "B C"], positive: Int[Tensor, " B"], real: Bool[Tensor, "B C"]) -> None:
        """Sets scale and center so that the softmax of the base logits fits the positives of some lists best.

        Args:
            score: retriever scores.
            positive: place of the positive in each list.
            real: which places hold a candidate.
        """
        scales = torch.logspace(0, 2.5, 51)
        losses = [nn.functional.cross_entropy((s * score).masked_fill(~real, -torch.inf), positive) for s in scales]
        with torch.no_grad():
            self.log_scale.copy_(scales[int(torch.stack(losses).argmin())].log())
            self.center.copy_(score[real].mean())
