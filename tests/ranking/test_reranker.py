"""The reranker starts from the retriever's order, and an id that is masked leaves no trace."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from recsys2stage.ranking import scorers
from recsys2stage.ranking.reranker import PARTS, Reranker
from recsys2stage.ranking.scorers import DIN, MLP, CalibratedScorer, RankerInputs, Scorer
from recsys2stage.ranking.scorers.deep import concat_inputs
from recsys2stage.shapes import CandidateBatch

V, D, B, C, R = 30, 8, 5, 12, 4
FEATURES: list[dict[str, Any]] = [
    {"name": "genres", "kind": "multi", "size": 5, "values": 3},
    {"name": "decade", "kind": "categorical", "size": 4, "values": 1},
    {"name": "price", "kind": "numeric", "size": 1, "values": 1},
]
SIGNALS: list[dict[str, Any]] = [
    {"name": "Clock.hour", "by_id": False, "counted": False},
    {"name": "Clock.day", "by_id": False, "counted": False},
    {"name": "Follows.once", "by_id": True, "counted": False},
]
S = len(SIGNALS)
SCORERS = [  # that learn by gradients alone; the others: test_boosting.py
    part
    for part in vars(scorers).values()
    if isinstance(part, type) and issubclass(part, Scorer) and not inspect.isabstract(part)
    if not issubclass(part, CalibratedScorer)
]


def arrays(rng: np.random.Generator) -> list[dict[str, Any]]:
    """The features with their values, row 0 for padding."""
    genres = rng.integers(0, 5, size=(V + 1, 3)).astype(np.int32)
    decade = rng.integers(0, 4, size=V + 1).astype(np.int32)
    price = rng.normal(20, 5, size=V + 1).astype(np.float32)
    genres[0], decade[0], price[0], price[[4, 9]] = 0, 0, np.nan, np.nan
    return [{**feature, "values": values} for feature, values in zip(FEATURES, (genres, decade, price), strict=True)]


def built(
    rng: np.random.Generator, scorer: Callable[[int, int], Scorer] = MLP, learned: bool = True, **options: Any
) -> Reranker:
    """In evaluation mode, as it stands at step 0 or with weights as after some training."""
    reranker = Reranker(V, D, FEATURES, scorer, **({"signals": SIGNALS} | options))
    vectors = torch.nn.functional.normalize(torch.randn(V + 1, D), dim=-1)
    vectors[0] = 0
    reranker.load_item_tables(vectors, rng.integers(1, 100, size=V + 1), arrays(rng))
    if learned:
        with torch.no_grad():
            for weight in reranker.parameters():
                weight += 0.2 * torch.randn_like(weight)
    return reranker.eval()


def lists(rng: np.random.Generator) -> CandidateBatch:
    """Candidates with their scores (best first) after histories of 0, 1, 2 ... events."""
    recent = torch.from_numpy(np.stack([rng.permutation(V)[:R] + 1 for _ in range(B)]))
    recent[torch.arange(R) >= torch.arange(B)[:, None]] = 0
    return CandidateBatch(
        state=torch.nn.functional.normalize(torch.randn(B, D), dim=-1),
        items=torch.from_numpy(np.stack([rng.permutation(V)[:C] + 1 for _ in range(B)])),
        score=torch.rand(B, C).sort(dim=1, descending=True).values,
        rank=torch.arange(1, C + 1).expand(B, C),
        signals=torch.randn(B, C, S),
        recent=recent,
        ages=(20 * torch.rand(B, R)).where(recent > 0, 0),
    )


NONE, ALL = torch.zeros(B, C, dtype=torch.bool), torch.ones(B, C, dtype=torch.bool)


# --- step 0


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.__name__)
@pytest.mark.parametrize("calibrated", [False, True])
def test_at_step_0_the_retrievers_order_stands(scorer: Any, calibrated: bool, rng: np.random.Generator) -> None:
    reranker = built(rng, scorer, learned=False)
    listed = lists(rng)
    shuffle = torch.stack([torch.randperm(C) for _ in range(B)])
    listed = listed._replace(**{name: getattr(listed, name).gather(1, shuffle) for name in ("items", "score", "rank")})
    if calibrated:
        reranker.calibrate(listed.score, listed.score.argmax(1), ALL)
        assert reranker.log_scale > 0
    by_score = listed.score.argsort(dim=1, descending=True)
    with torch.no_grad():
        for mode in (reranker.eval(), reranker.train()):  # the first batch of training too
            logits = mode(listed, NONE)
            assert torch.equal(logits.argsort(dim=1, descending=True), by_score)
        assert not reranker(listed, ALL).any(), "without ids there is no opinion yet"
    scored = built(rng, scorer, learned=True)
    with torch.no_grad():
        logits = scored(listed, NONE)
    assert not torch.equal(logits.argsort(dim=1, descending=True), by_score), "trained, it must have an opinion"


def test_a_scorer_from_outside_starts_from_the_retriever_too(rng: np.random.Generator) -> None:
    class Silent(Scorer):
        def __init__(self, dim: int, num_features: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(num_features))

        def forward(self, shown: RankerInputs) -> Float[Tensor, "B C"]:
            return shown.features @ self.weight

    listed = lists(rng)
    logits = built(rng, Silent, learned=False)(listed, NONE)
    assert torch.equal(logits.argsort(dim=1, descending=True), listed.rank - 1)


def test_at_step_0_cold_items_stand_where_an_item_tower_put_them(rng: np.random.Generator) -> None:
    """Those of a plain table, whose score means nothing, stand where a score at the center would put them."""
    for scores_cold in (True, False):
        reranker, listed = built(rng, learned=False, scores_cold=scores_cold), lists(rng)
        reranker.cold[1:] = torch.rand(V) < 0.3
        logits, cold = reranker(listed, NONE), reranker.cold[listed.items]
        assert cold.any()
        assert torch.equal(logits[cold] == 0, torch.full((int(cold.sum()),), not scores_cold))
        if scores_cold:
            assert torch.equal(logits.argsort(dim=1, descending=True), listed.rank - 1)


# --- what a masked id hides


class Seen(Scorer):
    """Keeps what it was shown."""

    shown: RankerInputs

    def __init__(self, dim: int, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, shown: RankerInputs) -> Float[Tensor, "B C"]:
        self.shown = shown
        return shown.features.sum(-1) * 0


def test_masked_ids_leave_no_trace(rng: np.random.Generator) -> None:
    reranker, listed = built(rng), lists(rng)
    by_id = torch.tensor([signal["by_id"] for signal in SIGNALS])
    changes = {
        "score": torch.rand_like(listed.score),
        "rank": listed.rank.flip(1),
        "signals": torch.where(by_id, torch.randn(B, C, S), listed.signals),
    }
    with torch.no_grad():
        masked, known = (reranker(listed, mask) for mask in (ALL, NONE))
        for name, values in changes.items():
            other = listed._replace(**{name: values})
            assert torch.equal(reranker(other, ALL), masked), name
            assert (reranker(other, NONE) - known).abs().max() > 1e-3, f"{name} is felt where the id is known"
        reranker.vectors.copy_(torch.randn_like(reranker.vectors))
        reranker.center += 3
        assert torch.equal(reranker(listed, ALL), masked)
        reranker.center -= 3
        assert (reranker(listed, NONE) - known).abs().max() > 1e-3, "vectors are felt where the id is known"


def test_a_margin_is_not_told_of_what_is_masked(rng: np.random.Generator) -> None:
    """Were it told, the best score of a list would show through the distances to it."""
    reranker, listed = built(rng, Seen, learned=False), lists(rng)
    reranker(listed, ALL)
    assert not reranker.scorer.shown.features[..., 2].any()


@pytest.mark.parametrize("buffer", ["popularity", "features.values0", "features.values1", "features.values2"])
@pytest.mark.parametrize("mask", [NONE, ALL], ids=["known", "masked"])
def test_popularity_and_features_stay(buffer: str, mask: Tensor, rng: np.random.Generator) -> None:
    reranker, listed = built(rng), lists(rng)
    with torch.no_grad():
        before = reranker(listed, mask)
        values = reranker.get_buffer(buffer)
        values[1:] = values[1:].roll(1, dims=0)
        assert (reranker(listed, mask) - before).abs().max() > 1e-3


@pytest.mark.parametrize("mask", [NONE, ALL], ids=["known", "masked"])
@pytest.mark.parametrize("part", ["state", "recent", "ages", "signals"])
def test_what_is_known_of_the_request_stays(part: str, mask: Tensor, rng: np.random.Generator) -> None:
    """The user's state and history, and signals that do not come from the candidate's id."""
    reranker, listed = built(rng, DIN), lists(rng)
    values = getattr(listed, part)
    if part == "signals":
        values = torch.cat([values[..., :2] + torch.randn(B, C, 2), values[..., 2:]], dim=-1)
    else:
        values = torch.where(values != 0, values.roll(1, dims=0), 0)
    with torch.no_grad():
        felt = (reranker(listed._replace(**{part: values}), mask) - reranker(listed, mask)).abs()
    assert felt.max() > 1e-3


def test_a_mask_hides_exactly_its_own_candidates(rng: np.random.Generator) -> None:
    reranker, listed = built(rng), lists(rng)
    some = torch.rand(B, C) < 0.4
    with torch.no_grad():
        mixed, known, masked = (reranker(listed, mask) for mask in (some, NONE, ALL))
    torch.testing.assert_close(mixed, torch.where(some, masked, known))


# --- what nothing is counted of


@pytest.mark.parametrize("scores_cold", [False, True])
def test_a_cold_item_goes_by_what_may_be_known_of_it(scores_cold: bool, rng: np.random.Generator) -> None:
    """No id and no count; the retriever's score where that was made of features."""
    counts = [{**signal, "counted": signal["name"] == "Clock.day"} for signal in SIGNALS]
    reranker, listed = built(rng, signals=counts, scores_cold=scores_cold), lists(rng)
    cold = torch.rand(B, C) < 0.4
    known = torch.tensor([True, False, False])  # Clock.hour alone is neither of the id nor counted
    changes = {
        "score": listed.score + torch.rand(B, C) - 2,  # below the best of each list
        "rank": listed.rank.flip(1),
        "known": torch.where(known, torch.randn(B, C, S), listed.signals),
        "hidden": torch.where(known, listed.signals, torch.randn(B, C, S)),
    }
    listed.score[:, 0], cold[:, 0] = 2, False  # the best
    with torch.no_grad():
        before = reranker(listed, NONE, cold)
        for name, values in changes.items():
            field = name if name in ("score", "rank") else "signals"
            values = torch.where(cold if field != "signals" else cold[..., None], values, getattr(listed, field))
            felt = (reranker(listed._replace(**{field: values}), NONE, cold) - before).abs()
            assert (felt[cold].max() > 1e-3) == (name == "known" or (scores_cold and field != "signals")), name
            assert not felt[~cold].any()
        for buffer in (reranker.popularity, reranker.vectors):
            buffer.copy_(buffer.roll(1, dims=0))
        felt = (reranker(listed, NONE, cold) - before).abs()
    assert not felt[cold].any(), "popularity and vectors"
    assert felt[~cold].max() > 1e-3


