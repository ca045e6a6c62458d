"""No tensor is left on the wrong device, tried without a GPU.

On the meta device tensors have shapes but no numbers, and any CPU tensor met on the way raises. What depends on numbers
takes its largest size there (`LargestSizes`). The code of other devices also runs on the CPU, with real numbers, where
a tensor that is made without a device lands on meta and raises.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_fixtures import K, Run, recsys
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from recsys2stage.columns import PAD
from recsys2stage.ranking import losses as list_losses
from recsys2stage.ranking import scorers
from recsys2stage.ranking.candidates import Lists
from recsys2stage.ranking.ranker import Ranker
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval import encoders, inputs, losses, objectives, towers
from recsys2stage.retrieval.encoders import (
    HSTU,
    BERT4Rec,
    FuXi,
    LiGR,
    Mamba4Rec,
    SASRec,
    Transformer,
    attention,
    layers,
    mamba4rec,
    positions,
    scan,
    times,
)
from recsys2stage.retrieval.encoders import partial as partial_positions
from recsys2stage.retrieval.histories import Queries
from recsys2stage.retrieval.inputs import ActionEmbedding, NextAction, RatingEmbedding
from recsys2stage.retrieval.items import ItemTower
from recsys2stage.retrieval.losses import (
    BCE,
    BPR,
    DCL,
    GBCE,
    MSE,
    FullSoftmax,
    InBatch,
    InfoNCE,
    Mixed,
    NormPenalty,
    Uniform,
)
from recsys2stage.retrieval.objectives import Cloze, NextItem
from recsys2stage.retrieval.rank_metrics import RankMetrics
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.users import UserTower
from recsys2stage.shapes import CandidateBatch, History

B, L, V, D, C, R, S = 5, 7, 20, 8, 6, 4, 2
FEATURES = [
    {"name": "genre", "kind": "categorical", "size": 4, "values": 1},
    {"name": "tags", "kind": "multi", "size": 5, "values": 3},
    {"name": "price", "kind": "numeric", "size": 0, "values": 1},
    {"name": "text", "kind": "vector", "size": 0, "values": 6},
]
ACTIONS = ["look", "buy"]


class LargestSizes(TorchFunctionMode):
    """On meta, what depends on numbers: every element counts, none equals another, nothing is equal as a whole."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, x = kwargs or {}, args[0] if args else None
        if not (isinstance(x, Tensor) and x.is_meta):
            return func(*args, **kwargs)
        if func is Tensor.nonzero:
            return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
        if func is torch.unique:
            every = [x.new_empty(x.numel())]
            every += [torch.empty_like(x, dtype=torch.int64)] * bool(kwargs.get("return_inverse"))
            every += [x.new_empty(x.numel(), dtype=torch.int64)] * bool(kwargs.get("return_counts"))
            return every[0] if len(every) == 1 else tuple(every)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            assert args[1].is_meta, "a mask on another device"
            return x.flatten(0, args[1].dim() - 1)
        if func is Tensor.tolist:  # where rows of a set begin
            return list(range(len(x)))
        if func is torch.equal:
            assert args[1].is_meta
            return False
        return func(*args, **kwargs)


@pytest.fixture(params=["meta", "cpu"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Any]]:
    """Moves modules and batches to where the test runs."""
    for module in (layers, attention, mamba4rec, partial_positions, scan, times, towers):
        monkeypatch.setattr(module, "use_cpu_blocks", lambda x: False)
    device, mode = torch.device(request.param), ExitStack()

    def move(*these: Any) -> Any:
        """All that is built is built on the CPU, as it is in a fit; what runs after this is watched."""
        moved = [
            it.to(device)
            if isinstance(it, torch.nn.Module)
            else tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, it)
            for it in these
        ]
        mode.enter_context(LargestSizes() if device.type == "meta" else torch.device("meta"))
        return moved

    with mode:
        yield move


def history(**without: Any) -> History:
    """Histories of 1 to L events with all that a model can read."""
    lengths = torch.arange(B) % L + 1
    real = torch.arange(L) < lengths[:, None]
    happened = torch.randint(10**9, 2 * 10**9, (B, L)).sort(dim=1).values
    fields = {
        "items": torch.randint(1, V + 1, (B, L)) * real,
        "lengths": lengths,
        "times": happened * real,
        "request": (happened + 60) * real,
        "ratings": torch.randint(1, 6, (B, L)).float() * real,
        "actions": torch.randint(1, 3, (B, L)) * real,
        "target_action": torch.randint(1, 3, (B, L)) * real,
        "user": tuple(rows(feature, B) for feature in FEATURES),
    }
    return History(**{**fields, **without})


