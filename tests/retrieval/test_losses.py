"""Losses against their definitions, written as loops; chunked equals unchunked; padding is never a column."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recsys2stage.ranking.losses import BCE, BPR, ListLoss, Listwise
from recsys2stage.retrieval import losses
from recsys2stage.retrieval.losses import (
    DCL,
    GBCE,
    MSE,
    Catalogue,
    FullSoftmax,
    InBatch,
    InfoNCE,
    Loss,
    Mixed,
    Negatives,
    Sampled,
    Targets,
    Uniform,
    blocks,
)
from recsys2stage.retrieval.losses.negatives import LogShares, SampledNegatives
from recsys2stage.retrieval.objectives import NextItem
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.shapes import History

V, D = 12, 5


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def asked(targets: Tensor) -> Targets:
    """Each place in a history of its own."""
    return Targets(items=targets, rows=torch.arange(len(targets)), window_items=targets[:, None])


def catalogue(table: Tensor, counts: Tensor | None = None) -> Catalogue:
    counts = torch.zeros(len(table), dtype=torch.int64) if counts is None else counts
    return Catalogue(lambda items: table[items], counts, torch.zeros_like(counts))


def info_nce(queries: Tensor, targets: Tensor, table: Tensor, log_popularity: Tensor, temperature: float) -> Tensor:
    """The definition, by rows and columns."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(targets)):
        logits = []
        for j in range(len(targets)):
            if j != i and targets[j] == targets[i]:
                continue  # the same item is no negative
            logits.append(queries[i] @ table[targets[j]] / temperature - log_popularity[targets[j]])
        own = queries[i] @ table[targets[i]] / temperature - log_popularity[targets[i]]
        total = total + torch.stack(logits).logsumexp(0) - own
    return total / len(targets)


