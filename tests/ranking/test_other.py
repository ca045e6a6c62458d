"""OtherRetriever against the towers and the index it was made from; in mined and served lists."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pipeline_fixtures import RETRIEVER, SIGNALS, Run, recsys
from worlds import untrained_index

from recsys2stage.data.batches import as_history
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.signals import OtherRetriever, Requests
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.index import Index

VECTORS = np.zeros((1, 1), np.float32)  # the first retriever's, which do not matter here


def requests_of(dataset: Dataset, length: int = 9) -> Requests:
    users = dataset.users("test")
    items = np.random.default_rng(2).integers(0, dataset.num_items + 1, (len(users), 7))
    return Requests(
        items, dataset.histories(users, "test", length), dataset.request_times(users, "test"), VECTORS, VECTORS
    )


def test_the_score_is_that_of_the_other_retriever(ragged: Path, tmp_path: Path) -> None:
    """Of histories cut to what it was trained to read, at the time of the request."""
    dataset = Dataset(ragged)
    towers, signal = untrained_index(tmp_path / "index", dataset), OtherRetriever(str(tmp_path / "index"))
    signal.fit(dataset, VECTORS)
    requests, users = requests_of(dataset), dataset.users("test")
    assert requests.history.lengths.max() > towers.max_length
    with torch.inference_mode():
        short = dataset.histories(users, "test", towers.max_length)
        queries = towers.queries(as_history(short, "target", requests.request_time)).numpy()
        vectors = np.concatenate([np.zeros((1, 8), np.float32), towers.all_item_vectors().numpy()])
    want = np.where(requests.items > 0, np.einsum("bd,bcd->bc", queries, vectors[requests.items]), 0)
    np.testing.assert_allclose(signal(requests)[..., 0], want, rtol=1e-4, atol=1e-5)
    later = requests._replace(request_time=requests.request_time + 10**6)
    assert not np.allclose(signal(later)[..., 0], want, atol=1e-3), "it knows when it is asked"
    assert signal.reads_times
    assert not signal.reads_ratings


def test_proposals_are_its_nearest_items(ragged: Path, tmp_path: Path) -> None:
    dataset, folder = Dataset(ragged), tmp_path / "index"
    towers, signal = untrained_index(folder, dataset), OtherRetriever(str(folder), candidates=6)
    signal.fit(dataset, VECTORS)
    requests, users = requests_of(dataset), dataset.users("test")
    known = dataset.filtered_items(users, "test")
    with torch.inference_mode():
        short = dataset.histories(users, "test", towers.max_length)
        queries = towers.queries(as_history(short, "target", requests.request_time)).numpy()
    _, items = Index.load(folder).search(queries, 6, exclude=(known.values, known.offsets))
    assert np.array_equal(signal.propose(requests, known), items)


def test_nobody_s_history_is_encoded(ragged: Path, tmp_path: Path) -> None:
    dataset = Dataset(ragged)
    untrained_index(tmp_path / "index", dataset)
    signal = OtherRetriever(str(tmp_path / "index"), candidates=3)
    signal.fit(dataset, VECTORS)
    requests, known = requests_of(dataset), dataset.filtered_items(dataset.users("test"), "test")
    requests.history.lengths[:2] = 0
    assert not signal(requests)[:2].any()
    assert (signal.propose(requests, known)[:2] == -1).all()
    assert (signal.propose(requests, known)[2:] > 0).any()


def test_another_split_is_refused(ragged: Path, cycle: Path, tmp_path: Path) -> None:
    untrained_index(tmp_path / "index", Dataset(cycle))
    with pytest.raises(ValueError, match=r"index was made from a dataset with split hash .* make .* again"):
        OtherRetriever(str(tmp_path / "index")).fit(Dataset(ragged), VECTORS)
    with pytest.raises(FileNotFoundError, match="recsys export-index --output"):
        OtherRetriever(str(tmp_path / "none")).fit(Dataset(ragged), VECTORS)


def test_what_signals_are_not_told_is_refused(ragged: Path, tmp_path: Path) -> None:
    dataset = Dataset(ragged)
    untrained_index(tmp_path / "rated", dataset, inputs=["RatingEmbedding"])
    rated = OtherRetriever(str(tmp_path / "rated"))
    rated.fit(dataset, VECTORS)
    assert rated.reads_ratings
    untrained_index(tmp_path / "kinds", dataset, inputs=["ActionEmbedding"])
    with pytest.raises(ValueError, match="kinds reads actions of events, which signals do not receive"):
        OtherRetriever(str(tmp_path / "kinds")).fit(dataset, VECTORS)


def test_a_bundle_serves_both_retrievers_without_the_other_s_folder(trained: Run, tmp_path: Path) -> None:
    """Mined, fitted, exported and asked; scores of the other stand in the lists and in what the bundle measures."""
    run, other = Run(tmp_path), tmp_path / "other"
    shutil.copytree(trained.index, run.index)
    (tmp_path / "other.yaml").write_text(RETRIEVER.replace("dim: 16", "dim: 8"), encoding="utf-8")
    words = ("--data.init_args.path", trained.data, "--seed_everything", 5, "--trainer.max_epochs", 1)
    recsys("fit", "--config", tmp_path / "other.yaml", "--output", other / "retriever", *words)
    recsys("export-index", "--retriever", other / "retriever/best.ckpt", "--data", trained.data)
    described = {"class_path": "OtherRetriever", "init_args": {"index": str(other / "index"), "candidates": 10}}
    (tmp_path / "signals.yaml").write_text(SIGNALS + f"- {json.dumps(described)}\n", encoding="utf-8")
    of = ("--data", trained.data, "--index", run.index, "--output", run.candidates, "--k", 40)
    recsys("mine-negatives", "--config", tmp_path / "signals.yaml", *of)
    mined = pl.read_parquet(run.candidates / "candidates.parquet")
    assert mined["OtherRetriever.score"].std() > 0
    assert (mined["source.OtherRetriever"] > 0).any()
    run.fit_ranker()
    run.export_bundle()
    shutil.rmtree(other)
    dataset, served = Dataset(trained.data), Recommender.load(run.bundle)
    asked = pl.read_parquet(run.candidates / "requests.parquet")
    users, places, now = (asked[name].to_numpy() for name in ("user", "place", "time"))
    lists = zip(users, places, now, mined.partition_by("request", maintain_order=True), strict=True)
    for user, place, time, rows in list(lists)[::10]:
        padded = dataset.histories(np.array([user]), np.array([place]), served.towers.max_length)
        items = rows["item"].to_numpy().astype(np.int64)[None]
        said = served.signals[-1](Requests(items, padded, np.array([time]), VECTORS, VECTORS))
        np.testing.assert_allclose(said[0, :, 0], rows["OtherRetriever.score"].to_numpy(), atol=1e-5)
    ids = served.catalogue.items["item_id"].to_numpy()[dataset.items[:5] - 1].tolist()
    assert len(served.recommend(ids, k=10, times=list(range(5)), request_time=9)) == 10