def rows(feature: dict[str, Any], count: int) -> Tensor:
    shape = (count, feature["values"])
    return torch.randint(feature["size"], shape, dtype=torch.int32) if feature["size"] else torch.randn(shape)


def queries(window: History) -> Queries:
    users = torch.arange(B)
    return Queries(users, window, torch.randint(1, V + 1, (B,)), users, torch.randint(1, V + 1, (B,)))


def retriever(**options: Any) -> Retriever:
    options = {"encoder": Transformer, "request_time": "target", **options}
    model = Retriever(V, L, dim=D, features=FEATURES, user_features=FEATURES, actions=ACTIONS, **options)
    model.target_counts.copy_(torch.arange(V + 1))
    model.last_times.copy_(10**9 + torch.arange(V + 1))
    return model


def a_step_and_a_validation(model: Retriever, window: History, place: Callable[[Any], Any]) -> None:
    """The loss with its gradients, ranks and metrics lie where the model does."""
    model, window, batch = place(model, window, queries(window))
    device = model.target_counts.device
    found = model.train().losses(window)
    found["loss"].backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients
    assert {x.device for x in [*gradients, *filter(torch.is_tensor, found.values())]} == {device}
    with torch.no_grad():
        model.eval().validation_step(batch, 0)
    assert {value.device for value in model.val_metrics.take("val/").values()} == {device}


def classes(module: Any, base: type) -> set[type]:
    kinds = {kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)}
    return {kind for kind in kinds if not getattr(kind, "__abstractmethods__", None) and kind.__name__[0] != "_"}


# --- the retriever

CLOCKS = {
    "RequestGap": times.RequestGap,
    "LogBuckets": times.LogBuckets,
    "LogSpaced": partial(times.LogSpaced, per_head=True),
    "Calendar": times.Calendar,
    "HybridTimestamp": times.HybridTimestamp,
    "Combined": partial(times.Combined, parts=[times.LogBuckets, times.Calendar]),
}
POSITIONS = {
    "Learned": positions.Learned,
    "Sinusoidal": positions.Sinusoidal,
    "Rotary": positions.Rotary,
    "PerDistance": positions.PerDistance,
    "T5Buckets": positions.T5Buckets,
    "Combined": partial(positions.Combined, parts=[positions.Rotary, positions.PerDistance]),
}
ENCODERS = {
    "Transformer": Transformer,
    "Transformer, dropped weights": partial(Transformer, attention_dropout=0.5, position=positions.PerDistance),
    "HSTU": partial(HSTU, time=times.LogBuckets),
    "SASRec": SASRec,
    "LiGR": LiGR,
    "BERT4Rec": partial(BERT4Rec, time=times.LogBuckets, type_embedding=True),
    "FuXi": partial(FuXi, time=times.LogBuckets),
    "Mamba4Rec": partial(Mamba4Rec, skip=True, chunk=3, time=times.RequestGap),
}
READS = {
    "ids": {},
    "item tower": {"items": partial(ItemTower, hidden=[8])},
    "untied, with biases": {"tied": False, "item_bias": True, "similarity": "dot"},
    "user tower": {"user": UserTower},
    "user tower, FiLM alone": {"user": partial(UserTower, token=False)},
    "ratings and actions": {"inputs": [RatingEmbedding, ActionEmbedding, NextAction]},
    "everything": {"items": ItemTower, "user": UserTower, "inputs": [RatingEmbedding, ActionEmbedding, NextAction]},
    "some rows at a time": {"user": UserTower, "recompute_rows": 2},
}
LOSSES: dict[str, Callable[[], losses.Loss]] = {
    "InfoNCE": InfoNCE,
    "InfoNCE, mixed and filtered": partial(InfoNCE, negatives=Mixed(), same_sequence=True, near=0.9, hard=3),
    "InfoNCE, Uniform per event": partial(InfoNCE, negatives=Uniform(4), same_sequence=True, near=0.9),
    "InfoNCE, Uniform per sequence": partial(InfoNCE, negatives=Uniform(4, per="sequence"), same_sequence=True),
    "InfoNCE, Uniform per batch": partial(InfoNCE, negatives=Uniform(4, per="batch"), correct="none"),
    "InfoNCE, active items": partial(InfoNCE, negatives=Uniform(4, active_after="2001-09-09")),
    "DCL": partial(DCL, negatives=InBatch(0.5), correct="negatives"),
    "FullSoftmax": FullSoftmax,
    "BCE": BCE,
    "BPR": BPR,
    "GBCE": GBCE,
    "MSE": MSE,
}
by_name: Callable[..., Any] = lambda name, these: pytest.mark.parametrize(name, these.values(), ids=these)  # noqa: E731


