"""Explicit feature crosses: the deep & cross network DCN-v2 of Wang et al. 2021 (arXiv 2008.13535)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.options import MAX_LAYERS, MAX_WIDTH, check_integer
from recsys2stage.ranking.scorers.base import RankerInputs, Scorer
from recsys2stage.ranking.scorers.deep import Deep, Wide, concat_inputs
from recsys2stage.retrieval.encoders.layers import Dropout


class DCN(Scorer):
    """Cross layers parallel to the MLP's layers (the paper's parallel structure); both take the same input x_0.

    x_0 concatenates user state, item vector, their elementwise product and the features. A cross layer (eq. 1; eq. 2
    with `rank`)

        x_{l+1} = x_0 ∘ (W x_l + b) + x_l

    raises the polynomial degree by one. Unlike the paper, there is dropout on the output of the last cross layer, since
    there are few candidate lists to train on. A linear term of the features is added to the score, as in all scorers.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the deep layers.
        dropout: rate after each deep layer, and after the last cross layer.
        crosses: number of cross layers.
        rank: rank of W, factorized as (W, rank) x (rank, W); None: full rank.
    """

    def __init__(
        self,
        dim: int,
        num_features: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.2,
        crosses: int = 2,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        width = 3 * dim + num_features
        check_integer("crosses", crosses, 1, MAX_LAYERS, example=2)
        check_integer("rank", rank, 1, MAX_WIDTH, other="null for full rank", example=64)
        self.crosses = nn.ModuleList(_linear(width, rank) for _ in range(crosses))
        self.drop = Dropout(dropout)
        self.last = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.last.weight)
        self.deep = Deep(dim, 2 * dim + num_features, hidden, dropout)
        self.wide = Wide(num_features)

    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]:
        user, candidates = concat_inputs(inputs)
        first = torch.cat([user[:, None].expand(-1, candidates.size(1), -1), candidates], dim=-1)
        crossed = first
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        both = self.deep(user, candidates) + self.last(self.drop(crossed))
        return both.squeeze(-1) + self.wide(inputs.features)


def _linear(width: int, rank: int | None) -> nn.Module:
    """x → W x + b with variance-preserving initialization, so that the products start at moderate size."""
    parts = [nn.Linear(width, width)] if rank is None else [nn.Linear(width, rank, bias=False), nn.Linear(rank, width)]
    for part in parts:
        nn.init.kaiming_uniform_(part.weight, nonlinearity="linear")
    nn.init.zeros_(parts[-1].bias)
    return nn.Sequential(*parts)
