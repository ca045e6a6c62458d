"""Penalty on the norm of user states."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class NormPenalty(nn.Module):
    """L2 penalty on user states before normalisation, which keeps them in numeric range.

        weight · n, or with a cap weight · max(n − cap, 0)²         n = batch mean of ‖state‖₂

    Args:
        weight: λ.
        cap: mean norm up to which the penalty is 0; None: no cap.
    """

    def __init__(self, weight: float = 1e-4, cap: float | None = None) -> None:
        super().__init__()
        if weight < 0 or (cap is not None and cap < 0):
            raise ValueError(f"weight is {weight} and cap {cap}; expected numbers of at least 0, or no cap")
        self.weight, self.cap = weight, cap

    def forward(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """
        Args:
            norm: mean norm of the states in a batch.
        """
        return self.weight * (norm if self.cap is None else torch.clamp(norm - self.cap, min=0) ** 2)
