"""The verbs between the trainings: what they write, what they refuse, and that nothing half-made stays."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_fixtures import K, Run, recsys
from worlds import seal

from recsys2stage.artifacts import fingerprint, read_manifest
from recsys2stage.checkpoints import read_checkpoint
from recsys2stage.cli import export
from recsys2stage.data.dataset import Dataset, sample_users
from recsys2stage.data.parquet import ParquetStream
from recsys2stage.ranking.bundle import check_split
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.histories import Histories
from recsys2stage.retrieval.index import Exact, Faiss, Index


@pytest.fixture(scope="module")
def alien(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Other events: one item fewer."""
    run = Run(tmp_path_factory.mktemp("alien"))
    ratings = pl.read_csv(raw / "ratings.csv")
    fewer = run.folder / "raw"
    fewer.mkdir()
    ratings.filter(pl.col("movieId") != ratings["movieId"].max()).write_csv(fewer / "ratings.csv")
    shutil.copy(raw / "movies.csv", fewer)
    run.prepare(fewer)
    return run


def refused(message: str, *words: object) -> None:
    with pytest.raises(SystemExit, match=message):
        recsys(*words)


# the index


def test_an_index_holds_all_that_the_first_stage_needs(trained: Run) -> None:
    names = {"manifest.json", "index.json", "index.npy", "towers.pt", "popularity.npy", "items.parquet"} | {"README.md"}
    assert {file.name for file in trained.index.iterdir()} == names
    dataset, manifest = Dataset(trained.data), read_manifest(trained.index, "index", "")
    assert manifest["items"] == dataset.num_items
    assert manifest["split_hash"] == dataset.manifest["split_hash"]
    for name, path in (("retriever", trained.retriever), ("data", trained.data)):
        relative = f"../{path.relative_to(trained.folder)}"
        assert manifest["parents"][name] == {"path": str(path), "relative": relative, "hash": fingerprint(path)}
    assert np.array_equal(np.load(trained.index / "popularity.npy"), dataset.train_counts)


def test_an_index_measures_itself(trained: Run, tmp_path: Path) -> None:
    measured = read_manifest(trained.index, "index", "")["measured"]
    assert measured["recall@100"] == 1.0  # it is exact
    assert measured["queries"] == len(Dataset(trained.data).users("val"))
    assert 0 < measured["median_ms"] <= measured["p95_ms"]
    of = ("--retriever", trained.retriever, "--data", trained.data)
    recsys("export-index", *of, "--output", tmp_path / "some", "--measured", 7)
    assert read_manifest(tmp_path / "some", "index", "")["measured"]["queries"] == 7
    recsys("export-index", *of, "--output", tmp_path / "none", "--measured", 0)
    assert "measured" not in read_manifest(tmp_path / "none", "index", "")


def test_the_vectors_are_those_of_the_checkpoint(trained: Run) -> None:
    _, weights = read_checkpoint(trained.retriever, "towers", "")
    table = weights["items.table.weight"][1:]
    expected = table / table.norm(dim=1, keepdim=True)
    assert np.load(trained.index / "index.npy") == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_faiss_index_serves_in_place_of_the_exact_one(trained: Run, tmp_path: Path) -> None:
    of = ("--retriever", trained.retriever, "--data", trained.data, "--output", tmp_path / "index")
    recsys("export-index", *of, "--index", "Faiss", "--index.factory", "Flat")
    exact, other = Recommender.load(trained.index), Recommender.load(tmp_path / "index")
    assert isinstance(exact.index, Exact)
    assert isinstance(other.index, Faiss)
    history = exact.catalogue.items["item_id"][:7].to_list()
    one, two = (served.recommend(history) for served in (exact, other))
    assert [row["item_id"] for row in one] == [row["item_id"] for row in two]
    run = Run(tmp_path)
    recsys(
        *("mine-negatives", "--data", trained.data, "--index", run.index, "--output", run.candidates, "--k", K),
        *("--users", 30),
    )
    recsys("export-bundle", "--index", run.index, "--ranker", trained.ranker, "--output", run.bundle)
    assert isinstance(Recommender.load(run.bundle).index, Faiss)
    assert Recommender.load(run.bundle).num_candidates == K  # as many as the ranker was trained on


