"""What a caller says of a request: user features as in training, times that are seconds, options that exist."""

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pipeline_fixtures import RETRIEVER, TOLD, Run, recsys
from worlds import directions_world

from recsys2stage import TwoStageRecommender
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.request_inputs import as_seconds, check_ascending, encode_users
from recsys2stage.data.side_tables import user_specs
from recsys2stage.data.sources import Feature, SideTable, Table
from recsys2stage.options import check_option
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import MLP
from recsys2stage.ranking.signals import Demographics
from recsys2stage.recommender import Recommender
from recsys2stage.serving.requests import FileRequests

NEWEST = 10**9 + 2 * 86_400  # seconds of the newest event of the served log
EACH = {"side": "on", "age": 33}  # features of some user


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A first stage with a user tower over side and age, with request time."""
    run = Run(tmp_path_factory.mktemp("served"))
    directions_world(run.folder, users=120)
    (run.folder / "retriever.yaml").write_text(RETRIEVER, encoding="utf-8")
    of = ("--config", run.folder / "retriever.yaml", "--output", run.folder / "retriever")
    recsys(
        *("fit", *of, "--data.init_args.path", run.data, *TOLD),
        *("--model.init_args.user", "UserTower", "--trainer.max_epochs", 1),
    )
    run.export_index()
    return run


@pytest.fixture(scope="module")
def recommender(served: Run) -> Recommender:
    return Recommender.load(served.index)


@pytest.fixture(scope="module")
def log(served: Run) -> pl.DataFrame:
    return pl.read_csv(served.folder / "events.csv").rename({"timestamp": "time"})


@pytest.fixture(scope="module")
def users(served: Run) -> pl.DataFrame:
    return pl.read_csv(served.folder / "users.csv")


@pytest.fixture(scope="module")
def expected_rows(served: Run, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    output = tmp_path_factory.mktemp("expected_rows") / "o.parquet"
    recsys("recommend", "--bundle", served.index, "--output", output)
    return pl.read_parquet(output)


# --- user features


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users with a class, several classes and a number, some unknown; codes that look like numbers."""
    folder = tmp_path_factory.mktemp("described")
    rows = ["user_id,zip,likes,age", "1,01,a|b,20", "2,1,b,", "3,,c| a |a,41.5", "4,7,,20"]
    (folder / "users.csv").write_text("\n".join([*rows, ""]))
    events = [f"{user},{(user + place) % 6 + 1},{1_000 + place}" for user in range(1, 6) for place in range(4)]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *events, ""]))
    features = {"zip": Feature("categorical"), "likes": Feature("multi"), "age": Feature("numeric")}
    source = Table(folder / "events.csv", users=SideTable("users.csv", "user_id", features))
    prepare(source, folder / "data")
    return Dataset(folder / "data")


