"""What commands print: paths, counts and the next command; quiet fits; lists as CSV, JSON lines and Parquet."""

import gzip
import json
import os
import re
import shlex
import signal
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from closeness import same_lists
from pipeline_fixtures import K, Run, recsys

from recsys2stage.cli import progress, training
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.data.summary import config_option
from recsys2stage.mining.mine import ListBuilder
from recsys2stage.ranking.beyond import Recommendations
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.serving.formats import ENDINGS, ListWriter

ROOT = Path(__file__).parents[2]
CONFIG = """
trainer: {max_epochs: 2, accelerator: cpu}
model:
  class_path: Retriever
  init_args: {dim: 8, encoder: {class_path: Transformer, init_args: {layers: 1, heads: 1}}}
data: {class_path: Histories, init_args: {max_length: 20, batch_size: 32}}
"""
NOISE = ("GPU", "TPU", "HPU", "Tip", "Trainer.fit", "Params", "Seed set", "many workers")


def fit(cycle: Path, folder: Path, *words: object) -> Path:
    """A fit of two epochs, with the defaults for what is printed."""
    (folder / "retriever.yaml").write_text(CONFIG)
    recsys(
        *("fit", "--config", folder / "retriever.yaml", "--data.init_args.path", cycle, "--output", folder / "run"),
        *words,
    )
    return folder / "run"


# closing lines


def test_every_command_ends_with_its_path_its_counts_and_the_next_command(
    raw: Path, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_HINTS", "1")
    of = {"data": ("--data", trained.data), "bundle": ("--bundle", trained.bundle)}
    index, ranker = ("--index", trained.index), ("--ranker", trained.ranker)
    lists = tmp_path / "lists.csv"
    said = {  # verb -> its options, its output, what its counts say, the next verb
        "simulate": (
            ("--users", 30, "--items", 40, "--events", 330),
            tmp_path / "raw",
            "30 users, 40 rated movies",
            "prepare-data",
        ),
        "prepare-data": (("--source", "MovieLens", "--source.path", raw), tmp_path / "data", "4,500 events", "fit"),
        "export-index": (
            ("--retriever", trained.retriever, *of["data"]),
            *(tmp_path / "index", "120 item vectors of 16 dimensions", "mine-negatives"),
        ),
        "mine-negatives": ((*of["data"], *index, "--k", K), tmp_path / "mined", "150 lists of 150 users", "fit"),
        "export-bundle": ((*index, *ranker), tmp_path / "bundle", f"both stages, {K} candidates", "evaluate"),
        "evaluate": ((*of["bundle"], "--resamples", 5), tmp_path, "150 users, 120 items", "recommend"),
        "recommend": (of["bundle"], lists, "1,500 rows, 10 items for each of 150 users", "serve"),
    }
    for verb, (words, output, counts, following) in said.items():
        capsys.readouterr()
        recsys(verb, *words, "--output", output)
        lines = capsys.readouterr().out.splitlines()
        (head,) = [line for line in lines if line.startswith(f"{output}{'/report.md' if verb == 'evaluate' else ''}: ")]
        assert counts in head
        assert lines[-1].startswith(f"next: recsys {following} ")
        assert "{" not in "".join(lines), "no raw dictionaries"
        if "NAME" not in lines[-1]:
            with pytest.raises(SystemExit) as end:  # it is a command
                recsys(*shlex.split(lines[-1])[2:], "--print_config")
            assert end.value.code == 0
    capsys.readouterr()
    monkeypatch.setenv("RECSYS_HINTS", "0")
    recsys("export-bundle", *index, *ranker, "--output", tmp_path / "bundle")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'bundle'}: ")
    assert "next:" not in capsys.readouterr().out


