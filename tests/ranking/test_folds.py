"""More lists for the ranker: those of earlier targets, cross-fitted over time, and all lists once it is selected."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch
from pipeline_fixtures import RANKER, K, Run, recsys
from worlds import seal

from recsys2stage import columns as c
from recsys2stage.artifacts import fingerprint, read_manifest
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.candidates import Candidates, Lists
from recsys2stage.ranking.lists import CANDIDATES, REQUESTS, STATES
from recsys2stage.recommender import Recommender

EARLIER = 3  # validation targets of each user in the fold
SIGNALS = """
signals:
- {class_path: Transitions, init_args: {candidates: 5, lags: [1], top: 20, alpha: ALPHA}}
- Neighbours
"""


class Mined(NamedTuple):
    """Lists of the newest validation target of each user, and of three, from a retriever that saw none of them."""

    run: Run
    own: Path
    fold: Path


def mine(run: Run, output: Path, *words: object, alpha: float = 1.0) -> Path:
    config = output.with_suffix(".yaml")
    config.write_text(SIGNALS.replace("ALPHA", str(alpha)), encoding="utf-8")
    of = ("--data", run.data, "--index", run.index, "--output", output, "--k", K)
    recsys("mine-negatives", *of, "--config", config, *words)
    return output


@pytest.fixture(scope="module")
def mined(trained: Run, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Mined:
    earlier = Run(tmp_path_factory.mktemp("earlier"))
    earlier.prepare(raw, "--split", "LeaveOneOut", "--split.val", EARLIER)
    earlier.fit_retriever("--trainer.max_epochs", 1)
    earlier.export_index()
    folder = tmp_path_factory.mktemp("mined")
    # another seed: other users select in the fold than in the ranker's own lists
    return Mined(trained, mine(trained, folder / "own"), mine(earlier, folder / "fold", "--seed", 1))


@pytest.fixture(scope="module")
def selected(mined: Mined, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranker that was selected on its own lists and the fold's."""
    output = tmp_path_factory.mktemp("selected") / "ranker"
    fit(mined, output, f"--data.init_args.folds=[{mined.fold}]")
    return output


def fit(mined: Mined, output: Path, *words: object) -> None:
    config = output.with_suffix(".yaml")
    config.write_text(RANKER, encoding="utf-8")
    blind = "--model.init_args.without=[state]"
    recsys("fit", "--config", config, "--output", output, "--data.init_args.path", mined.own, blind, *words)


def ready(*arguments: Any, **options: Any) -> Candidates:
    data = Candidates(*arguments, **options)
    data.setup("fit")
    return data


def numbers(data: Candidates, part: Literal["train", "val"]) -> np.ndarray:
    """Which lists a loader reads, ascending."""
    with mock.patch.object(data, "read", lambda batch: batch):
        found = np.sort(np.concatenate(list(getattr(data, f"{part}_dataloader")())))
    assert len(np.unique(found)) == len(found)
    return found


class Naive(NamedTuple):
    """A list as its files have it."""

    folder: Path
    number: int  # in its folder
    user: int
    place: int
    fold: str
    rows: pl.DataFrame


def files(*folders: Path) -> list[Naive]:
    """The lists of several folders behind each other."""
    found = []
    for folder in folders:
        rows = {key[0]: own for key, own in pl.read_parquet(folder / CANDIDATES).group_by(c.REQUEST)}
        for number, request in enumerate(pl.read_parquet(folder / REQUESTS).iter_rows(named=True)):
            own = rows[number].sort(c.RETRIEVER_RANK)
            found.append(Naive(folder, number, request[c.USER], request[c.PLACE], request[c.FOLD], own))
    return found


def changed(folder: Path, output: Path, **facts: Any) -> Path:
    """A copy of mined lists whose manifest says other things."""
    shutil.copytree(folder, output)
    manifest = json.loads((output / c.MANIFEST).read_text(encoding="utf-8"))
    (output / c.MANIFEST).write_text(json.dumps(manifest | facts), encoding="utf-8")
    return output


# --- folds


def test_the_world_has_what_the_tests_ask_about(mined: Mined) -> None:
    own, fold = files(mined.own), files(mined.fold)
    assert len(fold) == EARLIER * len(own)
    assert {one.fold for one in own} == {one.fold for one in fold} == {"train", "select"}
    selecting = [{one.user for one in lists if one.fold == "select"} for lists in (own, fold)]
    assert selecting[0] - selecting[1], "who selects here would train there"
    assert selecting[1] - selecting[0], "and the other way round"


