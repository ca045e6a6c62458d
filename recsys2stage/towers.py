"""The retriever's two towers: histories to queries, items to vectors; a score is their cosine, and perhaps a bias."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.columns import MASK, PAD
from recsys2stage.encoders import EncoderFactory
from recsys2stage.items import ItemTable
from recsys2stage.shapes import History

ItemsFactory = Callable[[int, int], ItemTable]  # (num_items, dim) -> ItemTable


class TwoTower(nn.Module):
    """An encoder over histories and an item table that it shares with the candidates.

    Args:
        num_items: V.
        max_length: longest history L.
        dim: width D.
        encoder: called with (dim, max_length).
        items: called with (num_items, dim).
        tied: whether candidates are the vectors that histories are read with; else they have a table of their own.
        item_bias: whether each item has a learned bias, added to its cosine: one more coordinate, 1 in every query.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        dim: int,
        encoder: EncoderFactory,
        items: ItemsFactory = ItemTable,
        tied: bool = True,
        item_bias: bool = False,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.items = items(num_items, dim)
        self.untied = None if tied else items(num_items, dim)
        self.bias = nn.Embedding(num_items + 1, 1, padding_idx=PAD) if item_bias else None
        self.encoder = encoder(dim, max_length)
        self.mask = None if self.encoder.causal else nn.Parameter(0.02 * torch.randn(dim))  # stands for a hidden event
        if self.bias is not None:
            nn.init.zeros_(self.bias.weight)

    def forward(self, history: History) -> Float[Tensor, "B L E"]:
        """Query vectors at every place: unit vectors of width E = D, and a 1 where items have a bias (E = D + 1)."""
        x = self.items(history.items.clamp(min=PAD))
        if self.mask is not None:
            x = torch.where((history.items == MASK)[..., None], self.mask.to(x.dtype), x)
        query = unit(self.encoder(x, history.lengths, history.times, history.request))
        return query if self.bias is None else F.pad(query, (0, 1), value=1.0)

    def queries(self, history: History) -> Float[Tensor, "B E"]:
        """The query at the newest place of each history; of an empty history, what the encoder says of padding."""
        if self.mask is not None:
            history = asked_after(history)
        last = (history.lengths - 1).clamp(min=0)
        return self(history)[torch.arange(len(last), device=last.device), last]

    def item_vectors(self, items: Int[Tensor, " U"]) -> Float[Tensor, "U E"]:
        """Vectors whose products with queries are scores: unit vectors, and the bias where items have one."""
        vectors = unit((self.untied or self.items)(items))
        return vectors if self.bias is None else torch.cat([vectors, self.bias(items).to(vectors.dtype)], dim=-1)

    def every_item(self) -> Float[Tensor, "V E"]:
        """Vectors of items 1..V."""
        return self.item_vectors(torch.arange(1, self.items.num_items + 1, device=self.items.table.weight.device))


def asked_after(history: History) -> History:
    """A history with a hidden event at its end, at the time of the request or, where that is not told, of the newest.

    Every place is then asked at its own time, as encoders that see both sides expect.
    """
    items, lengths, times, request = history
    rows, last = torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)
    now = (times if request is None else request)[rows, last]
    items, times = F.pad(items, (0, 1)), F.pad(times, (0, 1))
    items[rows, lengths], times[rows, lengths] = MASK, now
    return History(items, lengths + 1, times, None if request is None else times)


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last axis, at full precision even under bf16 autocast."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1, eps=1e-6)
