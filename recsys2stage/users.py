"""What is known of users, and how it bears on their histories."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.shapes import Embedded


class UserTower(nn.Module):
    """User features to a vector that opens the history as its first token and modulates it (FiLM).

    Args:
        dim: width D.
        features: declared user features.
        token: whether the vector is the first token of the history.
        film: whether it scales and shifts every event, x * (1 + scale) + shift (Perez et al. 2018).
    """

    token: bool

    def __init__(self, dim: int, features: Sequence[dict[str, Any]], token: bool = True, film: bool = True) -> None:
        super().__init__()
        self.token = token

    def forward(self, values: tuple[Tensor, ...] | None, users: int) -> Float[Tensor, "B D"]:
        """
        Args:
            values: (B, P) of each declared feature; None: nothing is known.
            users: B.
        """
        raise NotImplementedError

    def condition(self, x: Embedded, person: Float[Tensor, "B D"]) -> Embedded:
        """Events as the user's features scale and shift them."""
        return x

    def look_up(self, features: Sequence[dict[str, Any]]) -> None:
        """Takes the scale of numeric features from all users' values."""


UserFactory = Callable[[int, Sequence[dict[str, Any]]], UserTower]  # (dim, features) -> UserTower
