"""The estimator is the verbs, run on frames: the same numbers, and habits that one expects of an estimator."""

import copy
import gc
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from closeness import same_lists
from pipeline_fixtures import RANKER, RETRIEVER, K, Run, recsys

from recsys2stage import TwoStageRecommender
from recsys2stage.artifacts import read_manifest, write_manifest
from recsys2stage.checkpoints import read_checkpoint
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.fitted import FittedFolder
from recsys2stage.data.frames import as_polars, infer_kind
from recsys2stage.data.locks import locked
from recsys2stage.estimator import NotFittedError
from recsys2stage.recommender import Recommender

COLUMNS = {"user": "who", "item": "what", "time": "at", "rating": "stars"}
PREPARE = "source: {class_path: MovieLens, init_args: {path: nowhere}}\ntie_break: item_id\n"


KINDS: dict[str, Callable[[pl.DataFrame], Any]] = {
    "polars": pl.DataFrame.clone,
    "lazy": pl.DataFrame.lazy,
    "arrow": pl.DataFrame.to_arrow,
    "columns": lambda frame: frame.to_dict(as_series=False),
    "pandas": pl.DataFrame.to_pandas,
}


@pytest.fixture(scope="module")
def events(raw: Path) -> pl.DataFrame:
    frame = pl.read_csv(raw / "ratings.csv")
    return frame.rename({"userId": "who", "movieId": "what", "timestamp": "at", "rating": "stars"})