def test_a_fold_s_retriever_never_saw_its_targets_and_none_is_a_test_target(mined: Mined) -> None:
    dataset, own = Dataset(mined.run.data), files(mined.own)
    folder = read_manifest(mined.fold, "candidates", "")["parents"]["data"]["path"]
    earlier = Dataset(folder)
    for one in files(mined.fold):
        assert earlier.train_ends[one.user] <= one.place < dataset.val_ends[one.user]
        assert int(dataset.items[one.place]) not in one.rows.filter(pl.col(c.LABEL) == 0)[c.ITEM].to_list()
    newest = {(one.user, one.place) for one in own}
    assert newest == {(user, int(dataset.val_ends[user]) - 1) for user in range(dataset.num_users)}


def test_lists_of_all_folders_train_as_they_were_mined(mined: Mined) -> None:
    """Against a loop over the files: items, scores, signals, newest events, and the state of the own lists alone."""
    data = ready(mined.own, folds=[mined.fold], recent=4)
    names = [signal["name"] for signal in data.signals]
    assert "source.Transitions" in names
    states, dataset = np.load(mined.own / STATES), data.dataset
    every = files(mined.own, mined.fold)
    batch: Lists = data.read(np.arange(len(every)))
    for row, one in enumerate(every):
        count, listed = len(one.rows), batch.candidates
        assert sorted(listed.items[row, :count].tolist()) == sorted(one.rows[c.ITEM].to_list())
        assert not listed.items[row, count:].any()
        rows = one.rows.rows_by_key(c.ITEM, named=True, unique=True)
        for place, item in enumerate(listed.items[row, :count].tolist()):
            want = rows[item]
            assert listed.score[row, place] == want[c.RETRIEVER_SCORE]
            assert listed.rank[row, place] == want[c.RETRIEVER_RANK]
            assert listed.signals[row, place].tolist() == [want[name] for name in names]
            assert bool(want[c.LABEL]) == (batch.positive[row] == place)
        target = int(dataset.items[one.place])
        assert (batch.positive[row] >= 0) == (target in rows), "the target is the fold's, not the newest one's"
        first = int(dataset.offsets[one.user])
        before = dataset.items[max(one.place - 4, first) : one.place][::-1].tolist()
        assert listed.recent[row, : len(before)].tolist() == before
        state = states[one.number] if one.folder == mined.own else np.zeros(states.shape[1])
        assert listed.state[row].tolist() == state.tolist()


def test_who_selects_anywhere_does_not_train_there_and_own_lists_alone_select(mined: Mined) -> None:
    data = ready(mined.own, folds=[mined.fold])
    every = files(mined.own, mined.fold)
    selecting = {one.user for one in files(mined.own) if one.fold == "select"}
    trains = {int(number) for number in numbers(data, "train")}
    held = [one.rows[c.LABEL].sum() == 1 for one in every]
    want = {
        number for number, one in enumerate(every) if held[number] and one.fold == "train" and one.user not in selecting
    }
    assert trains == want
    assert len([number for number in trains if every[number].folder == mined.fold]) > len(files(mined.own))
    selects = [number for number, one in enumerate(every) if one.folder == mined.own and one.fold == "select"]
    assert numbers(data, "val").tolist() == selects
    assert not {every[number].user for number in selects} & {every[number].user for number in trains}


def test_without_folds_nothing_changes(mined: Mined) -> None:
    alone, both = ready(mined.own), ready(mined.own, folds=[mined.fold])
    count = len(files(mined.own))
    kept = numbers(both, "train")
    assert numbers(alone, "train").tolist() == kept[kept < count].tolist()


@pytest.mark.parametrize("refit", [False, True])
def test_no_batch_reads_a_test_event(mined: Mined, selected: Path, refit: bool) -> None:
    """Other test events, the same batches."""
    data = ready(mined.own, folds=[mined.fold], refit=selected if refit else None)
    lists = np.arange(len(data.lists.user))
    before: Lists = data.read(lists)
    tests = np.concatenate(
        [np.arange(a, b) for a, b in zip(data.dataset.val_ends, data.dataset.offsets[1:], strict=True)]
    )
    assert len(tests) >= data.dataset.num_users
    for name in ("items", "times"):
        values = np.array(getattr(data.dataset, name))
        values[tests] = values[tests][::-1] // 2 + 1
        assert not np.array_equal(values, getattr(data.dataset, name))
        setattr(data.dataset, name, values)
    after: Lists = data.read(lists)
    assert torch.equal(before.positive, after.positive)
    for name, values in before.candidates._asdict().items():
        assert torch.equal(values, getattr(after.candidates, name)), name


