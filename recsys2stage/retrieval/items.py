"""Item embeddings: a plain table and an item tower over IDs and features. Row 0 is padding and is always zero."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from recsys2stage.columns import PAD
from recsys2stage.options import MAX_WIDTH, check_integer, check_integers, check_number
from recsys2stage.retrieval.encoders.layers import Dropout
from recsys2stage.retrieval.features import FeatureTable


class ItemTable(nn.Module):
    """Learned embedding table, shared by histories and candidates.

    Args:
        num_items: V.
        dim: D.
        features: declared item features; ignored.
        std: standard deviation of the initial vectors. With cosine similarity only directions count, and AdamW turns
            short vectors faster than long ones: N(0, 1), as in PyTorch and nanoRecSys, learns several times slower than
            N(0, 0.02²).
    """

    knows_cold: ClassVar[bool] = False  # whether vectors of cold items (no training events) are usable

    def __init__(self, num_items: int, dim: int, features: Sequence[dict[str, Any]] = (), std: float = 0.02) -> None:
        super().__init__()
        check_integer("num_items", num_items)
        check_integer("dim", dim, 1, MAX_WIDTH, example=64)
        check_number("std", std, low=0, example=0.02)
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
        """Loads item features and which items are cold.

        Args:
            features: declared features with their arrays.
            trained: (V + 1,) bool, True for items with training events.
        """

    def every(self) -> Float[Tensor, "V D"]:
        """The vectors of all items 1..V."""
        return self(torch.arange(1, self.num_items + 1, device=self.table.weight.device))


class ItemTower(ItemTable):
    """Item tower over IDs and declared features, which also embeds cold items.

        id' = id, or a learned "unknown" vector if the ID is dropped or the item is cold (no training events)
        vector = id' + MLP([id', features]),    MLP: dropout → (Linear → ReLU → dropout)… → Linear

    The same tower embeds histories, targets and candidates, as in the model of a TAAC 2025 finalist.

    Args:
        num_items: V.
        dim: D.
        features: declared item features.
        feature_dim: width of a feature's embedding.
        hidden: widths of the hidden layers of the MLP; None: one layer of 2 D.
        id_dropout: probability in training that an item's ID is dropped, so that it is embedded by features alone.
        dropout: before the first layer and after each but the last.
        std: standard deviation of the initial ID vectors.
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
                "ItemTower needs item features, and the data declare none; declare some (source.init_args.items) or "
                "give vectors (item_vectors) in the config of prepare-data, or use items: ItemTable"
            )
        check_number("id_dropout", id_dropout, low=0, below=1, example=0.1, what="a probability")
        check_integer("feature_dim", feature_dim, 1, MAX_WIDTH, example=16)
        if hidden:  # an empty list: no hidden layer
            check_integers("hidden", hidden, 1, MAX_WIDTH, example=(128,))
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
        distinct, inverse = torch.unique(items, return_inverse=True)  # a batch repeats its items many times
        with_id = self.trained[distinct]
        if self.training:
            with_id = with_id & (torch.rand(len(distinct), device=with_id.device) >= self.id_dropout)
        ids = torch.where(with_id[:, None], self.table(distinct), self.unknown)
        # the finalist has no residual sum; with it IDs train as fast as in a plain table, and features act at once
        vectors = ids + self.mlp(torch.cat([ids, self.features(distinct)], dim=-1))
        return (vectors * (distinct != PAD)[:, None])[inverse]

    def load_item_tables(self, features: Sequence[dict[str, Any]], trained: Bool[Tensor, " W"]) -> None:
        self.features.load_item_tables(features)
        self.trained.copy_(trained)


ItemsFactory = Callable[[int, int, Sequence[dict[str, Any]]], ItemTable]  # (num_items, dim, features) -> ItemTable
