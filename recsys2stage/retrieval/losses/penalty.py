"""Penalty on the norm of user states."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recsys2stage.options import check_number


class NormPenalty(nn.Module):
    """L2 penalty on user states before normalization, which keeps them in numeric range.

        weight · n, or with a cap weight · max(n − cap, 0)²         n = batch mean of ‖state‖₂

    Args:
        weight: λ.
        cap: mean norm up to which the penalty is 0; None: no cap.
    """

    def __init__(self, weight: float = 1e-4, cap: float | None = None) -> None:
        super().__init__()
        check_number("weight", weight, low=0, example=1e-4)
        check_number("cap", cap, low=0, other="null for no cap", example=10.0)
        self.weight, self.cap = weight, cap

    def forward(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """
        Args:
            norm: mean norm of the states in a batch.
        """
        return self.weight * (norm if self.cap is None else torch.clamp(norm - self.cap, min=0) ** 2)
