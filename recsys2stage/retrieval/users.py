"""User tower: user features as a first token of the history and as feature-wise modulation (FiLM)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_WIDTH, check_integer
from recsys2stage.retrieval.encoders.layers import Dropout
from recsys2stage.retrieval.features import FeatureEncoder
from recsys2stage.shapes import Embedded


class UserTower(nn.Module):
    """Encodes user features as a vector: the first token of the history, and the input of FiLM modulation.

        user = dropout(SiLU(Linear(features)))
        scale, shift = Linear(user), initialized to zero
        event = event · (1 + tanh(scale)) + shift

    As in the model of a TAAC 2025 finalist (FiLM: Perez et al. 2018), but with SiLU instead of ReLU: with so few
    inputs, a high learning rate can make all ReLUs die, and then all users stay alike. In training, the features of
    some users are dropped, so that the model can also serve users without features.

    Args:
        dim: width D.
        features: declared user features.
        token: whether the vector is the first token of the history.
        film: whether it scales and shifts every event. With a plain ItemTable, whose initial vectors are short, the
            shifts dominate and training starts slowly; with an ItemTower it does not.
        feature_dim: width of a feature's embedding.
        dropout: probability in training that an element of the vector is dropped, and that a user's features are.
    """

    token: bool
    local = True  # whether `condition` treats each event alone; a subclass that overrides it sets it anew

    def __init__(
        self,
        dim: int,
        features: Sequence[dict[str, Any]],
        token: bool = True,
        film: bool = True,
        feature_dim: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not features:
            raise ValueError(
                "UserTower needs user features, and the data declare none; declare some (source.init_args.users) "
                "in the config of prepare-data, or leave user out"
            )
        if not (token or film):
            raise ValueError("UserTower has token: false and film: false, so it has no effect; set one or both to true")
        check_integer("feature_dim", feature_dim, 1, MAX_WIDTH, example=16)
        self.token = token
        self.features = FeatureEncoder(features, feature_dim)
        self.linear = nn.Linear(self.features.width, dim)
        self.dropout = Dropout(dropout)
        self.film = nn.Linear(dim, 2 * dim) if film else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, values: tuple[Tensor, ...] | None, users: int) -> Float[Tensor, "B D"]:
        """
        Args:
            values: (B, P) of each declared feature; None: all features are missing.
            users: B.
        """
        missing_values = self.features.missing_values(users, self.linear.weight.device)
        if values is None:
            features: Sequence[Tensor] = missing_values
        elif self.training:
            dropped = torch.rand(users, 1, device=self.linear.weight.device) < self.dropout.p
            features = [torch.where(dropped, *both) for both in zip(missing_values, values, strict=True)]
        else:
            features = values
        return self.dropout(F.silu(self.linear(self.features(features))))

    def condition(self, x: Embedded, user: Float[Tensor, "B D"]) -> Embedded:
        """Scales and shifts the embedded events by FiLM."""
        if self.film is None:
            return x
        scale, shift = self.film(user)[:, None].chunk(2, dim=-1)
        return x * (1 + scale.tanh()) + shift

    def load_user_features(self, features: Sequence[dict[str, Any]]) -> None:
        """Fits the scales of numeric features to the values of all users.

        Args:
            features: declared user features with their arrays.
        """
        self.features.load_item_tables(features)


UserFactory = Callable[[int, Sequence[dict[str, Any]]], UserTower]  # (dim, features) -> UserTower
