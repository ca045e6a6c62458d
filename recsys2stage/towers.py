"""The retriever's two towers: histories to queries, items to vectors, compared by cosine. Knows nothing of training."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.encoders import EncoderFactory
from recsys2stage.items import ItemTable
from recsys2stage.shapes import Embedded, History


class TwoTower(nn.Module):
    """An encoder over histories and an item table that it shares with the candidates.

    Args:
        num_items: V.
        max_length: longest history L.
        dim: width D.
        encoder: called with (dim, max_length).
        items: called with (num_items, dim).
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        dim: int,
        encoder: EncoderFactory,
        items: Callable[[int, int], ItemTable] = ItemTable,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.items = items(num_items, dim)
        self.encoder = encoder(dim, max_length)

    def forward(self, history: History) -> Embedded:
        """Unit query vectors at every place, (B, L, D)."""
        x = self.items(history.items)
        return unit(self.encoder(x, history.lengths, history.times, history.request))

    def queries(self, history: History) -> Float[Tensor, "B D"]:
        """The query at the newest place of each history; of an empty history, what the encoder says of padding."""
        last = (history.lengths - 1).clamp(min=0)
        return self(history)[torch.arange(len(last), device=last.device), last]

    def item_vectors(self, items: Int[Tensor, " U"]) -> Float[Tensor, "U D"]:
        """Unit vectors of items."""
        return unit(self.items(items))

    def every_item(self) -> Float[Tensor, "V D"]:
        """Unit vectors of items 1..V."""
        return unit(self.items.every())


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last axis, at full precision even under bf16 autocast."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-6)
