"""Declared features become numbers as written; what is unknown is learned, not zero."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys2stage.retrieval.features import FeatureEncoder, FeatureTable

V, DIM = 11, 5
FEATURES: list[dict[str, Any]] = [
    {"name": "type", "kind": "categorical", "size": 4, "values": 1},  # names that a module could not have
    {"name": "a.b", "kind": "multi", "size": 6, "values": 3},
    {"name": "price", "kind": "numeric", "size": 1, "values": 1},
    {"name": "text", "kind": "vector", "size": 7, "values": 7},
]
WIDTHS = [DIM, DIM, 2, DIM]


def arrays(rows: int = V + 1) -> list[dict[str, Any]]:
    """Features with values as a Dataset gives them; row 0 and some others are unknown."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, rows).astype(np.int32)
    tags = np.zeros((rows, 3), np.int32)
    for row in range(rows):
        some = rng.permutation(5)[: row % 4] + 1
        tags[row, : len(some)] = some
    price = rng.normal(1e3, 50, rows).astype(np.float32)
    text = rng.normal(2, 3, (rows, 7)).astype(np.float32)
    price[[0, 4]], price[5], kind[0], text[[0, 3]], text[6, 2] = np.nan, np.inf, 0, np.nan, np.nan
    return [{**f, "values": values} for f, values in zip(FEATURES, (kind, tags, price, text), strict=True)]


def table(double: bool = True) -> FeatureTable:
    """Looked up, with weights as after some training."""
    built = FeatureTable(V, FEATURES, DIM)
    if double:
        built = built.double()
    built.load_item_tables(arrays())
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return built


def naive(built: FeatureTable, items: list[int]) -> Tensor:
    """Feature by feature and row by row, from the arrays."""
    kind, tags, price, text = (feature["values"] for feature in arrays())
    of_kind, of_tags, _, of_text = built.encoder.parts
    known = [float(p) for p in price if np.isfinite(p)]
    mean = sum(known) / len(known)
    std = (sum((p - mean) ** 2 for p in known) / len(known)) ** 0.5
    rows = []
    for item in items:
        row = [of_kind.table.weight[int(kind[item])]]
        own = [int(tag) for tag in tags[item] if tag]
        row.append(sum(of_tags.table.weight[tag] for tag in own) / len(own) if own else of_tags.table.weight[0])
        finite = np.isfinite(price[item])
        row.append(
            torch.tensor([(float(price[item]) - mean) / std if finite else 0.0, float(finite)], dtype=torch.float64)
        )
        if np.isfinite(text[item]).all():
            x = of_text.linear.weight @ torch.tensor(text[item]).double() + of_text.linear.bias
            centred = x - x.sum() / DIM
            standard = centred / ((centred * centred).sum() / DIM + of_text.norm.eps) ** 0.5
            row.append(standard * of_text.norm.weight + of_text.norm.bias)
        else:
            row.append(of_text.unknown)
        rows.append(torch.cat(row))
    return torch.stack(rows)


def test_a_table_is_the_naive_one_in_value_and_gradient() -> None:
    built, items = table(), [5, 0, 3, 7, 7, *range(V + 1)]
    got, wanted = built(torch.tensor(items)), naive(built, items)
    assert got.shape == (len(items), built.width) == (len(items), sum(WIDTHS))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    weights, direction = dict(built.named_parameters()), torch.randn_like(got)
    for name, mine, other in zip(
        weights,
        torch.autograd.grad((got * direction).sum(), list(weights.values())),
        torch.autograd.grad((wanted * direction).sum(), list(weights.values())),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9, msg=name)
        assert mine.any(), name


