"""What is known of users reaches their histories, as a token, as FiLM, or both; strangers are served too."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from pipeline_fixtures import RETRIEVER, recsys
from torch import Tensor
from worlds import directions_world

from recsys2stage.data.dataset import Dataset
from recsys2stage.optim import RecsysAdamW
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import BERT4Rec, Transformer
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.retrieval.users import UserTower
from recsys2stage.shapes import History

B, L, V, D = 6, 5, 9, 8
FEATURES: list[dict[str, Any]] = [
    {"name": "side", "kind": "categorical", "size": 3, "values": 1},
    {"name": "likes", "kind": "multi", "size": 5, "values": 2},
    {"name": "age", "kind": "numeric", "size": 1, "values": 1},
]
WAYS = [(True, True), (True, False), (False, True)]
QUIET: dict[str, Any] = {
    "logger": False,
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def people() -> tuple[Tensor, ...]:
    side = torch.tensor([[1], [2], [0], [1], [2], [1]], dtype=torch.int32)
    likes = torch.tensor([[1, 2], [3, 0], [0, 0], [4, 1], [2, 0], [2, 3]], dtype=torch.int32)
    return side, likes, torch.tensor([[30.0], [41], [torch.nan], [22], [65], [30]])


def tower(**options: Any) -> UserTower:
    """In evaluation mode, with weights as after some training."""
    built = UserTower(D, FEATURES, **options)
    arrays = zip(FEATURES, people(), strict=True)
    built.load_user_features([{**feature, "values": values.numpy()} for feature, values in arrays])
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return built.eval()


# --- the vector and what it does


def test_a_person_and_its_film_are_the_naive_ones_in_value_and_gradient() -> None:
    built = tower().double()
    x = torch.randn(B, L, D, dtype=torch.float64)
    got = built.condition(x, built(people(), B))
    features, film = built.features(people()), built.film
    assert film is not None
    wanted = torch.zeros(B, L, D, dtype=torch.float64)
    for row in range(B):
        sums = [built.linear.weight[d] @ features[row] + built.linear.bias[d] for d in range(D)]
        person = [total / (1 + torch.exp(-total)) for total in sums]
        out = [sum(film.weight[n, d] * person[d] for d in range(D)) + film.bias[n] for n in range(2 * D)]
        for place in range(L):
            for d in range(D):
                wanted[row, place, d] = x[row, place, d] * (1 + torch.tanh(out[d])) + out[D + d]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
    weights, direction = list(built.parameters()), torch.randn_like(x)
    for mine, other in zip(
        torch.autograd.grad((got * direction).sum(), weights),
        torch.autograd.grad((wanted * direction).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def test_film_starts_as_the_identity_and_learns() -> None:
    built, x = UserTower(D, FEATURES).eval(), torch.randn(B, L, D)
    conditioned = built.condition(x, built(people(), B))
    assert torch.equal(conditioned, x)
    assert built.film is not None
    (gradient,) = torch.autograd.grad((conditioned * torch.randn(B, L, D)).sum(), built.film.weight)
    assert (gradient.abs().amax(1) > 1e-4).all(), "scale and shift both"


def test_without_film_events_stay_as_they_are() -> None:
    built, x = tower(film=False), torch.randn(B, L, D)
    assert torch.equal(built.condition(x, built(people(), B)), x)


def test_a_stranger_is_who_has_every_feature_unknown() -> None:
    built = tower()
    known = built(people(), B)
    nobody = built(None, 3)
    assert nobody.shape == (3, D)
    unknown = (torch.zeros(3, 1).int(), torch.zeros(3, 2).int(), torch.full((3, 1), torch.nan))
    assert torch.equal(nobody, built(unknown, 3))
    torch.testing.assert_close(known[2], nobody[0], msg="user 2 is one")
    assert (known[[0, 1, 3, 4, 5]] - nobody[0]).abs().amax(1).min() > 1e-3
    (gradient,) = torch.autograd.grad(nobody.sum(), built.features.parts[1].table.weight)
    assert gradient[0].abs().max() > 1e-4, "learned, not zeros"
    assert not gradient[1:].any()


def test_in_training_some_users_are_strangers_for_a_moment() -> None:
    """So that what stands for the unknown is trained where nothing is unknown."""
    built, n = tower(dropout=0.2), 20_000
    users = tuple(values[:1].expand(n, -1) for values in people())
    nobody, somebody = built(None, 1)[0], built(users, n)[0]
    built.train().dropout.eval()  # dropped numbers would hide who it is
    drawn = built(users, n)
    strange = (drawn - nobody).abs().amax(1) < 1e-6
    assert strange.float().mean().item() == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(drawn[~strange], somebody.expand_as(drawn[~strange]))
    certain = tower(dropout=0.0).train()
    torch.testing.assert_close(certain(users, n), certain.eval()(users, n))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ([], {}, "data declare none; declare some .source.init_args.users. in the config of prepare-data, or leave"),
        (FEATURES, {"token": False, "film": False}, "token: false and film: false, so it has no effect; set"),
        (FEATURES, {"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_means_nothing_is_refused(features: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UserTower(D, features, **options)


# --- in the two towers


def towers(encoder: Any = Transformer, **options: Any) -> TwoTower:
    built = TwoTower(V, L, D, encoder, user=partial(UserTower, **options), user_features=FEATURES)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            weight += 0.4 * torch.randn_like(weight)
            if name == "items.table.weight":
                weight[0] = 0
    return built.eval()


def histories(same: bool = False) -> History:
    """Of lengths 0 to L; `same` gives all users the history of the last."""
    rng = np.random.default_rng(0)
    items = rng.integers(1, V + 1, (B, L))
    lengths = np.arange(B).clip(max=L)
    if same:
        items, lengths = np.repeat(items[-1:], B, 0), np.full(B, L)
    real = np.arange(L) < lengths[:, None]
    times = np.cumsum(rng.integers(1, 10**6, (B, L)), 1) + 10**9
    return History(*map(torch.from_numpy, (items * real, lengths, times * real)), None, user=people())


@pytest.mark.parametrize(("token", "film"), WAYS)
@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
def test_states_differ_by_user(encoder: Any, token: bool, film: bool) -> None:
    built, given = towers(encoder, token=token, film=film), histories(same=True)
    with torch.no_grad():
        queries, alike = built.queries(given), built.queries(given._replace(user=None))
    torch.testing.assert_close(alike, alike[:1].expand_as(alike), msg="of strangers nothing but the history is known")
    for one in range(B):
        for other in range(one):
            assert (queries[one] - queries[other]).abs().max() > 1e-4
    torch.testing.assert_close(queries[2], alike[2])


@pytest.mark.parametrize(("token", "film"), WAYS)
def test_a_place_sees_the_user_and_nothing_that_comes_later(token: bool, film: bool) -> None:
    built, given = towers(token=token, film=film), histories(same=True)
    with torch.no_grad():
        before = built(given)
        for place in range(L):
            items = given.items.clone()
            items[:, place] = items[:, place] % V + 1
            apart = (built(given._replace(items=items)) - before).abs().amax(2)
            assert not (apart[:, :place] > 1e-6).any()
            assert (apart[:, place] > 1e-4).all()
        other = (built(given._replace(user=tuple(values.roll(1, 0) for values in people()))) - before).abs().amax(2)
    assert (other > 1e-5).all(), "every place, the first included"


@pytest.mark.parametrize(("token", "film"), WAYS)
@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
def test_a_query_is_that_of_the_history_alone(encoder: Any, token: bool, film: bool) -> None:
    """Whatever its padding and its company, though FiLM shifts padding too."""
    built, given = towers(encoder, token=token, film=film), histories()
    with torch.no_grad():
        queries = built.queries(given)
        for row in range(1, B):
            alone = given.take(slice(row, row + 1))
            cut = int(alone.lengths)
            alone = alone._replace(items=alone.items[:, :cut], times=alone.times[:, :cut])
            torch.testing.assert_close(built.queries(alone)[0], queries[row], rtol=1e-4, atol=1e-5)


# --- a world in which the user decides


def hit_at_1(path: Path, user: Any, nobody: bool = False) -> float:
    """Of validation targets, after some seconds of training; `nobody` asks for strangers."""
    data = Histories(path, max_length=4, batch_size=64)
    model = Retriever(
        data.num_items,
        data.max_length,
        dim=32,
        encoder=partial(Transformer, layers=1, heads=2, dropout=0.0),
        user=user,
        user_features=data.user_features,
        optimizer=partial(RecsysAdamW, lr=1e-2),
        warmup_steps=10,
    )
    Trainer(max_epochs=8, limit_val_batches=0, **QUIET).fit(model, data)
    batch = data.read_queries(data.dataset.users("val"), "val")
    if nobody:
        batch = batch._replace(history=batch.history._replace(user=None))
    with torch.no_grad():
        return (model.eval().ranks(batch) == 1).double().mean().item()


@pytest.fixture(scope="module")
def directions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directions_world(tmp_path_factory.mktemp("directions"))


@pytest.mark.parametrize(("token", "film"), WAYS[1:])
def test_the_users_feature_decides_the_next_item(directions: Path, token: bool, film: bool) -> None:
    """Both ways are as likely without it: hit@1 is near 1 with it, about 1/2 without."""
    assert hit_at_1(directions, partial(UserTower, token=token, film=film)) > 0.9


def test_without_the_users_feature_it_is_a_toss(directions: Path) -> None:
    assert 0.3 < hit_at_1(directions, None) < 0.7


def test_strangers_are_served_as_anybody(directions: Path) -> None:
    """The tower that was trained on known users alone is no worse for strangers than one without."""
    assert 0.3 < hit_at_1(directions, UserTower, nobody=True) < 0.7


def test_the_verbs_train_and_serve_it(directions: Path, tmp_path: Path) -> None:
    (tmp_path / "retriever.yaml").write_text(RETRIEVER, encoding="utf-8")
    of = ("--config", tmp_path / "retriever.yaml", "--data.path", directions, "--output", tmp_path / "retriever")
    recsys("fit", *of, "--model.user", "UserTower", "--model.user.token", "false", "--trainer.max_epochs", 1)
    checkpoint = tmp_path / "retriever" / "best.ckpt"
    recsys("export-index", "--retriever", checkpoint, "--data", directions, "--output", tmp_path / "index")
    dataset, recommender = Dataset(directions), Recommender.load(tmp_path / "index")
    tower = recommender.towers.user
    assert tower is not None
    assert not tower.token
    age = next(feature["values"] for feature in dataset.user_features if feature["name"] == "age")
    assert tower.features.parts[1].get_buffer("mean").item() == pytest.approx(age.mean(), rel=1e-6), "looked up"
    padded = dataset.histories(dataset.users("val"), "val", 20)
    known, strangers = (recommender.queries(one, None) for one in (padded, padded._replace(user=None)))
    assert np.isfinite(strangers).all()
    assert (np.abs(known - strangers).max(1) > 1e-6).all()
