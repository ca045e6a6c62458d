"""Item vectors: of ids alone, or of ids and features, which mean something of items that were never trained."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from closeness import close
from pipeline_fixtures import RANKER, RETRIEVER, recsys
from torch import Tensor
from worlds import cold_world

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.dataset import Dataset
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.index import VECTORS
from recsys2stage.retrieval.items import ItemTable, ItemTower
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.towers import TwoTower

V, D = 12, 8
FEATURES: list[dict[str, Any]] = [
    {"name": "genres", "kind": "multi", "size": 5, "values": 2},
    {"name": "price", "kind": "numeric", "size": 1, "values": 1},
    {"name": "text", "kind": "vector", "size": 3, "values": 3},
]
COLD = [3, 4, 9]


def arrays() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    genres = rng.integers(0, 5, (V + 1, 2)).astype(np.int32)
    price, text = rng.normal(size=V + 1).astype(np.float32), rng.normal(size=(V + 1, 3)).astype(np.float32)
    genres[[0, 5]], price[[0, 5, 6]], text[[0, 5]] = 0, np.nan, np.nan  # nothing is known of item 5
    genres[4], price[4], text[4] = genres[3], price[3], text[3]  # 3 and 4 are alike
    return [{**feature, "values": values} for feature, values in zip(FEATURES, (genres, price, text), strict=True)]


def tower(**options: Any) -> ItemTower:
    """In evaluation mode, with weights as after some training; items 3, 4 and 9 have had none."""
    built = ItemTower(V, D, FEATURES, **options)
    trained = torch.ones(V + 1, dtype=torch.bool)
    trained[[0, *COLD]] = False
    built.load_item_tables(arrays(), trained)
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.5 * torch.randn_like(weight)
        built.table.weight[0] = 0
    return built.eval()


def naive(built: ItemTower, item: int) -> Tensor:
    """One item's vector, sum by sum."""
    if not item:
        return torch.zeros(D, dtype=torch.float64)
    own = built.unknown if item in COLD else built.table.weight[item]
    x = [*own, *built.features(torch.tensor([item]))[0]]
    linears = [module for module in built.mlp if isinstance(module, torch.nn.Linear)]
    for number, linear in enumerate(linears):
        out = []
        for row, bias in zip(linear.weight, linear.bias, strict=True):
            total = bias
            for weight, value in zip(row, x, strict=True):
                total = total + weight * value
            out.append(torch.relu(total) if number < len(linears) - 1 else total)
        x = out
    return torch.stack([mine + other for mine, other in zip(own, x, strict=True)])


@pytest.mark.parametrize("hidden", [None, [7], [5, 9], []])
def test_the_tower_is_the_naive_one_in_value_and_gradient(hidden: list[int] | None) -> None:
    built = tower(hidden=hidden).double()
    items = torch.tensor([[3, 1, 0, 7], [7, 12, 3, 0], [5, 4, 9, 2]])
    got = built(items)
    wanted = torch.stack([torch.stack([naive(built, int(item)) for item in row]) for row in items])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    weights, direction = dict(built.named_parameters()), torch.randn_like(got)
    mine = torch.autograd.grad((got * direction).sum(), list(weights.values()))
    other = torch.autograd.grad((wanted * direction).sum(), list(weights.values()))
    for name, one, two in zip(weights, mine, other, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9, msg=name)
        assert one.any(), name
    assert not mine[list(weights).index("table.weight")][[0, *COLD]].any(), "of ids that nobody looks at"


def test_without_being_told_the_hidden_layer_is_twice_as_wide() -> None:
    assert [module.out_features for module in tower().mlp if isinstance(module, torch.nn.Linear)] == [2 * D, D]


@pytest.mark.parametrize("kind", [ItemTable, ItemTower])
def test_every_item_is_what_a_call_gives(kind: Any) -> None:
    built = kind(V, D, FEATURES).eval()
    items = torch.arange(1, V + 1)
    assert torch.equal(built.every(), built(items))
    torch.testing.assert_close(built(items.flip(0)[:, None])[:, 0].flip(0), built.every())
    assert built.every().shape == (V, D)
    assert not built(torch.zeros(2, 3, dtype=torch.int64)).any(), "padding"