def test_all_there_is_is_tried() -> None:
    def tried(these: dict[str, Any]) -> set[type]:
        return {kind.func if isinstance(kind, partial) else kind for kind in these.values()}

    assert tried(ENCODERS) == classes(encoders, encoders.base.Encoder)
    assert tried(CLOCKS) == classes(times, times.Time) - {times.Time}
    assert tried(POSITIONS) == classes(positions, positions.Position) - {positions.Position}
    assert tried(LOSSES) == classes(losses, losses.Loss)
    assert tried(SCORERS) == classes(scorers, scorers.Scorer)
    assert set(LIST_LOSSES) == classes(list_losses, list_losses.ListLoss)
    assert classes(objectives, objectives.Objective) == {NextItem, Cloze}
    assert classes(inputs, inputs.Input) == set(READS["ratings and actions"]["inputs"])


@by_name("encoder", ENCODERS)
def test_every_encoder(encoder: Any, place: Callable[[Any], Any]) -> None:
    a_step_and_a_validation(retriever(encoder=encoder, **READS["everything"]), history(), place)


@by_name("encoder", ENCODERS)
@pytest.mark.parametrize("place", ["cpu"], indirect=True)
def test_every_encoder_in_bf16(encoder: Any, place: Callable[[Any], Any]) -> None:
    """The code of a GPU in the precision of a GPU."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a_step_and_a_validation(retriever(encoder=encoder, **READS["everything"]), history(), place)


@by_name("reads", READS)
@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
def test_every_input(encoder: Any, reads: dict[str, Any], place: Callable[[Any], Any]) -> None:
    a_step_and_a_validation(retriever(encoder=encoder, **reads), history(), place)


@by_name("loss", LOSSES)
@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec], ids=["NextItem", "Cloze"])
def test_every_loss_takes_every_objective(encoder: Any, loss: Any, place: Callable[[Any], Any]) -> None:
    model = retriever(encoder=encoder, loss=loss(), norm_penalty=NormPenalty(cap=0.1))
    a_step_and_a_validation(model, history(), place)


def test_soft_labels(place: Callable[[Any], Any], request: pytest.FixtureRequest) -> None:
    if "meta" in request.node.name:
        pytest.skip("ratings are checked, which takes numbers")
    a_step_and_a_validation(retriever(loss=BCE(max_rating=5.0)), history(), place)


@pytest.mark.slow
@by_name("encoder", ENCODERS)
@by_name("reads", READS)
@by_name("loss", LOSSES)
def test_every_encoder_input_and_loss(
    encoder: Any, reads: dict[str, Any], loss: Any, place: Callable[[Any], Any]
) -> None:
    a_step_and_a_validation(retriever(encoder=encoder, loss=loss(), **reads), history(), place)


@by_name("clock", CLOCKS)
def test_every_clock(clock: Any, place: Callable[[Any], Any]) -> None:
    a_step_and_a_validation(retriever(encoder=partial(Transformer, time=clock)), history(), place)


@by_name("position", POSITIONS)
@pytest.mark.parametrize("kind", [HSTU, BERT4Rec])
def test_every_position(kind: Any, position: Any, place: Callable[[Any], Any]) -> None:
    a_step_and_a_validation(retriever(encoder=partial(kind, position=position)), history(), place)


@pytest.mark.parametrize("encoder", [Transformer, BERT4Rec])
def test_histories_of_which_little_is_known(encoder: Any, place: Callable[[Any], Any]) -> None:
    reads = READS["everything"]
    window = history(request=None, ratings=None, actions=None, target_action=None, user=None)
    a_step_and_a_validation(retriever(encoder=encoder, request_time="none", **reads), window, place)


# --- the ranker

SCORERS = {
    "MLP": partial(scorers.MLP, hidden=(8,)),
    "DIN": partial(scorers.DIN, hidden=(8,)),
    "DCN": partial(scorers.DCN, hidden=(8,), rank=2),
    "MoL": partial(scorers.MoL, hidden=(8,), user_parts=2, item_parts=2, part_dim=4),
    "ListAttention": partial(scorers.ListAttention, width=8),
    "GBDT": scorers.GBDT,
    "Blend": partial(scorers.Blend, members=[partial(scorers.MLP, hidden=(8,)), scorers.GBDT]),
}
LIST_LOSSES = {
    list_losses.Listwise: "softmax",
    list_losses.BCE: "pointwise",
    list_losses.BPR: "pairs",
    list_losses.LambdaRank: "weighted pairs",
}


def lists() -> Lists:
    listed = CandidateBatch(
        state=torch.randn(B, D),
        items=torch.randint(1, V + 1, (B, C)).index_fill_(1, torch.tensor([C - 1]), PAD),
        score=torch.randn(B, C),
        rank=torch.arange(1, C + 1).expand(B, C).clone(),
        signals=torch.randn(B, C, S),
        recent=torch.randint(V + 1, (B, R)),
        ages=torch.rand(B, R),
    )
    return Lists(listed, torch.arange(B) % (C - 1))


@by_name("scorer", SCORERS)
@pytest.mark.parametrize("features", [FEATURES, []], ids=["features", "no features"])
def test_every_scorer(scorer: Any, features: list[dict[str, Any]], place: Callable[[Any], Any]) -> None:
    a_step_of_the_ranker(scorer, list_losses.Listwise, features, place)


@pytest.mark.parametrize("loss", LIST_LOSSES, ids=LIST_LOSSES.values())
def test_every_list_loss(loss: Any, place: Callable[[Any], Any]) -> None:
    a_step_of_the_ranker(SCORERS["MLP"], loss, FEATURES, place)


def a_step_of_the_ranker(scorer: Any, loss: Any, features: list[dict[str, Any]], place: Callable[[Any], Any]) -> None:
    signals = [{"name": f"Signal.{n}", "by_id": n == 0, "counted": n == 1} for n in range(S)]
    ranker = Ranker(V, D, features, signals=signals, scorer=scorer, loss=loss(), id_dropout=0.5)
    ranker, (listed, positive) = place(ranker, lists())
    device, real = listed.items.device, listed.items != PAD
    ranker.reranker.standardise(listed.signals[real])
    logits = ranker.reranker(listed, ranker.drop_ids(listed.items), ranker.drop_counts(listed.items))
    ranker.loss(logits, positive, real).backward()
    gradients = [weight.grad for weight in ranker.parameters() if weight.grad is not None]
    assert {x.device for x in [logits, *gradients]} == {device}
    with torch.no_grad():
        ranker.eval().validation_step(Lists(listed, positive), 0)
    assert {value.device for value in ranker.masked_metrics.take("val/").values()} == {device}


def test_calibration_stays_where_the_scores_are() -> None:
    """Its best scale depends on numbers, so on the CPU alone."""
    reranker, (listed, positive) = Ranker(V, D, [], scorer=scorers.MLP).reranker, lists()
    with torch.device("meta"):
        reranker.calibrate(listed.score, positive, listed.items != PAD)
    assert reranker.log_scale.device.type == "cpu"


def test_metrics_stay_where_the_ranks_are(place: Callable[[Any], Any]) -> None:
    metric, ranks = place(RankMetrics(), torch.tensor([1, 3, 500]))
    metric.update(ranks)
    assert {value.device for value in metric.take("").values()} == {metric.users.device}


# --- what was saved on a GPU


def test_a_bundle_made_on_a_gpu_serves_on_a_cpu(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights whose file says cuda:0, and an index that is to be searched there."""
    index, bundle = tmp_path / "index", tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        device = ("--index", "Exact", "--index.device", "cuda:99")
        recsys("export-index", "--retriever", trained.retriever, "--data", trained.data, "--output", index, *device)
        recsys("export-bundle", "--index", index, "--ranker", trained.ranker, "--output", bundle, "--candidates", K)
    one, other = Recommender.load(bundle), Recommender.load(trained.bundle)
    assert "searching on the CPU" in caplog.text
    history = other.catalogue.items["item_id"][:3].to_list()
    assert one.recommend(history, k=5) == other.recommend(history, k=5)  # the same sums on the same device