def of_both(loss: Callable[[Tensor, Tensor], Tensor], queries: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients for queries and item vectors."""
    queries, table = queries.clone().requires_grad_(), table.clone().requires_grad_()
    value = loss(queries, table)
    value.backward()
    assert queries.grad is not None
    assert table.grad is not None
    return value.detach(), queries.grad, table.grad


@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize(
    "targets",
    [[3, 1, 3, 7, 1, 3, 12, 2], [1, 2, 3, 4, 5], [4, 4, 4, 4], [9]],
    ids=["duplicates", "distinct", "one item only", "one place"],
)
def test_info_nce_is_its_definition(targets: list[int], temperature: float) -> None:
    picked = torch.tensor(targets)
    queries, table = unit(len(picked), D), unit(V + 1, D)
    counts = torch.randint(0, 90, (V + 1,))
    log_popularity = LogShares()(torch.arange(len(counts)), counts)
    loss = InfoNCE(temperature)
    got = of_both(lambda q, v: loss(q, asked(picked), catalogue(v, counts)), queries, table)
    want = of_both(lambda q, v: info_nce(q, picked, v, log_popularity, temperature), queries, table)
    for ours, defined in zip(got, want, strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-9)
    if len(set(targets)) > 1:
        assert got[1].abs().max() > 1e-3, "the comparison must not be of zeros"


def test_the_same_item_is_never_its_own_negative() -> None:
    """With one item only there is nothing to lose; counted as a negative it would cost log 4."""
    same = torch.tensor([4, 4, 4, 4])
    loss = InfoNCE()(unit(4, D), asked(same), catalogue(unit(V + 1, D)))
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_log_q_takes_popularity_out_of_every_column() -> None:
    """Orthogonal vectors, every logit 0 before the correction: the loss is arithmetic."""
    queries = torch.zeros(2, D, dtype=torch.float64)
    table = unit(V + 1, D)
    counts = torch.zeros(V + 1, dtype=torch.int64)
    counts[1], counts[2] = 15, 3
    loss = InfoNCE(1.0)(queries, asked(torch.tensor([1, 2])), catalogue(table, counts))
    # p is in proportion to counts + 1, and columns weigh 1/p: 2 and 8
    assert loss.item() == pytest.approx((math.log((2 + 8) / 2) + math.log((2 + 8) / 8)) / 2)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0.0, expected a number above 0"):
        InfoNCE(0.0)


# --- every form, with every kind of negatives and every filter, against loops


class Recorded(Negatives):
    """Remembers what another drew."""

    def __init__(self, inner: Negatives) -> None:
        super().__init__()
        self.inner, self.drawn = inner, None

    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        self.drawn = self.inner(targets, catalogue)
        return self.drawn


B, L = 4, 5
NEGATIVES = {
    "in-batch": lambda: InBatch(alpha=0.7),
    "per event": lambda: Uniform(9),
    "one per event": lambda: Uniform(1),
    "per sequence": lambda: Uniform(11, "sequence"),
    "per batch": lambda: Uniform(5, "batch"),
    "as many as places": lambda: Uniform(None, "batch"),
    "mixed": lambda: Mixed(share=0.4),
}
FILTERS = {
    "itself": {},
    "history": {"same_sequence": True},
    "near": {"near": 0.2},
    "hard": {"hard": 3},
    "all": {"same_sequence": True, "near": 0.4, "hard": 2},
}
FORMS = {
    "BCE": lambda **options: losses.BCE(**options),
    "soft BCE": lambda **options: losses.BCE(max_rating=5.0, **options),
    "MSE": lambda **options: MSE(**options),
    "GBCE": lambda **options: GBCE(calibration=0.6, **options),
    "BPR": lambda **options: losses.BPR(**options),
}


def batch() -> tuple[Tensor, Tensor, Targets, Tensor]:
    """Queries, item table, answers of histories of 4, 1, 0 and 5 places, and counts."""
    rows = torch.tensor([0] * 4 + [1] + [3] * 5)
    met = torch.randint(1, V + 1, (B, L)) * (torch.arange(L) < torch.tensor([5, 2, 1, 5])[:, None])
    items = torch.cat([met[0, 1:], met[1, 1:2], met[3]])
    targets = Targets(items, rows, met, ratings=torch.randint(1, 6, (10,)).float())
    queries, table = torch.randn(10, D, dtype=torch.float64), torch.randn(V + 1, D, dtype=torch.float64)
    return queries, table, targets, torch.randint(0, 90, (V + 1,))


def candidates(drawn: SampledNegatives, place: int) -> list[tuple[int, float, float]]:
    """Item, draws and log of the expected draws of a place's candidates."""
    number = place if drawn.starts is None else max(s for s, first in enumerate(drawn.starts[:-1]) if first <= place)
    if drawn.starts is not None:  # of two sets that start here, all but the last are empty
        assert drawn.starts[number] <= place < drawn.starts[number + 1]
    fields = (drawn.items[number], drawn.sample_counts[number], drawn.log_expected[number])
    return [(int(item), float(times), float(log)) for item, times, log in zip(*fields, strict=True)]


def reference(loss: Sampled, drawn: SampledNegatives, queries: Tensor, table: Tensor, targets: Targets) -> Tensor:
    """The loss by rows and candidates."""
    total = torch.zeros((), dtype=torch.float64)
    for i, right in enumerate(targets.items.tolist()):
        score_of = queries[i] @ table.T / loss.temperature
        own = score_of[right]
        left = [(item, times, log) for item, times, log in candidates(drawn, i) if item != right]
        if getattr(loss, "same_sequence", False):
            left = [entry for entry in left if entry[0] not in targets.window_items[targets.rows[i]].tolist()]
        if getattr(loss, "near", None) is not None:
            cosine = nn.functional.cosine_similarity(table.detach(), table[right].detach(), dim=1).tolist()
            left = [entry for entry in left if cosine[entry[0]] <= loss.near]
        scores = [score_of[item] for item, *_ in left]
        if isinstance(loss, InfoNCE):
            values = [score.item() for score in scores]
            order = sorted(range(len(left)), key=lambda j: -values[j])[: loss.hard.at(targets.progress)]
            terms = []
            for j in order:
                _, times, log_expected = left[j]
                terms.append(scores[j] + (math.log(times) - (0 if loss.correct == "none" else log_expected)))
            a = own - (drawn.target_log_q[i] if loss.correct == "both" else 0)
            if isinstance(loss, DCL):
                total = total + (torch.stack(terms).logsumexp(0) - a if terms else 0)
            else:
                total = total + torch.stack([a, *terms]).logsumexp(0) - a
            continue
        every = [score for score, (_, times, _) in zip(scores, left, strict=True) for _ in range(round(times))]
        count, sigmoid = len(every), torch.sigmoid
        rating = targets.ratings[i].double()
        if isinstance(loss, losses.BCE):
            label = 1.0 if loss.max_rating is None else rating / loss.max_rating
            total = total - label * sigmoid(own).log() - (1 - label) * sigmoid(-own).log()
            total = total + sum(-(1 - sigmoid(score)).log() / count for score in every)
        elif isinstance(loss, MSE):
            total = total + (own - rating) ** 2 + sum(score**2 / count for score in every)
        elif isinstance(loss, GBCE):
            a, t = count / (V - 1), loss.calibration
            beta = a * (t * (1 - 1 / a) + 1 / a) if 0 < a < 1 else (1 - t if a == 0 else 1)
            parts = (sigmoid(own) ** beta).log() + sum((1 - sigmoid(score)).log() for score in every)
            total = total - parts / (count + 1)
        else:
            total = total + sum(-sigmoid(own - score).log() / count for score in every)
    return total / len(targets.items)


def compare(loss: Sampled) -> None:
    queries, table, targets, counts = batch()
    loss.negatives = Recorded(loss.negatives)
    got = of_both(lambda q, v: loss(q, targets, catalogue(v, counts)), queries, table)
    want = of_both(lambda q, v: reference(loss, loss.negatives.drawn, q, v, targets), queries, table)
    for ours, defined in zip(got, want, strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("correct", ["none", "negatives", "both"])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("form", [InfoNCE, DCL])
def test_softmax_losses_are_their_definitions(form: type[InfoNCE], negatives: str, correct: str) -> None:
    for filters in FILTERS if correct == "both" else ("itself", "all"):
        compare(form(0.8, NEGATIVES[negatives](), correct, **FILTERS[filters]))


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("form", FORMS)
def test_pointwise_losses_are_their_definitions(form: str, negatives: str) -> None:
    compare(FORMS[form](temperature=1.3, negatives=NEGATIVES[negatives]()))


def every_loss() -> list[Loss]:
    """Every form, kind of negatives and filter, and all that touch how blocks are computed."""
    made: list[Loss] = [FullSoftmax(1.0), DCL(1.0)]
    for negatives in NEGATIVES.values():
        made += [GBCE(negatives=negatives()), InfoNCE(1.0, negatives(), **FILTERS["all"])]
    return [*made, *(form(negatives=Uniform(9)) for form in FORMS.values())]


@pytest.mark.parametrize("loss", every_loss(), ids=lambda loss: type(loss).__name__)
def test_a_loss_with_weights_is_the_weighted_mean_of_its_rows(loss: Loss) -> None:
    queries, table, targets, counts = batch()

    def cost(q: Tensor, v: Tensor, weights: Tensor | None) -> Tensor:
        torch.manual_seed(2)  # the same negatives
        return loss(q, targets._replace(weights=weights), catalogue(v, counts))

    def by_rows(q: Tensor, v: Tensor) -> Tensor:
        rows = torch.stack([cost(q, v, row) for row in torch.eye(len(queries))])
        assert torch.allclose(rows.mean(), cost(q, v, None), rtol=1e-9)
        return (weights * rows).sum() / weights.sum()

    weights = torch.tensor([1.0, 7.0] * 5, dtype=torch.float64)
    got = of_both(lambda q, v: cost(q, v, weights), queries, table)
    for ours, defined in zip(got, of_both(by_rows, queries, table), strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-9)


def test_full_softmax_is_its_definition() -> None:
    queries, table, targets, _ = batch()
    got = of_both(lambda q, v: FullSoftmax(0.7)(q, targets, catalogue(v)), queries, table)
    want = of_both(lambda q, v: nn.functional.cross_entropy(q @ v[1:].T / 0.7, targets.items - 1), queries, table)
    for ours, defined in zip(got, want, strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-9)


def test_defaults_are_the_published_choices() -> None:
    assert isinstance(InfoNCE().negatives, InBatch)
    assert isinstance(DCL().negatives, InBatch)
    pointwise = (losses.BCE(), MSE(), losses.BPR(), GBCE())
    assert [(loss.negatives.count, loss.negatives.per) for loss in pointwise] == [(1, "event")] * 3 + [(256, "event")]


@pytest.mark.parametrize("form", [InfoNCE, DCL, FullSoftmax, losses.BCE, GBCE, losses.BPR])
@pytest.mark.parametrize(("similarity", "temperature"), [("cosine", 0.05), ("dot", 1.0)])
def test_the_temperature_suits_the_similarity(form: Any, similarity: Any, temperature: float) -> None:
    queries, table, targets = unit(6, D), unit(V + 1, D), asked(torch.tensor([3, 1, 3, 7, 2, 5]))

    def cost(given: float | None) -> float:
        torch.manual_seed(1)
        return form(given)(queries, targets, catalogue(table)._replace(similarity=similarity)).item()

    assert cost(None) == cost(temperature)
    assert cost(None) != pytest.approx(cost(0.3))


def test_a_bias_does_not_make_items_alike() -> None:
    """Orthogonal items, each with a large bias behind its vector: their cosine is 0, though not with the bias."""
    table = torch.cat([torch.eye(4), torch.full((4, 1), 30.0)], dim=1).double()
    targets, queries = asked(torch.tensor([1, 2, 3])), unit(3, 5)
    plain, filtered = InfoNCE(), InfoNCE(near=0.9)
    told = catalogue(table)._replace(dim=4)
    assert filtered(queries, targets, told).item() == pytest.approx(plain(queries, targets, told).item())
    assert filtered(queries, targets, catalogue(table)).item() == 0, "the bias alone would hide all negatives"


def test_calibration_ends_at_bce_and_at_the_share_of_negatives() -> None:
    """Petrov & Macdonald 2023, section 5: t = 0 is BCE, t = 1 weighs the answer by N / (V − 1)."""
    queries, table = torch.zeros(1, D, dtype=torch.float64), unit(V + 1, D)
    table[:, 0], queries[0, 0] = torch.arange(V + 1), 1.0  # the score of item j is j
    target = asked(torch.tensor([3]))

    def cost(t: float) -> tuple[float, float, int]:
        loss = GBCE(calibration=t, negatives=Recorded(Uniform(4)))
        value = loss(queries, target, catalogue(table)._replace(similarity="dot")).item()
        drawn = [item for item, times, _ in candidates(loss.negatives.drawn, 0) for _ in range(int(times)) if item != 3]
        return value, sum(math.log1p(math.exp(item)) for item in drawn), len(drawn)

    positive = math.log1p(math.exp(-3))
    value, others, count = cost(0.0)
    assert value == pytest.approx((positive + others) / (count + 1))
    value, others, count = cost(1.0)
    assert value == pytest.approx((count / (V - 1) * positive + others) / (count + 1))


def test_bce_divides_by_the_number_of_negatives() -> None:
    """Every score 0: an answer costs log 2, and so do its negatives together, however many they are."""
    for count in (1, 7, 300):
        loss = losses.BCE(negatives=Uniform(count, "batch"))
        queries = torch.zeros(2, D, dtype=torch.float64)
        value = loss(queries, asked(torch.tensor([1, 2])), catalogue(unit(5000, D)))
        assert value.item() == pytest.approx(2 * math.log(2)), count


def test_an_answer_far_below_its_negatives_is_still_pulled() -> None:
    """At −60 a probability raised to a power would be 0 in float32, and its gradient with it."""
    queries, table = torch.zeros(1, 2).index_fill(1, torch.tensor([0]), 60.0), torch.tensor([[0.0, 0], [-1, 0], [1, 0]])
    _, gradient, _ = of_both(lambda q, v: GBCE()(q, asked(torch.tensor([1])), catalogue(v)), queries, table)
    assert gradient.isfinite().all()
    assert gradient[0, 0] > 0.1, "and its query moves towards it"


@pytest.mark.parametrize("hard", [1, 2, 4, 5, 6, 1000])
@pytest.mark.parametrize(
    "negatives", [InBatch(), Uniform(60), Uniform(60, "sequence")], ids=["one set", "many", "each"]
)
def test_hard_negatives_are_those_of_the_highest_score_before_the_correction(negatives: Negatives, hard: int) -> None:
    """Item j scores j / 10 and has a coordinate of its own; item 6 is popular, and −log q would put it last."""
    table = torch.cat([torch.arange(7.0)[:, None] / 10, torch.eye(7)], dim=1).double()
    queries = torch.zeros(6, 8, dtype=torch.float64)
    queries[:, 0] = 1
    counts, targets = torch.tensor([0, 0, 0, 0, 0, 0, 10_000]), asked(torch.arange(1, 7))
    loss = InfoNCE(1.0, negatives, hard=hard)
    _, gradient, _ = of_both(lambda q, v: loss(q, targets, catalogue(v, counts)), queries, table)
    chosen = set((gradient[0, 1:] > 0).nonzero().flatten().tolist())  # by the place whose answer is item 1
    if isinstance(negatives, InBatch):
        assert chosen == set(range(max(2, 7 - hard), 7))
    else:  # each item is drawn about ten times, and every draw is a candidate
        assert 6 in chosen
        assert chosen == set(range(min(chosen), 7))
        assert len(chosen) <= hard


def test_where_nothing_is_left_nothing_is_lost() -> None:
    """Every candidate is in the history: finite, no cost but the answer's own, and no gradient."""
    met = torch.arange(1, V + 1)[None]
    targets = Targets(torch.tensor([2, 5]), torch.tensor([0, 0]), met)
    queries, table = unit(2, D), unit(V + 1, D)
    for form in (InfoNCE, DCL):
        for negatives in NEGATIVES.values():
            for filters in ({"same_sequence": True}, {"near": -1.0}, {"near": -1.0, "hard": 2}):
                loss = form(0.1, negatives(), **filters)
                results = of_both(lambda q, v, loss=loss: loss(q, targets, catalogue(v)), queries, table)
                assert not any(part.any() for part in results)
    same = asked(torch.tensor([4, 4, 4]))._replace(ratings=torch.full((3,), 5.0))
    for form in FORMS.values():
        loss = form(negatives=InBatch())
        results = of_both(lambda q, v, loss=loss: loss(q, same, catalogue(v)), unit(3, D), table)
        assert all(part.isfinite().all() for part in results)
        assert results[0] == 0 or not isinstance(loss, losses.BPR)


def test_near_has_no_gradient_and_takes_out_copies() -> None:
    """A copy of the answer under another number is no negative."""
    table = unit(V + 1, D)
    table[2] = 3 * table[1]
    loss = InfoNCE(1.0, near=0.999)
    value, *gradients = of_both(lambda q, v: loss(q, asked(torch.tensor([1, 2])), catalogue(v)), unit(2, D), table)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)
    assert InfoNCE(1.0)(unit(2, D), asked(torch.tensor([1, 2])), catalogue(table)) > 0.1


def test_the_sampled_softmax_needs_no_correction_of_both() -> None:
    """Uniform draws are all corrected alike: `both` is `none`, and `negatives` weighs the negatives by V / N."""
    queries, table, targets, counts = batch()
    values = {}
    for correct in ("none", "both", "negatives"):
        torch.manual_seed(3)
        values[correct] = InfoNCE(1.0, Uniform(5), correct)(queries, targets, catalogue(table, counts)).item()
    assert values["none"] == pytest.approx(values["both"], rel=1e-12)
    assert values["negatives"] > values["none"] + 0.1


def test_the_same_seed_gives_the_same_loss() -> None:
    queries, table, targets, counts = batch()

    def once(loss: Loss) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return of_both(lambda q, v: loss(q, targets, catalogue(v, counts)), queries, table)

    for loss, again in zip(every_loss(), every_loss(), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(once(loss), once(again), strict=True))


def test_other_draws_give_another_loss() -> None:
    queries, table, targets, counts = batch()
    loss = GBCE(negatives=Uniform(3))
    assert loss(queries, targets, catalogue(table, counts)) != loss(queries, targets, catalogue(table, counts))


# --- ratings


def test_without_ratings_they_say_so() -> None:
    for loss in (MSE(), losses.BCE(max_rating=5.0)):
        with pytest.raises(ValueError, match="needs ratings and the log has none"):
            loss(unit(1, D), asked(torch.tensor([1])), catalogue(unit(V + 1, D)))


@pytest.mark.parametrize("rating", [-1.0, 5.5])
def test_a_rating_that_makes_no_label_is_refused(rating: float) -> None:
    targets = asked(torch.tensor([1, 2]))._replace(ratings=torch.tensor([5.0, rating]))
    with pytest.raises(ValueError, match=rf"rated {rating:g}, expected 0 to max_rating 5"):
        losses.BCE(max_rating=5.0)(unit(2, D), targets, catalogue(unit(V + 1, D)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfoNCE(hard=0), "hard is 0, expected at least 1"),
        (lambda: GBCE(calibration=1.5), "calibration is 1.5"),
        (lambda: losses.BCE(max_rating=0.0), "max_rating is 0.0"),
        (lambda: losses.BPR(temperature=-1.0), "temperature is -1.0"),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], Loss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- blocks of rows


@pytest.mark.parametrize("dense", [0, blocks.DENSE])
@pytest.mark.parametrize("budget", [1, 60])
def test_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch, budget: int, dense: int) -> None:
    queries, table, targets, counts = batch()

    def results() -> list[tuple[Tensor, ...]]:
        torch.manual_seed(1)
        return [
            of_both(lambda q, v, loss=loss: loss(q, targets, catalogue(v, counts)), queries, table)
            for loss in every_loss()
        ]

    at_once = results()
    monkeypatch.setattr(blocks, "BLOCK", budget)
    monkeypatch.setattr(blocks, "DENSE", dense)
    for got, want in zip(results(), at_once, strict=True):
        for ours, other in zip(got, want, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("negatives", [InBatch(), Uniform(3, "batch")])
def test_it_passes_gradcheck(negatives: Negatives) -> None:
    queries, table, _, counts = batch()
    targets = asked(torch.tensor([3, 1, 3]))

    def loss(q: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(1)
        return InfoNCE(1.0, negatives)(q, targets, catalogue(v, counts))

    assert torch.autograd.gradcheck(loss, (queries[:3].requires_grad_(), table.requires_grad_()))


def test_the_gradient_is_scaled_by_what_follows() -> None:
    queries, table, targets, counts = batch()
    once = of_both(lambda q, v: InfoNCE()(q, targets, catalogue(v, counts)), queries, table)
    thrice = of_both(lambda q, v: 3 * InfoNCE()(q, targets, catalogue(v, counts)), queries, table)
    torch.testing.assert_close(thrice[1], 3 * once[1])
    torch.testing.assert_close(thrice[2], 3 * once[2])


@pytest.mark.parametrize("make", [InfoNCE, DCL, FullSoftmax, GBCE, losses.BPR])
def test_bf16_autocast_does_not_round_it(make: Callable[[], Loss]) -> None:
    """The products are rough, sums and gradients are kept in float32."""
    targets, table, queries = torch.randint(1, V + 1, (200,)), unit(V + 1, D).float(), unit(200, D).float()

    def result(rough: bool) -> tuple[Tensor, ...]:
        def loss(q: Tensor, v: Tensor) -> Tensor:
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=rough):
                return make()(q, asked(targets), catalogue(v))

        return of_both(loss, queries, table)

    for ours, other in zip(result(True), result(False), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, other)  # bf16 would round logits of ±20 to steps of 1/8


def test_large_logits_do_not_overflow() -> None:
    queries, table, targets, counts = batch()
    for loss in every_loss():
        if not isinstance(loss, MSE):  # whose square is large
            results = of_both(
                lambda q, v, loss=loss: loss(q, targets, catalogue(v, counts)), 1e4 * queries.float(), table.float()
            )
            assert all(part.isfinite().all() for part in results)


def test_without_rows_it_says_so() -> None:
    for loss in (InfoNCE(), FullSoftmax(), GBCE()):
        with pytest.raises(ValueError, match=r"at least one target position"):
            loss(unit(1, D)[:0], asked(torch.tensor([1])[:0]), catalogue(unit(V + 1, D)))


def test_a_vector_is_computed_once_for_each_distinct_item() -> None:
    """An item tower is dear: who is drawn often, or in many sets, is asked for once."""
    queries, table, targets, counts = batch()
    for name, negatives in NEGATIVES.items():
        wanted: list[Tensor] = []

        def vectors(items: Tensor, wanted: list[Tensor] = wanted) -> Tensor:
            wanted.append(items)
            return table[items]

        loss = InfoNCE(negatives=Recorded(negatives()))
        loss(queries, targets, Catalogue(vectors, counts, torch.zeros_like(counts)))
        assert len(wanted) == 1, name
        assert wanted[0].tolist() == sorted({*loss.negatives.drawn.items.flatten().tolist(), *targets.items.tolist()})


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(part.numel() for part in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(part))]
        )
        return out


