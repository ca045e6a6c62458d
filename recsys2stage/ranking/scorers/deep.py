"""Building blocks of scorers: input concatenation, feed-forward layers and the linear term of the features."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_WIDTH, check_integers
from recsys2stage.ranking.scorers.base import RankerInputs
from recsys2stage.retrieval.encoders.layers import Dropout

# AdamW updates all weights at the same rate; the few weights of linear terms can and should learn faster
DIRECT_SCALE = 10.0


def spread(vectors: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
    """Rescales unit vectors so that their elements have unit variance."""
    return vectors * vectors.size(-1) ** 0.5


def concat_inputs(inputs: RankerInputs) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B C W"]]:
    """User vector, and for each candidate the concatenation of item vector, elementwise product and features.

    W = 2D + F.
    """
    user, vectors = spread(inputs.state), spread(inputs.vectors)
    return user, torch.cat([vectors, user[:, None] * vectors, inputs.features], dim=-1)


class Deep(nn.Module):
    """Linear → LayerNorm → ReLU → Dropout layers over user and candidate inputs; outputs 0 at initialization.

    LayerNorm replaces the BatchNorm of nanoRecSys: a masked candidate's output is independent of the batch.

    Args:
        user: number of user inputs, D.
        candidate: number of inputs per candidate, W.
        hidden: widths of the layers.
        dropout: rate after each layer.
        outputs: number of outputs, N.
    """

    def __init__(self, user: int, candidate: int, hidden: Sequence[int], dropout: float, outputs: int = 1) -> None:
        super().__init__()
        self.without: frozenset[str] = frozenset()  # inputs that are always zero, of state and vectors
        check_integers("hidden", hidden, 1, MAX_WIDTH, example=(256, 128))
        # equals one layer over the concatenation, but the user part is computed once per request
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

    def of_inputs(self, inputs: RankerInputs) -> Float[Tensor, "B C N"]:
        """`forward` of `concat_inputs`, without the concatenation and without inputs that are always zero."""
        dim, weight = inputs.state.size(-1), self.of_candidate.weight
        hidden = F.linear(inputs.features, weight[:, 2 * dim :], self.of_candidate.bias)
        user = None if "state" in self.without else spread(inputs.state)
        if "vectors" not in self.without:
            if user is None:
                hidden = hidden + F.linear(spread(inputs.vectors), weight[:, :dim])
            else:  # W v + P (u ∘ v) = (W + P diag(u)) v: linear in the item vector, with one matrix per request
                of_request = weight[:, :dim] + weight[:, dim : 2 * dim] * user[:, None]
                hidden = torch.baddbmm(hidden, inputs.vectors, of_request.transpose(1, 2), alpha=dim**0.5)
        if user is not None:
            hidden = hidden + self.of_user(user)[:, None]
        return self.rest(hidden)


class Wide(nn.Linear):
    """Linear term of the features, as in wide & deep learning (Cheng et al. 2016); 0 at initialization.

    It learns main effects such as popularity before the deep layers overfit the training lists.

    Args:
        num_features: F.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, 1, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, features: Float[Tensor, "B C F"]) -> Float[Tensor, "B C"]:
        return DIRECT_SCALE * super().forward(features).squeeze(-1)
