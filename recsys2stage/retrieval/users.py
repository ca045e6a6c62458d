"""What is known of users, and how it bears on their histories."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.features import FeatureEncoder
from recsys2stage.retrieval.encoders.layers import Dropout
from recsys2stage.shapes import Embedded


class UserTower(nn.Module):
    """User features to a vector that opens the history as its first token and modulates it (FiLM).

        person = dropout(SiLU(Linear(features)))
        scale, shift = Linear(person), zero at first
        event = event · (1 + tanh(scale)) + shift

    As a TAAC 2025 finalist has it, after Perez et al. 2018, but with SiLU for ReLU: with so few numbers to read, a high
    learning rate can leave no ReLU that is ever above zero, and then all users are alike for good. In training some
    users are taken for strangers, so that the model can also serve people of whom nothing is known.

    Args:
        dim: width D.
        features: declared user features.
        token: whether the vector is the first token of the history.
        film: whether it scales and shifts every event. Beside a plain ItemTable, whose vectors are short at first,
            shifts drown them and training starts slowly; beside an ItemTower it does not.
        feature_dim: width of the vector that a feature becomes.
        dropout: share of the vector's numbers that are dropped in training, and of users taken for strangers.
    """

    token: bool

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
                "UserTower is for users with features, and the data declare none; name some (source.init_args.users) "
                "in the config of prepare-data, or leave user out"
            )
        if not (token or film):
            raise ValueError("UserTower has token: false and film: false, and would do nothing; choose one, or both")
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
            values: (B, P) of each declared feature; None: nothing is known.
            users: B.
        """
        nothing = self.features.nothing(users, self.linear.weight.device)
        if values is None:
            known: Sequence[Tensor] = nothing
        elif self.training:
            stranger = torch.rand(users, 1, device=self.linear.weight.device) < self.dropout.p
            known = [torch.where(stranger, *both) for both in zip(nothing, values, strict=True)]
        else:
            known = values
        return self.dropout(F.silu(self.linear(self.features(known))))

    def condition(self, x: Embedded, person: Float[Tensor, "B D"]) -> Embedded:
        """Events as the user's features scale and shift them."""
        if self.film is None:
            return x
        scale, shift = self.film(person)[:, None].chunk(2, dim=-1)
        return x * (1 + scale.tanh()) + shift

    def load_item_tables(self, features: Sequence[dict[str, Any]]) -> None:
        """Takes the scale of numeric features from all users' values.

        Args:
            features: declared user features with their arrays.
        """
        self.features.load_item_tables(features)


UserFactory = Callable[[int, Sequence[dict[str, Any]]], UserTower]  # (dim, features) -> UserTower