def test_what_no_training_event_shows_is_cold_by_itself(rng: np.random.Generator) -> None:
    counts, listed = rng.integers(0, 3, size=V + 1), lists(rng)
    reranker = built(rng)
    with torch.no_grad():
        told = reranker(listed, NONE, torch.from_numpy(counts == 0)[listed.items])
        assert (told - reranker(listed, NONE)).abs().max() > 1e-3
        reranker.cold[1:] = torch.from_numpy(counts == 0)[1:]
        assert torch.equal(reranker(listed, NONE), told)
    reranker.load_item_tables(reranker.vectors, counts, arrays(rng))
    assert reranker.cold.tolist() == [False, *(counts[1:] == 0).tolist()]


def test_what_the_scorer_sees(rng: np.random.Generator) -> None:
    """Score, log rank, margin, is_unknown, popularity; then the declared features, then the signals."""
    reranker, listed = built(rng, Seen, learned=False), lists(rng)
    listed.score[0, 7:], listed.items[0, 7:] = 0, 0  # a list of seven
    listed.score[:, :7] -= 3  # so that the padding's score is the largest number
    some = torch.rand(B, C) < 0.4
    reranker.log_scale.data.fill_(0.7)
    reranker.center.fill_(0.4)
    base = reranker(listed, some)
    seen, real = reranker.scorer.shown, listed.items > 0
    assert torch.equal(seen.features[..., 3], some.float()), "is_unknown"
    assert not seen.features[..., :3][some].any()
    assert not seen.vectors[some].any()
    assert torch.equal(seen.features[..., 0], base), "the calibrated score"
    scale = reranker.log_scale.exp()
    torch.testing.assert_close(base[~some], ((listed.score - reranker.center) * scale)[~some])
    torch.testing.assert_close(seen.features[..., 1][~some], listed.rank.float().log()[~some])
    for row in range(B):
        best = max(listed.score[row][real[row]].tolist())
        for place in range(C):
            known = real[row, place] and not some[row, place]
            margin = (listed.score[row, place] - best) * scale if known else torch.tensor(0.0)
            torch.testing.assert_close(seen.features[row, place, 2], margin)
    torch.testing.assert_close(seen.vectors[~some], reranker.vectors[listed.items[~some]])
    assert torch.equal(seen.features[..., 4], reranker.popularity[listed.items])
    assert seen.features.shape[-1] == reranker.scorer.num_features == 5 + 16 + 16 + 2 + S
    assert torch.equal(seen.features[..., -S:-1], listed.signals[..., :-1]), "that do not come from the id"
    assert torch.equal(seen.features[..., -1], listed.signals[..., -1].where(~some, 0))
    torch.testing.assert_close(seen.state, listed.state)
    assert torch.equal(seen.ages, listed.ages)
    assert torch.equal(seen.real, listed.recent > 0)
    assert seen.real.sum(1).tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(seen.recent[seen.real], reranker.vectors[listed.recent[seen.real]])
    assert not base[some].any()


