"""Export to ONNX: files compute what the model computes, at any batch size and length, or are refused."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import polars as pl
import pytest
import torch
from closeness import close
from pipeline_fixtures import Run, recsys
from test_docs import ROOT, blocks_of
from torch import Tensor, nn
from wrong_inputs import check_error, check_message, nothing_written

from recsys2stage.data.batches import Ragged, as_history
from recsys2stage.data.dataset import Dataset
from recsys2stage.options import RequestTime
from recsys2stage.ranking import scorers
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval import encoders, inputs, users
from recsys2stage.retrieval.encoders import positions, times
from recsys2stage.retrieval.encoders.base import Encoder, EncoderFactory
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.items import ItemTower
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.serving import onnx_files
from recsys2stage.serving.graphs import RankerGraph, RetrieverGraph
from recsys2stage.serving.onnx_files import TOLERANCE, CannotExport, check, difference, write_graphs

V, LONGEST, DIM = 50, 45, 16  # longer than a chunk of Mamba4Rec, so that 40 is no limit
NEWEST = 1_300_000_000  # float32 does not resolve seconds there
SMALL: dict[str, Any] = {"layers": 1, "heads": 2}
USER_FEATURES = [
    {"name": "gender", "kind": "categorical", "size": 3, "values": 1},
    {"name": "age", "kind": "numeric", "size": 0, "values": 1},
    {"name": "tags", "kind": "multi", "size": 6, "values": 4},
]
ITEM_FEATURES = [
    {"name": "genres", "kind": "multi", "size": 6, "values": 3},
    {"name": "price", "kind": "numeric", "size": 0, "values": 1},
    {"name": "text", "kind": "vector", "size": 0, "values": 5},
]
SIGNALS = [
    {"name": "Popular.count", "by_id": True, "counted": True},
    {"name": "Session.length", "by_id": False, "counted": False},
]
ATTENTIVE = ("Transformer", "SASRec", "BERT4Rec", "LiGR", "HSTU", "FuXi")
REQUEST_ONLY = {"RequestGap", "HybridTimestamp"}  # not in a bidirectional encoder


def perturb(module: nn.Module) -> None:
    """Moves all parameters, so that none that starts at zero has no effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def item_features() -> list[dict[str, Any]]:
    """The features with their arrays, some values missing."""
    rng = np.random.default_rng(0)
    known = rng.random((V + 1, 1)) < 0.7
    values = [
        rng.integers(0, 6, (V + 1, 3)).astype(np.int32),
        np.where(known, rng.random((V + 1, 1)), np.nan).astype(np.float32),
        np.where(known, rng.standard_normal((V + 1, 5)), np.nan).astype(np.float32),
    ]
    return [{**feature, "values": array} for feature, array in zip(ITEM_FEATURES, values, strict=True)]