def test_features_are_encoded_as_when_the_data_were_prepared(described: Dataset) -> None:
    specs = user_specs(described)
    assert [spec["classes"] for spec in specs] == [["01", "1", "7"], ["a", "b", "c"], None]
    assert json.loads(json.dumps(specs)) == specs
    rows: list[dict[str, Any]] = [
        {"zip": "01", "likes": ["a", "b"], "age": 20},
        {"zip": 1, "likes": ("b",), "age": None},
        {"likes": ["c", " a ", "a"], "age": 41.5},
        {"zip": 7.0, "likes": [], "age": np.float32(20)},
        {"zip": float("nan"), "age": float("nan")},
    ]
    encoded, prepared = encode_users(specs, rows, "here"), described.user_values(np.arange(5))
    for one, other in zip(encoded, prepared, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def test_unknown_classes_count_as_unknown_with_a_warning(described: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    encoded = encode_users(user_specs(described), [{"zip": "02", "likes": ["z", "b"]}, {"zip": "1"}], "some.csv")
    assert encoded[0].tolist() == [[0], [2]]
    assert encoded[1].tolist() == [[2], [0]]
    assert [record.getMessage() for record in caplog.records] == [
        f"some.csv: 1 values of {name} are not in the training data, for example {value!r}; they count as unknown"
        for name, value in (("zip", "02"), ("likes", "z"))
    ]


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"gender": "F", "zip": "1"}, "user has the user features 'gender', expected some of zip, likes, age"),
        ({"age": "old"}, "user: age is 'old', expected a finite number, or None where it is unknown"),
        ({"age": float("inf")}, "user: age is inf, expected a finite number"),
        ({"zip": ["1", "7"]}, r"user: zip is \['1', '7'\], expected one class"),
        ({"likes": "a|b"}, r"user: likes is 'a\|b', expected a list of classes"),
    ],
)
def test_features_of_another_kind_are_refused(described: Dataset, user: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_users(user_specs(described), [user], "user")


MALFORMED: list[Any] = [
    *([1], [None], ["side"], [[]], [{}], [{"name": "side"}]),
    [{"name": "side", "kind": "categorical", "size": 3, "classes": None}],
    [{"name": "side", "kind": "categorical", "size": 3, "classes": [["left"], "right"]}],
    [{"name": "side", "kind": "categorical", "size": 2, "classes": ["left", "right"]}],
    [{"name": "side", "kind": "text", "size": 3, "classes": ["left", "right"]}],
    [{"name": ["side"], "kind": "categorical", "size": 3, "classes": ["left", "right"]}],
    [{"name": "age", "kind": "numeric", "size": 1, "classes": ["left"]}],
]


def test_malformed_features_of_a_manifest_are_refused_when_it_is_loaded(served: Run, tmp_path: Path) -> None:
    path = shutil.copytree(served.index, tmp_path / "index") / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for features in MALFORMED:
        path.write_text(json.dumps(manifest | {"user_features": features}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"manifest.json has the user feature .*, expected a name, a kind"):
            Recommender.load(path.parent)
    for features in ([], manifest["user_features"][:1], manifest["user_features"][::-1]):
        path.write_text(json.dumps(manifest | {"user_features": features}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"has other user features than its retriever reads"):
            Recommender.load(path.parent)


def test_without_declared_features_there_are_none_to_give() -> None:
    with pytest.raises(ValueError, match="has the user features 'age', but the training data declare none"):
        encode_users([], [{"age": 3}], "user")


def same_rows(rows: list[dict[str, Any]], expected: pl.DataFrame) -> None:
    """Of both, the items and, up to the rounding of batches of other shapes, the scores."""
    assert [row["item_id"] for row in rows] == expected["item_id"].to_list()
    np.testing.assert_allclose([row["score"] for row in rows], expected["score"], rtol=1e-4, atol=1e-5)


def test_a_user_of_the_data_gets_the_same_in_python(
    recommender: Recommender, expected_rows: pl.DataFrame, log: pl.DataFrame, users: pl.DataFrame
) -> None:
    for user in (0, 1, 2, 3):
        own = log.filter(pl.col("user_id") == user)
        features = users.filter(pl.col("user_id") == user).drop("user_id").row(0, named=True)
        about = {"times": own["time"].to_list(), "request_time": NEWEST}
        rows = recommender.recommend(own["item_id"].to_list(), user=features, **about)
        same_rows(rows, expected_rows.filter(pl.col("user_id") == user))
        stranger = recommender.recommend(own["item_id"].to_list(), **about)
        assert [row["score"] for row in stranger] != [row["score"] for row in rows]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_histories_in_a_file_may_have_user_features(
    served: Run, expected_rows: pl.DataFrame, log: pl.DataFrame, users: pl.DataFrame, tmp_path: Path, kind: str
) -> None:
    table = log.join(users, on="user_id").with_columns(  # one of a user's rows says it all
        side=pl.when(pl.int_range(pl.len()).over("user_id") == 0).then("side")
    )
    path = tmp_path / f"histories.{kind}"
    table.write_csv(path) if kind == "csv" else table.write_parquet(path)
    recsys("recommend", "--bundle", served.index, "--histories", path, "--output", tmp_path / "o.parquet")
    found = pl.read_parquet(tmp_path / "o.parquet")
    for user in (0, 1, 50, 119):
        same_rows(of_user(found, user).to_dicts(), of_user(expected_rows, user))


def of_user(table: pl.DataFrame, user: int) -> pl.DataFrame:
    return table.filter(pl.col("user_id") == user)


def test_histories_of_the_estimator_may_have_user_features(
    served: Run, expected_rows: pl.DataFrame, log: pl.DataFrame, users: pl.DataFrame, tmp_path: Path
) -> None:
    for name, folder in (("data", served.data), ("bundle", served.index)):
        (tmp_path / name).symlink_to(folder)
    model = TwoStageRecommender(user="user_id", item="item_id", time="time")
    model._fitted = tmp_path
    few = log.join(users, on="user_id").filter(pl.col("user_id") < 5)
    found = model.recommend(histories=few, request_time=NEWEST)
    for user in range(5):
        same_rows(of_user(found, user).to_dicts(), of_user(expected_rows, user))


def test_files_that_say_nothing_or_two_things_of_a_user(
    recommender: Recommender, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "new.csv"
    path.write_text(f"user_id,item_id,time\n1,5,{10**9}\n")
    padded, _ = FileRequests(path, recommender).read(slice(0, 1))
    assert padded.user is None
    assert [record.getMessage().split("new.csv ")[1][:18] for record in caplog.records] == [
        "has no column side",
        "has no column age,",
    ]
    path.write_text(f"user_id,item_id,time,side,age\n1,5,{10**9},on,20\n1,6,{10**9},back,20\n")
    with pytest.raises(ValueError, match="two values of side for one user, 'on' and 'back'; keep one"):
        FileRequests(path, recommender)


def test_a_signal_of_user_features_says_the_same_in_python(described: Dataset) -> None:
    """Demographics, beside a retriever without a user tower."""
    from recsys2stage.retrieval.encoders import Transformer
    from recsys2stage.retrieval.index import Exact
    from recsys2stage.retrieval.towers import TwoTower

    torch.manual_seed(0)
    towers, index = TwoTower(described.num_items, 8, 8, partial(Transformer, layers=1)), Exact()
    index.build(towers.all_item_vectors().detach().numpy())
    signal = Demographics()
    signal.fit(described, np.zeros((described.num_items + 1, 8), np.float32))
    catalogue, popularity = pl.read_parquet(described.path / "items.parquet"), described.train_counts
    reranker = Reranker(
        described.num_items, 8, [], MLP, signals=[{"name": "Demographics.zip_lift", "by_id": False, "counted": True}]
    )
    for part in reranker.scorer.parameters():
        torch.nn.init.normal_(part, std=0.5)
    model = Recommender(
        towers, index, reranker, catalogue, popularity, "none", signals=[signal], user_features=user_specs(described)
    )
    assert model.reads_user
    numbers = np.arange(2)
    padded = described.histories(numbers, "val", 8)
    expected = model.catalogue.rows(model.rank(padded, described.seen(numbers, "val"), None, 4))
    for row, zip_code in enumerate(("01", "1")):
        history = described.items[described.offsets[row] : described.train_ends[row]].tolist()
        got = model.recommend(history, k=4, user={"zip": zip_code})
        assert [one["item_id"] for one in got] == [one["item_id"] for one in expected[row]]
        np.testing.assert_allclose([o["score"] for o in got], [o["score"] for o in expected[row]], rtol=1e-4, atol=1e-5)
        stranger = model.recommend(history, k=4)
        assert [one["score"] for one in stranger] != [one["score"] for one in got]


# --- times


def test_seconds_are_whole_numbers_of_this_century_however_they_are_held() -> None:
    for values in (
        [10**9, 2],
        (10**9, 2),
        np.array([1e9, 2.0]),
        pl.Series([10**9, 2]),
        np.array([10**9, 2], np.uint32),
    ):
        seconds = as_seconds(values, "times", 10**9)
        assert seconds.dtype == np.int64
        assert seconds.tolist() == [10**9, 2]
    assert as_seconds([], "times", None).tolist() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([10**9, 1.5], "times holds 1.5, expected whole seconds"),
        ([10**9, float("nan")], "times holds nan, expected whole seconds"),
        ([10**9, None], "times holds None, expected whole seconds"),
        (["2003-02-28"], "times holds '2003-02-28', expected whole seconds"),
        ([True, False], "times holds True, expected whole seconds"),
        ([datetime(2003, 2, 28, tzinfo=UTC)], r"holds datetime.*int\(value\.timestamp\(\)\)"),
        ([5, -1], "times holds -1, expected seconds since 1970: 0 or more"),
        ([10**12], "beyond the year 2100; it looks like milliseconds: divide by 1000$"),
        ([10**15], "it looks like microseconds: divide by 1000000$"),
        ([10**18], "it looks like nanoseconds: divide by 1000000000$"),
        ([2**63 - 1], "holds 9223372036854775807, expected seconds since 1970, and that is beyond the year 2100$"),
    ],
)
def test_times_that_are_no_seconds_are_refused(values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_seconds(values, "times", 10**9)


def test_times_far_beyond_the_training_data_are_refused() -> None:
    """Seconds of a log that begins near 0; its milliseconds lie in this century."""
    assert as_seconds([5 * 10**6], "times", 10**6).tolist() == [5 * 10**6]
    message = "beyond 50 times the newest training event, 1000000; it looks like milliseconds: divide by 1000"
    with pytest.raises(ValueError, match=message):
        as_seconds([10**9], "times", 10**6)


def test_times_must_not_go_back() -> None:
    check_ascending(np.array([1, 1, 3]))
    with pytest.raises(ValueError, match=r"times go back from 9 \(event 2 of 4\) to 7 \(the next\); give history and"):
        check_ascending(np.array([1, 9, 7, 8]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": [10**12, 10**12 + 5]}, "times holds 1000000000005, .* it looks like milliseconds"),
        ({"times": [10**9 + 5, 10**9]}, "times go back from 1000000005"),
        ({"request_time": 10**12}, "request_time holds 1000000000000, .* it looks like milliseconds"),
        ({"request_time": -1}, "request_time holds -1"),
        ({"request_time": 10**9}, "request_time is 1000000000, before the newest event of the history, 1000000005"),
    ],
)
def test_in_python_times_are_checked(recommender: Recommender, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recommender.recommend([1, 2], user=EACH, **{"times": [10**9, 10**9 + 5], "request_time": NEWEST} | options)


def test_events_in_the_future_of_the_clock_are_named(
    recommender: Recommender, caplog: pytest.LogCaptureFixture
) -> None:
    times = [10**9, 4 * 10**9]
    late = recommender.recommend([1, 2], times=times, user=EACH)
    assert "2096-10-02 07:06:40 UTC (4000000000), lies in the future of this machine's clock" in caplog.text
    assert late == recommender.recommend([1, 2], times=times, user=EACH, request_time=4 * 10**9)


@pytest.mark.parametrize("kind", ["data", "histories"])
def test_the_verb_checks_the_request_time(
    served: Run, log: pl.DataFrame, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log.write_csv(tmp_path / "h.csv")
    words = ("--histories", tmp_path / "h.csv") if kind == "histories" else ()
    of = ("recommend", "--bundle", served.index, "--output", tmp_path / "o.parquet", *words)
    last = log.group_by("user_id").agg(pl.col("time").max()).sort("user_id")
    late = last.filter(pl.col("time") > NEWEST - 1)
    assert 0 < len(late) < 120
    first, when = late.row(0)
    message = f"request_time is {NEWEST - 1}, before the newest event of {len(late)} of 120 users, such as {when} of "
    with pytest.raises(SystemExit, match=f"{message}user {first};"):
        recsys(*of, "--request_time", NEWEST - 1)
    with pytest.raises(SystemExit, match=r"request_time holds 1000172800000, .* looks like milliseconds"):
        recsys(*of, "--request_time", NEWEST * 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.csv"]
    recsys(*of)
    assert f"as of 2001-09-11 01:46:40 UTC ({NEWEST}), the newest event of the log" in capsys.readouterr().out


def test_the_request_time_of_a_file_is_that_of_all_its_users(
    recommender: Recommender, log: pl.DataFrame, tmp_path: Path
) -> None:
    """Whoever is chosen of them."""
    log.write_csv(tmp_path / "h.csv")
    early = log.group_by("user_id").agg(pl.col("time").max()).filter(pl.col("time") < NEWEST)["user_id"][0]
    people = FileRequests(tmp_path / "h.csv", recommender, [str(early)])
    assert people.newest == NEWEST
    assert people.last_times.tolist() == [log.filter(pl.col("user_id") == early)["time"].max()]


@pytest.mark.parametrize(
    ("time", "message"),
    [(10**12, r"h\.csv, column time, holds 1000000000000, .* looks like milliseconds"), (-5, "column time, holds -5")],
)
def test_times_of_a_file_are_checked(recommender: Recommender, tmp_path: Path, time: int, message: str) -> None:
    (tmp_path / "h.csv").write_text(f"user_id,item_id,time\n1,5,{10**9}\n1,6,{time}\n")
    with pytest.raises(ValueError, match=message):
        FileRequests(tmp_path / "h.csv", recommender)


def test_rows_of_a_file_are_sorted_by_time(recommender: Recommender, tmp_path: Path) -> None:
    now = 10**9
    (tmp_path / "h.csv").write_text(f"user_id,item_id,time\n1,5,{now + 9}\n1,6,{now}\n1,7,{now + 9}\n")
    padded, _ = FileRequests(tmp_path / "h.csv", recommender).read(slice(0, 1))
    assert [recommender.catalogue.items["item_id"][item - 1] for item in padded.items[0].tolist()] == [6, 5, 7]
    assert padded.times[0].tolist() == [now, now + 9, now + 9]


def test_a_newest_event_in_the_future_of_the_clock_is_named(
    served: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "h.csv").write_text(f"user_id,item_id,time,side,age\n1,5,{10**9},on,20\n2,6,{4 * 10**9},on,20\n")
    recsys("recommend", "--bundle", served.index, "--histories", tmp_path / "h.csv", "--output", tmp_path / "o.parquet")
    assert "the newest event of the log, 2096-10-02 07:06:40 UTC (4000000000), lies in the future" in caplog.text


# --- options


def test_an_option_is_one_of_its_words() -> None:
    from recsys2stage.options import Part

    check_option("split", "val", Part)
    for wrong in ("validation", None, 3, ["val"]):
        with pytest.raises(ValueError, match=r"split is .*, expected val or test"):
            check_option("split", wrong, Part)


WRONG = """
import sys
from pathlib import Path
import numpy as np
from recsys2stage import TwoStageRecommender
from recsys2stage.cli.evaluate import evaluate
from recsys2stage.cli.recommend import recommend
from recsys2stage.retrieval.histories import Histories
from recsys2stage.data.batches import as_history
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.data.simulate import simulate
from recsys2stage.data.sources import Table
from recsys2stage.retrieval.towers import TwoTower

data, index, folder = map(Path, sys.argv[1:])
dataset, served, table = Dataset(data), Recommender.load(index), Table(data / "events.csv")
users = np.arange(3)
model = TwoStageRecommender()
(folder / "model").mkdir()
for name, target in (("data", data), ("bundle", index)):
    (folder / "model" / name).symlink_to(target.resolve())
model._fitted = folder / "model"
for call in (
    lambda: evaluate(index, data, folder / "out", split="validation", plots=False, resamples=5),
    lambda: model.evaluate("validation"),
    lambda: dataset.users("validation"),
    lambda: dataset.target_indices("Test"),
    lambda: dataset.ends(users, "train"),
    lambda: dataset.targets(users, "validation"),
    lambda: dataset.targets(users, "all"),
    lambda: dataset.request_times(users, "all"),
    lambda: dataset.histories(users, "validation", 4),
    lambda: dataset.filtered_items(users, "validation"),
    lambda: evaluate(index, data, folder / "out", protocol="sample-100"),
    lambda: Histories(data, request_time="targets"),
    lambda: Histories(data, next_action="targets"),
    lambda: Retriever(5, 5, request_time="last"),
    lambda: as_history(dataset.histories(users, "val", 4), "last"),
    lambda: TwoTower(5, 5, 8, None, similarity="cos"),
    lambda: prepare(table, folder / "out", repeats="all"),
    lambda: prepare(table, folder / "out", tie_break="random"),
    lambda: prepare(table, folder / "out", on_bad_rows="ignore"),
    lambda: served.recommend([1], seen="no", times=[10**9]),
    lambda: recommend(index, data, output=folder / "out.parquet", seen="no"),
    lambda: model.recommend(users=[1], seen="no"),
    lambda: simulate(folder / "out", size="ml-1m"),
):
    try:
        call()
        print("accepted")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
assert not (folder / "out").exists()
"""


def test_a_word_that_an_option_does_not_know_is_refused_in_python(served: Run, tmp_path: Path) -> None:
    """In a process of its own, since the types that tests check refuse it first."""
    split, seen = "split is {!r}, expected val or test", "seen is 'no', expected keep or filter"
    request = "request_time is {!r}, expected none, last_event or target"
    expected = [
        *([split.format("validation")] * 3),
        *(split.format("Test"), split.format("train"), split.format("validation")),
        *([split.format("all")] * 2),
        *([split.format("validation")] * 2),
        "protocol is 'sample-100', expected full or sampled-N",
        request.format("targets"),
        "next_action is 'targets' but the events of",
        *([request.format("last")] * 2),
        "similarity is 'cos', expected cosine or dot",
        "repeats is 'all', expected first, last, keep or error",
        "tie_break is 'random', expected file_order, item_id or hash",
        "on_bad_rows is 'ignore', expected error or quarantine",
        *([seen] * 3),
        "size is 'ml-1m', expected demo or ml-20m",
    ]
    words = [sys.executable, "-c", WRONG, served.data, served.index, tmp_path]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = [line for line in done.stdout.splitlines() if line]
    assert [line[: len(f"ValueError: {text}")] for line, text in zip(got, expected, strict=True)] == [
        f"ValueError: {text}" for text in expected
    ]