# --- what is left out


WHERE = {"score": [0], "rank": [1], "margin": [2], "popularity": [4], "features": range(5, 39)}
WHERE |= {"Clock": [39, 40], "Clock.hour": [39], "Clock.day": [40], "Follows": [41], "Follows.once": [41]}


@pytest.mark.parametrize("part", [*PARTS, "Clock", "Clock.hour", "Clock.day", "Follows", "Follows.once"])
def test_without_hides_what_it_names_and_nothing_else(part: str, rng: np.random.Generator) -> None:
    listed, both = lists(rng), []
    for without in (None, [part]):
        reranker = built(np.random.default_rng(0), Seen, learned=False, without=without)
        reranker.vectors.copy_(torch.arange(31.0)[:, None] + torch.arange(D))
        reranker.standardise(listed.signals.flatten(0, 1))
        torch.manual_seed(1)
        for table in [] if reranker.features is None else reranker.features.parameters():
            torch.nn.init.normal_(table)
        both.append((reranker(listed, NONE), reranker.scorer.shown))
    (base, whole), (other_base, less) = both
    hidden = list(WHERE.get(part, []))
    seen = torch.ones(whole.features.size(-1), dtype=torch.bool)
    seen[hidden] = False
    assert torch.equal(less.features[..., seen], whole.features[..., seen])
    assert not less.features[..., ~seen].any()
    for place in hidden:
        assert whole.features[..., place].any(), "there was something to hide"
    for name in ("state", "vectors"):
        values = getattr(less, name)
        assert torch.equal(values, torch.zeros_like(values) if name == part else getattr(whole, name))
    assert torch.equal(less.real, torch.zeros_like(less.real) if part == "recent" else whole.real)
    assert torch.equal(base, other_base), "the retriever's score is corrected, not left out"