@pytest.mark.parametrize("dense", [0, blocks.DENSE])
def test_the_scores_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch, dense: int) -> None:
    """The largest tensor of forward and backward stays within the budget, never rows times candidates (times width)."""
    rows, items, width, budget = 120, 60, 16, 1 << 9
    monkeypatch.setattr(blocks, "BLOCK", budget)
    monkeypatch.setattr(blocks, "DENSE", dense)
    targets = Targets(
        torch.arange(rows) % items + 1,
        torch.arange(rows) // 30,
        torch.arange(rows).view(4, 30) % items + 1,
        torch.full((rows,), 4.0),
    )
    queries, table = unit(rows, width).requires_grad_(), unit(items + 1, width).requires_grad_()
    for loss in every_loss():
        with Largest() as largest:
            loss(queries, targets, catalogue(table)).backward()
        # as large as the gradients, or as the draws
        assert largest.numel <= max(budget, rows * width, rows * 9, items * width)
        assert largest.numel < min(rows * items, rows * 9 * width)


def test_a_large_budget_takes_all_rows_at_once() -> None:
    targets = torch.arange(300) % 100 + 1
    with Largest() as largest:
        InfoNCE()(unit(300, 4), asked(targets), catalogue(unit(101, 4)))
    assert largest.numel == 300 * 100, "equal columns are merged"