@pytest.mark.parametrize(("feature", "unknown"), [(0, "table"), (1, "table"), (3, "unknown")])
def test_what_is_unknown_is_learned_and_starts_in_the_middle(feature: int, unknown: str) -> None:
    """A gradient reaches it from a row of which nothing is known, and from no other."""
    built = FeatureTable(V, FEATURES, DIM)
    built.load_item_tables(arrays())
    values = torch.from_numpy(np.asarray(arrays()[feature]["values"])).view(V + 1, -1)
    bad = ~values.isfinite().all(1) if values.is_floating_point() else ~values.any(1)
    part = built.encoder.parts[feature]
    weight = part.unknown if unknown == "unknown" else part.table.weight
    row = weight if unknown == "unknown" else weight[0]
    assert not row.any(), "the mean of vectors drawn around zero"
    assert 1 <= int(bad.sum()) < V
    for item in range(V + 1):
        (gradient,) = torch.autograd.grad(built(torch.tensor([item])).sum(), weight)
        reached = gradient if unknown == "unknown" else gradient[0]
        assert bool(reached.any()) == bool(bad[item]), item


def test_known_numbers_have_about_unit_variance() -> None:
    rng = np.random.default_rng(1)
    features: list[dict[str, Any]] = [
        {"name": "c", "kind": "categorical", "size": 500, "values": rng.integers(1, 500, 2000).astype(np.int32)},
        {"name": "n", "kind": "numeric", "size": 1, "values": rng.normal(-7e5, 3e3, 2000).astype(np.float32)},
        {"name": "v", "kind": "vector", "size": 9, "values": rng.normal(0, 0.01, (2000, 9)).astype(np.float32)},
    ]
    feature_specs = [{**f, "values": f["values"][0].size} for f in features]
    built = FeatureTable(1999, feature_specs, 8)
    built.load_item_tables(features)
    x = built(torch.arange(1, 2000))
    for part in (x[:, :8], x[:, 8], x[:, 10:]):
        assert part.std().item() == pytest.approx(1, abs=0.15)
    assert (x[:, 9] == 1).all(), "known"


@pytest.mark.parametrize("values", [[np.nan, np.nan, np.nan], [4.0, 4.0, np.nan]])
def test_a_number_that_is_never_known_or_always_the_same_says_nothing(values: list[float]) -> None:
    feature: dict[str, Any] = {"name": "n", "kind": "numeric", "size": 1, "values": 1}
    built = FeatureTable(2, [feature], DIM)
    built.load_item_tables([{**feature, "values": np.array(values, np.float32)}])
    x = built(torch.arange(3))
    assert not x[:, 0].any()
    assert x[:, 1].tolist() == [float(np.isfinite(value)) for value in values]


def test_before_a_look_up_nothing_is_known() -> None:
    built = FeatureTable(V, FEATURES, DIM)
    encoder = built.encoder
    assert torch.equal(built(torch.tensor([1, 2])), encoder(encoder.missing_values(2)))
    assert built.get_buffer("values3").isnan().all()


def test_an_encoder_alone_takes_the_scale_of_the_data() -> None:
    """As the user tower has it: values come with each batch, only mean and deviation are kept."""
    ages = np.array([20, np.nan, 40, 60], np.float32)
    feature: dict[str, Any] = {"name": "age", "kind": "numeric", "size": 1, "values": 1}
    encoder = FeatureEncoder([feature], DIM)
    encoder.load_item_tables([{**feature, "values": ages}])
    x = encoder([torch.tensor([[60.0], [torch.nan], [40.0]])])
    torch.testing.assert_close(x, torch.tensor([[(3 / 2) ** 0.5, 1], [0, 0], [0, 1]]))
    fresh = FeatureEncoder([feature], DIM)
    fresh.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(fresh([torch.tensor([[60.0]])]), x[:1])


def test_all_that_is_looked_up_is_in_the_state() -> None:
    built, fresh = table(double=False), FeatureTable(V, FEATURES, DIM)
    fresh.load_state_dict(built.state_dict())
    items = torch.arange(V + 1)
    assert torch.equal(fresh(items), built(items))
    assert not any("type" in name or "a.b" in name for name in built.state_dict())