def test_several_things_are_left_out_at_once(rng: np.random.Generator) -> None:
    reranker, listed = built(rng, Seen, learned=False, without=["rank", "Clock.day", "Follows", "recent"]), lists(rng)
    reranker(listed, NONE)
    seen = reranker.scorer.shown
    assert seen.features.any(0).any(0)[[0, 1, 2, 4, 39, 40, 41]].tolist() == [
        True,
        False,
        True,
        True,
        True,
        False,
        False,
    ]
    assert not seen.real.any()


@pytest.mark.parametrize("name", ["Clok", "Clock.minute", "hour", "logits", "is_unknown"])
def test_a_part_that_is_not_there_cannot_be_left_out(name: str) -> None:
    with pytest.raises(ValueError, match=rf"without has {name}, expected some of Clock, Clock.day, .*, vectors"):
        Reranker(V, D, FEATURES, MLP, signals=SIGNALS, without=["Clock", name])


def test_weights_that_leave_something_out_still_do_after_loading(rng: np.random.Generator) -> None:
    reranker, listed = built(rng, without=["Clock", "popularity"]), lists(rng)
    reranker.standardise(listed.signals.flatten(0, 1))
    fresh = Reranker(V, D, FEATURES, MLP, signals=SIGNALS, without=["Clock", "popularity"])
    fresh.load_state_dict(reranker.state_dict())
    other = listed._replace(signals=torch.cat([torch.randn(B, C, 2), listed.signals[..., 2:]], dim=-1))
    with torch.no_grad():
        assert torch.equal(fresh.eval()(other, NONE), reranker(listed, NONE))