# --- padding, through objective and retriever


def window(length: int, padding: int) -> History:
    """Three windows of 5, 3 and 2 events; what stands in the padding is `padding`."""
    lengths = torch.tensor([5, 3, 2])
    items = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 2, 0, 0], [3, 9, 0, 0, 0]])
    real = torch.arange(length) < lengths[:, None]
    wide = torch.zeros(3, length, dtype=torch.long)
    wide[:, :5] = items
    return History(torch.where(real, wide, padding), lengths, torch.where(real, 1000, padding), None)


def test_next_item_asks_every_event_but_the_first() -> None:
    training_batch = NextItem()(window(7, padding=0))
    assert training_batch.targets.tolist() == [2, 3, 4, 5, 7, 2, 9]
    assert training_batch.target_positions.sum(1).tolist() == [4, 2, 1] == training_batch.history.lengths.tolist()
    assert training_batch.history.items.shape == (3, 6)
    asked_from = training_batch.history.items[training_batch.target_positions]
    assert asked_from.tolist() == [1, 2, 3, 4, 6, 7, 3]


def test_next_item_keeps_the_request_of_each_place() -> None:
    items, lengths, times = window(5, padding=0)[:3]
    history = NextItem()(History(items, lengths, times, times + 50)).history
    assert history.request is not None
    assert torch.equal(history.request, history.times + 50)
    assert history.request.shape == history.items.shape