@pytest.fixture(scope="module")
def items(raw: Path) -> pl.DataFrame:
    frame = pl.read_csv(raw / "movies.csv").rename({"movieId": "what"})
    return frame.with_columns(
        genres=pl.col("genres").str.split("|"),
        words=pl.col("title").str.split(" ").list.len(),
        initial=pl.col("title").str.head(1),
    )


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somewhere") / "configs" / "tiny"
    folder.mkdir(parents=True)
    files = {"prepare": PREPARE, "retriever": RETRIEVER, "ranker": RANKER, "mine": f"k: {K}"}
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def fitted(
    configs: Path, events: pl.DataFrame, items: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> TwoStageRecommender:
    """Read it, do not fit it again."""
    empty = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(empty)
        model = TwoStageRecommender.from_config(configs, **COLUMNS).fit(events, items)
        assert not list(empty.iterdir())
    return model


@pytest.mark.slow  # both stages, and the retriever twice
@pytest.mark.parametrize(("refit", "until"), [("all", "test"), ("production", "end")])
def test_a_refit_learns_again_and_serves(
    configs: Path, events: pl.DataFrame, items: pl.DataFrame, fitted: TwoStageRecommender, refit: str, until: str
) -> None:
    model = TwoStageRecommender.from_config(configs, refit=refit, **COLUMNS).fit(events, items)
    dataset = Dataset(model.path / "data", until)  # type: ignore[arg-type]
    assert read_manifest(model.path / "bundle", "bundle", "")["trained_until"] == until
    assert np.array_equal(np.load(model.path / "bundle/popularity.npy"), dataset.train_counts)
    assert len(model.recommend(users=[1], k=3)) == 3
    with pytest.raises(ValueError, match="expected one that was not trained on val targets"):
        model.evaluate("val")
    if refit == "all":
        assert model.evaluate()["users"] == fitted.evaluate()["users"]
    else:
        with pytest.raises(ValueError, match="expected one that was not trained on test targets"):
            model.evaluate()


@pytest.fixture(scope="module")
def cut(events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events, and the last three of each user."""
    log = events.sort("who", "at", maintain_order=True)
    late = pl.int_range(pl.len(), 0, -1).over("who") <= 3
    return log.filter(~late), log.filter(late)


# the verbs


def test_it_recommends_and_measures_what_the_verbs_do(
    fitted: TwoStageRecommender, events: pl.DataFrame, items: pl.DataFrame, tmp_path: Path
) -> None:
    events.write_csv(tmp_path / "events.csv")
    items.with_columns(pl.col("genres").list.join("|")).write_csv(tmp_path / "items.csv")
    columns = '{genres: {kind: multi, separator: "|"}, words: {kind: numeric}, initial: {kind: categorical}}'
    (tmp_path / "prepare.yaml").write_text(f"""
        source:
          class_path: Table
          init_args:
            path: {tmp_path / "events.csv"}
            user: who
            item: what
            time: at
            rating: stars
            items: {{path: items.csv, id: what, title: title, columns: {columns}}}
        tie_break: item_id
        output: {tmp_path / "data"}
    """)
    run = Run(tmp_path)
    recsys("prepare-data", "--config", tmp_path / "prepare.yaml")
    run.fit_retriever()
    run.export_index()
    run.mine()
    run.fit_ranker()
    run.export_bundle()
    of = ("--bundle", run.bundle, "--output")
    recsys("recommend", *of, tmp_path / "recommended.parquet", "--k", 5)
    recsys("evaluate", *of, tmp_path / "report")

    data, other = Dataset(fitted.path / "data").manifest, Dataset(run.data).manifest
    for fact in ("split_hash", "features", "protocol", "has", "counts"):
        assert data[fact] == other[fact], fact
    wanted = pl.read_parquet(tmp_path / "recommended.parquet")
    found = fitted.recommend(k=5)
    assert found.columns == ["who", "what", "rank", "score", "retriever_score"]
    assert found["who"].n_unique() == events["who"].n_unique()
    assert found.equals(wanted.rename({"user_id": "who", "item_id": "what"}).select(found.columns))
    assert fitted.evaluate() == json.loads((tmp_path / "report" / "report.json").read_text())
    sampled = fitted.evaluate(protocol="sampled-20", split="val")["protocol"]
    assert sampled["ranking"].startswith("sampled: 1 positive and 20 random negatives")
    assert sampled["evaluated"] == "val"


def test_the_fitted_folder_is_one_the_verbs_read(fitted: TwoStageRecommender, tmp_path: Path) -> None:
    recsys("recommend", "--bundle", fitted.path / "bundle", "--output", tmp_path / "r.parquet", "--k", 3)
    assert pl.read_parquet(tmp_path / "r.parquet")["item_id"].equals(fitted.recommend(k=3)["what"], check_names=False)
    one = Recommender.load(fitted.path / "bundle")
    assert one.num_candidates == K


def test_features_follow_the_types_of_the_columns(fitted: TwoStageRecommender, items: pl.DataFrame) -> None:
    features = Dataset(fitted.path / "data").manifest["features"]["items"]
    kinds = {feature["name"]: feature["kind"] for feature in features}
    assert kinds == {"genres": "multi", "words": "numeric", "initial": "categorical"}
    assert "title" in pl.read_parquet(fitted.path / "data" / "items.parquet").columns
    types = {
        "numeric": [pl.Int8, pl.Float64],
        "categorical": [pl.Boolean, pl.String, pl.Date],
        "multi": [pl.List(pl.Int64), pl.Array(pl.String, 2)],
    }
    for kind, dtypes in types.items():
        assert [infer_kind(pl.Series("x", [], dtype)) for dtype in dtypes] == [kind] * len(dtypes)


@pytest.mark.parametrize("kind", ["polars", "pandas"])
def test_quiet_and_of_the_kind_of_its_events_and_gone_with_its_folder(
    kind: str, configs: Path, events: pl.DataFrame, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    frame = KINDS[kind](events.with_columns(pl.from_epoch("at", time_unit="s")))
    model = TwoStageRecommender(configs, **COLUMNS, max_epochs=1).fit(frame)
    found = model.recommend(users=[1, 2])
    model.evaluate()
    printed = capfd.readouterr()
    assert printed.out == ""
    assert not printed.err, printed.err
    model.save(tmp_path / "model")
    assert found.equals(TwoStageRecommender.load(tmp_path / "model").recommend(users=[1, 2]))
    assert type(found).__module__.partition(".")[0] == kind
    assert list(found.columns) == ["who", "what", "rank", "score", "retriever_score"]
    assert len(model.recommend(histories=frame.head(9), k=3)) == 3
    folder = model.path
    assert (folder / "bundle").is_dir()
    del model
    gc.collect()
    assert not folder.exists()


# people


def test_people_never_seen_are_recommended_by_what_they_did_however_its_time_is_written(
    fitted: TwoStageRecommender, events: pl.DataFrame, rng: np.random.Generator
) -> None:
    log = events.filter(pl.col("who").is_in([3, 7])).sort("who", "at", "what")
    log = log.filter(~pl.struct("who", "at").is_duplicated())  # equal times stand as the file has them
    shuffled = log[rng.permutation(len(log))]
    strangers = shuffled.with_columns(pl.col("who").replace_strict({3: "ann", 7: "bob"}))
    written = {
        "seconds": strangers,
        "dates": strangers.with_columns(pl.from_epoch("at", time_unit="s")),
        "zoned": strangers.with_columns(pl.from_epoch("at", time_unit="s").dt.replace_time_zone("UTC")),
        "text": strangers.with_columns(pl.from_epoch("at", time_unit="s").dt.to_string("iso")),
        "sorted": strangers.sort("at").drop("at"),
    }
    found = {name: fitted.recommend(histories=frame, k=5) for name, frame in written.items()}
    assert found["seconds"]["who"].to_list() == ["ann"] * 5 + ["bob"] * 5
    for name, frame in found.items():
        assert frame.equals(found["seconds"]), name
    backwards = fitted.recommend(histories=strangers.sort("at", descending=True).drop("at"), k=5)
    assert not backwards.equals(found["seconds"])  # the order counts
    met = strangers.select("who", "what")
    assert found["seconds"].join(met, on=["who", "what"]).is_empty()


def test_users_are_chosen_by_their_ids(fitted: TwoStageRecommender) -> None:
    found = fitted.recommend(users=[np.int64(3), "7"], k=5)
    assert found["who"].to_list() == [3] * 5 + [7] * 5
    assert found["rank"].to_list() == [1, 2, 3, 4, 5] * 2
    same_lists(found, fitted.recommend(k=5).filter(pl.col("who").is_in([3, 7])))


def test_whoever_has_the_history_of_a_known_user_is_recommended_the_same(
    fitted: TwoStageRecommender, events: pl.DataFrame
) -> None:
    log = events.sort("at", "what").with_columns(pl.col("who") + 1000)
    found, wanted = fitted.recommend(histories=log.drop("at"), k=4), fitted.recommend(k=4)
    same_lists(found.with_columns(pl.col("who") - 1000), wanted)


# validation events


def test_validation_events_are_the_targets_and_all_others_train(
    configs: Path, cut: tuple[pl.DataFrame, pl.DataFrame], tmp_path: Path
) -> None:
    train, later = cut
    strangers = later.with_columns(pl.col("who") + 10_000)
    model = TwoStageRecommender(
        configs, **COLUMNS, max_epochs=40, early_stopping=1, folder=tmp_path / "run", overlays=["told"]
    )
    (configs.parent / "with").mkdir()
    (configs.parent / "with" / "told.yaml").write_text("data: {init_args: {request_time: target}}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(configs.parent.parent)
        assert model.fit(train, validation=pl.concat([strangers, later])) is model
    assert model.path == tmp_path / "run"
    data = Dataset(model.path / "data")
    counts = data.manifest["counts"]
    assert counts["train_events"] == len(train)
    assert counts["val_events"] == counts["val_users"] == train["who"].n_unique()
    assert counts["test_events"] == 0
    ids = {"who": pl.read_parquet(data.path / "users.parquet"), "what": pl.read_parquet(data.path / "items.parquet")}
    first = later.group_by("who", maintain_order=True).agg(pl.col("what").first()).sort("who")
    targets = data.targets(data.users("val"), "val")
    assert ids["who"]["user_id"].to_list() == first["who"].to_list()
    assert [ids["what"]["item_id"][int(item) - 1] for item in targets] == first["what"].to_list()
    with pytest.raises(ValueError, match=r"no user with a test target; .* measure on the other targets, split val"):
        model.evaluate()

    # it stopped early, and the best weights are those that serve
    stages = {name: read_manifest(model.path / name, name, "") for name in ("retriever", "ranker")}
    assert stages["retriever"]["epochs"] < 40
    report = model.evaluate(split="val")
    assert report["models"]["retriever"]["ndcg@10"]["value"] == pytest.approx(stages["retriever"]["best"], abs=1e-6)
    assert report["protocol"]["request_time"] == "target"  # the overlay's
    for stage, part, served in (("retriever", "towers", "towers.pt"), ("ranker", "reranker", "reranker.pt")):
        best, last = (read_checkpoint(model.path / stage / f"{name}.ckpt", part, "")[1] for name in ("best", "last"))
        weights = torch.load(model.path / "bundle" / served, weights_only=True)
        assert all(torch.equal(weights[name], value) for name, value in best.items())
        assert not all(torch.equal(last[name], value) for name, value in best.items())
        (metrics,) = (model.path / stage / "log").glob("*/metrics.csv")
        measured = pl.read_csv(metrics)["val/ndcg@10"].drop_nulls().to_list()
        assert stages[stage]["best"] == pytest.approx(max(measured), abs=1e-6)
        assert measured[-1] <= measured[-2]  # one epoch without an improvement, and no more
        assert measured[:-1] == sorted(set(measured[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda late: late.clear(), "none of the 0 validation events is of a user with training events"),
        (lambda late: late.with_columns(pl.col("who") + 10_000), "none of the 450 validation events is of a user"),
        (lambda late: late.drop("at"), "the frame of validation events has no column 'at'"),
        (lambda late: late.with_columns(at=pl.lit(5)), "150 of 150 users have events marked .* in another order"),
    ],
)
def test_validation_events_must_be_later_ones_of_the_same_users(
    cut: tuple[pl.DataFrame, pl.DataFrame], change: Callable[[pl.DataFrame], pl.DataFrame], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TwoStageRecommender(**COLUMNS).fit(cut[0], validation=change(cut[1]))


@pytest.mark.parametrize("early_stopping", [True, 3, False])
def test_without_a_validation_target_nothing_is_trained(early_stopping: bool | int, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 2, 3]})  # leave-one-out wants three of each
    model = TwoStageRecommender(time=None, early_stopping=early_stopping, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="split LeaveOneOut leaves no user a validation target, and early stopping"):
        model.fit(frame)
    assert not (tmp_path / "run" / "retriever").exists()
    with pytest.raises(NotFittedError):
        model.recommend()


# an estimator's habits


def test_without_a_config_there_are_defaults_and_the_seed_counts(raw: Path) -> None:
    frame = pl.read_csv(raw / "ratings.csv").select(user_id="userId", item_id="movieId", timestamp="timestamp")
    frame = frame.filter(pl.col("user_id") <= 30)

    def recommended(seed: int) -> pl.DataFrame:
        return TwoStageRecommender(max_epochs=1, seed=seed).fit(frame).recommend(users=[1, 2, 3], k=5)

    one = recommended(1)
    assert not one.equals(recommended(2))  # and with the same seed the verbs above found the same
    assert one.columns == ["user_id", "item_id", "rank", "score", "retriever_score"]


@pytest.mark.parametrize(("early_stopping", "epochs"), [(True, 2), (False, 4)])
def test_who_learns_nothing_is_stopped_as_is_asked(
    early_stopping: bool | int, epochs: int, configs: Path, events: pl.DataFrame, tmp_path: Path
) -> None:
    still = RANKER.replace("lr: 1.0e-2", "lr: 0.0")
    (tmp_path / "still.yaml").write_text(still + "early_stopping: {patience: 1}\n")
    model = TwoStageRecommender(
        configs, **COLUMNS, ranker=tmp_path / "still.yaml", early_stopping=early_stopping, max_epochs=4
    )
    model.fit(events.filter(pl.col("who") <= 40))
    assert read_manifest(model.path / "ranker", "ranker", "")["epochs"] == epochs


def test_signals_that_the_frame_cannot_give_are_left_out(
    configs: Path, events: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(configs, tmp_path / "told")
    (folder / "mine.yaml").write_text(f"k: {K}\nsignals: [Ratings, Affinity, Transitions]\n", encoding="utf-8")
    model = TwoStageRecommender(folder, user="who", item="what", time="at", max_epochs=1)
    model.fit(events.filter(pl.col("who") <= 40))
    told = read_manifest(model.path / "candidates", "candidates", "")["signals"]
    assert {signal["name"].partition(".")[0] for signal in told} == {"Transitions"}
    left_out = [line for line in caplog.messages if "is not used" in line]
    assert left_out[0] == "the signal Ratings is not used: the events have no ratings"
    assert left_out[1].startswith("the signal Affinity is not used: the items have no categorical, ")
    assert len(left_out) == 2
    assert not any("/" in line or "leave" in line for line in left_out), "neither our folder nor what is already done"
    assert len(model.recommend(users=[1, 2], k=5)) == 10


def test_arguments_are_attributes_and_parameters() -> None:
    model = TwoStageRecommender.from_config("configs/ml-1m-plain", max_epochs=3, overlays=["hstu"])
    params = model.get_params()
    assert params["config"] == model.config == "configs/ml-1m-plain"
    assert (model.max_epochs, model.overlays, model.user) == (3, ["hstu"], "user_id")
    assert TwoStageRecommender(**params).get_params() == params


def test_the_repr_shows_what_differs_from_the_defaults() -> None:
    """As scikit-learn does it."""
    model = TwoStageRecommender("small", user="kunde", max_epochs=None, early_stopping=1)
    assert repr(model) == "TwoStageRecommender(config='small', early_stopping=1, user='kunde')"
    assert repr(TwoStageRecommender()) == "TwoStageRecommender()"


def test_parameters_are_set_by_name() -> None:
    """As scikit-learn's clone and searches use them."""
    model = TwoStageRecommender(overlays=["hstu"])
    assert model.set_params(max_epochs=3, seed=7) is model
    assert (model.max_epochs, model.seed, model.overlays) == (3, 7, ["hstu"])
    clone = type(model)(**{name: copy.deepcopy(value) for name, value in model.get_params(deep=False).items()})
    assert clone.get_params() == model.get_params()
    with pytest.raises(ValueError, match=r"set_params got 'max_epoch', expected .*; did you mean 'max_epochs'"):
        model.set_params(seed=8, max_epoch=4)
    assert model.seed == 7


def test_an_unfitted_model_is_copied_and_pickled() -> None:
    model = TwoStageRecommender("demo", max_epochs=3)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.get_params() == model.get_params()
        with pytest.raises(NotFittedError):
            other.recommend()


def stand_in(folder: Path | None, trained: Run) -> TwoStageRecommender:
    """A model as `fit` leaves it, with the artifacts of a run."""
    model = TwoStageRecommender(folder=folder, user="userId", item="movieId")
    holder = FittedFolder(folder)
    for name in ("data", "bundle"):
        shutil.copytree(trained.folder / name, holder.path / name)
    parents = {name: holder.path / name for name in ("data", "bundle")}
    write_manifest(holder.path, "model", model.get_params(), parents, pandas=False)
    model._fitted, model._holder = holder.path, holder.remember()
    return model


def test_copies_of_a_fitted_model_share_its_temporary_folder(trained: Run) -> None:
    model = stand_in(None, trained)
    folder, expected = model.path, model.recommend(users=[1, 2], k=3)
    copies = [copy.deepcopy(model), copy.copy(model)]
    del model
    gc.collect()
    for one in copies:
        assert one.path == folder
        same_lists(one.recommend(users=[1, 2], k=3), expected)
    del one
    copies.pop()
    gc.collect()
    assert folder.exists()
    copies.pop()
    gc.collect()
    assert not folder.exists()


def test_a_model_in_a_temporary_folder_is_not_pickled_and_a_saved_one_is(trained: Run, tmp_path: Path) -> None:
    model = stand_in(None, trained)
    with pytest.raises(TypeError, match=r"the temporary folder .* cannot be pickled; .* save\(path\), then load"):
        pickle.dumps(model)
    expected = model.recommend(users=[1, 2], k=3)
    model.save(tmp_path / "saved")
    for one in (TwoStageRecommender.load(tmp_path / "saved"), stand_in(tmp_path / "own", trained)):
        other = pickle.loads(pickle.dumps(one))
        assert other.get_params() == one.get_params()
        assert other.recommend(users=[1, 2], k=3)["movieId"].to_list() == expected["movieId"].to_list()


@pytest.mark.parametrize("change", ["removed", "another fit"])
def test_a_folder_that_no_longer_holds_the_model_is_not_served(change: str, trained: Run, tmp_path: Path) -> None:
    """A copy that was fitted again into the same folder would answer for this one."""
    model = stand_in(tmp_path / "own", trained)
    other = copy.deepcopy(model)
    if change == "removed":
        shutil.rmtree(tmp_path / "own")
    else:
        write_manifest(tmp_path / "own", "model", {"seed": 1}, {}, pandas=False)
    for one in (model, other):
        with pytest.raises(NotFittedError, match=r"own no longer holds this model: it was removed or overwritten"):
            one.recommend(users=[1])


def test_two_fits_into_one_folder_at_once_are_refused(configs: Path, events: pl.DataFrame, tmp_path: Path) -> None:
    model = TwoStageRecommender(configs, **COLUMNS, folder=tmp_path / "own")
    with locked(tmp_path / "own"), pytest.raises(ValueError, match="own is being written by process"):
        model.fit(events)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["path", "recommend", "evaluate", "save"])
def test_what_is_not_fitted_says_so(name: str, tmp_path: Path) -> None:
    model = TwoStageRecommender()
    with pytest.raises(NotFittedError, match=r"not fitted; call fit\(events\)"):
        {"save": lambda: model.save(tmp_path / "m")}.get(name, lambda: getattr(model, name)())()
    assert issubclass(NotFittedError, ValueError)
    assert issubclass(NotFittedError, AttributeError)


def test_a_model_comes_back_in_another_process(fitted: TwoStageRecommender, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model")
    fitted.save(tmp_path / "model")  # replaces itself
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"manifest.json", "bundle", "data"}
    with pytest.raises(ValueError, match="would be lost"):
        fitted.save(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    code = f"""
import sys
import recsys2stage
assert recsys2stage.__version__
assert not {{"torch", "polars", "lightning", "numpy"}} & set(sys.modules), "the door is heavy"
from recsys2stage import TwoStageRecommender
model = TwoStageRecommender.load({str(tmp_path / "model")!r})
assert model.user == "who" and model.folder is None
model.recommend(users=[5, 6], k=7).write_parquet("r.parquet")
print(model.evaluate()["models"]["ranker"]["mrr"]["value"])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert pl.read_parquet(tmp_path / "elsewhere" / "r.parquet").equals(fitted.recommend(users=[5, 6], k=7))
    assert float(result.stdout) == fitted.evaluate()["models"]["ranker"]["mrr"]["value"]
    assert [file.name for file in (tmp_path / "elsewhere").iterdir()] == ["r.parquet"]
    with pytest.raises(FileNotFoundError, match=r"no model in .*nothing; run: .*\.save\("):
        TwoStageRecommender.load(tmp_path / "nothing")


def test_a_saved_model_says_neither_what_to_trust_nor_which_configs_to_read(
    fitted: TwoStageRecommender, tmp_path: Path
) -> None:
    """Whoever wrote it could name code in either; both are the caller's to say."""
    fitted.save(tmp_path / "model")
    path = tmp_path / "model/manifest.json"
    manifest = json.loads(path.read_text())
    named = {"trust": ["os"], "config": str(tmp_path), "retriever": "x.yaml", "ranker": "x.yaml", "overlays": ["x"]}
    path.write_text(json.dumps(manifest | {"options": manifest["options"] | named}))
    loaded = TwoStageRecommender.load(tmp_path / "model", trust=["my_signals"])
    assert loaded.trust == ["my_signals"]
    by_name = TwoStageRecommender.load(tmp_path / "model", trust="my_signals")  # one module, as Recommender.load has it
    trusted: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsys2stage.cli.recommend.recommend", lambda **options: trusted.append(options["trust"]))
        for model in (loaded, by_name):
            with pytest.raises(FileNotFoundError):  # of recommendations, which nothing wrote
                model.recommend()
    assert trusted == [["my_signals"]] * 2
    assert [loaded.config, loaded.retriever, loaded.ranker, loaded.overlays] == [None, None, None, ()]
    for options, message in (({"depth": 3}, "has unknown arguments depth"), ([], "expected dict")):
        path.write_text(json.dumps(manifest | {"options": options}))
        with pytest.raises(ValueError, match=message):
            TwoStageRecommender.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"users": [1], "histories": {"who": [1], "what": [1]}}, "both users and histories are given"),
        (
            {"users": [1, 77_777, "x"]},
            "2 of 3 users are not in the data, for example '77777', 'x', expected ids such as '.*'; check the ids",
        ),
        (
            {"users": ["x"]},
            "user 'x' is not in the data, expected ids such as '1'; check the id, .* history: histories$",
        ),
        ({"users": []}, "no users to recommend for"),
        ({"histories": {"who": [1], "at": [1]}}, "the frame of histories has no column 'what'"),
        ({"histories": {"who": [1], "what": [-5]}}, "does not know the item id in .*, -5; expected ids such as"),
    ],
)
def test_questions_without_an_answer_are_refused(
    fitted: TwoStageRecommender, ask: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fitted.recommend(**ask)


@pytest.mark.parametrize(
    ("options", "sides", "message"),
    [
        ({"time": "timestamp"}, {}, "the frame of events has no column 'timestamp'; its columns are: 'who', 'what'"),
        ({"user": "woh"}, {}, r"no column 'woh' \(did you mean 'who'\?\)"),
        ({"action": "did"}, {}, "no column 'did'"),
        ({}, {"items": {"what": []}}, "the frame of items has no rows, .* give a table with rows, or leave items out"),
        ({}, {"items": {"id": [1]}}, "the frame of items has no column 'what'"),
        ({}, {"users": {"what": [1]}}, "the frame of users has no column 'who'"),
        ({"item_features": {"hue": "numeric"}}, {"items": {"what": [1]}}, "the frame of items has no column 'hue'"),
        ({}, {"items": {"what": [1], "v": [[0.5]]}}, "'v' of items holds lists of floats"),
        ({"config": "nowhere"}, {}, "nowhere does not exist, nor does configs/nowhere; give a path, or a name"),
        ({"retriever": "no.yaml"}, {}, "no.yaml does not exist"),
    ],
)
def test_frames_and_options_that_do_not_fit_are_named(
    events: pl.DataFrame, options: dict[str, Any], sides: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TwoStageRecommender(**COLUMNS | options).fit(events.head(40), **sides)


def test_a_config_with_a_mistake_is_an_error_and_not_the_end_of_the_process(
    configs: Path, events: pl.DataFrame, tmp_path: Path
) -> None:
    for stage, text in (("retriever", RETRIEVER.replace("dim: 16", "dmi: 16")), ("mine", "kk: 5")):
        folder = tmp_path / stage
        folder.mkdir()
        for file in configs.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / f"{stage}.yaml").write_text(text)
        with pytest.raises(ValueError, match=rf"(?s){stage}.yaml: .*(dmi|kk)"):
            TwoStageRecommender(folder, **COLUMNS, max_epochs=1).fit(events)


# kinds of frames


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_any_kind_are_read(kind: str, events: pl.DataFrame) -> None:
    dated = events.head(20).with_columns(pl.from_epoch("at", time_unit="s"))
    frame = as_polars(KINDS[kind](dated))
    assert frame["at"].dt.epoch("s").to_list() == events["at"].head(20).to_list()
    assert frame.drop("at").equals(dated.drop("at"))
