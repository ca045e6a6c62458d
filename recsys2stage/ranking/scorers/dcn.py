"""Explicit crosses of all that is seen: the deep & cross network DCN-v2 of Wang et al. 2021 (arXiv 2008.13535)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.ranking.scorers.base import Scorer, Shown
from recsys2stage.ranking.scorers.deep import Deep, Wide, seen
from recsys2stage.retrieval.encoders.layers import Dropout


class DCN(Scorer):
    """Cross layers beside the MLP's layers (the paper's parallel structure); both see the same x_0.

    x_0 is the user's state, the item's vector, their product and the features. A cross layer (eq. 1; eq. 2 with `rank`)

        x_{l+1} = x_0 ∘ (W x_l + b) + x_l

    raises the degree of the products by one. Unlike in the paper there is a dropout on what comes out of the last one,
    as lists of candidates are few; the features also act on the score directly, as in all scorers here.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the deep layers.
        dropout: after each of them, and after the last cross layer.
        crosses: how many cross layers.
        rank: of their W, as a product of a narrow and a wide map; None: full.
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
        for name, value in {"crosses": crosses, "rank": rank}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.crosses = nn.ModuleList(_linear(width, rank) for _ in range(crosses))
        self.drop = Dropout(dropout)
        self.last = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.last.weight)
        self.deep = Deep(dim, 2 * dim + num_features, hidden, dropout)
        self.wide = Wide(num_features)

    def forward(self, shown: Shown) -> Float[Tensor, "B C"]:
        user, candidates = seen(shown)
        first = torch.cat([user[:, None].expand(-1, candidates.size(1), -1), candidates], dim=-1)
        crossed = first
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        both = self.deep(user, candidates) + self.last(self.drop(crossed))
        return both.squeeze(-1) + self.wide(shown.features)


def _linear(width: int, rank: int | None) -> nn.Module:
    """x → W x + b, keeping the variance, so that products of many numbers begin moderate."""
    parts = [nn.Linear(width, width)] if rank is None else [nn.Linear(width, rank, bias=False), nn.Linear(rank, width)]
    for part in parts:
        nn.init.kaiming_uniform_(part.weight, nonlinearity="linear")
    nn.init.zeros_(parts[-1].bias)
    return nn.Sequential(*parts)