def test_the_tower_starts_from_ids_as_the_table_does() -> None:
    assert ItemTower(2_000, 32, FEATURES).table.weight[1:].std().item() == pytest.approx(0.02, rel=0.02)
    assert ItemTower(2_000, 32, FEATURES, std=0.5).table.weight[1:].std().item() == pytest.approx(0.5, rel=0.02)


def test_items_without_training_are_their_features() -> None:
    built = tower()
    with torch.no_grad():
        before = built.every()
        close(before[2], before[3])  # 3 and 4 have like features
        built.table.weight[1:] += torch.randn(V, D)
        moved = (built.every() - before).abs().amax(1) > 1e-4
        assert [int(item) + 1 for item in (~moved).nonzero()] == COLD, "what their ids are is felt nowhere"
        before = built.every()
        values = built.features.get_buffer("values2")
        values[9] += 1.0
        moved = (built.every() - before).abs().amax(1) > 1e-4
        assert [int(item) + 1 for item in moved.nonzero()] == [9]


def test_ids_are_dropped_in_training_once_for_each_item_of_a_call() -> None:
    built = tower(id_dropout=0.3, dropout=0.0)
    items = torch.arange(V + 1).expand(4, -1)
    with torch.no_grad():
        with_id = built(items[0])
        learned = built.trained.clone()
        built.trained.zero_()
        without = built(items[0])
        built.trained.copy_(learned)
        assert torch.equal(built(items), with_id.expand(4, -1, -1)), "never when it is not training"
        built.train()
        dropped = torch.zeros(V + 1)
        calls = 1_000
        for _ in range(calls):
            drawn = built(items)
            assert torch.equal(drawn, drawn[:1].expand_as(drawn)), "an item is the same wherever it stands"
            is_dropped = (drawn[0] - without).abs().amax(1) < 1e-6
            assert (is_dropped | ((drawn[0] - with_id).abs().amax(1) < 1e-6)).all()
            dropped += is_dropped
    share = dropped / calls
    assert (share[[0, *COLD]] == 1).all()
    for item in set(range(1, V + 1)) - set(COLD):
        assert share[item].item() == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / calls) ** 0.5)


