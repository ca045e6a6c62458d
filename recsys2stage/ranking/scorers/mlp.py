"""The interaction-aware MLP of nanoRecSys (github.com/zheliu17/nanoRecSys)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from recsys2stage.ranking.scorers.base import RankerInputs, Scorer
from recsys2stage.ranking.scorers.deep import Deep, Wide


class MLP(Scorer):
    """Linear → LayerNorm → ReLU → Dropout layers over user state, item vector, their product and the features.

    A linear term of the features is added to the score, as in all scorers.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the layers.
        dropout: rate after each layer.
    """

    def __init__(self, dim: int, num_features: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.2) -> None:
        super().__init__()
        self.deep = Deep(dim, 2 * dim + num_features, hidden, dropout)
        self.wide = Wide(num_features)

    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]:
        return self.deep.of_inputs(inputs).squeeze(-1) + self.wide(inputs.features)
