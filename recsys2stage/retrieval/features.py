"""Encoders of declared item and user features: embeddings, standardized numbers, projected vectors.

N rows (items or users), P values of a feature in a row, G width of all encoded features of a row.

A declared feature is {"name", "kind", "size", "values"}: `size` counts the classes of a categorical or multi-valued
feature, "unknown" included, and `values` is P; where data are loaded, `values` is the array itself. A missing value
has its own learned vector. It starts at zero, the mean of the others, so that it is meaningful even if no value is
missing in the training data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.columns import UNKNOWN


class FeatureTable(nn.Module):
    """Encoded features of each item. All values are buffers, so its state_dict is complete.

    Args:
        num_items: V; row 0 of the buffers is padding, with all values missing.
        features: declared item features.
        dim: width of each encoded feature; 2 for numeric features.
    """

    def __init__(self, num_items: int, features: Sequence[dict[str, Any]], dim: int) -> None:
        super().__init__()
        self.encoder = FeatureEncoder(features, dim)
        self.width = self.encoder.width
        for number, values in enumerate(self.encoder.missing_values(num_items + 1)):
            self.register_buffer(f"values{number}", values)

    def forward(self, items: Int[Tensor, " N"]) -> Float[Tensor, "N G"]:
        return self.encoder([self.get_buffer(f"values{n}")[items] for n in range(len(self.encoder.parts))])

    def load_item_tables(self, features: Sequence[dict[str, Any]]) -> None:
        """Loads the values of all items, and the scales of numeric features.

        Args:
            features: declared features with their arrays, as `Dataset.item_features` gives them.
        """
        self.encoder.load_item_tables(features)
        for number, feature in enumerate(features):
            self.get_buffer(f"values{number}").copy_(feature_table(feature))


class FeatureEncoder(nn.Module):
    """Encodes values of declared features to about unit variance and concatenates them.

    Args:
        features: declared features.
        dim: width of each encoded feature; 2 for numeric features.
    """

    width: int  # G

    def __init__(self, features: Sequence[dict[str, Any]], dim: int) -> None:
        super().__init__()
        # by number: submodules cannot be named type or a.b
        self.parts: Sequence[ColumnEncoder] = nn.ModuleList(  # type: ignore[assignment]  # torch: of modules
            ENCODERS[feature["kind"]](feature, dim) for feature in features
        )
        self.width = sum(part.width for part in self.parts)

    def forward(self, values: Sequence[Tensor]) -> Float[Tensor, "N G"]:
        """
        Args:
            values: (N, P) of each feature, in the order they were declared.
        """
        return torch.cat([part(column) for part, column in zip(self.parts, values, strict=True)], dim=-1)

    def missing_values(self, rows: int, device: torch.device | None = None) -> list[Tensor]:
        """Inputs of `forward` for rows with all values missing."""
        return [part.missing_values(rows, device) for part in self.parts]

    def learned_columns(self) -> list[int]:
        """Columns of the encoding that depend on learned weights: all but those of numeric features."""
        columns, start = list[int](), 0
        for part in self.parts:
            if any(True for _ in part.parameters()):
                columns += range(start, start + part.width)
            start += part.width
        return columns

    def load_item_tables(self, features: Sequence[dict[str, Any]]) -> None:
        """Computes the scales of numeric features from all rows.

        Args:
            features: declared features with their arrays.
        """
        for part, feature in zip(self.parts, features, strict=True):
            if isinstance(part, NumericEncoder):
                part.load_item_tables(feature_table(feature))


def feature_table(feature: dict[str, Any]) -> Tensor:
    """Values of a feature in all rows, (rows, P)."""
    values = torch.from_numpy(np.asarray(feature["values"]))
    return values.view(len(values), -1)


class ColumnEncoder(nn.Module):
    """Encodes the values of one feature.

    Args:
        feature: the declared feature.
        dim: width of its encoding, unless it is numeric.
    """

    missing: float  # stands for a missing value
    dtype: torch.dtype  # of values

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.values, self.width = int(feature["values"]), dim

    def missing_values(self, rows: int, device: torch.device | None) -> Tensor:
        """Inputs for rows with a missing value, (rows, P)."""
        return torch.full((rows, self.values), self.missing, dtype=self.dtype, device=device)


class CategoricalEncoder(ColumnEncoder):
    """Class embeddings of a categorical feature; their mean for a multi-valued one.

    Row 0 of the table is "unknown": the vector of a row without any class, never part of a mean.
    """

    missing, dtype = UNKNOWN, torch.int32

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__(feature, dim)
        self.table = nn.EmbeddingBag(feature["size"], dim, mode="mean", padding_idx=UNKNOWN)  # N(0, 1), row 0 is zero

    def forward(self, values: Int[Tensor, "N P"]) -> Float[Tensor, "N D"]:
        known = (values != UNKNOWN).any(dim=-1, keepdim=True)
        return torch.where(known, self.table(values), self.table.weight[UNKNOWN])


class NumericEncoder(ColumnEncoder):
    """A standardized number and an indicator that it is known; both 0 if it is missing."""

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


class VectorEncoder(ColumnEncoder):
    """A given vector through Linear → LayerNorm; a learned "unknown" vector if any of its numbers is missing."""

    missing, dtype = torch.nan, torch.float32

    def __init__(self, feature: dict[str, Any], dim: int) -> None:
        super().__init__(feature, dim)
        self.linear, self.norm = nn.Linear(self.values, dim), nn.LayerNorm(dim)
        self.unknown = nn.Parameter(torch.zeros(dim))

    def forward(self, values: Float[Tensor, "N P"]) -> Float[Tensor, "N D"]:
        known = values.isfinite().all(dim=-1, keepdim=True)
        values = values.where(known, 0).to(self.linear.weight.dtype)
        return torch.where(known, self.norm(self.linear(values)), self.unknown)


ENCODERS: dict[str, type[ColumnEncoder]] = {
    "categorical": CategoricalEncoder,
    "multi": CategoricalEncoder,
    "numeric": NumericEncoder,
    "vector": VectorEncoder,
}
