"""The interaction-aware MLP of nanoRecSys (github.com/zheliu17/nanoRecSys)."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.scorers.base import Scorer

WIDE_SCALE = 10.0  # AdamW moves all weights alike; a few direct ones can and should learn faster than many layered ones


class MLP(Scorer):
    """User state, item vector, their product and the features, through Linear → LayerNorm → ReLU → Dropout layers.

    The features also act on the score directly, as in wide & deep learning (Cheng et al. 2016): main effects such as
    popularity are learned before the layers begin to know the lists by heart. LayerNorm stands where nanoRecSys has
    BatchNorm: it treats a masked candidate alike whatever else is in the batch.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the layers.
        dropout: after each of them.
    """

    def __init__(self, dim: int, num_features: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.2) -> None:
        super().__init__()
        # the first layer acts on the user once and on each candidate: the same sum as over their concatenation
        self.of_user = nn.Linear(dim, hidden[0], bias=False)
        self.of_candidate = nn.Linear(2 * dim + num_features, hidden[0])
        layers: list[nn.Module] = [nn.LayerNorm(hidden[0]), nn.ReLU(), nn.Dropout(dropout)]
        for width, following in itertools.pairwise(hidden):
            layers += [nn.Linear(width, following), nn.LayerNorm(following), nn.ReLU(), nn.Dropout(dropout)]
        self.wide = nn.Linear(num_features, 1, bias=False)
        last = nn.Linear(hidden[-1], 1)
        self.rest = nn.Sequential(*layers, last)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(self.wide.weight)

    def forward(
        self, state: Float[Tensor, "B D"], vectors: Float[Tensor, "B C D"], features: Float[Tensor, "B C F"]
    ) -> Float[Tensor, "B C"]:
        state = state * state.size(-1) ** 0.5  # unit vectors to unit variance
        vectors = vectors * vectors.size(-1) ** 0.5
        candidate = torch.cat([vectors, state[:, None] * vectors, features], dim=-1)
        deep = self.rest(self.of_user(state)[:, None] + self.of_candidate(candidate))
        return (deep + WIDE_SCALE * self.wide(features)).squeeze(-1)