def recommender(
    encoder: EncoderFactory,
    request_time: RequestTime = "target",
    actions: list[str] | None = None,
    user_features: list[dict[str, Any]] | None = None,
    next_action: str = "none",
    reranker: Reranker | None = None,
    signals: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Recommender:
    """Untrained towers with all parameters in use; `signals` are only the names of their values."""
    torch.manual_seed(0)
    towers = TwoTower(V, LONGEST, DIM, encoder, actions=actions, user_features=user_features, **options).eval()
    if isinstance(towers.items, ItemTower):
        towers.load_item_tables(item_features(), [], torch.arange(V + 1) % 5 != 1)
    perturb(towers)
    index = Exact()
    with torch.no_grad():
        towers.items.table.weight[0] = 0
        index.build(towers.all_item_vectors().numpy())
    catalogue = pl.DataFrame({"item": np.arange(1, V + 1), "item_id": [str(number) for number in range(V)]})

    class Named(Recommender):
        signal_names = signals or []  # type: ignore[assignment]

    return Named(
        *(towers, index, reranker, catalogue, np.ones(V + 1, dtype=np.int64), request_time, next_action, actions or ()),
        recent=7 if reranker else 0,
        newest_time=NEWEST,
        user_features=user_features or (),
    )


def ranked(scorer: str, signals: list[dict[str, Any]], features: list[dict[str, Any]], **options: Any) -> Recommender:
    """A recommender with a second stage, some of its items cold."""
    torch.manual_seed(0)
    specs = [{**feature, "values": feature["values"].shape[1]} for feature in features]
    specs = [spec for spec, _ in zip(ITEM_FEATURES, specs, strict=False)]
    width = {"width": 8} if scorer == "ListAttention" else {"hidden": [8]}
    reranker = Reranker(V, DIM, specs, partial(getattr(scorers, scorer), **width), signals=signals, **options)
    perturb(reranker)
    vectors = torch.cat([torch.zeros(1, DIM), torch.randn(V, DIM)])
    reranker.load_item_tables(vectors, np.array([0, 0, 0, *range(1, V - 1)]), features)
    return recommender(partial(encoders.SASRec, **SMALL), reranker=reranker, signals=signals)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every encoder with every position and every time encoding; inputs, user towers, items and similarities."""
    of_position = ["Learned", "Sinusoidal", "Rotary", "PerDistance", "T5Buckets", "Combined", "Position"]
    of_time = ["RequestGap", "LogBuckets", "LogSpaced", "Calendar", "HybridTimestamp", "Combined", "Time"]
    both = partial(positions.Combined, parts=[positions.Rotary, positions.PerDistance])
    gaps = partial(times.Combined, parts=[times.LogBuckets, times.RequestGap])
    for number, name in enumerate(ATTENTIVE):
        for place, position in enumerate(of_position):
            time = of_time[(place + number) % len(of_time)]
            if name == "BERT4Rec" and time in REQUEST_ONLY | {"Combined"}:
                time = "LogSpaced"
            encoder = partial(
                getattr(encoders, name),
                **SMALL,
                position=both if position == "Combined" else getattr(positions, position),
                time=gaps if time == "Combined" else getattr(times, time),
            )
            yield f"{name}-{position}-{time}", {"encoder": encoder}
    mamba = partial(encoders.Mamba4Rec, layers=2, state=8, ssm_heads=2)
    yield "Mamba4Rec", {"encoder": mamba}
    for position, time in (("Learned", "RequestGap"), ("Sinusoidal", "HybridTimestamp"), ("Position", "Calendar")):
        encoder = partial(mamba, skip=True, position=getattr(positions, position), time=getattr(times, time))
        yield f"Mamba4Rec-{position}-{time}", {"encoder": encoder}
    told = partial(encoders.HSTU, **SMALL, time=times.LogBuckets)
    masked = partial(encoders.BERT4Rec, **SMALL, time=times.LogBuckets)
    asked = {
        "inputs": [inputs.ActionEmbedding, inputs.RatingEmbedding, inputs.NextAction],
        "actions": ["click", "buy"],
        "next_action": "target",
    }
    yield "last-event", {"encoder": told, "request_time": "last_event"}
    yield (
        "request-of-the-calendar",
        {"encoder": partial(encoders.SASRec, **SMALL, time=partial(times.Calendar, of="request"))},
    )
    yield "inputs", {"encoder": told, **asked}
    yield "inputs-masked", {"encoder": masked, **asked}
    yield (
        "user",
        {
            "encoder": told,
            "user": users.UserTower,
            "user_features": USER_FEATURES,
            "similarity": "dot",
            "item_bias": True,
        },
    )
    yield "user-masked", {"encoder": masked, "user": users.UserTower, "user_features": USER_FEATURES}
    yield (
        "film",
        {
            "encoder": partial(encoders.SASRec, **SMALL),
            "user": partial(users.UserTower, token=False),
            "user_features": USER_FEATURES,
            "tied": False,
            "item_bias": True,
        },
    )
    yield (
        "item-tower",
        {
            "encoder": partial(encoders.SASRec, **SMALL),
            "items": ItemTower,
            "features": ITEM_FEATURES,
            "similarity": "dot",
        },
    )


CASES = dict(cases())
SCORERS = {
    f"{scorer}-{'features' if features else 'plain'}": (scorer, SIGNALS if features else [], features)
    for scorer in ("MLP", "DIN", "DCN", "MoL", "ListAttention")
    for features in ([], item_features())
}


# without onnx


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_of_a_retriever_computes_its_query_vectors(name: str) -> None:
    """Item towers are looked up, and Mamba4Rec takes a history as one chunk."""
    graph = RetrieverGraph(recommender(**CASES[name]))
    for batch, size in ((1, 1), (3, 7), (2, LONGEST)):
        values = graph.random(batch, size, seed=batch)
        with torch.inference_mode():
            output = graph(*(torch.from_numpy(values[port.name]) for port in graph.inputs))
        assert difference(output.numpy(), graph.reference(values)) < TOLERANCE


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_exported_of_a_ranker_computes_its_scores(name: str) -> None:
    graph = RankerGraph(ranked(*SCORERS[name]))
    for batch, size in ((1, 1), (3, 7)):
        values = graph.random(batch, size, seed=batch)
        with torch.inference_mode():
            output = graph(*(torch.from_numpy(values[port.name]) for port in graph.inputs))
        assert difference(output.numpy(), graph.reference(values)) < TOLERANCE


def test_a_difference_is_relative_to_large_outputs_and_infinite_for_other_shapes_or_padding() -> None:
    assert difference(np.array([0.5, 1e-3]), np.array([0.5, 0.0])) == pytest.approx(1e-3)
    assert difference(np.array([100.0, 1.0]), np.array([100.0, 0.0])) == pytest.approx(1e-2)
    assert difference(np.zeros((2, 1)), np.zeros(2)) == np.inf
    assert difference(np.array([0.0, 1.0]), np.array([-np.inf, 1.0])) == np.inf
    assert difference(np.array([np.nan]), np.array([0.0])) == np.inf
    assert difference(np.array([-np.inf]), np.array([-np.inf])) == 0


def test_missing_packages_are_named(
    trained: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_files, "find_spec", lambda name: None if name == "onnxscript" else object())
    with nothing_written(tmp_path), pytest.raises(SystemExit) as end:
        recsys("export-onnx", "--bundle", trained.bundle, "--output", tmp_path / "onnx")
    check_message(str(end.value.code), "export-onnx", "needs onnxscript,", r"pip install 'recsys2stage\[onnx\]'")


# with onnx


@pytest.fixture(scope="module")
def onnx() -> Iterator[None]:
    """Skips without the extra. Types are not checked, since sizes are symbols while torch traces."""
    for name in onnx_files.NEEDED:
        pytest.importorskip(name, reason="of the extra onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module")
def exported(onnx: None, informed: Run) -> Path:
    """The files of the informed run, written by the verb."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        recsys("export-onnx", "--bundle", informed.bundle)
    (informed.folder / "printed.txt").write_text(printed.getvalue())
    return informed.folder / "onnx"


def session_of(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_the_files_of_a_bundle_rank_as_the_bundle_does(exported: Path, informed: Run) -> None:
    """Users of different history lengths, at batch sizes other than the exported example's."""
    dataset, model = Dataset(informed.data), Recommender.load(informed.bundle)
    chosen = dataset.users("test")[:7]
    padded = dataset.histories(chosen, "test", model.towers.max_length)
    request = dataset.request_times(chosen, "test")
    history = as_history(padded, "target", request)
    retriever, ranker = (session_of(exported / f"{stage}.onnx") for stage in ("retriever", "ranker"))
    (queries,) = retriever.run(
        None, {"items": padded.items, "lengths": padded.lengths, "times": padded.times, "request_time": request}
    )
    with torch.inference_mode():
        close(queries, model.towers.queries(history))
    scores = queries @ np.load(exported / "item_vectors.npy").T
    assert np.array_equal(np.load(exported / "item_vectors.npy"), model.vectors[1:])
    seen = dataset.filtered_items(chosen, "test")
    excluded = Ragged(seen.values, seen.offsets)
    found = model.candidates(queries, excluded, padded, request)
    rows = np.arange(len(chosen))[:, None]
    assert np.abs(scores[rows, found.items - 1] - found.score).max() < TOLERANCE
    batch = model.candidate_batch(queries, found, padded, request)
    names = {port.name for port in ranker.get_inputs()}
    for part in (slice(0, 1), slice(0, 7)):
        values = {name: value[part].numpy() for name, value in batch._asdict().items() if name in names}
        (output,) = ranker.run(["scores"], values)
        assert difference(output, model.rerank(batch)[part]) < TOLERANCE


def test_the_manifest_describes_the_files(exported: Path, informed: Run) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["kind"] == "onnx"
    assert manifest["parents"]["bundle"]["hash"]
    assert manifest["packages"].keys() == {"torch", "onnx", "onnxscript", "onnxruntime"}
    held = {path.name for path in exported.iterdir()}
    assert held == {"retriever.onnx", "ranker.onnx", "item_vectors.npy", "items.parquet", "popularity.npy"} | {
        "manifest.json"
    }
    assert manifest["files"].keys() == held - {"manifest.json"}
    types = {"tensor(int64)": "int64", "tensor(float)": "float32"}
    for stage in ("retriever", "ranker"):
        told, session = manifest["graphs"][stage], session_of(exported / f"{stage}.onnx")
        for ports, described in ((session.get_inputs(), told["inputs"]), (session.get_outputs(), told["outputs"])):
            found = [{"name": port.name, "type": types[port.type], "shape": port.shape} for port in ports]
            assert found == described
        assert len({shape["batch"] for shape in told["checked"]}) >= 3
        assert all(shape["difference"] < TOLERANCE for shape in told["checked"])
    assert [port["name"] for port in manifest["graphs"]["retriever"]["inputs"]] == [
        *("items", "lengths", "times", "request_time")
    ]
    assert {"signals", "recent", "ages"} <= {port["name"] for port in manifest["graphs"]["ranker"]["inputs"]}


def test_the_verb_prints_inputs_outputs_and_the_largest_difference(exported: Path, informed: Run) -> None:
    head, retriever, ranker, difference, *_ = (informed.folder / "printed.txt").read_text().splitlines()
    assert head == f"{exported}: retriever.onnx and ranker.onnx, opset 20"
    assert retriever == "  retriever: items, lengths, times, request_time → queries"
    assert ranker == "  ranker: state, items, score, rank, signals, recent, ages → scores"
    assert re.fullmatch(r"  largest difference from torch \de-0[6-9], at 10 shapes", difference)


def test_the_files_hold_no_paths_of_the_machine_that_wrote_them(exported: Path) -> None:
    for path in exported.glob("*.onnx"):
        assert not re.search(rb"recsys2stage/|site-packages|\.py\b", path.read_bytes()), path


def test_the_documentation_runs(exported: Path, informed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/ml-1m").symlink_to(informed.folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks_of(ROOT / "docs/howto/onnx.md"):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, block.page, "exec"), names)
    expected = Recommender.load(informed.bundle).recommend(
        ["50", "110", "32"], times=[978300760, 978300760, 978302109], request_time=978302268, k=10
    )
    found = {row["item_id"]: row["score"] for row in names["best"]}
    assert len(found) == 10
    close(np.array(list(found.values())), np.array([row["score"] for row in expected]))
    both = [(found[row["item_id"]], row["score"]) for row in expected if row["item_id"] in found]
    assert len(both) >= 9, "but for a tie at the end of the list"
    close(*np.array(both).T)


def test_a_file_that_computes_something_else_is_refused(
    exported: Path, informed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = RetrieverGraph(Recommender.load(informed.bundle))
    reference = graph.reference
    monkeypatch.setattr(graph, "reference", lambda values: reference(values) + 1e-4 * (len(values["items"]) == 3))
    with pytest.raises(CannotExport) as error:
        check(graph, exported / "retriever.onnx", [port.name for port in graph.inputs])
    check_error(
        error.value, "the retriever .Transformer.", "differs from torch by 0.0001 at batch 3 and length 1", "1e-05"
    )


class FixedLength(Encoder):
    """Computes with the length of the example, which an export would make the only one."""

    def forward(self, x: Tensor, lengths: Tensor, times: Tensor, request: Tensor | None) -> Tensor:
        return x * int(x.size(1))


class ByValue(Encoder):
    """Its operations depend on values."""

    def forward(self, x: Tensor, lengths: Tensor, times: Tensor, request: Tensor | None) -> Tensor:
        return x if int(lengths.max()) > 3 else -x


@pytest.mark.parametrize("encoder", [FixedLength, ByValue])
def test_a_model_that_cannot_be_exported_is_refused_and_nothing_is_written(
    encoder: type[Encoder], onnx: None, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Recommender.load(trained.bundle)
    model.towers.encoder = encoder()
    monkeypatch.setattr(Recommender, "load", lambda *arguments: model)
    with nothing_written(tmp_path), pytest.raises(SystemExit) as end:
        recsys("export-onnx", "--bundle", trained.bundle, "--output", tmp_path / "onnx")
    check_message(
        str(end.value.code),
        rf"{re.escape(str(trained.bundle))}: the retriever \({encoder.__name__}\)",
        "cannot be exported to ONNX: .*nothing is written",
        "serve this model with recsys serve",
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_file_of_every_retriever_computes_its_query_vectors(name: str, onnx: None, tmp_path: Path) -> None:
    write_graphs(recommender(**CASES[name]), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORERS)
def test_the_file_of_every_ranker_computes_its_scores(name: str, onnx: None, tmp_path: Path) -> None:
    made = write_graphs(ranked(*SCORERS[name]), tmp_path)
    read = {port["name"] for port in made["ranker"]["inputs"]}
    assert ("ages" in read) == name.startswith("DIN")
    assert ("signals" in read) == name.endswith("features")