def test_a_fold_of_other_signals_is_refused(mined: Mined, tmp_path: Path) -> None:
    other = changed(mined.fold, tmp_path / "other", signals=[{"name": "Session.gap", "by_id": False, "counted": False}])
    with pytest.raises(ValueError, match=r"mined with different signals.*mine both with the same ones"):
        ready(mined.own, folds=[mined.fold, other])


def test_a_fold_whose_signals_have_other_options_is_refused(mined: Mined, tmp_path: Path) -> None:
    """The numbers have the same names and mean something else."""
    other = mine(mined.run, tmp_path / "other", alpha=2.0)
    assert read_manifest(other, "candidates", "")["signals"] == read_manifest(mined.own, "candidates", "")["signals"]
    with pytest.raises(ValueError, match="or signal options"):
        ready(mined.own, folds=[other])


def test_a_fold_whose_retriever_alone_knows_cold_items_is_refused(mined: Mined, tmp_path: Path) -> None:
    other = changed(mined.fold, tmp_path / "other", scores_cold=True)
    with pytest.raises(ValueError, match=r"only one of the retrievers of .* has an item tower"):
        ready(mined.own, folds=[other])


def test_lists_of_an_older_version_are_refused(mined: Mined, tmp_path: Path) -> None:
    other = shutil.copytree(mined.own, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["scores_cold"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"was mined by an older version.*mine again"):
        ready(other)


def test_a_fold_with_another_now_is_refused(mined: Mined, tmp_path: Path) -> None:
    other = changed(mined.fold, tmp_path / "other", request_time="target")
    with pytest.raises(ValueError, match=r"has request_time target, that of .* none; train both with the same one"):
        ready(mined.own, folds=[other])


def test_a_fold_of_other_events_is_refused(mined: Mined, tmp_path: Path) -> None:
    parents = read_manifest(mined.fold, "candidates", "")["parents"]
    data = shutil.copytree(parents["data"]["path"], tmp_path / "data")
    path = next(data.glob("events.item*.npy"))
    items = np.load(path)
    items[[0, 1]] = items[[1, 0]]
    np.save(path, items)
    parents["data"] = {"path": str(data), "hash": fingerprint(data)}
    with pytest.raises(ValueError, match=r"mined from other events than .*; prepare both from the same log"):
        ready(mined.own, folds=[changed(mined.fold, tmp_path / "other", parents=parents)])


def test_a_fold_whose_targets_are_test_events_is_refused(mined: Mined, tmp_path: Path) -> None:
    """As of data that are split later than the ranker's own."""
    late = shutil.copytree(mined.fold, tmp_path / "late")
    requests, ends = pl.read_parquet(late / REQUESTS), np.asarray(Dataset(mined.run.data).val_ends)
    newest = requests[c.PLACE].to_numpy() == ends[requests[c.USER].to_numpy()] - 1
    newest[np.flatnonzero(newest)[7:]] = False
    requests.with_columns(pl.col(c.PLACE) + pl.Series(newest)).write_parquet(late / REQUESTS)
    seal(late)
    with pytest.raises(ValueError, match=r"^7 targets of .* are test events of .*; mine earlier ones"):
        ready(mined.own, folds=[late])


def test_a_ranker_that_looks_at_states_is_refused(mined: Mined, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        fit(mined, tmp_path / "ranker", f"--data.init_args.folds=[{mined.fold}]", "--model.init_args.without=[rank]")
    assert "folds have states of other retrievers; remove them" in str(end.value.code)
    assert not (tmp_path / "ranker" / "best.ckpt").exists()


def test_what_folds_trained_is_signed_and_served(mined: Mined, selected: Path, tmp_path: Path) -> None:
    parents = read_manifest(selected, "ranker", "")["parents"]
    assert {name: parent["hash"] for name, parent in parents.items()} == {
        "candidates": fingerprint(mined.own),
        "fold 1": fingerprint(mined.fold),
    }
    of = ("--index", mined.run.index, "--ranker", selected / "best.ckpt", "--output", tmp_path / "bundle")
    recsys("export-bundle", *of)
    served = Recommender.load(tmp_path / "bundle")
    for name, table in served.signals[0].tables.items():  # those of the newest data, not of the fold
        assert np.array_equal(table, np.load(mined.own / "signals" / f"0.{name}.npy"))
    item = served.catalogue.items[c.ITEM_ID].to_list()[0]
    assert len(served.recommend([item], k=5)) == 5


# --- refit


def best_of(folder: Path, output: Path, **facts: int) -> Path:
    """A copy of a ranker's run whose best checkpoint says other things."""
    shutil.copytree(folder, output)
    torch.save(torch.load(folder / "best.ckpt", weights_only=True) | facts, output / "best.ckpt")
    return output


def test_a_refit_trains_on_all_lists_as_long_as_the_best_took(mined: Mined, selected: Path, tmp_path: Path) -> None:
    run = best_of(selected, tmp_path / "run", epoch=2, global_step=9)  # more epochs than the config has: 2
    output = tmp_path / "refit"
    impatient = ("--early_stopping.patience", 1, "--early_stopping.monitor", "val/retriever_ndcg@10")  # it never rises
    fit(mined, output, f"--data.init_args.folds=[{mined.fold}]", "--data.init_args.refit", run, *impatient)
    best, last = (torch.load(output / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert best["epoch"] == last["epoch"] == 2, "best.ckpt is the last epoch's, whatever was measured"
    assert best["global_step"] == last["global_step"] > 0
    for name, weights in best["state_dict"].items():
        assert torch.equal(weights, last["state_dict"][name]), name

    data = ready(mined.own, folds=[mined.fold], refit=run)
    held = [number for number, one in enumerate(files(mined.own, mined.fold)) if one.rows[c.LABEL].sum() == 1]
    assert numbers(data, "train").tolist() == held, "who selected trains too"
    assert best["global_step"] == 3 * -(-len(held) // 16), "as RANKER has it"
    manifest = read_manifest(output, "ranker", "")
    assert manifest["epochs"] == 3
    assert manifest["monitor"] is None
    assert manifest["parents"]["selected"]["hash"] == fingerprint(run)


@pytest.mark.parametrize("epoch", [0, 6])
def test_a_refit_takes_the_epochs_of_the_best_not_of_the_last(
    mined: Mined, selected: Path, tmp_path: Path, epoch: int
) -> None:
    run = best_of(selected, tmp_path / "run", epoch=epoch, global_step=1)
    assert Candidates(mined.own, folds=[mined.fold], refit=run).epochs == epoch + 1
    assert Candidates(mined.own, folds=[mined.fold]).epochs is None


def test_there_is_nothing_to_refit_where_no_step_helped(mined: Mined, selected: Path, tmp_path: Path) -> None:
    run = best_of(selected, tmp_path / "run", epoch=0, global_step=0)
    with pytest.raises(ValueError, match="is step 0, before any training, expected one after a step; serve it as"):
        _ = Candidates(mined.own, folds=[mined.fold], refit=run).epochs


def test_a_refit_of_nothing_or_of_an_unfinished_fit_is_refused(mined: Mined, selected: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no ranker in .*; run: recsys fit --output"):
        _ = Candidates(mined.own, refit=tmp_path / "nowhere").epochs
    unfinished = shutil.copytree(selected, tmp_path / "unfinished")  # its best so far may not be its best
    (unfinished / c.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="there is no ranker in"):
        _ = Candidates(mined.own, folds=[mined.fold], refit=unfinished).epochs


def test_a_refit_on_other_lists_is_refused(mined: Mined, selected: Path) -> None:
    """Their epochs are of another length, and nothing was selected on them."""
    with pytest.raises(ValueError, match=r"was not selected on the lists of .*own; refit on the lists"):
        _ = Candidates(mined.own, refit=selected).epochs  # the fold is missing
    with pytest.raises(ValueError, match="was not selected on the lists of"):
        _ = Candidates(mined.fold, folds=[mined.fold], refit=selected).epochs


def test_a_fit_does_not_write_over_what_it_starts_from(mined: Mined, selected: Path) -> None:
    before = fingerprint(selected / "best.ckpt")
    for output, what in ((selected, "selected"), (mined.own, "candidates")):
        with pytest.raises(SystemExit) as end:
            fit(mined, output, f"--data.init_args.folds=[{mined.fold}]", "--data.init_args.refit", selected)
        assert f"is the {what} of this fit and would be overwritten; choose another --output" in str(end.value.code)
    assert fingerprint(selected / "best.ckpt") == before
    assert read_manifest(mined.own, "candidates", "")["kind"] == "candidates"
