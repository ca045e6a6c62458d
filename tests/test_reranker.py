"""The reranker starts from the retriever's order, and an id that is masked leaves no trace."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from recsys2stage import scorers
from recsys2stage.reranker import Reranker
from recsys2stage.scorers import MLP, Scorer

V, D, B, C = 30, 8, 5, 12
FEATURES: list[dict[str, Any]] = [
    {"name": "genres", "kind": "multi", "size": 5, "values": 3},
    {"name": "decade", "kind": "categorical", "size": 4, "values": 1},
    {"name": "price", "kind": "numeric", "size": 1, "values": 1},
]
SCORERS = [
    part
    for part in vars(scorers).values()
    if isinstance(part, type) and issubclass(part, Scorer) and part is not Scorer
]


def arrays(rng: np.random.Generator) -> list[dict[str, Any]]:
    """The features with their values, row 0 for padding."""
    genres = rng.integers(0, 5, size=(V + 1, 3)).astype(np.int32)
    decade = rng.integers(0, 4, size=V + 1).astype(np.int32)
    price = rng.normal(20, 5, size=V + 1).astype(np.float32)
    genres[0], decade[0], price[0], price[[4, 9]] = 0, 0, np.nan, np.nan
    return [{**feature, "values": values} for feature, values in zip(FEATURES, (genres, decade, price), strict=True)]


def built(rng: np.random.Generator, scorer: Callable[[int, int], Scorer] = MLP, learned: bool = True) -> Reranker:
    """In evaluation mode, as it stands at step 0 or with weights as after some training."""
    reranker = Reranker(V, D, FEATURES, scorer)
    vectors = torch.nn.functional.normalize(torch.randn(V + 1, D), dim=-1)
    vectors[0] = 0
    reranker.look_up(vectors, rng.integers(0, 100, size=V + 1), arrays(rng))
    if learned:
        with torch.no_grad():
            for weight in reranker.parameters():
                weight += 0.2 * torch.randn_like(weight)
    return reranker.eval()


def lists(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """State, items, score (best first) and rank."""
    items = torch.from_numpy(np.stack([rng.permutation(V)[:C] + 1 for _ in range(B)]))
    score = torch.rand(B, C).sort(dim=1, descending=True).values
    return torch.nn.functional.normalize(torch.randn(B, D), dim=-1), items, score, torch.arange(1, C + 1).expand(B, C)


NONE, ALL = torch.zeros(B, C, dtype=torch.bool), torch.ones(B, C, dtype=torch.bool)


# --- step 0


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.__name__)
@pytest.mark.parametrize("calibrated", [False, True])
def test_at_step_0_the_retrievers_order_stands(scorer: Any, calibrated: bool, rng: np.random.Generator) -> None:
    reranker = built(rng, scorer, learned=False)
    state, items, score, rank = lists(rng)
    shuffle = torch.stack([torch.randperm(C) for _ in range(B)])
    items, score, rank = items.gather(1, shuffle), score.gather(1, shuffle), rank.gather(1, shuffle)
    if calibrated:
        reranker.calibrate(score, score.argmax(1), ALL)
        assert reranker.log_scale > 0
    with torch.no_grad():
        for mode in (reranker.eval(), reranker.train()):  # the first batch of training too
            logits = mode(state, items, score, rank, NONE)
            assert torch.equal(logits.argsort(dim=1, descending=True), score.argsort(dim=1, descending=True))
        assert not reranker(state, items, score, rank, ALL).any(), "without ids there is no opinion yet"
    scored = built(rng, scorer, learned=True)
    with torch.no_grad():
        logits = scored(state, items, score, rank, NONE)
    assert not torch.equal(logits.argsort(dim=1), score.argsort(dim=1)), "trained, it must have an opinion"


def test_a_scorer_from_outside_starts_from_the_retriever_too(rng: np.random.Generator) -> None:
    class Silent(Scorer):
        def __init__(self, dim: int, num_features: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(num_features))

        def forward(
            self, state: Float[Tensor, "B D"], vectors: Float[Tensor, "B C D"], features: Float[Tensor, "B C F"]
        ) -> Float[Tensor, "B C"]:
            return features @ self.weight

    state, items, score, rank = lists(rng)
    logits = built(rng, Silent, learned=False)(state, items, score, rank, NONE)
    assert torch.equal(logits.argsort(dim=1, descending=True), rank - 1)


# --- what a masked id hides


class Seen(Scorer):
    """Keeps what it was shown."""

    def __init__(self, dim: int, num_features: int) -> None:
        super().__init__()
        self.state = self.vectors = self.features = torch.zeros(0)

    def forward(
        self, state: Float[Tensor, "B D"], vectors: Float[Tensor, "B C D"], features: Float[Tensor, "B C F"]
    ) -> Float[Tensor, "B C"]:
        self.state, self.vectors, self.features = state, vectors, features
        return features.sum(-1) * 0


def test_masked_ids_leave_no_trace(rng: np.random.Generator) -> None:
    reranker, (state, items, score, rank) = built(rng), lists(rng)
    with torch.no_grad():
        masked, known = (reranker(state, items, score, rank, mask) for mask in (ALL, NONE))
        other = torch.rand_like(score)
        assert torch.equal(reranker(state, items, other, rank, ALL), masked)
        assert torch.equal(reranker(state, items, score, rank.flip(1), ALL), masked)
        reranker.vectors.copy_(torch.randn_like(reranker.vectors))
        reranker.center += 3
        assert torch.equal(reranker(state, items, score, rank, ALL), masked)

        # each of them is felt where the id is known
        assert (reranker(state, items, other, rank, NONE) - known).abs().max() > 1e-3
        reranker.center -= 3
        assert (reranker(state, items, score, rank, NONE) - known).abs().max() > 1e-3, "vectors"
    again = built(np.random.default_rng(0))
    with torch.no_grad():
        by_rank = again(state, items, score, rank.flip(1), NONE) - again(state, items, score, rank, NONE)
    assert by_rank.abs().max() > 1e-3


@pytest.mark.parametrize("buffer", ["popularity", "features.values0", "features.values1", "features.values2"])
@pytest.mark.parametrize("mask", [NONE, ALL], ids=["known", "masked"])
def test_popularity_and_features_stay(buffer: str, mask: Tensor, rng: np.random.Generator) -> None:
    reranker, (state, items, score, rank) = built(rng), lists(rng)
    with torch.no_grad():
        before = reranker(state, items, score, rank, mask)
        values = reranker.get_buffer(buffer)
        values[1:] = values[1:].roll(1, dims=0)
        assert (reranker(state, items, score, rank, mask) - before).abs().max() > 1e-3


def test_a_mask_hides_exactly_its_own_candidates(rng: np.random.Generator) -> None:
    reranker, (state, items, score, rank) = built(rng), lists(rng)
    some = torch.rand(B, C) < 0.4
    with torch.no_grad():
        mixed, known, masked = (reranker(state, items, score, rank, mask) for mask in (some, NONE, ALL))
    torch.testing.assert_close(mixed, torch.where(some, masked, known))


def test_what_the_scorer_sees(rng: np.random.Generator) -> None:
    """Score, log rank, is_unknown, popularity; then the declared features."""
    reranker, (state, items, score, rank) = built(rng, Seen, learned=False), lists(rng)
    some = torch.rand(B, C) < 0.4
    reranker.log_scale.data.fill_(0.7)
    reranker.center.fill_(0.4)
    base = reranker(state, items, score, rank, some)
    seen = reranker.scorer
    assert torch.equal(seen.features[..., 2], some.float()), "is_unknown"
    assert not seen.features[..., :2][some].any()
    assert not seen.vectors[some].any()
    assert torch.equal(seen.features[..., 0], base), "the calibrated score"
    torch.testing.assert_close(base[~some], ((score - reranker.center) * reranker.log_scale.exp())[~some])
    torch.testing.assert_close(seen.features[..., 1][~some], rank.float().log()[~some])
    torch.testing.assert_close(seen.vectors[~some], reranker.vectors[items[~some]])
    assert torch.equal(seen.features[..., 3], reranker.popularity[items])
    assert seen.features.shape[-1] == 4 + 16 + 16 + 2
    assert not base[some].any()


# --- what is looked up


def test_popularity_is_the_z_score_of_log_shares() -> None:
    counts = np.array([0, 0, 7, 90])
    reranker = Reranker(3, D, [], MLP)
    reranker.look_up(torch.zeros(4, D), counts, [])
    share = np.log((counts[1:] + 1) / (97 + 3))
    torch.testing.assert_close(
        reranker.popularity[1:],
        torch.tensor((share - share.mean()) / share.std(), dtype=torch.float32),
        rtol=1e-4,
        atol=1e-5,
    )
    assert reranker.popularity[0] == 0


def test_the_declared_features_are_those_of_a_table(rng: np.random.Generator) -> None:
    reranker = built(rng)
    assert reranker.features is not None
    items = torch.tensor([[4, 2, 0], [2, 2, 30]])
    seen = reranker.item_features(items)
    for row in range(2):
        for place in range(3):
            item = items[row, place]
            assert seen[row, place, 0] == reranker.popularity[item]
            torch.testing.assert_close(seen[row, place, 1:], reranker.features(item[None])[0])
    assert reranker.features.get_buffer("values2")[[4, 9]].isnan().all(), "looked up"


@pytest.mark.parametrize("longer", [0.02, 50.0])
def test_the_scorer_sees_unit_vectors_whatever_the_retriever_has(longer: float, rng: np.random.Generator) -> None:
    """A retriever compared by dot products has states and vectors of any length."""
    state, items, _, rank = lists(rng)
    dot = built(np.random.default_rng(0), Seen, learned=False)
    reranker = built(np.random.default_rng(0), learned=True)
    vectors = reranker.vectors.clone() * (longer * (1 + torch.rand(V + 1, 1)))
    score = (vectors[items] @ (state * longer)[..., None]).squeeze(-1)
    before = reranker(state, items, score, rank, NONE)
    for one in (dot, reranker):
        one.vectors.copy_(vectors)
    dot(state * longer, items, score, rank, NONE)
    torch.testing.assert_close(dot.scorer.vectors.norm(dim=-1), torch.ones(B, C))
    torch.testing.assert_close(dot.scorer.state, state)
    torch.testing.assert_close(reranker(state * longer, items, score, rank, NONE), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reranker.state_dict()["vectors"], vectors, msg="kept as they are in the index")


def test_weights_stand_alone(rng: np.random.Generator) -> None:
    """All that is looked up by item is in the state: a fresh reranker needs no data."""
    reranker, batch = built(rng), lists(rng)
    fresh = Reranker(V, D, FEATURES, MLP)
    fresh.load_state_dict(reranker.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(*batch, NONE), reranker(*batch, NONE))


# --- calibration


@pytest.mark.parametrize("spread", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("sharpness", [5.0, 40.0])
def test_calibrate_finds_the_scale_that_made_the_data(sharpness: float, spread: float) -> None:
    """Positives drawn from softmax(scale · score) are fitted best by that scale, whatever the range of the scores."""
    n, width, scale = 20_000, 10, sharpness / spread
    apart = torch.rand(n, width)
    real = torch.arange(width) < torch.randint(4, width + 1, (n, 1))
    positive = (sharpness * apart).masked_fill(~real, -torch.inf).softmax(1).multinomial(1).squeeze(1)
    score = spread * (apart + 7 * torch.rand(n, 1))  # lists lie apart, which no softmax feels
    reranker = Reranker(V, D, [], MLP)
    reranker.calibrate(torch.where(real, score, 77e3), positive, real)
    assert reranker.log_scale.exp().item() == pytest.approx(scale, rel=0.1)  # one step of the grid is 12 %
    assert reranker.center.item() == pytest.approx(score[real].mean().item(), rel=1e-4), "padding must not count"


def test_calibrate_stays_on_its_grid_when_the_scores_decide_all_or_nothing() -> None:
    score = torch.rand(500, 10)
    spread = (score - score.mean(1, keepdim=True)).square().mean().sqrt().item()
    for positive, expected in ((score.argmax(1), 100 / spread), (score.argmin(1), 0.1 / spread)):
        reranker = Reranker(V, D, [], MLP)
        reranker.calibrate(score, positive, torch.ones(500, 10, dtype=torch.bool))
        assert reranker.log_scale.exp().item() == pytest.approx(expected, rel=1e-4)


def test_equal_scores_are_calibrated_to_something_finite() -> None:
    reranker = Reranker(V, D, [], MLP)
    reranker.calibrate(torch.full((4, 3), 2.5), torch.tensor([0, 1, 2, 0]), torch.ones(4, 3, dtype=torch.bool))
    assert reranker.log_scale.isfinite()
    assert reranker.center == 2.5