def test_padding_is_never_a_column() -> None:
    """Whatever items stand in the padding and however long it is, the training loss and its gradient are the same."""
    model = Retriever(num_items=V, max_length=8, dim=8).eval()  # without dropout
    model.log = lambda *args, **kwargs: None
    model.target_counts[:] = torch.randint(1, 90, (V + 1,))

    def step(history: History) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = model.training_step(history, 0)
        loss.backward()
        gradient = model.towers.items.table.weight.grad
        assert gradient is not None
        return loss.item(), gradient.clone()

    loss, gradient = step(window(5, padding=0))
    for other in (window(8, padding=0), window(5, padding=11), window(8, padding=12)):
        again, gradient_again = step(other)
        assert again == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(gradient_again, gradient, rtol=1e-4, atol=1e-7)
    assert not gradient[0].any(), "padding must not learn"
    assert not gradient[[11, 12]].any(), "an item that stands in padding only is no negative"
    assert gradient[1:8].abs().amax(1).min() > 0

    real = window(5, padding=0)
    real.items[0, 4] = 11
    assert abs(step(real)[0] - loss) > 1e-3, "a real place must be felt"


# --- losses over lists


def definition(loss: ListLoss, logits: Tensor, positive: Tensor, real: Tensor) -> Tensor:
    """By rows, without what is padding."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(logits)):
        own = logits[row, positive[row]]
        others = [logits[row, j] for j in range(logits.size(1)) if real[row, j] and j != positive[row]]
        negatives = torch.stack(others) if others else torch.zeros(0, dtype=torch.float64)
        mean = 1 / max(len(others), 1)
        if isinstance(loss, Listwise):
            total = total - own + torch.cat([own[None], negatives]).logsumexp(0)
        elif isinstance(loss, BCE):
            total = total - torch.sigmoid(own).log() - mean * (1 - torch.sigmoid(negatives)).log().sum()
        else:
            total = total - mean * torch.sigmoid(own - negatives).log().sum()
    return total / len(logits)


@pytest.mark.parametrize("loss", [Listwise(), BCE(), BPR()], ids=lambda loss: type(loss).__name__)
def test_list_losses_are_their_definitions(loss: ListLoss) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64) * 2
    positive, lengths = torch.tensor([0, 3, 2, 0]), torch.tensor([6, 4, 3, 1])  # the last list is the positive alone
    real = torch.arange(6) < lengths[:, None]
    ours, defined = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got, want = loss(ours, positive, real), definition(loss, defined, positive, real)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, defined.grad, rtol=1e-9, atol=1e-9)
    assert not ours.grad[~real].any()
    assert ours.grad[:3][real[:3]].abs().min() > 0

    noisy = torch.where(real, logits, 1e4 * torch.randn(4, 6, dtype=torch.float64))
    torch.testing.assert_close(loss(noisy, positive, real), got.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [Listwise(), BCE(), BPR()], ids=lambda loss: type(loss).__name__)
def test_a_better_order_costs_less(loss: ListLoss) -> None:
    real, positive = torch.ones(1, 3, dtype=torch.bool), torch.tensor([1])
    assert loss(torch.tensor([[0.0, 2.0, 1.0]]), positive, real) < loss(torch.tensor([[2.0, 0.0, 1.0]]), positive, real)
