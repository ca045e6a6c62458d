"""The interaction-aware MLP of nanoRecSys (github.com/zheliu17/nanoRecSys)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from recsys2stage.ranking.scorers.base import Scorer, Shown
from recsys2stage.ranking.scorers.deep import Deep, Wide, seen


class MLP(Scorer):
    """User state, item vector, their product and the features, through Linear → LayerNorm → ReLU → Dropout layers.

    The features also act on the score directly, as in all scorers here.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the layers.
        dropout: after each of them.
    """

    def __init__(self, dim: int, num_features: int, hidden: Sequence[int] = (256, 128), dropout: float = 0.2) -> None:
        super().__init__()
        self.deep = Deep(dim, 2 * dim + num_features, hidden, dropout)
        self.wide = Wide(num_features)

    def forward(self, shown: Shown) -> Float[Tensor, "B C"]:
        return self.deep(*seen(shown)).squeeze(-1) + self.wide(shown.features)
