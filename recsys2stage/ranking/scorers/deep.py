"""What scorers are made of: what each of them sees of a candidate, layers over it, and features with a direct say."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.ranking.scorers.base import Shown
from recsys2stage.retrieval.encoders.layers import Dropout

# AdamW moves all weights alike; a few direct ones can and should learn faster than many layered ones
DIRECT_SCALE = 10.0


def spread(vectors: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
    """Unit vectors with numbers of unit variance."""
    return vectors * vectors.size(-1) ** 0.5


def seen(shown: Shown) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B C W"]]:
    """What every scorer sees of the user, and of each candidate: its vector, the product of both, and the features.

    W = 2D + F.
    """
    user, vectors = spread(shown.state), spread(shown.vectors)
    return user, torch.cat([vectors, user[:, None] * vectors, shown.features], dim=-1)


class Deep(nn.Module):
    """Linear → LayerNorm → ReLU → Dropout layers over a user's and a candidate's numbers together; 0 at first.

    LayerNorm stands where nanoRecSys has BatchNorm: it treats a masked candidate alike whatever else is in the batch.

    Args:
        user: how many numbers are known of the user, D.
        candidate: how many of each candidate, W.
        hidden: widths of the layers.
        dropout: after each of them.
        outputs: how many numbers come out, N.
    """

    def __init__(self, user: int, candidate: int, hidden: Sequence[int], dropout: float, outputs: int = 1) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden is {list(hidden)}, expected the width of at least one layer, such as [256, 128]")
        # the first layer acts on the user once and on each candidate: the same sum as over their concatenation
        self.of_user = nn.Linear(user, hidden[0], bias=False)
        self.of_candidate = nn.Linear(candidate, hidden[0])
        layers: list[nn.Module] = [nn.LayerNorm(hidden[0]), nn.ReLU(), Dropout(dropout)]
        for width, following in itertools.pairwise(hidden):
            layers += [nn.Linear(width, following), nn.LayerNorm(following), nn.ReLU(), Dropout(dropout)]
        last = nn.Linear(hidden[-1], outputs)
        self.rest = nn.Sequential(*layers, last)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(last.weight)

    def forward(self, user: Float[Tensor, "B D"], candidates: Float[Tensor, "B C W"]) -> Float[Tensor, "B C N"]:
        return self.rest(self.of_user(user)[:, None] + self.of_candidate(candidates))


class Wide(nn.Linear):
    """Features acting directly on the score, as in wide & deep learning (Cheng et al. 2016); 0 at first.

    Main effects such as popularity are learned before the layers begin to know the lists by heart.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, 1, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, features: Float[Tensor, "B C F"]) -> Float[Tensor, "B C"]:
        return DIRECT_SCALE * super().forward(features).squeeze(-1)
