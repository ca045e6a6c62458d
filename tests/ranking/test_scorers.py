"""Scorers are their formulas, judge each candidate alone, begin silent, and learn what they were made for."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from naive import Weights, enlarged, float64, linear, norm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recsys2stage.ranking import scorers
from recsys2stage.ranking.scorers import DCN, DIN, GBDT, MLP, Blend, ListAttention, MoL, RankerInputs, Scorer

B, C, R, D, F = 4, 6, 5, 8, 3
HIDDEN = (12, 7)
SCORERS = {
    "MLP": MLP,
    "DIN": DIN,
    "DCN": DCN,
    "DCN, low rank": partial(DCN, rank=3, crosses=3),
    "MoL": partial(MoL, user_parts=3, item_parts=2, part_dim=5),
}
Kind = Callable[..., Scorer]
every = pytest.mark.parametrize("kind", SCORERS.values(), ids=SCORERS)


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def shown(requests: int = B, candidates: int = C, newest: int = R, dim: int = D, features: int = F) -> RankerInputs:
    """Requests whose histories have 0, 1, 2 … events, a masked candidate in each list, junk where nothing is there."""
    vectors = unit(requests, candidates, dim)
    vectors[:, 1:2] = 0
    real = torch.arange(newest) < torch.arange(requests)[:, None]
    ages = (20 * torch.rand(requests, newest)).sort(dim=1).values
    values = torch.randn(requests, candidates, features)
    base, listed = torch.randn(requests, candidates), torch.ones(requests, candidates, dtype=torch.bool)
    return RankerInputs(unit(requests, dim), vectors, values, unit(requests, newest, dim), ages, real, base, listed)


def test_every_scorer_is_tested() -> None:
    kinds = {kind for kind in vars(scorers).values() if isinstance(kind, type) and issubclass(kind, Scorer)}
    abstract = {kind for kind in kinds if inspect.isabstract(kind)}
    assert kinds - abstract == {MLP, DIN, DCN, MoL, ListAttention, GBDT, Blend}  # the last two: test_boosting.py


# --- what holds for every scorer


@every
def test_it_says_nothing_before_it_has_learned(kind: Kind) -> None:
    scorer = kind(D, F)
    for mode in (scorer.train(), scorer.eval()):
        said = mode(shown())
        assert said.shape == (B, C)
        assert not said.any()


@every
@pytest.mark.parametrize("by_features", [False, True])
def test_a_few_steps_change_the_order(kind: Kind, by_features: bool) -> None:
    """A scorer that is silent at first must not stay so, even where features do not tell candidates apart."""
    seen = shown()
    seen = seen if by_features else seen._replace(features=torch.zeros(B, C, F))
    scorer = kind(D, F, dropout=0.0)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(scorer(seen), torch.zeros(B, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert scorer(seen).detach().std(dim=1).min() > 1e-4, "each list is put in some order"
    assert losses[0] == pytest.approx(math.log(C))
    assert losses[2] < losses[1] < losses[0]
    # a bias of the whole score moves all candidates alike, which a softmax does not feel: a gradient of 0 or a rounding
    shift = "" if kind is SCORERS["MoL"] else f"deep.rest.{len(scorer.deep.rest) - 1}.bias"
    for name, weight in scorer.named_parameters():
        if weight.grad is not None and (by_features or "wide" not in name):
            size = weight.grad.abs().max()
            assert size < 1e-7 if name == shift else size > 5e-7, f"{name} must learn, but for a shift of all"


@every
def test_a_candidate_is_judged_alone_wherever_it_stands(kind: Kind) -> None:
    with float64():
        scorer, seen = enlarged(kind(D, F)), shown()
        said = scorer(seen)
        order = torch.randperm(C)
        moved = seen._replace(vectors=seen.vectors[:, order], features=seen.features[:, order])
        torch.testing.assert_close(scorer(moved), said[:, order], rtol=1e-9, atol=1e-9)
        for place in range(C):
            alone = seen._replace(vectors=seen.vectors[:, [place]], features=seen.features[:, [place]])
            torch.testing.assert_close(scorer(alone), said[:, [place]], rtol=1e-9, atol=1e-9)
        one = RankerInputs(*(part[2:3] for part in seen))
        torch.testing.assert_close(scorer(one), said[2:3], rtol=1e-9, atol=1e-9)
    assert (said.std(dim=1) > 1e-3).all()


@every
def test_what_is_not_there_is_not_seen(kind: Kind) -> None:
    scorer, seen = enlarged(kind(D, F)), shown()
    other = torch.where(seen.real[..., None], seen.recent, unit(B, R, D))
    ages = torch.where(seen.real, seen.ages, 7 + torch.rand(B, R))
    assert torch.equal(scorer(seen._replace(recent=other, ages=ages)), scorer(seen))


@every
def test_without_events_or_candidates_it_is_finite(kind: Kind) -> None:
    empty = shown(newest=0)
    for seen in (empty, shown(candidates=0), shown(requests=0), shown(requests=1), shown(1, 1, 1)):
        scorer = enlarged(kind(D, F))
        said = scorer(seen)
        said.sum().backward()
        assert said.shape == seen.vectors.shape[:2]
        assert said.isfinite().all()
        assert all(w.grad is None or w.grad.isfinite().all() for w in scorer.parameters())
    padded = empty._replace(recent=unit(B, R, D), ages=torch.rand(B, R), real=torch.zeros(B, R, dtype=torch.bool))
    torch.testing.assert_close(scorer(padded), scorer(empty))


@every
def test_half_precision_tells_the_same(kind: Kind) -> None:
    scorer, seen = enlarged(kind(D, F)), shown(requests=20)
    said = scorer(seen)
    with torch.autocast("cpu", torch.bfloat16):
        half = scorer(seen)
        half.float().square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in scorer.parameters())
    together = torch.stack([half.detach().float().flatten(), said.detach().flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(MLP, hidden=()), r"hidden is \(\), expected a list of integers"),
        (partial(MLP, hidden=(8, 0)), r"hidden is \(8, 0\)"),
        (partial(DCN, crosses=0), "crosses is 0, expected at least 1"),
        (partial(DCN, rank=0), "rank is 0, expected at least 1"),
        (partial(MoL, temperature=0.0), "temperature is 0.0, expected a number above 0"),
        (partial(DIN, dropout=1.0), "dropout is 1.0, expected a share"),
    ],
)
def test_options_out_of_range_say_so(build: Kind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(D, F)


# --- against their formulas, for one candidate in plain loops


def deep(user: Tensor, candidate: Tensor, weights: Weights, name: str) -> Tensor:
    """The layers of HIDDEN."""
    x = linear(user, weights, f"{name}.of_user") + linear(candidate, weights, f"{name}.of_candidate")
    for width in range(len(HIDDEN)):
        first = 4 * width
        x = norm(x, weights, f"{name}.rest.{first}", eps=1e-5).relu()
        x = linear(x, weights, f"{name}.rest.{first + 3}")
    return x


def mlp(c: Tensor, values: Tensor, u: Tensor, events: list[tuple[Tensor, Tensor]], weights: Weights) -> Tensor:
    return deep(u, torch.cat([c, u * c, values]), weights, "deep")[0]


def din(c: Tensor, values: Tensor, u: Tensor, events: list[tuple[Tensor, Tensor]], weights: Weights) -> Tensor:
    masses = []
    for place, (r, age) in enumerate(events, start=1):
        event = torch.cat([r, torch.stack([(age - 11.4) / (17.3 - 11.4), torch.tensor(math.log(place))])])
        layer = linear(event, weights, "of_event") + weights["of_candidate"] @ c + weights["of_product"] @ (r * c)
        masses.append(linear(layer.relu(), weights, "activation")[0].exp())
    interest = torch.zeros(D)
    for mass, (r, _) in zip(masses, events, strict=True):
        interest = interest + mass * r / (1 + sum(masses))
    return deep(u, torch.cat([c, u * c, values, interest, interest * c]), weights, "deep")[0]


def dcn(c: Tensor, values: Tensor, u: Tensor, events: list[tuple[Tensor, Tensor]], weights: Weights) -> Tensor:
    first = crossed = torch.cat([u, c, u * c, values])
    for layer in range(2):
        name = f"crosses.{layer}.0"
        mapped = linear(crossed, weights, name)
        if f"crosses.{layer}.1.weight" in weights:
            mapped = linear(mapped, weights, f"crosses.{layer}.1")
        crossed = torch.stack([first[i] * mapped[i] + crossed[i] for i in range(len(first))])
    return deep(u, torch.cat([c, u * c, values]), weights, "deep")[0] + linear(crossed, weights, "last")[0]


def mol(c: Tensor, values: Tensor, u: Tensor, events: list[tuple[Tensor, Tensor]], weights: Weights) -> Tensor:
    of_users = linear(u, weights, "of_user").split(5)
    of_items = linear(torch.cat([c, values]), weights, "of_item").split(5)
    cosines = torch.stack([g @ f / (g.norm() * f.norm()) for g in of_items for f in of_users])
    gates = deep(u, torch.cat([c, u * c, values, cosines]), weights, "gates").exp()
    return 10 * weights["scale"] * (gates / gates.sum() * cosines).sum() / 0.05


@pytest.mark.parametrize(
    ("kind", "formula"),
    [(MLP, mlp), (DIN, din), (DCN, dcn), (partial(DCN, rank=3), dcn), (SCORERS["MoL"], mol)],
    ids=["MLP", "DIN", "DCN", "DCN, low rank", "MoL"],
)
def test_a_scorer_is_its_formula(kind: Kind, formula: Callable[..., Tensor]) -> None:
    with float64():
        scorer, seen = enlarged(kind(D, F, hidden=HIDDEN)), shown(requests=R + 1)
        weights = dict(scorer.named_parameters())
        want = []
        for row in range(R + 1):
            u = seen.state[row] * math.sqrt(D)
            events = [(seen.recent[row, j] * math.sqrt(D), seen.ages[row, j]) for j in range(R) if seen.real[row, j]]
            for c, values in zip(seen.vectors[row] * math.sqrt(D), seen.features[row], strict=True):
                wide = 10 * linear(values, weights, "wide")[0]
                want.append(formula(c, values, u, events, weights) + wide)
        said = scorer(seen).flatten()
        torch.testing.assert_close(said, torch.stack(want), rtol=1e-9, atol=1e-9)
        mass = torch.randn(len(said))
        got, wanted = (torch.autograd.grad((out * mass).sum(), weights.values()) for out in (said, torch.stack(want)))
        for name, one, other in zip(weights, got, wanted, strict=True):
            assert other.abs().max() > 1e-8, f"{name} must matter"
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_attention_needs_no_vector_for_each_pair_of_candidate_and_event() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes = [part.numel() for part in tree_leaves(out) if isinstance(part, Tensor)]
            self.numbers = max(self.numbers, *sizes, 0)
            return out

    candidates, newest, dim, width = 40, 20, 16, 8
    seen = shown(B, candidates, newest, dim)
    with Largest() as largest:
        DIN(dim, F, hidden=HIDDEN, attention_hidden=width)(seen).sum().backward()
    assert largest.numbers == B * candidates * newest * width


# --- worlds with a known answer

World = Callable[[int], tuple[RankerInputs, Tensor]]  # so many requests, and the place of each one's target


def with_targets(seen: RankerInputs, worth: Tensor) -> tuple[RankerInputs, Tensor]:
    return seen, worth.argmax(dim=1)


def oldest_again(requests: int) -> tuple[RankerInputs, Tensor]:
    """Of the newest items, in any order and among strangers, the user takes the one that is longest ago."""
    seen = shown(requests, candidates=8)
    place = torch.stack([torch.randperm(8)[:R] for _ in range(requests)])
    vectors = unit(requests, 8, D).scatter(1, place[..., None].expand(-1, -1, D), seen.recent)
    ages = 20 * torch.rand(requests, R)
    target = place.gather(1, ages.argmax(dim=1, keepdim=True)).squeeze(1)
    return seen._replace(vectors=vectors, ages=ages, real=torch.ones(requests, R, dtype=torch.bool)), target


def product_of_two_features(requests: int) -> tuple[RankerInputs, Tensor]:
    """Each of the two alone says nothing."""
    seen = shown(requests)
    return with_targets(seen, seen.features[..., 0] * seen.features[..., 1])


def two_tastes(requests: int) -> tuple[RankerInputs, Tensor]:
    """One feature says which half of the vector, each in an order of its own, is like which half of the state."""
    seen = shown(requests, candidates=8, features=1)
    state, vectors = seen.state.flip(-1)[:, None], unit(requests, 8, D)
    sort = torch.randint(2, (requests, 8))
    likes = (state * vectors).unflatten(-1, (2, -1)).sum(-1)
    worth = likes.gather(2, sort[..., None]).squeeze(2)
    return with_targets(seen._replace(vectors=vectors, features=2.0 * sort[..., None] - 1), worth)


def hits(scorer: Scorer, world: World, steps: int) -> float:
    """Share of targets that come first, on requests it has not learned from."""
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-2)
    for _ in range(steps):
        seen, target = world(128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scorer(seen), target).backward()
        optimizer.step()
    seen, target = world(1000)
    with torch.no_grad():
        return (scorer.eval()(seen).argmax(dim=1) == target).double().mean().item()


def test_attention_finds_the_item_that_is_longest_ago() -> None:
    options = {"hidden": (16,), "dropout": 0.0}
    assert hits(DIN(D, F, **options), oldest_again, steps=200) > 0.9
    assert hits(MLP(D, F, **options), oldest_again, steps=200) < 0.25, "chance is one of eight"


@pytest.mark.parametrize("rank", [None, 2])
def test_crosses_find_the_product_of_two_features(rank: int | None) -> None:
    """With deep layers too narrow to help."""
    options = {"hidden": (1,), "dropout": 0.0}
    assert hits(DCN(D, F, rank=rank, **options), product_of_two_features, steps=150) > 0.85
    assert hits(MLP(D, F, **options), product_of_two_features, steps=150) < 0.5, "chance is one of six"


def test_a_mixture_of_logits_finds_the_similarity_that_counts() -> None:
    options = {"hidden": (16,), "dropout": 0.0}
    assert hits(MoL(D, 1, **options), two_tastes, steps=200) > 0.85
    assert hits(MLP(D, 1, **options), two_tastes, steps=200) < 0.7