def test_prepared_data_are_counted(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratings = pl.read_csv(raw / "ratings.csv", schema_overrides={"rating": pl.String})
    low = (ratings["rating"].cast(pl.Float64) < 3).sum()
    bad = ratings.head(2).with_columns(rating=pl.lit("five"))
    repeated = ratings.filter(pl.col("rating") == "5.0").head(3)
    (tmp_path / "raw").mkdir()
    pl.concat([ratings, bad, repeated]).write_csv(tmp_path / "raw/ratings.csv")
    (tmp_path / "raw/movies.csv").write_bytes((raw / "movies.csv").read_bytes())
    words = ("--source", "MovieLens", "--source.path", tmp_path / "raw", "--min_rating", 3)
    capsys.readouterr()
    recsys("prepare-data", *words, "--on_bad_rows", "quarantine", "--output", tmp_path / "data")
    said = capsys.readouterr().out
    counts = json.loads((tmp_path / "data/manifest.json").read_text())["counts"]
    assert f"dropped: {low:,} below min_rating, 3 repeats; " in said
    assert f"quarantined: 2 bad rows ({tmp_path / 'data/rejected.parquet'})" in said
    assert (
        f"events: {counts['train_events']:,} training, {counts['val_events']:,} validation (of {counts['val_users']:,} "
        f"users), {counts['test_events']:,} test (of {counts['test_users']:,} users)"
    ) in said
    assert (
        "protocol: LeaveOneOut split; equal times in file_order; repeats: first; time in seconds; min_rating 3" in said
    )


def test_the_next_command_names_the_config_of_the_dataset_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert config_option("retriever", "demo") == "--config configs/demo/retriever.yaml"
    assert config_option("retriever", "elsewhere") == "--config configs/NAME/retriever.yaml"


# fits


def test_a_fit_in_a_file_prints_a_line_per_epoch_and_its_result(
    cycle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECSYS_HINTS", "1")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    fit(cycle, tmp_path)
    printed = capfd.readouterr()
    start, *epochs, result, following = printed.out.splitlines()
    assert re.fullmatch(r"Retriever: [\d,]+ parameters, cpu, 32-true, 2 epochs, 4 batches each", start)
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 1 of 2", "epoch 2 of 2"]
    assert all("val/ndcg@10 0." in line for line in epochs[1:])
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert result.startswith(f"{tmp_path / 'run/best.ckpt'}: val/ndcg@10 {manifest['best']:.4f}, epoch ")
    assert " of 2, 8 steps, " in result
    assert following == f"next: recsys export-index --retriever {tmp_path / 'run/best.ckpt'} --data {cycle}"
    assert not any(word in printed.out + printed.err for word in NOISE)
    assert "\r" not in printed.out + printed.err


def test_short_fits_have_no_lines_of_epochs(cycle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(cycle, tmp_path)
    assert "epoch 1" not in capfd.readouterr().out.splitlines()[1:-2]


def test_a_fit_on_a_terminal_draws_its_bar(
    cycle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "on_terminal", lambda: True)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    fit(cycle, tmp_path)
    printed = capfd.readouterr()
    assert printed.out.startswith("Retriever: "), "a line of its own, above the bar"
    assert "100%" in printed.out
    assert "epoch 1 of 2:" not in printed.out
    assert not any(word in printed.out + printed.err for word in NOISE)


@pytest.mark.parametrize("hints", ["1", "0"])
def test_an_interrupted_fit_says_how_to_go_on(
    cycle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hints: str
) -> None:
    def interrupt(model: Retriever, outputs: object, batch: object, batch_idx: int) -> None:
        if model.global_step == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("RECSYS_HINTS", hints)
    monkeypatch.setattr(Retriever, "on_train_batch_end", interrupt)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            fit(cycle, tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)
    said = capfd.readouterr().err
    advice = f"; to resume, add to the command --ckpt_path {tmp_path / 'run/last.ckpt'}" if hints == "1" else ""
    assert f"recsys fit: interrupted{advice}\n" in said
    assert "Traceback" not in said


def test_an_interrupted_command_writes_nothing_and_shows_no_traceback(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ListBuilder, "build", interrupt)
    with pytest.raises(SystemExit) as end:
        recsys("mine-negatives", "--data", trained.data, "--index", trained.index, "--output", tmp_path / "mined")
    assert end.value.code == 130
    assert "recsys mine-negatives: interrupted, nothing is written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# loggers


def blocks() -> dict[str, str]:
    """The YAML blocks of docs/howto/training_logs.md, by the class they name."""
    text = (ROOT / "docs/howto/training_logs.md").read_text(encoding="utf-8")
    found = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    return {yaml.safe_load(block)["trainer"]["logger"]["class_path"]: block for block in found}


def test_tensorboard_gets_the_metrics_beside_the_csv(cycle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is an extra: pip install recsys2stage[tensorboard]")
    (tmp_path / "logger.yaml").write_text(blocks()["TensorBoardLogger"])
    board = tmp_path / "board"
    run = fit(cycle, tmp_path, "--config", tmp_path / "logger.yaml", "--trainer.logger.init_args.save_dir", board)
    (events,) = board.glob("mine-retriever/version_0/events.out.tfevents.*")
    assert b"val/ndcg@10" in events.read_bytes()
    assert b"train/loss" in events.read_bytes()
    assert "val/ndcg@10" in (run / "log/version_0/metrics.csv").read_text()
    assert (run / "log/version_0/config.yaml").is_file()


@pytest.mark.parametrize("name", ["TensorBoardLogger", "WandbLogger", "MLFlowLogger"])
def test_the_loggers_of_the_docs_are_understood(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logger.yaml").write_text(blocks()[name])
    with pytest.raises(SystemExit) as end:
        recsys(
            "fit",
            "--config",
            ROOT / "configs/demo/retriever.yaml",
            "--config",
            tmp_path / "logger.yaml",
            "--print_config",
        )
    assert end.value.code == 0
    logger = yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]
    given = yaml.safe_load(blocks()[name])["trainer"]["logger"]
    assert logger["class_path"].endswith(name)
    assert given["init_args"].items() <= logger["init_args"].items()


# formats of lists


def read(path: Path) -> pl.DataFrame:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    name = path.name.removesuffix(".gz")
    reader = {"parquet": pl.read_parquet, "csv": pl.read_csv}.get(name.rpartition(".")[2], pl.read_ndjson)
    return reader(data)


def test_lists_are_the_same_in_every_format(trained: Run, tmp_path: Path) -> None:
    tables = {}
    for ending in ENDINGS:
        path = tmp_path / f"lists{ending}"
        recsys("recommend", "--bundle", trained.bundle, "--output", path, "--k", 3, "--batch_size", 64)
        tables[ending] = read(path)
    parquet = tables[".parquet"]
    assert parquet.columns == ["user_id", "item_id", "title", "score", "rank", "retriever_score"]
    titles = pl.read_parquet(trained.bundle / "items.parquet").select("item_id", "title")
    assert (
        parquet["title"].to_list() == parquet.join(titles, on="item_id", maintain_order="left")["title_right"].to_list()
    )
    for table in tables.values():
        same_lists(table.cast(dict(parquet.schema)), parquet)  # each computed anew
    assert {path.name for path in tmp_path.iterdir()} == {f"lists{ending}" for ending in ENDINGS}


@pytest.mark.parametrize("name", ["lists", "lists.xlsx", "lists.parquet.gz", "lists.json"])
def test_another_ending_is_refused(trained: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(
        SystemExit, match=rf"--output is {tmp_path / name}, expected a file name that ends in .parquet, "
    ):
        recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(SystemExit, match=r"folder.csv is a folder, expected a file; for example"):
        recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / "folder.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("titled", [True, False])
def test_batches_without_a_row_have_the_types_of_the_others(tmp_path: Path, ending: str, titled: bool) -> None:
    """The first batch decided the types, and a text column without a row had none."""
    items = pl.DataFrame({"item": [1, 2], "item_id": ["a", "b"]})
    items = items.with_columns(title=pl.Series(["One, the", None])) if titled else items
    users, path = np.array(["ann", "bob"], dtype=object), tmp_path / f"lists{ending}"
    nothing = Recommendations(np.array([[-1]]), np.array([[-np.inf]]), np.array([[np.nan]]))
    both = Recommendations(np.array([[2, 1]]), np.array([[0.5, 0.25]]), np.array([[0.1, 0.2]]))
    with ListWriter.open(path, users, Catalogue(items)) as writer:
        writer.write(slice(0, 1), nothing)
        writer.write(slice(1, 2), both)
        assert not path.exists(), "it appears when it is whole"
    table = read(path)
    assert table["user_id"].to_list() == ["bob", "bob"]
    assert table["item_id"].to_list() == ["b", "a"]
    assert table["rank"].to_list() == [1, 2]
    if titled:
        assert table["title"].to_list() == [None, "One, the"]
    with ListWriter.open(path, users, Catalogue(items)) as writer:
        writer.write(slice(0, 1), nothing)
    if ending == ".parquet":
        assert pl.read_parquet(path).schema == table.schema
    else:
        data = gzip.decompress(path.read_bytes()) if ending.endswith(".gz") else path.read_bytes()
        assert data.decode() == (f"{','.join(table.columns)}\n" if ".csv" in ending else "")


def test_a_failure_leaves_the_old_lists(tmp_path: Path) -> None:
    items = Catalogue(pl.DataFrame({"item": [1], "item_id": ["a"]}))
    (tmp_path / "lists.csv").write_text("old")
    with pytest.raises(ValueError, match="stop"), ListWriter.open(tmp_path / "lists.csv", np.array([5]), items):
        raise ValueError("stop")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("lists.csv", "old")]


def test_examples_show_titles_and_the_ranks_of_both_stages(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = partial(recsys, "recommend", "--bundle")
    make(trained.index, "--output", tmp_path / "first.parquet", "--k", 120)
    capsys.readouterr()
    make(trained.bundle, "--output", tmp_path / "both.parquet", "--k", 5, "--show", 2)
    printed = capsys.readouterr().out
    first, both = pl.read_parquet(tmp_path / "first.parquet"), pl.read_parquet(tmp_path / "both.parquet")
    users = re.findall(
        r"  user (\d+), newest events last: (.+)\n    rank  retriever's rank  item\n((?:.+\n){5})", printed
    )
    ids = pl.read_parquet(trained.data / "users.parquet").sort("user")["user_id"]
    assert [int(user) for user, *_ in users] == [ids[0], ids[-1]]
    for user, history, table in users:
        lists = both.filter(pl.col("user_id") == int(user)).sort("rank")
        order = first.filter(pl.col("user_id") == int(user))
        places = lists.join(order, on="item_id", maintain_order="left")["rank_right"]
        columns = (lists["rank"], places, lists["title"])
        expected = [f"{rank:8}  {place:16}  {title}" for rank, place, title in zip(*columns, strict=True)]
        assert table.splitlines() == expected
        assert history.count("; ") == 4
    with pytest.raises(SystemExit, match="show is -1, expected at least 0"):
        make(trained.bundle, "--output", tmp_path / "both.parquet", "--show", -1)