# --- signals


def test_signals_are_standardised_by_the_candidates_they_are_shown(rng: np.random.Generator) -> None:
    reranker, listed = built(rng, Seen, learned=False), lists(rng)
    signals = torch.tensor([1e3, 0.01, 5.0]) + torch.tensor([40.0, 1e-3, 2.0]) * torch.randn(B, C, S)
    reranker.standardise(signals.flatten(0, 1))
    reranker(listed._replace(signals=signals), NONE)
    seen = reranker.scorer.shown.features[..., -S:]
    values = signals.double().flatten(0, 1).numpy()
    want = ((values - values.mean(0)) / values.std(0)).reshape(B, C, S)
    assert np.abs(want).max() < 5
    torch.testing.assert_close(seen, torch.from_numpy(want).float(), rtol=1e-3, atol=1e-3)


def test_a_signal_that_never_changes_says_nothing(rng: np.random.Generator) -> None:
    """Divided by its spread, the noise of its last digit would be told in full."""
    reranker, listed = built(rng, Seen, learned=False), lists(rng)
    signals = torch.randn(B, C, S)
    signals[..., 1] = 12.25
    reranker.standardise(signals.flatten(0, 1))
    reranker(listed._replace(signals=signals * 1.01), NONE)
    seen = reranker.scorer.shown.features[..., -S:]
    assert not seen[..., 1].any()
    assert seen[..., [0, 2]].any(0).any(0).all()


def test_a_signal_far_out_says_little_more_than_one_less_far(rng: np.random.Generator) -> None:
    reranker, listed = built(rng, Seen, learned=False), lists(rng)
    reranker.standardise(3 * torch.randn(10_000, S) + 1)
    signals = torch.linspace(-100, 100, B * C * S).view(B, C, S)
    reranker(listed._replace(signals=signals), NONE)
    seen = reranker.scorer.shown.features[..., -S:]
    assert (seen.min(), seen.max()) == (-5, 5)
    near = (signals - 1).abs() < 12
    torch.testing.assert_close(seen[near], (signals[near] - 1) / 3, rtol=0.05, atol=0.15)


def test_without_signals_there_is_nothing_to_standardise(rng: np.random.Generator) -> None:
    reranker, listed = Reranker(V, D, FEATURES, Seen), lists(rng)
    reranker.standardise(torch.zeros(7, 0))
    reranker(listed._replace(signals=torch.zeros(B, C, 0)), NONE)
    assert reranker.scorer.shown.features.shape == (B, C, 39)


# --- what is looked up


def test_popularity_is_the_z_score_of_log_shares() -> None:
    counts = np.array([0, 0, 7, 90])
    reranker = Reranker(3, D, [], MLP)
    reranker.load_item_tables(torch.zeros(4, D), counts, [])
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
            torch.testing.assert_close(seen[row, place], reranker.features(items[row, place][None])[0])
    assert reranker.features.get_buffer("values2")[[4, 9]].isnan().all(), "looked up"


