"""The item table: item numbers to vectors. Row 0 is padding and is always zero."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.columns import PAD


class ItemTable(nn.Module):
    """A learned vector for each item, shared by histories and candidates.

    Args:
        num_items: V.
        dim: D.
        features: declared item features, of which it makes nothing.
        std: of the initial vectors. Under a cosine only directions count, and AdamW turns a short vector sooner than a
            long one: N(0, 1), PyTorch's and nanoRecSys's, learns several times slower than N(0, 0.02²).
    """

    def __init__(self, num_items: int, dim: int, features: Sequence[dict[str, Any]] = (), std: float = 0.02) -> None:
        super().__init__()
        self.table = nn.Embedding(num_items + 1, dim, padding_idx=PAD)
        nn.init.normal_(self.table.weight, std=std)
        with torch.no_grad():
            self.table.weight[PAD] = 0

    def forward(self, items: Int[Tensor, "*S"]) -> Float[Tensor, "*S D"]:
        return self.table(items)

    @property
    def num_items(self) -> int:
        return self.table.num_embeddings - 1

    def look_up(self, features: Sequence[dict[str, Any]], trained: Tensor) -> None:
        """Takes what the data say of items.

        Args:
            features: declared features with their arrays.
            trained: (V + 1,) bool, which items have training events.
        """

    def every(self) -> Float[Tensor, "V D"]:
        """The vectors of all items 1..V."""
        return self.table(torch.arange(1, self.num_items + 1, device=self.table.weight.device))


ItemsFactory = Callable[[int, int, Sequence[dict[str, Any]]], ItemTable]  # (num_items, dim, features) -> ItemTable
