"""Losses against their definitions, written as loops; chunked equals unchunked; padding is never a column."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recsys2stage.losses import Answers, Catalogue, InfoNCE, contrast, cross_entropy
from recsys2stage.losses.contrast import log_share
from recsys2stage.losses.lists import BCE, BPR, ListLoss, Listwise
from recsys2stage.objectives import NextItem
from recsys2stage.retriever import Retriever
from recsys2stage.shapes import History

V, D = 12, 5


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def asked(answers: Tensor) -> Answers:
    """Each place in a history of its own."""
    return Answers(items=answers, rows=torch.arange(len(answers)), met=answers[:, None])


def catalogue(table: Tensor, counts: Tensor | None = None) -> Catalogue:
    counts = torch.zeros(len(table), dtype=torch.int64) if counts is None else counts
    return Catalogue(lambda items: table[items], counts, torch.zeros_like(counts))


def info_nce(queries: Tensor, answers: Tensor, table: Tensor, log_popularity: Tensor, temperature: float) -> Tensor:
    """The definition, by rows and columns."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(answers)):
        logits = []
        for j in range(len(answers)):
            if j != i and answers[j] == answers[i]:
                continue  # the same item is no negative
            logits.append(queries[i] @ table[answers[j]] / temperature - log_popularity[answers[j]])
        own = queries[i] @ table[answers[i]] / temperature - log_popularity[answers[i]]
        total = total + torch.stack(logits).logsumexp(0) - own
    return total / len(answers)


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
    "answers",
    [[3, 1, 3, 7, 1, 3, 12, 2], [1, 2, 3, 4, 5], [4, 4, 4, 4], [9]],
    ids=["duplicates", "distinct", "one item only", "one place"],
)
def test_info_nce_is_its_definition(answers: list[int], temperature: float) -> None:
    picked = torch.tensor(answers)
    queries, table = unit(len(picked), D), unit(V + 1, D)
    counts = torch.randint(0, 90, (V + 1,))
    log_popularity = log_share(counts)
    loss = InfoNCE(temperature)
    got = of_both(lambda q, v: loss(q, asked(picked), catalogue(v, counts)), queries, table)
    want = of_both(lambda q, v: info_nce(q, picked, v, log_popularity, temperature), queries, table)
    for ours, defined in zip(got, want, strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-9, atol=1e-9)
    if len(set(answers)) > 1:
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


# --- blocks of rows


def whole_cross_entropy(
    queries: Tensor, columns: Tensor, answer: Tensor, column_bias: Tensor, answer_bias: Tensor
) -> Tensor:
    logits = queries @ columns.T + column_bias
    own = (queries * columns[answer]).sum(1) + answer_bias
    return nn.functional.cross_entropy(logits.scatter(1, answer[:, None], own[:, None]), answer)


def problem(rows: int = 23, width: int = 7) -> tuple[Tensor, ...]:
    return (
        torch.randn(rows, D, dtype=torch.float64) * 3,
        torch.randn(width, D, dtype=torch.float64),
        torch.randint(width, (rows,)),
        torch.randn(width, dtype=torch.float64),
        torch.randn(rows, dtype=torch.float64),
    )


@pytest.mark.parametrize("block", [1, 2, 7, 22, 23, 24, 1000, None])
def test_in_blocks_as_at_once(block: int | None) -> None:
    queries, columns, *rest = problem()
    got = of_both(lambda q, c: cross_entropy(q, c, *rest, block=block), queries, columns)
    want = of_both(lambda q, c: whole_cross_entropy(q, c, *rest), queries, columns)
    for ours, defined in zip(got, want, strict=True):
        torch.testing.assert_close(ours, defined, rtol=1e-10, atol=1e-12)


def test_cross_entropy_passes_gradcheck() -> None:
    queries, columns, *rest = problem(rows=6, width=4)
    assert torch.autograd.gradcheck(
        lambda q, c: cross_entropy(q, c, *rest, block=4), (queries.requires_grad_(), columns.requires_grad_())
    )


def test_the_gradient_is_scaled_by_what_follows() -> None:
    queries, columns, *rest = problem()
    once = of_both(lambda q, c: cross_entropy(q, c, *rest), queries, columns)
    thrice = of_both(lambda q, c: 3 * cross_entropy(q, c, *rest), queries, columns)
    torch.testing.assert_close(thrice[1], 3 * once[1])
    torch.testing.assert_close(thrice[2], 3 * once[2])


def test_bf16_autocast_does_not_round_it() -> None:
    """The products are rough, sums and gradients are kept in float32."""
    answers, table, queries = torch.randint(1, V + 1, (200,)), unit(V + 1, D).float(), unit(200, D).float()

    def rough(q: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return InfoNCE()(q, asked(answers), catalogue(v))

    exact = of_both(lambda q, v: InfoNCE()(q, asked(answers), catalogue(v)), queries, table)
    for ours, other in zip(of_both(rough, queries, table), exact, strict=True):
        assert torch.equal(ours, other)  # bf16 would round logits of ±20 to steps of 1/8


def test_large_logits_do_not_overflow() -> None:
    queries, columns, *rest = problem()
    arguments = [part.float() if part.is_floating_point() else part for part in (queries * 1e3, columns, *rest)]
    value, *gradients = of_both(lambda q, c: cross_entropy(q, c, *arguments[2:]), *arguments[:2])
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_without_rows_it_says_so() -> None:
    queries, columns, *rest = problem(rows=1)
    with pytest.raises(ValueError, match=r"at least one answered place"):
        cross_entropy(queries[:0], columns, rest[0][:0], rest[1], rest[2][:0])


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


@pytest.mark.parametrize("budget", [1 << 9, 1 << 20])
def test_the_logits_are_never_all_in_memory(monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """The largest tensor of forward and backward stays within the budget, never rows times columns."""
    rows, items = 300, 100
    monkeypatch.setattr(contrast, "BLOCK_LOGITS", budget)
    answers = torch.arange(rows) % items + 1
    queries, table = unit(rows, 4).requires_grad_(), unit(items + 1, 4).requires_grad_()
    with Largest() as largest:
        InfoNCE()(queries, asked(answers), catalogue(table)).backward()
    limit = max(budget, rows * 4)  # the gradient of the queries is as large as they are
    assert largest.numel <= limit if budget < rows * items else largest.numel == rows * items
    assert largest.numel < rows * rows, "equal columns must be merged"


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
    question = NextItem()(window(7, padding=0))
    assert question.answers.tolist() == [2, 3, 4, 5, 7, 2, 9]
    assert question.places.sum(1).tolist() == [4, 2, 1] == question.history.lengths.tolist()
    assert question.history.items.shape == (3, 6)
    asked_from = question.history.items[question.places]
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
