"""The two towers: where a query stands, what it may know, tables that are tied or not, and biases of items."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys2stage.columns import MASK
from recsys2stage.data.batches import Padded, as_history
from recsys2stage.options import RequestTime
from recsys2stage.retrieval.encoders import BERT4Rec, Transformer
from recsys2stage.retrieval.encoders.times import Calendar, LogBuckets
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.losses import Catalogue, InfoNCE, Targets
from recsys2stage.retrieval.towers import TwoTower, append_masked_event, unit
from recsys2stage.shapes import History

V, L, D = 12, 6, 8
LENGTHS = [0, 1, 3, 5, L]


def towers(encoder: Any = Transformer, **options: Any) -> TwoTower:
    """In evaluation mode, with weights large enough to be seen, but those of padding."""
    built = TwoTower(V, L, D, encoder, **options)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            weight += 0.4 * torch.randn_like(weight)
            if name in ("items.table.weight", "untied.table.weight", "bias.weight"):
                weight[0] = 0
    return built.eval()


def histories(mode: RequestTime = "none", delay: int = 0) -> History:
    """Histories of all lengths; `delay` seconds are added to the request time."""
    rng = np.random.default_rng(0)
    lengths = np.array(LENGTHS)
    real = np.arange(L) < lengths[:, None]
    times = (10**9 + np.cumsum(rng.integers(1, 10**6, (len(lengths), L)), axis=1)) * real
    target = times.max(1) + 1_000 + delay
    return as_history(Padded(rng.integers(1, V + 1, (len(lengths), L)) * real, times, lengths), mode, target)


# --- the question after a history


@pytest.mark.parametrize("mode", ["none", "last_event", "target"])
def test_a_question_is_one_hidden_event_more(mode: RequestTime) -> None:
    given = histories(mode)
    asked = append_masked_event(given)
    assert asked.items.shape == (len(LENGTHS), L + 1)
    assert asked.lengths.tolist() == [length + 1 for length in LENGTHS]
    for row, length in enumerate(LENGTHS):
        assert asked.items[row].tolist() == [*given.items[row, :length].tolist(), MASK, *[0] * (L - length)]
        newest = max(length - 1, 0)
        now = given.times[row, newest] if given.request is None else given.request[row, newest]
        assert asked.times[row, : length + 1].tolist() == [*given.times[row, :length].tolist(), int(now)]
        if mode == "target":
            assert now == given.times[row].max() + 1_000, "an empty history is asked at its request too"
    if mode == "none":
        assert asked.request is None
    else:
        assert asked.request is not None
        assert torch.equal(asked.request, asked.times), "each place is asked at its own time"
    assert (given.items >= 0).all(), "the history must be left as it was"


@pytest.mark.parametrize(
    ("mode", "time", "moves"),
    [
        ("none", None, False),
        ("none", Calendar, False),
        ("last_event", LogBuckets, False),
        ("target", None, False),
        ("target", LogBuckets, True),
        ("target", Calendar, True),
    ],
)
def test_a_query_knows_the_request_time_only_when_told(mode: RequestTime, time: Any, moves: bool) -> None:
    built = towers(partial(BERT4Rec, time=time))
    with torch.no_grad():
        early, late = (built.queries(histories(mode, delay=delay)) for delay in (0, 12_345_678))
    apart = (early - late).abs().amax(1)
    if not moves:
        assert torch.equal(early, late)
    elif time is Calendar:
        assert (apart > 1e-4).all()
    else:  # an empty history holds no event to which there is a time
        assert (apart[1:] > 1e-4).all()
        assert apart[0] == 0


@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
def test_a_query_is_that_of_the_history_alone(encoder: Any) -> None:
    """Whatever its length, its padding and its company."""
    built, given = towers(encoder), histories()
    with torch.no_grad():
        queries = built.queries(given)
        for row, length in enumerate(LENGTHS):
            cut = max(length, 1)
            alone = History(
                given.items[row : row + 1, :cut], given.lengths[row : row + 1], given.times[row : row + 1, :cut], None
            )
            torch.testing.assert_close(built.queries(alone)[0], queries[row], rtol=1e-4, atol=1e-5)
        changed = given.items.clone()
        changed[:, 0] = changed[:, 0] % V + 1
        apart = (built.queries(given._replace(items=changed)) - queries).abs().amax(1)
    assert (apart[1:] > 1e-4).all(), "the oldest event must be felt"
    assert queries.shape == (len(LENGTHS), D)
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(len(LENGTHS)))


def test_a_hidden_event_is_the_learned_mask() -> None:
    built, given = towers(BERT4Rec), histories()
    assert built.mask is not None
    built.queries(given).sum().backward()
    assert built.mask.grad is not None
    assert built.mask.grad.abs().max() > 1e-4
    with torch.no_grad():
        before = built.queries(given)
        built.mask += torch.randn(D)
        assert ((built.queries(given) - before).abs().amax(1) > 1e-4).all()
        visible = built(given)
        built.mask += torch.randn(D)
        assert torch.equal(built(given), visible), "it stands for nothing else"
    assert towers(Transformer).mask is None


def test_the_longest_history_leaves_a_place_for_the_question(ragged: Path) -> None:
    data = Histories(ragged, max_length=5)
    built = TwoTower(data.num_items, 5, D, BERT4Rec).eval()
    batch = data.read_queries(data.dataset.users("test"), "test")
    assert int(batch.history.lengths.max()) == 5
    window = data.read_windows(np.flatnonzero(data.window_ends - data.window_starts == 6)[:3])
    assert window.items.shape == (3, 6), "in training the answer has a place of its own"
    with torch.no_grad():
        assert built.queries(batch.history).isfinite().all()
        assert built(window).shape == (3, 6, D)


# --- the tables


def both(built: TwoTower) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return built.queries(histories()), built.all_item_vectors()


def test_a_tied_table_is_read_and_recommended() -> None:
    built = towers()
    queries, vectors = both(built)
    torch.testing.assert_close(vectors, unit(built.items.table.weight.detach()[1:]))
    with torch.no_grad():
        built.items.table.weight[1:] += torch.randn(V, D)
    other_queries, other_vectors = both(built)
    assert (other_queries - queries).abs().max() > 1e-3
    assert (other_vectors - vectors).abs().max() > 1e-3


def test_an_untied_table_is_recommended_and_the_other_is_read() -> None:
    built = towers(tied=False)
    assert built.untied is not None
    queries, vectors = both(built)
    torch.testing.assert_close(vectors, unit(built.untied.table.weight.detach()[1:]))
    torch.testing.assert_close(built.item_vectors(torch.tensor([3, 12, 1])), vectors[[2, 11, 0]])
    for table, moves in ((built.untied, (False, True)), (built.items, (True, False))):
        with torch.no_grad():
            table.table.weight[1:] += torch.randn(V, D)
        now = both(built)
        assert tuple(not torch.equal(one, other) for one, other in zip(now, (queries, vectors), strict=True)) == moves
        queries, vectors = now


def test_untied_tables_start_apart() -> None:
    built = TwoTower(V, L, D, Transformer, tied=False)
    assert built.untied is not None
    assert not torch.equal(built.items.table.weight, built.untied.table.weight)


# --- biases of items


@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
@pytest.mark.parametrize("tied", [True, False])
def test_a_score_is_the_cosine_and_the_bias(encoder: Any, tied: bool) -> None:
    built = towers(encoder, tied=tied, item_bias=True)
    assert built.bias is not None
    queries, vectors = both(built)
    assert queries.shape == (len(LENGTHS), D + 1)
    assert vectors.shape == (V, D + 1)
    assert (queries[:, -1] == 1).all()
    table = (built.items if tied else built.untied).table.weight.detach()
    for row in range(len(LENGTHS)):
        for item in range(1, V + 1):
            cosine = torch.cosine_similarity(queries[row, :D], table[item], dim=0)
            assert (queries[row] @ vectors[item - 1]).item() == pytest.approx(
                (cosine + built.bias.weight[item, 0]).item(), abs=1e-5
            )
    torch.testing.assert_close(queries[:, :D].norm(dim=1), torch.ones(len(LENGTHS)))


def test_an_index_finds_what_the_scores_say() -> None:
    built = towers(item_bias=True)
    assert built.bias is not None
    with torch.no_grad():
        built.bias.weight[5] += 0.7  # so that the order is another than that of the cosines
    queries, vectors = both(built)
    scores = queries @ vectors.T
    index = Exact()
    index.build(vectors.numpy())
    found, items = index.search(queries.numpy(), 4)
    best = scores.topk(4)
    np.testing.assert_allclose(found, best.values.numpy(), atol=1e-5)
    assert (items == best.indices.numpy() + 1).all()
    cosines = queries[:, :D] @ vectors[:, :D].T
    assert not torch.equal(cosines.topk(4).indices, best.indices)


def test_biases_start_at_zero_and_learn_but_that_of_padding() -> None:
    built = TwoTower(V, L, D, Transformer, item_bias=True)
    plain = TwoTower(V, L, D, Transformer)
    plain.load_state_dict({name: weight for name, weight in built.state_dict().items() if name != "bias.weight"})
    built.eval(), plain.eval()
    for mine, other in zip(both(built), both(plain), strict=True):
        torch.testing.assert_close(mine[:, :D], other)
    assert built.bias is not None
    assert not built.bias.weight.any()
    queries, items = built.query_vectors(built(histories())[:, 0]), torch.tensor([1, 2, 3, 4, 5])
    targets = Targets(items, rows=torch.arange(5), window_items=items[:, None])
    zeros = torch.zeros(V + 1, dtype=torch.int64)
    InfoNCE()(queries, targets, Catalogue(built.item_vectors, zeros, zeros)).backward()
    assert built.bias.weight.grad is not None
    assert (built.bias.weight.grad[1:6] != 0).all()
    assert not built.bias.weight.grad[[0, *range(6, V + 1)]].any()


@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
@pytest.mark.parametrize("item_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_checkpoint_holds(tied: bool, item_bias: bool, encoder: Any) -> None:
    built = towers(encoder, tied=tied, item_bias=item_bias)
    keys = {name for name in built.state_dict() if not name.startswith("encoder.")}
    expected = {"items.table.weight"}
    expected |= set() if tied else {"untied.table.weight"}
    expected |= {"bias.weight"} if item_bias else set()
    expected |= {"mask"} if encoder is BERT4Rec else set()
    assert keys == expected
    other = towers(encoder, tied=tied, item_bias=item_bias)
    other.load_state_dict(built.state_dict())
    for mine, yours in zip(both(built), both(other), strict=True):
        assert torch.equal(mine, yours)