def test_an_index_is_chosen_by_its_measured_recall(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was tried is printed and in the manifest, and what was chosen is a plain index."""
    of = ("--retriever", trained.retriever, "--data", trained.data, "--index", "Auto", "--index.recall", 0.9)
    recsys("export-index", *of, "--output", tmp_path / "small")
    assert isinstance(Recommender.load(tmp_path / "small").index, Exact)  # 120 items
    monkeypatch.setattr("recsys2stage.retrieval.index.auto.SMALL", 50)
    capsys.readouterr()
    recsys("export-index", *of, "--output", tmp_path / "index")
    manifest = read_manifest(tmp_path / "index", "index", "")
    assert manifest["options"]["index"]["class"] == "Faiss"
    assert manifest["options"]["index"]["options"]["factory"] == "IVF32,Flat"
    assert [one["index"] for one in manifest["tried"]] == ["IVF32,Flat, nprobe 8"]
    assert manifest["measured"]["recall@100"] >= 0.9
    said = capsys.readouterr().out
    assert "IVF32,Flat, nprobe 8: recall@100 " in said
    exact, chosen = Recommender.load(trained.index), Recommender.load(tmp_path / "index")
    history = exact.catalogue.items["item_id"][:7].to_list()
    one, two = (served.recommend(history, k=100) for served in (exact, chosen))
    assert len({row["item_id"] for row in one} & {row["item_id"] for row in two}) >= 80
    recsys("export-index", *of, "--output", tmp_path / "blind", "--measured", 0)  # without queries of users
    assert read_manifest(tmp_path / "blind", "index", "")["tried"]
    assert isinstance(Recommender.load(tmp_path / "blind").index, Faiss)


def test_a_retriever_of_other_data_is_refused(trained: Run, alien: Run, tmp_path: Path) -> None:
    assert Dataset(alien.data).num_items == Dataset(trained.data).num_items - 1
    of = ("--retriever", trained.retriever, "--data", alien.data, "--output", tmp_path / "index")
    refused("has 120 items but .* has 119; fit again", "export-index", *of)
    assert list(tmp_path.iterdir()) == []


# mining


def test_what_is_mined_says_how(trained: Run) -> None:
    manifest = read_manifest(trained.candidates, "candidates", "")
    assert manifest["options"]["k"] == K
    parts = manifest["options"]["miner"]["init_args"]["miners"]
    assert [part["class_path"].rpartition(".")[2] for part in parts] == ["RankBand", "Uniform", "Popular"]
    assert manifest["parents"].keys() == {"index", "data"}
    assert manifest["vector_dim"] == 16


def test_mining_refuses_what_cannot_be(trained: Run, alien: Run, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "candidates")
    refused("split hash", "mine-negatives", "--data", alien.data, "--index", trained.index, *out)
    of = ("--data", trained.data, "--index", trained.index)
    refused("select is 1.0, expected a share", "mine-negatives", *of, *out, "--select", 1.0)
    refused("k is 0, expected at least 1", "mine-negatives", *of, *out, "--k", 0)
    told = ("--users", 5, "--select", 0.999)
    refused(
        "select is 0.999, so all 5 mined users validate the ranker.* or raise users", "mine-negatives", *of, *out, *told
    )
    told = ("--users", 5, "--select", 0.01)
    refused("none of the 5 mined users validates the ranker.*; raise select", "mine-negatives", *of, *out, *told)
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_validation_target_have_nothing_to_mine(trained: Run, tmp_path: Path) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    np.save(data / "users.train_end.npy", np.load(data / "users.val_end.npy"))
    of = ("--data", data, "--index", trained.index, "--output", tmp_path / "candidates")
    refused("has no user with a validation target and events before it", "mine-negatives", *of)


def test_without_anyone_to_select_on_training_says_so(trained: Run, tmp_path: Path) -> None:
    of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / "candidates")
    recsys("mine-negatives", *of, "--select", 0.0, "--k", K)
    run = Run(tmp_path)
    with pytest.raises(SystemExit, match="has no validation users for the ranker; mine with select above 0"):
        run.fit_ranker()


# the bundle


def test_a_bundle_is_the_index_and_the_second_stage(trained: Run) -> None:
    shared = {file.name for file in trained.index.iterdir()} - {"manifest.json"}
    assert {file.name for file in trained.bundle.iterdir()} == shared | {"manifest.json", "reranker.pt"}
    for name in shared - {"README.md"}:  # the model cards differ
        assert (trained.bundle / name).read_bytes() == (trained.index / name).read_bytes()
    manifest = read_manifest(trained.bundle, "bundle", "")
    assert manifest["candidates"] == K
    assert {name: parent["path"] for name, parent in manifest["parents"].items()} == {
        "index": str(trained.index),
        "ranker": str(trained.ranker),
        "data": str(trained.data),
    }
    assert torch.load(trained.bundle / "reranker.pt", weights_only=True)["vectors"].shape == (121, 16)


def test_a_bundle_with_signals_holds_their_tables(informed: Run) -> None:
    shared = {file.name for file in informed.index.iterdir()}
    assert {file.name for file in informed.bundle.iterdir()} == shared | {"reranker.pt", "signals"}
    tables = {file.name: file.read_bytes() for file in (informed.candidates / "signals").iterdir()}
    assert {file.name: file.read_bytes() for file in (informed.bundle / "signals").iterdir()} == tables
    assert "signals.json" in tables
    mined, served = (
        read_manifest(folder, kind, "")
        for folder, kind in ((informed.candidates, "candidates"), (informed.bundle, "bundle"))
    )
    assert served["reranker"]["signals"] == mined["signals"] == Recommender.load(informed.bundle).signal_names
    assert served["recent"] == 20
    kinds = [signal["class_path"].rpartition(".")[2] for signal in mined["options"]["signals"]]
    assert kinds == ["PopularityAsOf", "Transitions", "Neighbours", "Content", "Affinity", "Session", "Ratings"]
    assert mined["options"]["signals"][1]["init_args"]["lags"] == [1, 2]
    assert mined["options"]["targets"] is None


def test_signals_of_other_candidates_than_those_of_the_ranker_are_refused(informed: Run, tmp_path: Path) -> None:
    """Mined again with other options, they would say other things than what it learned from."""
    run = Run(tmp_path)
    shutil.copytree(informed.candidates, run.candidates)
    shutil.copytree(informed.ranker.parent, run.ranker.parent)
    manifest = json.loads((run.ranker.parent / "manifest.json").read_text())
    manifest["parents"]["candidates"]["path"] = str(run.candidates)
    (run.ranker.parent / "manifest.json").write_text(json.dumps(manifest))
    of = ("--index", informed.index, "--ranker", run.ranker, "--output", run.bundle)
    recsys("export-bundle", *of)
    shutil.rmtree(run.bundle)
    mined = run.candidates / "manifest.json"
    mined.write_text(mined.read_text() + "\n")
    refused("was trained on other candidates than those now in .*; fit again", "export-bundle", *of)
    assert not run.bundle.exists()


def test_a_signal_is_named_once(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("signals: [Transitions, Neighbours, Transitions]")
    of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / "candidates")
    refused(
        r"two signals give the value Transitions\.after_1", "mine-negatives", *of, "--config", tmp_path / "twice.yaml"
    )
    assert not (tmp_path / "candidates").exists()


def test_signals_that_the_data_cannot_give_are_refused(trained: Run, tmp_path: Path) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["has"] |= {"rating": False, "time": False}
    (data / "manifest.json").write_text(json.dumps(manifest))
    of = ("--data", data, "--index", trained.index, "--output", tmp_path / "candidates", "--k", K)
    for signal, message in (("Ratings", "have no ratings"), ("Session", "no times"), ("PopularityAsOf", "no times")):
        (tmp_path / "signals.yaml").write_text(f"signals: [{signal}]\n")
        refused(f"{message}.*leave (it|{signal}) out", "mine-negatives", *of, "--config", tmp_path / "signals.yaml")
    assert not (tmp_path / "candidates").exists()


def test_a_ranker_of_another_index_is_refused(trained: Run, tmp_path: Path) -> None:
    index = shutil.copytree(trained.index, tmp_path / "index")
    np.save(index / "index.npy", np.load(index / "index.npy") * 0.5)
    seal(index)
    of = ("--index", index, "--ranker", trained.ranker, "--output", tmp_path / "bundle")
    refused("was trained with other item vectors than those of .*; mine and fit again", "export-bundle", *of)
    assert not (tmp_path / "bundle").exists()


def test_the_two_checkpoints_are_not_confused(trained: Run, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out")
    refused("holds no towers", "export-index", "--retriever", trained.ranker, "--data", trained.data, *out)
    refused("holds no reranker", "export-bundle", "--index", trained.index, "--ranker", trained.retriever, *out)


def test_a_failure_leaves_the_old_artifact_and_nothing_half_made(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = shutil.copytree(trained.index, tmp_path / "index")
    before = (index / "manifest.json").read_bytes()

    def fail(*arguments: object, **facts: object) -> None:
        raise ValueError("the disk is full, say")

    monkeypatch.setattr(export, "write_manifest", fail)
    of = ("--retriever", trained.retriever, "--data", trained.data, "--output", index)
    refused("the disk is full", "export-index", *of)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    assert (index / "manifest.json").read_bytes() == before


def test_an_artifact_made_again_replaces_the_old(trained: Run, tmp_path: Path) -> None:
    index = shutil.copytree(trained.index, tmp_path / "index")
    (index / "index.faiss").touch()  # of an earlier index of another kind
    recsys("export-index", "--retriever", trained.retriever, "--data", trained.data, "--output", index)
    assert not (index / "index.faiss").exists()
    assert isinstance(Index.load(index), Exact)


# small parts


def test_some_users_are_drawn_by_the_seed_and_stay_in_order() -> None:
    users = np.arange(100, 200)
    assert sample_users(users, None, 0) is users
    assert sample_users(users, 100, 0) is users
    drawn = sample_users(users, 10, 0)
    assert len(set(drawn.tolist())) == 10
    assert drawn.tolist() == sorted(drawn)
    assert drawn.tolist() == sample_users(users, 10, 0).tolist() != sample_users(users, 10, 1).tolist()


def test_a_stream_of_tables_is_one_table(tmp_path: Path) -> None:
    with ParquetStream(tmp_path / "table") as stream:
        stream.write({"a": np.arange(3), "b": np.array(["x", "y", "z"])})
        stream.write({"a": np.arange(2), "b": np.array(["u", "v"])})
    table = pq.read_table(tmp_path / "table")
    assert table.to_pydict() == {"a": [0, 1, 2, 0, 1], "b": ["x", "y", "z", "u", "v"]}


def test_the_same_split_is_recognised_by_its_hash(trained: Run, alien: Run) -> None:
    for folder in (trained.index, trained.bundle):
        check_split(Dataset(trained.data), folder)
        with pytest.raises(ValueError, match=r"its test events may have been trained on; make .* again"):
            check_split(Dataset(alien.data), folder)


def test_every_manifest_names_its_parents_by_what_they_were(trained: Run) -> None:
    """So that anyone can follow a report back to the raw file."""
    folders = {"data": "dataset", "retriever": "retriever", "index": "index"}
    folders |= {"candidates": "candidates", "ranker": "ranker", "bundle": "bundle"}
    for name, kind in folders.items():
        manifest = json.loads((trained.folder / name / "manifest.json").read_text())
        assert manifest["kind"] == kind
        assert manifest["parents"]
        for parent in manifest["parents"].values():
            assert parent["hash"] == fingerprint(parent["path"])
            assert parent["hash"] is not None


def moved(run: Run, folder: Path) -> Run:
    """Data and bundle in another place, as if nothing were left where they were made."""
    for name in ("data", "bundle"):
        shutil.copytree(run.folder / name, folder / name)
    manifest = json.loads((folder / "bundle/manifest.json").read_text())
    manifest["parents"]["data"]["path"] = str(folder / "elsewhere/data")
    (folder / "bundle/manifest.json").write_text(json.dumps(manifest))
    return Run(folder)


def test_data_and_bundle_that_were_moved_together_find_each_other(trained: Run, tmp_path: Path) -> None:
    run = moved(trained, tmp_path / "moved")
    users = ("--users", json.dumps(some_ids(trained)))
    recsys("recommend", "--bundle", run.bundle, *users)
    recsys("evaluate", "--bundle", run.bundle, "--users", 20, "--resamples", 10)
    shutil.move(run.data, tmp_path / "data")
    tried = (
        rf"the data of .*bundle does not exist, expected at .*elsewhere/data or {run.data}; pass its folder as --data"
    )
    refused(f"recommend: {tried}", "recommend", "--bundle", run.bundle)
    refused(f"evaluate: {tried}", "evaluate", "--bundle", run.bundle)
    recsys("recommend", "--bundle", run.bundle, *users, "--data", tmp_path / "data")


def test_lists_of_moved_data_are_trained_on_and_those_of_lost_data_are_not(trained: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    for name in ("data", "index", "candidates"):
        shutil.copytree(trained.folder / name, run.folder / name)
    manifest = json.loads((run.candidates / "manifest.json").read_text())
    for parent in manifest["parents"].values():
        parent["path"] = "/nowhere" + parent["path"]
    (run.candidates / "manifest.json").write_text(json.dumps(manifest))
    assert Candidates(run.candidates).dataset.path == run.data
    shutil.move(run.data, tmp_path / "data")
    message = (
        rf"the data of .*candidates does not exist, expected at /nowhere.* or {run.data}; .* recsys mine-negatives"
    )
    with pytest.raises(FileNotFoundError, match=message):
        Candidates(run.candidates)


# what must not be lost or mixed up


def test_a_folder_of_another_kind_is_not_replaced(trained: Run, tmp_path: Path) -> None:
    of = ("--index", trained.index, "--ranker", trained.ranker)
    shutil.copytree(trained.retriever.parent, tmp_path / "retriever")
    refused("holds a retriever and would be lost", "export-bundle", *of, "--output", tmp_path / "retriever")
    refused("holds other things and would be lost", "export-bundle", *of, "--output", tmp_path)
    assert (tmp_path / "retriever/best.ckpt").is_file()
    recsys("export-bundle", *of, "--output", tmp_path / "bundle")
    recsys("export-bundle", *of, "--output", tmp_path / "bundle")  # its own kind is


def test_what_is_written_stands_beside_what_was_read(trained: Run, tmp_path: Path) -> None:
    run = Run(tmp_path)
    shutil.copytree(trained.bundle, run.bundle)
    recsys("evaluate", "--bundle", run.bundle, "--users", 20, "--resamples", 10)
    recsys("recommend", "--bundle", run.bundle, "--users", json.dumps(some_ids(trained)))
    assert {file.name for file in tmp_path.iterdir()} >= {"report.json", "report.md", "recommendations.parquet"}


def some_ids(run: Run) -> list[int]:
    return pl.read_parquet(run.data / "users.parquet")["user_id"].head(3).to_list()


def test_candidates_are_not_trained_on_beside_another_index(trained: Run, tmp_path: Path) -> None:
    run = Run(tmp_path)
    shutil.copytree(trained.index, run.index)
    of = ("--data", trained.data, "--index", run.index, "--output", run.candidates)
    recsys("mine-negatives", *of, "--k", K, "--users", 30)
    Candidates(run.candidates)
    (run.index / "manifest.json").write_text((run.index / "manifest.json").read_text() + "\n")
    with pytest.raises(ValueError, match="mined from another index than the one now in"):
        Candidates(run.candidates)


def test_a_miner_that_leaves_lists_empty_is_refused(trained: Run, tmp_path: Path) -> None:
    of = ("--data", trained.data, "--index", trained.index, "--output", tmp_path / "c")
    refused(
        r"the miner left \d+ of 150 lists empty; with k = 20, skip_top must be lower",
        "mine-negatives",
        *of,
        "--k",
        20,
        "--miner",
        "RankBand",
        "--miner.skip_top",
        20,
    )
    assert not (tmp_path / "c").exists()


def test_a_bundle_of_an_older_version_is_refused(trained: Run, tmp_path: Path) -> None:
    bundle = shutil.copytree(trained.bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["reranker"]["scores_cold"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"bundle was exported by an older version.*export again"):
        Recommender.load(bundle)


# numbers that count something


def test_numbers_that_count_are_refused_below_the_least(trained: Run, tmp_path: Path) -> None:
    """Mining with batches of -5 users wrote empty lists, a bundle of -5 candidates failed only when it served."""
    out, bundle = ("--output", tmp_path / "out"), ("--bundle", trained.bundle)
    lists = ("--output", tmp_path / "lists.csv")
    exported = ("--retriever", trained.retriever, "--data", trained.data)
    mined = ("--data", trained.data, "--index", trained.index)
    packed = ("--index", trained.index, "--ranker", trained.ranker)
    for wrong in (0, -5):
        least = f"is {wrong}, expected at least 1"
        refused(f"batch_size {least}", "mine-negatives", *mined, *out, "--batch_size", wrong)
        refused(f"users {least}, or null for all", "mine-negatives", *mined, *out, "--users", wrong)
        refused(f"candidates {least}, or null for the number", "export-bundle", *packed, *out, "--candidates", wrong)
        refused(f"batch_size {least}", "recommend", *bundle, *lists, "--batch_size", wrong)
        refused(f"batch_size {least}", "evaluate", *bundle, *out, "--batch_size", wrong)
        refused(f"users {least}, or null for all", "evaluate", *bundle, *out, "--users", wrong)
        refused(f"resamples {least}", "evaluate", *bundle, *out, "--resamples", wrong)
    refused("measured is -1, expected at least 0", "export-index", *exported, *out, "--measured", -1)
    assert list(tmp_path.iterdir()) == []


def test_batches_of_data_modules_hold_something(trained: Run) -> None:
    for wrong in (0, -5):
        with pytest.raises(ValueError, match=f"eval_batch_size is {wrong}, expected at least 1"):
            Histories(trained.data, eval_batch_size=wrong)
        with pytest.raises(ValueError, match=f"batch_size is {wrong}, expected at least 1"):
            Candidates(trained.candidates, batch_size=wrong)