@pytest.mark.parametrize("longer", [0.02, 50.0])
def test_the_scorer_sees_unit_vectors_whatever_the_retriever_has(longer: float, rng: np.random.Generator) -> None:
    """A retriever compared by dot products has states and vectors of any length."""
    listed = lists(rng)
    dot = built(np.random.default_rng(0), Seen, learned=False)
    reranker = built(np.random.default_rng(0), learned=True)
    vectors = reranker.vectors.clone() * (longer * (1 + torch.rand(V + 1, 1)))
    state = listed.state * longer
    listed = listed._replace(score=(vectors[listed.items] @ state[..., None]).squeeze(-1))
    before = reranker(listed, NONE)
    for one in (dot, reranker):
        one.vectors.copy_(vectors)
    dot(listed._replace(state=state), NONE)
    seen = dot.scorer.shown
    torch.testing.assert_close(seen.vectors.norm(dim=-1), torch.ones(B, C))
    torch.testing.assert_close(seen.recent[seen.real].norm(dim=-1), torch.ones(int(seen.real.sum())))
    torch.testing.assert_close(seen.state, listed.state)
    torch.testing.assert_close(reranker(listed._replace(state=state), NONE), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reranker.state_dict()["vectors"], vectors, msg="kept as they are in the index")


def test_weights_stand_alone(rng: np.random.Generator) -> None:
    """All that is looked up by item is in the state: a fresh reranker needs no data."""
    reranker, listed = built(rng), lists(rng)
    reranker.standardise(listed.signals.flatten(0, 1) * 2 + 1)
    fresh = Reranker(V, D, FEATURES, MLP, signals=SIGNALS)
    fresh.load_state_dict(reranker.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(listed, NONE), reranker(listed, NONE))


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
    assert reranker.log_scale.exp().item() == pytest.approx(scale, rel=0.1)  # one step of the grid is 6 %
    assert reranker.center.item() == pytest.approx(score[real].mean().item(), rel=1e-4), "padding must not count"


def test_calibrate_stays_on_its_grid_when_the_scores_decide_all_or_nothing() -> None:
    score = torch.rand(500, 10)
    spread = (score - score.mean(1, keepdim=True)).square().mean().sqrt().item()
    for positive, expected in ((score.argmax(1), 100 / spread), (score.argmin(1), 10**-1.5 / spread)):
        reranker = Reranker(V, D, [], MLP)
        reranker.calibrate(score, positive, torch.ones(500, 10, dtype=torch.bool))
        assert reranker.log_scale.exp().item() == pytest.approx(expected, rel=1e-4)


def test_equal_scores_are_calibrated_to_something_finite() -> None:
    reranker = Reranker(V, D, [], MLP)
    reranker.calibrate(torch.full((4, 3), 2.5), torch.tensor([0, 1, 2, 0]), torch.ones(4, 3, dtype=torch.bool))
    assert reranker.log_scale.isfinite()
    assert reranker.center == 2.5


@pytest.mark.parametrize("without", [[], ["state"], ["vectors"], ["state", "vectors"], ["features"]], ids="-".join)
def test_the_mlp_leaves_out_only_what_is_zero(without: list[str], rng: np.random.Generator) -> None:
    """As if all inputs were concatenated, with zeros for what is left out."""
    reranker, batch = built(rng, without=without), lists(rng)
    scorer = reranker.scorer
    assert isinstance(scorer, MLP)
    _, inputs = reranker.scorer_inputs(batch)
    whole = scorer.deep(*concat_inputs(inputs)).squeeze(-1) + scorer.wide(inputs.features)
    torch.testing.assert_close(scorer(inputs), whole, rtol=1e-4, atol=1e-4)


def test_no_mask_is_a_mask_of_nothing(rng: np.random.Generator) -> None:
    reranker, batch = built(rng), lists(rng)
    nothing = torch.zeros_like(batch.items, dtype=torch.bool)
    for cold in (False, True):
        reranker.cold.fill_(False)
        reranker.cold[batch.items[0, 0]] = cold
        torch.testing.assert_close(reranker(batch), reranker(batch, nothing))


def test_frozen_features_are_those_of_the_weights_until_training_goes_on(rng: np.random.Generator) -> None:
    reranker, items = built(rng), torch.arange(V + 1)[None]
    want = reranker.item_features(items)
    assert reranker.freeze().encoded is not None
    torch.testing.assert_close(reranker.item_features(items), want)
    assert "encoded" not in reranker.state_dict()
    reranker.train()
    assert reranker.encoded is None
    assert built(rng, without=["features"]).freeze().encoded is None
