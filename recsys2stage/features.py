"""Declared features of items and users as numbers that a network can read.

N rows (items or users), P values of a feature in a row, G numbers made of all the features of a row.

A declared feature is {"name", "kind", "size", "values"}: `size` counts the classes of a categorical or multi-valued
feature, "unknown" included, and `values` is P; where data are looked up, `values` is the array itself. What is not
known has a learned vector of its own. It starts at zero, the mean of the known ones, so that it means something even
where the data hold nothing unknown.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.columns import UNKNOWN


class FeatureTable(nn.Module):
    """What is known of each item, made numbers. All values lie in buffers, so that its weights stand alone.

    Args:
        num_items: V; row 0 of the buffers is padding, of which nothing is known.
        features: declared item features.
        dim: width of the vector that a feature becomes, but for numeric ones, which become two numbers.
    """

    def __init__(self, num_items: int, features: Sequence[dict[str, Any]], dim: int) -> None:
        super().__init__()
        self.encoder = FeatureEncoder(features, dim)
        self.width = self.encoder.width
        for number, values in enumerate(self.encoder.nothing(num_items + 1)):
            self.register_buffer(f"values{number}", values)

    def forward(self, items: Int[Tensor, " N"]) -> Float[Tensor, "N G"]:
        return self.encoder([self.get_buffer(f"values{n}")[items] for n in range(len(self.encoder.parts))])

    def load_item_tables(self, features: Sequence[dict[str, Any]]) -> None:
        """Takes all items' values and their scales from the data.

        Args:
            features: declared features with their arrays, as `Dataset.item_features` gives them.
        """
        self.encoder.load_item_tables(features)
        for number, feature in enumerate(features):
            self.get_buffer(f"values{number}").copy_(feature_table(feature))


class FeatureEncoder(nn.Module):
    """Values of declared features to numbers of about unit variance, side by side.

    Args:
        features: declared features.
        dim: width of the vector that a feature becomes, but for numeric ones, which become two numbers.
    """

    width: int  # G

    def __init__(self, features: Sequence[dict[str, Any]], dim: int) -> None:
        super().__init__()
        # by number: a module cannot hold parts named type or a.b
        self.parts: Sequence[Part] = nn.ModuleList(  # type: ignore[assignment]  # torch: of modules
            KINDS[feature["kind"]](feature, dim) for feature in features
        )
        self.width = sum(part.width for part in self.parts)

    def forward(self, values: Sequence[Tensor]) -> Float[Tensor, "N G"]:
        """
        Args:
            values: (N, P) of each feature, in the order they were declared.
        """
        return torch.cat([part(of_one) for part, of_one in zip(self.parts, values, strict=True)], dim=-1)

    def nothing(self, rows: int, device: torch.device | None = None) -> list[Tensor]:
        """Values, as `forward` takes them, of rows of which nothing is known."""
        return [part.nothing(rows, device) for part in self.parts]

    def load_item_tables(self, features: Sequence[dict[str, Any]]) -> None:
        """Takes the scales of numeric features from all rows' values.

        Args:
            features: declared features with their arrays.
        """
        for part, feature in zip(self.parts, features, strict=True):
            if isinstance(part, Numeric):
                part.load_item_tables(feature_table(feature))


def feature_table(feature: dict[str, Any]) -> Tensor:
    """All rows' values of a feature, (rows, P)."""
    values = torch.from_numpy(np.asarray(feature["values"]))
    return values.view(len(values), -1)


class Part(nn.Module):
    """One feature's values to numbers.

    Args:
        feature: the declared feature.
        dim: width of the vector that it becomes, unless it is numeric.
    """

    missing: float  # the value that says "not known"
    dtype: torch.dtype  # of values

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.values, self.width = int(feature["values"]), dim

    def nothing(self, rows: int, device: torch.device | None) -> Tensor:
        """Values of rows of which nothing is known, (rows, P)."""
        return torch.full((rows, self.values), self.missing, dtype=self.dtype, device=device)


class Classes(Part):
    """A learned vector for each class of a categorical feature; the mean of those that a multi-valued one has.

    Row 0 of the table is "unknown": it stands where a row has no class at all, and is no part of a mean.
    """

    missing, dtype = UNKNOWN, torch.int32

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__(feature, dim)
        self.table = nn.EmbeddingBag(feature["size"], dim, mode="mean", padding_idx=UNKNOWN)  # N(0, 1), row 0 is zero

    def forward(self, values: Int[Tensor, "N P"]) -> Float[Tensor, "N D"]:
        known = (values != UNKNOWN).any(dim=-1, keepdim=True)
        return torch.where(known, self.table(values), self.table.weight[UNKNOWN])


class Numeric(Part):
    """A number, standardised by the known ones, and whether it is known; where it is not, 0 and 0."""

    missing, dtype = torch.nan, torch.float32

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__(feature, dim)
        self.width = 2
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, values: Float[Tensor, "N 1"]) -> Float[Tensor, "N 2"]:
        known = values.isfinite()
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        standard = (torch.where(known, values, mean) - mean) / std
        return torch.cat([standard, known.to(standard.dtype)], dim=-1)

    def load_item_tables(self, values: Float[Tensor, "N 1"]) -> None:
        real = values[values.isfinite()].double()
        if len(real):
            spread = real.std(correction=0)
            self.get_buffer("mean").copy_(real.mean())
            self.get_buffer("std").copy_(torch.where(spread > 0, spread, 1))


class Pretrained(Part):
    """A vector from elsewhere, through Linear → LayerNorm; a learned "unknown" where any number of it is missing."""

    missing, dtype = torch.nan, torch.float32

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__(feature, dim)
        self.linear, self.norm = nn.Linear(self.values, dim), nn.LayerNorm(dim)
        self.unknown = nn.Parameter(torch.zeros(dim))

    def forward(self, values: Float[Tensor, "N P"]) -> Float[Tensor, "N D"]:
        known = values.isfinite().all(dim=-1, keepdim=True)
        values = values.where(known, 0).to(self.linear.weight.dtype)
        return torch.where(known, self.norm(self.linear(values)), self.unknown)


KINDS: dict[str, type[Part]] = {
    "categorical": Classes,
    "multi": Classes,
    "numeric": Numeric,
    "vector": Pretrained,
}