def test_a_batch_trains_what_stands_for_a_dropped_id() -> None:
    built = tower(id_dropout=0.5).train()
    built(torch.tensor([[1, 2, 5, 6, 7, 8]])).square().sum().backward()
    assert built.unknown.grad is not None
    assert built.unknown.grad.abs().max() > 1e-4
    assert built.table.weight.grad is not None
    assert 0 < int(built.table.weight.grad.any(1).sum()) < 6


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([], {}, "the data declare none; declare some .* or give vectors .item_vectors. .* or use items: ItemTable"),
        (FEATURES, {"id_dropout": 1.0}, "id_dropout is 1.0, expected a probability from 0 to below 1"),
        (FEATURES, {"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_what_means_nothing_is_refused(features: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemTower(V, D, features, **options)


# --- in the two towers


@pytest.mark.parametrize("tied", [True, False])
def test_towers_look_up_what_a_tower_of_items_needs(cycle: Path, tied: bool) -> None:
    data = Histories(cycle)
    model = Retriever(data.num_items, data.max_length, dim=D, items=ItemTower, tied=tied, features=data.features)
    model.load_item_tables(data.dataset)
    for table in (model.towers.items, model.towers.untied):
        if table is not None:
            assert isinstance(table, ItemTower)
            assert torch.equal(table.features.get_buffer("values0")[1:, 0] > 0, torch.ones(40, dtype=torch.bool))
            assert table.trained.tolist() == [False] + [True] * 40
    assert (model.towers.untied is None) == tied
    assert model.towers.eval().all_item_vectors().shape == (40, D)


def test_a_tower_of_items_is_rebuilt_from_its_weights() -> None:
    def built() -> TwoTower:
        return TwoTower(V, 4, D, Transformer, items=ItemTower, features=FEATURES).eval()

    first, second = built(), built()
    first.load_item_tables(arrays(), [], torch.arange(V + 1) % 2 == 0)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.all_item_vectors(), first.all_item_vectors())


# --- a world in which half of the items are cold


class Served(NamedTuple):
    folder: Path  # of the index
    cold: np.ndarray  # whether each test target is cold
    ranks: np.ndarray  # of each test target among all items that its user has not met


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cold_world(tmp_path_factory.mktemp("cold"))


def served(data: Path, folder: Path, items: str) -> Served:
    """Trained for some seconds and exported, by the verbs; ranks are of the index that serves."""
    (folder / "retriever.yaml").write_text(RETRIEVER, encoding="utf-8")
    recsys(
        *("fit", "--config", folder / "retriever.yaml", "--output", folder / "retriever"),
        *("--data.path", data, "--model.items", items, "--model.dim", 32, "--model.encoder.dropout", 0),
        *("--trainer.max_epochs", 10, "--trainer.check_val_every_n_epoch", 10),
    )
    checkpoint = folder / "retriever" / "best.ckpt"
    recsys("export-index", "--retriever", checkpoint, "--data", data, "--output", folder / "index", "--measured", 0)
    dataset, recommender = Dataset(data), Recommender.load(folder / "index")
    users = dataset.users("test")
    queries = recommender.queries(dataset.histories(users, "test", 20), None)
    known, target = dataset.filtered_items(users, "test"), dataset.targets(users, "test")
    scores = queries @ recommender.index.vectors.T
    own = scores[np.arange(len(users)), target - 1]
    scores[known.rows, known.values - 1] = -np.inf
    return Served(folder / "index", dataset.cold[target], (scores >= own[:, None]).sum(1))


@pytest.fixture(scope="module")
def towered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(data, tmp_path_factory.mktemp("tower"), "ItemTower")


def test_cold_items_are_found_by_their_features(data: Path, towered: Served, tmp_path: Path) -> None:
    """Of 1000 items chance is a recall@100 of .1: a tower finds at least five times as many, a table about as many.

    No more than 15/16 can be found: the target's group is one of the next four with that probability.
    """
    recall = {}
    for items, run in (("ItemTable", served(data, tmp_path, "ItemTable")), ("ItemTower", towered)):
        assert run.cold.sum() > 150
        recall[items] = float((run.ranks <= 100)[run.cold].mean())
        vectors = np.load(run.folder / VECTORS)
        assert len(vectors) == read_manifest(run.folder, "index", "")["items"] == 1_000, "cold items can be retrieved"
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert recall["ItemTable"] < 0.2, recall
    assert recall["ItemTower"] >= 0.5, recall


def test_a_ranker_keeps_the_cold_items_that_a_tower_found(data: Path, towered: Served, tmp_path: Path) -> None:
    """Though none was a target of any list, and it is told how popular items are."""
    (tmp_path / "ranker.yaml").write_text(RANKER, encoding="utf-8")
    (tmp_path / "signals.yaml").write_text("signals: [PopularityAsOf, Content]", encoding="utf-8")
    of = ("--data", data, "--index", towered.folder, "--config", tmp_path / "signals.yaml", "--k", 200)
    recsys("mine-negatives", *of, "--output", tmp_path / "candidates")
    recsys(
        *("fit", "--config", tmp_path / "ranker.yaml", "--output", tmp_path / "ranker", "--trainer.max_epochs", 6),
        *("--data.path", tmp_path / "candidates"),
    )
    checkpoint = tmp_path / "ranker" / "best.ckpt"
    recsys("export-bundle", "--index", towered.folder, "--ranker", checkpoint, "--output", tmp_path / "bundle")
    dataset, recommender = Dataset(data), Recommender.load(tmp_path / "bundle")
    assert recommender.reranker is not None
    assert recommender.reranker.scores_cold
    assert np.array_equal(recommender.reranker.cold[1:], dataset.train_counts[1:] == 0)
    users = dataset.users("test")
    target, padded = dataset.targets(users, "test"), dataset.histories(users, "test", 20)
    ranking = recommender.rank(padded, dataset.filtered_items(users, "test"), None, 200)
    found = (ranking.items[:, :100] == target[:, None]).any(1)[towered.cold].mean()
    first = (towered.ranks <= 100)[towered.cold].mean()
    assert found > 0.9 * first > 0.4
