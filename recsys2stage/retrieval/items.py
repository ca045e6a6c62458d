"""The item table: item numbers to vectors. Row 0 is padding and is always zero."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.columns import PAD
from recsys2stage.features import FeatureTable
from recsys2stage.retrieval.encoders.layers import Dropout


class ItemTable(nn.Module):
    """A learned vector for each item, shared by histories and candidates.

    Args:
        num_items: V.
        dim: D.
        features: declared item features, of which it makes nothing.
        std: of the initial vectors. Under a cosine only directions count, and AdamW turns a short vector sooner than a
            long one: N(0, 1), PyTorch's and nanoRecSys's, learns several times slower than N(0, 0.02²).
    """

    knows_cold: ClassVar[bool] = False  # whether the vector of an item without training events means something

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

    def load_item_tables(self, features: Sequence[dict[str, Any]], trained: Bool[Tensor, " W"]) -> None:
        """Takes what the data say of items.

        Args:
            features: declared features with their arrays.
            trained: (V + 1,) bool, which items have training events.
        """

    def every(self) -> Float[Tensor, "V D"]:
        """The vectors of all items 1..V."""
        return self(torch.arange(1, self.num_items + 1, device=self.table.weight.device))


class ItemTower(ItemTable):
    """Vectors from ids and declared features, so that an item that was never trained has one that means something.

        id' = id, or a learned "unknown" where the id is dropped or has had no training event
        vector = id' + MLP([id', features]),    MLP: dropout → (Linear → ReLU → dropout)… → Linear

    The same tower reads histories, answers and candidates, as that of a TAAC 2025 finalist.

    Args:
        num_items: V.
        dim: D.
        features: declared item features.
        feature_dim: width of the vector that a feature becomes.
        hidden: widths of the layers of the MLP; None: one of 2 D.
        id_dropout: probability with which an item of a call goes by its features alone, in training.
        dropout: before the first layer and after each but the last.
        std: of the initial vectors of ids.
    """

    knows_cold = True
    trained: Tensor

    def __init__(
        self,
        num_items: int,
        dim: int,
        features: Sequence[dict[str, Any]],
        feature_dim: int = 16,
        hidden: list[int] | None = None,
        id_dropout: float = 0.1,
        dropout: float = 0.1,
        std: float = 0.02,
    ) -> None:
        if not features:
            raise ValueError(
                "ItemTower is for items with features, and the data declare none; name some (source.init_args.items) "
                "or give vectors (item_vectors) in the config of prepare-data, or use items: ItemTable"
            )
        if not 0 <= id_dropout < 1:
            raise ValueError(f"id_dropout is {id_dropout}, expected a probability from 0 to below 1")
        super().__init__(num_items, dim, features, std)
        self.id_dropout = id_dropout
        self.features = FeatureTable(num_items, features, feature_dim)
        self.unknown = nn.Parameter(torch.zeros(dim))
        widths = [dim + self.features.width, *([2 * dim] if hidden is None else hidden)]
        layers: list[nn.Module] = [Dropout(dropout)]
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU(), Dropout(dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], dim))
        self.register_buffer("trained", torch.ones(num_items + 1, dtype=torch.bool))

    def forward(self, items: Int[Tensor, "*S"]) -> Float[Tensor, "*S D"]:
        distinct, place = torch.unique(items, return_inverse=True)  # a batch repeats its items many times
        known = self.trained[distinct]
        if self.training:
            known = known & (torch.rand(len(distinct), device=known.device) >= self.id_dropout)
        ids = torch.where(known[:, None], self.table(distinct), self.unknown)
        # the finalist has no sum; with it an id turns as fast as in a plain table while its features speak at once
        vectors = ids + self.mlp(torch.cat([ids, self.features(distinct)], dim=-1))
        return (vectors * (distinct != PAD)[:, None])[place]

    def load_item_tables(self, features: Sequence[dict[str, Any]], trained: Bool[Tensor, " W"]) -> None:
        self.features.load_item_tables(features)
        self.trained.copy_(trained)


ItemsFactory = Callable[[int, int, Sequence[dict[str, Any]]], ItemTable]  # (num_items, dim, features) -> ItemTable
