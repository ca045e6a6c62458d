"""What is served: never a known item, the same for a user whoever else asks, and from the bundle alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import polars as pl
import pytest
import torch
from closeness import same_lists
from pipeline_fixtures import RETRIEVER, SIGNALS, K, Run, recsys
from worlds import cycle_world, forks_world

from recsys2stage.checkpoints import read_checkpoint
from recsys2stage.data.catalogue import Catalogue
from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.evaluate import rank_users
from recsys2stage.options import RequestTime
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Encoder, Transformer
from recsys2stage.retrieval.encoders.times import Calendar, RequestGap, TimeFactory
from recsys2stage.retrieval.index import Exact, Faiss
from recsys2stage.retrieval.inputs import ActionEmbedding, InputFactory, NextAction, RatingEmbedding
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.serving.requests import DatasetRequests, FileRequests, read_target_actions
from recsys2stage.trust import arguments, factory

COLUMNS = ["user_id", "item_id", "title", "score", "rank", "retriever_score"]
KINDS = ["buy", "look"]


@pytest.fixture(scope="module")
def recommender(trained: Run) -> Recommender:
    return Recommender.load(trained.bundle)


@pytest.fixture(scope="module")
def dataset(trained: Run) -> Dataset:
    return Dataset(trained.data)


@pytest.fixture(scope="module")
def everybody(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    output = tmp_path_factory.mktemp("everybody") / "recommendations.parquet"
    recsys("recommend", "--bundle", trained.bundle, "--output", output)
    return pl.read_parquet(output)


@pytest.fixture(scope="module")
def log(raw: Path) -> pl.DataFrame:
    """The raw events in order, as a user of `--histories` would have them."""
    ratings = pl.read_csv(raw / "ratings.csv").sort("userId", "timestamp", maintain_order=True)
    return ratings.select(user_id="userId", item_id="movieId", time="timestamp")


def untrained(
    item_ids: Sequence[Any],
    request_time: RequestTime = "none",
    titles: Sequence[str] | None = None,
    time: TimeFactory | None = None,
    inputs: Sequence[InputFactory] = (),
    next_action: str = "none",
) -> Recommender:
    """A first stage with random weights over items of these ids, the first the most popular; events buy or look."""
    torch.manual_seed(0)
    encoder = partial(Transformer, layers=1, time=time or (None if request_time == "none" else RequestGap))
    towers = TwoTower(len(item_ids), 8, 8, encoder, inputs=inputs, actions=KINDS)
    for part in towers.inputs:  # as large as the rest, so that what they say shows
        torch.nn.init.normal_(part.table.weight)
    index = Exact()
    index.build(towers.all_item_vectors().detach().numpy())
    catalogue = {"item": np.arange(1, len(item_ids) + 1), "item_id": item_ids} | ({"title": titles} if titles else {})
    popularity = np.append(0, np.arange(len(item_ids), 0, -1))
    table = pl.DataFrame(catalogue)
    return Recommender(towers, index, None, table, popularity, request_time, next_action, KINDS)


# for the users of the data


def test_everybody_gets_k_items_best_first(everybody: pl.DataFrame, dataset: Dataset) -> None:
    assert everybody.columns == COLUMNS
    users = pl.read_parquet(dataset.path / "users.parquet")["user_id"]
    assert set(everybody["user_id"]) == set(users)
    for _, rows in everybody.group_by("user_id"):
        assert rows["rank"].to_list() == list(range(1, 11))
        assert rows["score"].to_list() == sorted(rows["score"], reverse=True)
        assert rows["item_id"].is_unique().all()


def test_nobody_gets_a_known_item(everybody: pl.DataFrame, log: pl.DataFrame) -> None:
    """Of all events: who asks now has seen the test item, too."""
    assert len(everybody.join(log, on=["user_id", "item_id"])) == 0


def test_the_second_stage_has_its_say(everybody: pl.DataFrame) -> None:
    orders = [rows["retriever_score"].is_sorted(descending=True) for _, rows in everybody.group_by("user_id")]
    assert not all(orders)


def test_a_short_list_is_the_head_of_a_long_one(trained: Run, everybody: pl.DataFrame, tmp_path: Path) -> None:
    """All candidates are ranked anew, however few are asked for."""
    recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / "long.parquet", "--k", K)
    long = pl.read_parquet(tmp_path / "long.parquet")
    assert len(long) > 2 * len(everybody)
    assert long.filter(pl.col("rank") <= 10).equals(everybody)


def test_a_user_gets_the_same_whoever_else_asks(trained: Run, everybody: pl.DataFrame, tmp_path: Path) -> None:
    def ask(*words: object) -> pl.DataFrame:
        recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / "some.parquet", *words)
        return pl.read_parquet(tmp_path / "some.parquet")

    users = everybody["user_id"].unique().sort()[::10].to_list()
    expected = everybody.filter(pl.col("user_id").is_in(users))
    few = ask("--users", json.dumps([str(user) for user in users]))
    same_lists(few, expected)
    same_lists(ask("--batch_size", 7), everybody)


def test_users_may_be_named_in_numbers_or_in_a_file(trained: Run, everybody: pl.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_text("3\n\n  7  \n")
    for users in ("[3, 7]", "[3, '7']", tmp_path / "users.txt"):
        recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / "few.parquet", "--users", users)
        few = pl.read_parquet(tmp_path / "few.parquet")
        assert few["user_id"].unique().sort().to_list() == [3, 7]
    same_lists(few, everybody.filter(pl.col("user_id").is_in([3, 7])))


def as_frame(rows: list[dict[str, Any]], like: pl.DataFrame) -> pl.DataFrame:
    """One user's recommendations from Python, as the verb writes them."""
    users = like["user_id"].head(1).to_list() * len(rows)
    return pl.DataFrame(rows).with_columns(pl.Series("user_id", users)).select(like.columns).cast(dict(like.schema))


def test_one_user_gets_the_same_in_python_and_from_the_verb(
    recommender: Recommender, everybody: pl.DataFrame, log: pl.DataFrame
) -> None:
    for user in (1, 40, 150):
        history = log.filter(pl.col("user_id") == user)["item_id"].to_list()
        rows = recommender.recommend(history, k=10)
        expected = everybody.filter(pl.col("user_id") == user)
        assert [row["rank"] for row in rows] == list(range(1, 11))
        same_lists(as_frame(rows, expected), expected)


def test_the_first_stage_alone_serves_from_the_index(trained: Run, log: pl.DataFrame, tmp_path: Path) -> None:
    recsys("recommend", "--bundle", trained.index, "--output", tmp_path / "first.parquet", "--k", 5)
    first = pl.read_parquet(tmp_path / "first.parquet")
    assert len(first) == 5 * log["user_id"].n_unique()
    assert first["score"].equals(first["retriever_score"])
    assert len(first.join(log, on=["user_id", "item_id"])) == 0


def test_more_items_than_there_are_gives_all_that_are_not_known(
    trained: Run, log: pl.DataFrame, tmp_path: Path
) -> None:
    recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / "all.parquet", "--k", 500)
    counts = pl.read_parquet(tmp_path / "all.parquet").group_by("user_id").len().sort("user_id")
    known = log.group_by("user_id").agg(pl.col("item_id").n_unique()).sort("user_id")
    assert (counts["len"] + known["item_id"]).unique().to_list() == [log["item_id"].n_unique()]


@pytest.mark.parametrize("kind", ["both stages", "all signals", "first stage", "approximate"])
def test_the_first_k_are_the_same_however_many_are_requested(trained: Run, informed: Run, kind: str) -> None:
    """Beyond the candidates, too, where the retriever's order follows; scores never rise."""
    run = informed if kind == "all signals" else trained
    dataset, served = (
        Dataset(run.data),
        Recommender.load(run.bundle if run is informed or "both" in kind else run.index),
    )
    if kind == "approximate":
        vectors, served.index = served.vectors[1:], Faiss("IVF16,Flat", {"nprobe": 1})
        served.index.build(vectors)
    if "stage" not in kind or kind == "first stage":
        served.num_candidates = 30
    users = dataset.users("test")[:6]
    padded, known = dataset.histories(users, "test", served.towers.max_length), dataset.filtered_items(users, "test")
    padded.lengths[-1] = 0  # one without a history
    now = dataset.request_times(users, "test")
    long = served.rank(padded, known, now, dataset.num_items)
    unseen = dataset.num_items - np.diff(known.offsets)
    assert (long.items > 0).sum(1).tolist() == unseen.tolist()
    for k in range(1, dataset.num_items + 1):
        for one, other in zip(served.rank(padded, known, now, k), long, strict=True):
            assert one.shape == (len(users), k)
            np.testing.assert_allclose(one, other[:, :k], rtol=1e-6, atol=1e-6)
    for items, score, count in zip(long.items, long.score, unseen, strict=True):
        assert len(set(items[:count].tolist())) == count
        assert (np.diff(score[:count]) <= 0).all()
        assert np.isfinite(score[:count]).all()
    if kind == "first stage":
        assert np.array_equal(long.score[:-1], long.retriever_score[:-1])
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        served.rank(padded, known, now, 0)


def test_a_list_of_all_items_has_the_target_where_the_evaluation_ranks_it(informed: Run) -> None:
    dataset, served = Dataset(informed.data), Recommender.load(informed.bundle)
    users = dataset.users("test")[:60]
    padded, known = dataset.histories(users, "test", served.towers.max_length), dataset.filtered_items(users, "test")
    ranking = served.rank(padded, known, dataset.request_times(users, "test"), dataset.num_items)
    place = (ranking.items == dataset.targets(users, "test")[:, None]).argmax(1) + 1
    assert (place > served.num_candidates).any()
    assert (place <= served.num_candidates).any()
    assert place.tolist() == rank_users(dataset, served, users, "test").ranks["ranker"].tolist()


# for histories in a file


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_histories_in_a_file_give_what_the_data_give(
    trained: Run, everybody: pl.DataFrame, log: pl.DataFrame, tmp_path: Path, kind: str
) -> None:
    shuffled = log.sample(fraction=1, shuffle=True, seed=0)  # the times say the order, not the rows
    ties = log.group_by("user_id").agg(pl.col("time").is_duplicated().any())
    clear = ties.filter(~pl.col("time"))["user_id"].to_list()
    path = tmp_path / f"histories.{kind}"
    shuffled.write_csv(path) if kind == "csv" else shuffled.write_parquet(path)
    recsys("recommend", "--bundle", trained.bundle, "--histories", path, "--output", tmp_path / "out.parquet")
    out = pl.read_parquet(tmp_path / "out.parquet")
    assert out.columns == COLUMNS
    assert set(out["user_id"]) == set(log["user_id"])
    one, other = (table.filter(pl.col("user_id").is_in(clear)) for table in (out, everybody))
    assert len(one) > 100
    same_lists(one, other)


def test_users_never_seen_are_served(
    trained: Run, recommender: Recommender, log: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    items = log["item_id"].unique().sort().to_list()
    rows = [("ann lee", items[3]), ("ann lee", items[8]), ("bob", 10**9), ("ann lee", 10**9 + 1), ("zoë", items[1])]
    pl.DataFrame(rows, schema=["user_id", "item_id"], orient="row").write_csv(tmp_path / "new.csv")
    recsys(
        "recommend",
        "--bundle",
        trained.bundle,
        "--histories",
        tmp_path / "new.csv",
        "--output",
        tmp_path / "o.parquet",
        "--k",
        7,
    )
    out = pl.read_parquet(tmp_path / "o.parquet")
    assert out["user_id"].unique().sort().to_list() == ["ann lee", "bob", "zoë"]
    assert out.group_by("user_id").len()["len"].unique().to_list() == [7]
    assert "skipping 2 of 5 events, of items the model does not know" in caplog.text
    ann = out.filter(pl.col("user_id") == "ann lee")
    same_lists(ann, as_frame(recommender.recommend([items[3], items[8]], k=7), ann))
    bob = out.filter(pl.col("user_id") == "bob")  # of whom nothing is known
    assert bob["item_id"].to_list() == [row["item_id"] for row in recommender.recommend([], k=7)]
    assert bob["retriever_score"].null_count() == 7
    (tmp_path / "users.txt").write_text("ann lee\nzoë\n")
    some = ("--users", tmp_path / "users.txt")
    recsys(
        "recommend",
        "--bundle",
        trained.bundle,
        "--histories",
        tmp_path / "new.csv",
        "--output",
        tmp_path / "o.parquet",
        *some,
    )
    assert pl.read_parquet(tmp_path / "o.parquet")["user_id"].unique().sort().to_list() == ["ann lee", "zoë"]


def test_ids_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    served = untrained(["0012", "012", "12", "B7"])
    (tmp_path / "new.csv").write_text("user_id,item_id\n007,0012\n007,12\n8,012\n")
    people = FileRequests(tmp_path / "new.csv", served)
    assert people.user_ids.tolist() == ["007", "8"]
    padded, known = people.read(slice(0, 2))
    assert padded.items.tolist() == [[1, 3], [2, 0]]
    assert known.values.tolist() == [1, 3, 2]
    ranking = served.rank(padded, known, None, 4)
    assert sorted(ranking.items[0].tolist()) == [-1, -1, 2, 4]
    assert sorted(ranking.items[1].tolist()) == [-1, 1, 3, 4]


def test_a_long_history_in_a_file_filters_all_of_it_and_is_read_by_its_newest_part(tmp_path: Path) -> None:
    served = untrained(list(range(1, 31)))
    order = list(range(20, 0, -1))
    path = tmp_path / "long.csv"
    path.write_text("user_id,item_id\n" + "".join(f"1,{item}\n" for item in order))
    padded, known = FileRequests(path, served).read(slice(0, 1))
    assert padded.items.tolist() == [order[-8:]]  # max_length is 8
    assert sorted(known.values.tolist()) == sorted(order)
    ranking = served.rank(padded, known, None, 30)
    assert sorted(ranking.items[ranking.items > 0].tolist()) == list(range(21, 31))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item_id\n1,2\n", "lacks the columns ['user_id']; it has ['user', 'item_id']"),
        ("user_id,item_id\n", "holds no events"),
        ("user_id,item_id\n1,a\n2,b\n", "the model knows none of the 2 item ids in"),
        ("user_id,item_id\n1,1\n,2\n", "1 of 2 rows have no user_id"),
        ("user_id,item_id,time\n1,1,10\n1,2,\n", "1 of 2 rows have no time"),
        ("user_id,item_id,time\n1,1,yesterday\n", "expected whole seconds"),
        ("", "cannot be read: empty CSV"),
    ],
)
def test_bad_histories_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.csv") as error:
        FileRequests(tmp_path / "bad.csv", untrained([1, 2, 3]))
    assert message in str(error.value)


def test_a_file_that_is_no_parquet_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(ValueError, match=r"bad\.parquet cannot be read"):
        FileRequests(tmp_path / "bad.parquet", untrained([1, 2, 3]))


def test_unknown_users_say_which(recommender: Recommender, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 3 users are not in the data, for example 'nobody', 'x', .*--histories"):
        DatasetRequests(dataset, recommender, ["1", "nobody", "x"])
    (tmp_path / "new.csv").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(ValueError, match=r"user '2' is not in .*new\.csv, expected ids such as '1'; check the id$"):
        FileRequests(tmp_path / "new.csv", untrained([1, 2, 3]), ["2"])


def test_recommending_for_nobody_is_an_error(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no users"):
        recsys("recommend", "--bundle", trained.bundle, "--output", tmp_path / "out.parquet", "--users", "[]")
    assert list(tmp_path.iterdir()) == []


# for one user, in Python


def test_an_empty_history_gets_what_is_popular(recommender: Recommender, dataset: Dataset) -> None:
    ids = pl.read_parquet(dataset.path / "items.parquet").sort("item")["item_id"].to_list()
    best = np.argsort(-dataset.train_counts[1:], kind="stable")[:10]
    for history in ([], ["an id", "of another world"]):
        rows = recommender.recommend(history, k=10)
        assert [row["item_id"] for row in rows] == [ids[item] for item in best]
        assert [row["score"] for row in rows] == dataset.train_counts[1:][best].tolist()


def test_what_is_excluded_is_not_recommended(recommender: Recommender) -> None:
    for history in ([], [recommender.catalogue.items["item_id"][0]]):
        first = [row["item_id"] for row in recommender.recommend(history, k=10)]
        then = [row["item_id"] for row in recommender.recommend(history, k=8, exclude=[first[0], first[3]])]
        assert then == [item for item in first if item not in (first[0], first[3])]


def test_where_filters_leave_n_items_min_k_n_are_recommended(recommender: Recommender, told: Recommender) -> None:
    """By the last stage among the candidates, and by popularity for a new user."""
    for served in (recommender, told):
        ids = [str(one) for one in served.catalogue.items["item_id"]]
        history, rng = ids[10:16], np.random.default_rng(0)
        times = {"times": [10**9 + place for place in range(6)]} if served is told else {}
        for count in (0, 1, 7, 60, len(ids)):
            allow, exclude = rng.permutation(ids)[:count].tolist(), rng.permutation(ids)[:9].tolist()
            for past, now in ((history, times), ([], {})):
                eligible = set(allow) - set(exclude) - set(past)
                for k in (3, 50, 10**6):
                    rows = served.recommend(past, k=k, allow=allow, exclude=exclude, **now)
                    got = [str(row["item_id"]) for row in rows]
                    assert len(got) == len(set(got)) == min(k, len(eligible))
                    assert set(got) <= eligible
                    assert not past or [row["score"] for row in rows] == sorted(row["score"] for row in rows)[::-1]


def test_a_list_by_popularity_says_so(recommender: Recommender, caplog: pytest.LogCaptureFixture) -> None:
    assert {row["retriever_score"] for row in recommender.recommend([])} == {None}
    assert not caplog.records
    assert {row["retriever_score"] for row in recommender.recommend(["x7", "x8"])} == {None}
    example = str(recommender.catalogue.items["item_id"][0])
    assert f"none of the 2 item ids of the history, for example 'x7'; expected ids such as '{example}'" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k is 0, expected at least 1; set k to 10"),
        ({"k": 2.5}, "k is 2.5, expected an integer, at least 1; set k to 10"),
        ({"k": True}, "k is True, expected an integer, at least 1; set k to 10"),
        ({"k": "3"}, "k is '3', expected an integer, at least 1; set k to 10"),
        ({"times": 1_710_000_000}, "times is 1710000000, expected a sequence of seconds, .*; put it in a list"),
        ({"times": "now"}, "times is the text 'now', expected a sequence of seconds"),
        ({"ratings": 5}, "ratings is 5, expected a sequence of numbers, .*; put it in a list"),
        ({"ratings": ["good"]}, "ratings holds 'good', expected finite numbers, or None"),
        ({"ratings": [float("inf")]}, "ratings holds inf, expected finite numbers, or None"),
        ({"actions": [5]}, "actions holds 5, expected names"),
        ({"exclude": 5}, "exclude is 5, expected a sequence of item ids; put it in a list"),
        ({"allow": "12"}, r"allow is the text '12', expected a sequence of item ids: \['12'\]"),
        ({"allow": ["x"]}, "does not know the item id of allow, 'x'; expected ids such as '1'"),
        ({"history": {1}}, r"history is the set \{1\}, expected a sequence .*; list them oldest first"),
        ({"history": {"a": 1}}, "history is {'a': 1}, expected a sequence"),
        ({"history": [[1, 2]]}, r"history holds \[1, 2\], expected a flat sequence"),
        ({"history": None}, "history is None, expected a sequence"),
        ({"user": "old"}, "user is 'old', expected features by name"),
        ({"request_time": "now"}, "request_time holds 'now', expected whole seconds since 1970; convert"),
    ],
)
def test_wrong_arguments_say_what_is_expected(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which refuses them first, in tests only
    recommend: Any = untrained([1, 2, 3]).recommend
    with pytest.raises(ValueError, match=message) as error:
        recommend(**({"history": [1]} | given))
    assert str(error.value).count("\n") < 3


def test_files_of_allowed_and_excluded_items(trained: Run, everybody: pl.DataFrame, tmp_path: Path) -> None:
    ids = everybody["item_id"].unique().sort().cast(pl.String).to_list()
    allow, exclude = ids[::2], ids[::6]
    (tmp_path / "allow.txt").write_text("\n".join(allow))
    (tmp_path / "exclude.txt").write_text("\n".join([*exclude, "", "nowhere"]))
    files = ("--allow", tmp_path / "allow.txt", "--exclude", tmp_path / "exclude.txt")
    some = ("--bundle", trained.bundle, "--output", tmp_path / "out.parquet", "--users", "[1, 2, 3]", "--k", 200)
    recsys("recommend", *some)
    free = pl.read_parquet(tmp_path / "out.parquet")
    recsys("recommend", *some, *files)
    out = pl.read_parquet(tmp_path / "out.parquet")
    text = pl.col("item_id").cast(pl.String)
    expected = free.filter(text.is_in(allow) & ~text.is_in(exclude))
    assert sorted(out.select("user_id", "item_id").rows()) == sorted(expected.select("user_id", "item_id").rows())
    for path, message in (("none.txt", "is not a file"), ("empty.txt", "holds no ids; expected ids such as '")):
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(SystemExit, match=message):
            recsys("recommend", *some, "--allow", tmp_path / path)
    (tmp_path / "foreign.txt").write_text("x\ny\n")
    with pytest.raises(SystemExit, match="holds 2 ids, for example 'x', all unknown to the model; expected ids such"):
        recsys("recommend", *some, "--exclude", tmp_path / "foreign.txt")
    with pytest.raises(SystemExit, match=r"leave none of \d+ items, expected at least 1; name other ids"):
        recsys("recommend", *some, "--allow", tmp_path / "allow.txt", "--exclude", tmp_path / "allow.txt")


def test_items_come_with_their_titles_where_there_are_any(recommender: Recommender) -> None:
    row = recommender.recommend([], k=1)[0]
    assert list(row) == ["item_id", "title", "score", "rank", "retriever_score"]
    titles = dict(recommender.catalogue.items.select("item_id", "title").iter_rows())
    assert row["title"] == titles[row["item_id"]]
    assert list(untrained([1, 2]).recommend([1], k=1)[0]) == ["item_id", "score", "rank", "retriever_score"]


def test_ids_compare_as_text(recommender: Recommender) -> None:
    ids = recommender.catalogue.items["item_id"][:5].to_list()
    assert recommender.recommend(ids) == recommender.recommend([str(item) for item in ids])
    assert recommender.recommend(ids) == recommender.recommend(tuple(ids))
    assert recommender.recommend(ids) != recommender.recommend(ids[::-1])


def test_unknown_items_are_passed_over(recommender: Recommender) -> None:
    ids = recommender.catalogue.items["item_id"][:5].to_list()
    assert recommender.recommend([*ids[:2], "?", *ids[2:], -1]) == recommender.recommend(ids)


def test_a_text_is_not_a_history(recommender: Recommender) -> None:
    with pytest.raises(ValueError, match="exclude is the text '12', expected a sequence of item ids"):
        recommender.recommend(["1"], exclude="12")
    with pytest.raises(ValueError, match="expected a sequence of item ids"):
        recommender.recommend("1193")


def test_a_model_that_is_told_the_time_needs_times(tmp_path: Path) -> None:
    served = untrained(list(range(1, 21)), "target")
    now = 1_000_000_000
    times = [now - 500, now - 100]
    with pytest.raises(ValueError, match=r"times are missing: .*read.* times"):
        served.recommend([1, 2], request_time=now)
    with pytest.raises(ValueError, match="history has 2 events but times has 1"):
        served.recommend([1, 2], times=[now], request_time=now)
    soon, late = (served.recommend([1, 2], times=times, request_time=now + gap) for gap in (0, 10**8))
    assert soon != late
    assert len(served.recommend([])) == 10
    (tmp_path / "timeless.csv").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['time'\]"):
        FileRequests(tmp_path / "timeless.csv", served)


def test_a_model_with_a_calendar_needs_times_whatever_it_is_told(tmp_path: Path) -> None:
    served = untrained(list(range(1, 21)), time=Calendar)
    with pytest.raises(ValueError, match=r"times are missing: .*read.* times; pass times"):
        served.recommend([1, 2])
    (tmp_path / "timeless.csv").write_text("user_id,item_id\n1,1\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['time'\]"):
        FileRequests(tmp_path / "timeless.csv", served)


def test_a_model_that_is_not_told_the_time_does_not_heed_it() -> None:
    served = untrained(list(range(1, 21)))
    assert served.recommend([1, 2], times=[5, 10**9], request_time=2 * 10**9) == served.recommend([1, 2])


# by the kind of action that is asked for


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A first stage that knows: after item i, who looks takes i + 1, who buys i + 7."""
    run = Run(tmp_path_factory.mktemp("forks"))
    forks_world(run.folder, "target_action")
    (run.folder / "retriever.yaml").write_text(RETRIEVER)
    recsys(
        *("fit", "--config", run.folder / "retriever.yaml", "--output", run.folder / "retriever"),
        *("--data.init_args.path", run.data, "--data.init_args.max_length", 8),
        *("--data.init_args.next_action", "target", "--model.init_args.inputs", "[NextAction]"),
        *("--model.init_args.dim", 32, "--trainer.max_epochs", 12),
    )
    run.export_index()
    return run


def best_of_each(forks: Run, output: Path, *words: object) -> dict[int, int]:
    """The first item recommended to each user."""
    recsys("recommend", "--bundle", forks.index, "--output", output, "--k", 3, *words)
    first = pl.read_parquet(output).filter(pl.col("rank") == 1)
    return dict(first.select("user_id", "item_id").iter_rows())


def share_taken(best: dict[int, int], forks: Run, step: int) -> float:
    """How many users get the item so many steps after their newest."""
    log = pl.read_csv(forks.folder / "events.csv").group_by("user_id").last()
    newest = dict(log.select("user_id", "item_id").iter_rows())
    return float(np.mean([item == (newest[user] - 1 + step) % 60 + 1 for user, item in best.items()]))


def test_everybody_is_asked_for_one_action(forks: Run, tmp_path: Path) -> None:
    look, buy = (best_of_each(forks, tmp_path / "out.parquet", "--action", kind) for kind in ("look", "buy"))
    assert len(look) == len(buy) == 300
    assert share_taken(look, forks, 1) > 0.9
    assert share_taken(buy, forks, 7) > 0.9
    served = Recommender.load(forks.index)
    log = pl.read_csv(forks.folder / "events.csv").filter(pl.col("user_id") == 17)
    history, actions = log["item_id"].to_list(), log["action"].to_list()
    for kind, best in (("look", look), ("buy", buy)):
        assert served.recommend(history, k=1, actions=actions, action=kind)[0]["item_id"] == best[17]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_each_user_is_asked_for_an_action_of_a_file(
    forks: Run, tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In whatever order they stand there; whoever is missing, for an unknown one."""
    path, out = tmp_path / f"asked.{suffix}", tmp_path / "out.parquet"
    asked = {user: KINDS[user % 2] for user in range(299, 9, -1)} | {-5: "buy"}
    table = pl.DataFrame({"user_id": list(asked), "action": list(asked.values())})
    table = pl.concat([table, pl.DataFrame({"user_id": [9], "action": [None]})], how="vertical_relaxed")
    if suffix == "json":
        path.write_text(json.dumps({str(user): kind for user, kind in asked.items()} | {"9": None}))
    else:
        table.write_csv(path) if suffix == "csv" else table.write_parquet(path)
    nobody = best_of_each(forks, out)
    caplog.clear()
    mixed = best_of_each(forks, out, "--action", path, "--batch_size", 37)
    look, buy = (best_of_each(forks, out, "--action", kind) for kind in ("look", "buy"))
    assert mixed == {user: (nobody if user < 10 else look if user % 2 else buy)[user] for user in range(300)}
    assert "has no action for 10 of 300 users; using 'unknown'" in caplog.text
    assert len(caplog.records) == 1


def test_where_nobody_says_the_kind_is_unknown_and_that_is_said_once(
    forks: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best_of_each(forks, tmp_path / "out.parquet")
    assert caplog.text.count("no target action given, using 'unknown'") == len(caplog.records) == 1
    served = Recommender.load(forks.index)
    assert served.recommend([5], k=1)[0]["item_id"] in (6, 12)
    served.recommend([7])
    assert len(caplog.records) == 2


def test_a_model_with_a_usual_action_is_asked_for_it(
    forks: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(forks.index, tmp_path / "index")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"next_action": "buy"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    usual, other = Recommender.load(folder), Recommender.load(forks.index)
    assert usual.recommend([5, 6]) == other.recommend([5, 6], action="buy")
    assert usual.recommend([5, 6], action="look") == other.recommend([5, 6], action="look")
    assert not caplog.records


def test_targets_are_asked_for_by_their_own_kind_wherever_they_are_measured(
    forks: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, served = Dataset(forks.data), Recommender.load(forks.index)
    recsys("evaluate", "--bundle", forks.index, "--output", tmp_path, "--resamples", 10)
    ranks = pl.read_parquet(tmp_path / "ranks.parquet")
    assert (ranks["retriever"] == 1).mean() > 0.9
    assert (ranks["markov"] == 1).mean() < 0.65
    assert json.loads((tmp_path / "report.json").read_text())["protocol"]["next_action"] == "target"
    assert "next action: target" in (tmp_path / "report.md").read_text()
    of = ("--data", forks.data, "--index", forks.index, "--output", tmp_path / "candidates")
    recsys("mine-negatives", *of, "--k", 20)
    recsys("export-index", "--retriever", forks.retriever, "--data", forks.data, "--output", tmp_path / "index")
    assert not caplog.records, "all users have a target action"
    users = dataset.users("val")
    asked = dataset.target_action(users, "val", "target")
    queries = served.queries(dataset.histories(users, "val", 8), dataset.request_times(users, "val"), asked)
    assert np.load(tmp_path / "candidates/states.npy") == pytest.approx(queries, abs=1e-5)


def test_a_json_of_actions_is_read_as_the_same_csv_is(tmp_path: Path) -> None:
    """Of two actions for one user in a .json the last was taken, those in a CSV are refused."""
    path = tmp_path / "actions.json"
    path.write_text('{"1": "look", "2": null, "03": "buy"}')
    assert read_target_actions(path) == {"1": "look", "03": "buy"}
    path.write_text("{}")
    assert read_target_actions(path) == {}
    path.write_text('{"1": "look", "2": "buy", "1": "buy"}')
    with pytest.raises(ValueError, match="has more than one action for 1 users, for example '1'"):
        read_target_actions(path)


def test_an_action_that_cannot_be_asked_for_says_why(forks: Run, trained: Run, tmp_path: Path) -> None:
    def refused(message: str, bundle: Path, action: object) -> None:
        with pytest.raises(SystemExit, match=message):
            recsys("recommend", "--bundle", bundle, "--output", tmp_path / "out.parquet", "--action", action)

    refused("the target action is 'sell', expected a file or one of the model's actions buy, look", forks.index, "sell")
    (tmp_path / "asked.csv").write_text("user_id,action\n1,look\n2,sell\n")
    refused("the target action is 'sell', expected one of buy, look", forks.index, tmp_path / "asked.csv")
    (tmp_path / "twice.csv").write_text("user_id,action\n1,look\n2,buy\n1,buy\n")
    refused("has more than one action for 1 users, for example '1'", forks.index, tmp_path / "twice.csv")
    (tmp_path / "bare.csv").write_text("user_id,kind\n1,look\n")
    refused(r"lacks the columns \['action'\]", forks.index, tmp_path / "bare.csv")
    (tmp_path / "list.json").write_text("[1, 2]")
    refused("holds a list, expected {user_id: action}", forks.index, tmp_path / "list.json")
    (tmp_path / "cut.json").write_text('{"1": "lo')
    refused(r"cut\.json cannot be read", forks.index, tmp_path / "cut.json")
    refused("this model has no target action", trained.bundle, "look")
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(ValueError, match="the target action is 'sell', expected one of buy, look"):
        Recommender.load(forks.index).recommend([5], action="sell")
    with pytest.raises(ValueError, match="this model has no target action"):
        Recommender.load(trained.bundle).recommend([5], action="look")


# by the kinds and ratings of events


def inquisitive() -> Recommender:
    return untrained(list(range(1, 61)), inputs=(RatingEmbedding, ActionEmbedding, NextAction), next_action="target")


def test_histories_in_a_file_have_the_ratings_and_kinds_of_the_data(tmp_path: Path) -> None:
    served, dataset = inquisitive(), Dataset(forks_world(tmp_path, "target_action", users=30))
    log = pl.read_csv(tmp_path / "events.csv").rename({"timestamp": "time"})
    ids = pl.read_parquet(dataset.path / "items.parquet")["item_id"].to_list()
    items = pl.DataFrame({"item": range(1, len(ids) + 1), "item_id": ids})
    served.catalogue = Catalogue(items, served.actions)
    log.sample(fraction=1, shuffle=True, seed=0).write_csv(tmp_path / "new.csv")
    log.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "new.parquet")
    whole = DatasetRequests(dataset, served).read(slice(4, 20))[0]
    assert set(whole.actions.ravel().tolist()) == {1, 2}
    for name in ("new.csv", "new.parquet"):
        read = FileRequests(tmp_path / name, served).read(slice(4, 20))[0]
        for field in ("items", "lengths", "times", "ratings", "actions"):
            assert np.array_equal(getattr(read, field), getattr(whole, field)), field


def test_what_a_file_does_not_say_of_events_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = inquisitive()
    (tmp_path / "some.csv").write_text("user_id,item_id,rating,action\n1,5,4.5,look\n1,6,,\n1,99,1,buy\n2,7,3,sell\n")
    padded, _ = FileRequests(tmp_path / "some.csv", served).read(slice(0, 2))
    assert padded.ratings.tolist() == [[4.5, 0.0], [3.0, 0.0]]
    assert padded.actions.tolist() == [[2, 0], [0, 0]]
    assert (
        "1 of 4 events have action types that the model does not know, for example 'sell'; it knows buy, look"
        in caplog.text
    )
    caplog.clear()
    (tmp_path / "bare.csv").write_text("user_id,item_id\n1,5\n1,6\n2,7\n")
    people = FileRequests(tmp_path / "bare.csv", served)
    assert [record.getMessage().split("bare.csv ")[1][:20] for record in caplog.records] == [
        "has no column rating",
        "has no column action",
    ]
    padded, known = people.read(slice(0, 2))
    assert padded.ratings is None
    assert padded.actions is None
    blank = padded._replace(ratings=np.zeros((2, 2), np.float32), actions=np.zeros((2, 2), np.int64))
    one, other = (served.rank(some, known, None, 5, np.array([1, 2])) for some in (padded, blank))
    assert np.array_equal(one.items, other.items)
    (tmp_path / "words.csv").write_text("user_id,item_id,rating\n1,5,good\n")
    with pytest.raises(ValueError, match=r"words\.csv has ratings that are no numbers"):
        FileRequests(tmp_path / "words.csv", served)


def test_in_python_ratings_and_kinds_are_heeded_by_who_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    served, history = inquisitive(), [5, 6, 7]

    def scores(**known: Any) -> list[float]:
        return [row["score"] for row in served.recommend(history, action="look", **known)]

    plain = scores()
    assert scores(ratings=[None, None, float("nan")], actions=[None, None, None]) == plain
    assert scores(ratings=[1, 5, 2.5]) != plain
    assert scores(actions=["buy", None, "look"]) != plain
    assert not caplog.records
    assert scores(actions=[None, "sell", None]) == plain
    assert "1 of 3 events have action types that the model does not know, for example 'sell'" in caplog.text
    with pytest.raises(ValueError, match="history has 3 events but ratings has 1; give one rating for each"):
        scores(ratings=[1])
    with pytest.raises(ValueError, match="history has 3 events but actions has 4; give one action for each"):
        scores(actions=["buy"] * 4)
    unread = untrained(list(range(1, 61)))
    assert unread.recommend(history, ratings=[1, 2, 3], actions=["a", "b", "c"]) == unread.recommend(history)


def test_data_with_other_kinds_are_refused(tmp_path: Path) -> None:
    served, dataset = inquisitive(), Dataset(forks_world(tmp_path / "forks", "target_action", users=9))
    served.check(dataset)
    dataset.manifest["actions"] = ["buy", "look", "sell"]
    with pytest.raises(
        ValueError, match=r"the model was trained with the actions buy, look, but .* has buy, look, sell"
    ):
        DatasetRequests(dataset, served)
    plain = Dataset(cycle_world(tmp_path / "cycle", users=9))
    untrained([1]).check(plain)
    with pytest.raises(ValueError, match="ActionEmbedding reads the actions of events"):
        served.check(plain)


# with signals


@pytest.fixture(scope="module")
def told(informed: Run) -> Recommender:
    return Recommender.load(informed.bundle)


@pytest.fixture(scope="module")
def untold(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages with all signals, on a retriever that is not told the time of a request."""
    run = Run(tmp_path_factory.mktemp("untold"))
    (run.folder / "signals.yaml").write_text(SIGNALS)
    of = ("--data", trained.data, "--index", trained.index, "--output", run.candidates, "--k", K)
    recsys("mine-negatives", *of, "--config", run.folder / "signals.yaml")
    run.fit_ranker("--trainer.max_epochs", 6)
    recsys("export-bundle", "--index", trained.index, "--ranker", run.ranker, "--output", run.bundle)
    return run


@pytest.fixture(scope="module")
def rated(raw: Path) -> pl.DataFrame:
    """The raw events in order, with their ratings."""
    ratings = pl.read_csv(raw / "ratings.csv").sort("userId", "timestamp", maintain_order=True)
    return ratings.select("rating", user_id="userId", item_id="movieId", time="timestamp")


@pytest.fixture(scope="module")
def advised(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """What everybody of the data gets, told of all signals."""
    output = tmp_path_factory.mktemp("advised") / "recommendations.parquet"
    recsys("recommend", "--bundle", informed.bundle, "--output", output)
    return pl.read_parquet(output)


def test_with_signals_everybody_gets_new_items_in_an_order_of_their_own(
    advised: pl.DataFrame, log: pl.DataFrame
) -> None:
    assert advised.group_by("user_id").len()["len"].unique().to_list() == [10]
    assert len(advised.join(log, on=["user_id", "item_id"])) == 0
    assert np.isfinite(advised["score"].to_numpy()).all()
    orders = [rows["retriever_score"].is_sorted(descending=True) for _, rows in advised.group_by("user_id")]
    assert not all(orders)


def test_with_signals_a_file_and_python_give_what_the_data_give(
    informed: Run, told: Recommender, advised: pl.DataFrame, rated: pl.DataFrame, tmp_path: Path
) -> None:
    ties = rated.group_by("user_id").agg(pl.col("time").is_duplicated().any())
    clear = ties.filter(~pl.col("time"))["user_id"].to_list()
    rated.sample(fraction=1, shuffle=True, seed=0).write_csv(tmp_path / "histories.csv")
    of = ("--bundle", informed.bundle, "--output", tmp_path / "out.parquet", "--batch_size", 13)
    recsys("recommend", *of, "--histories", tmp_path / "histories.csv")
    one, other = (
        table.filter(pl.col("user_id").is_in(clear)) for table in (pl.read_parquet(tmp_path / "out.parquet"), advised)
    )
    assert len(one) > 100
    same_lists(one, other, rounding=1e-4)  # the scale of a signal multiplies its rounding
    for user in clear[:3]:
        own = rated.filter(pl.col("user_id") == user)
        rows = told.recommend(
            own["item_id"].to_list(),
            times=own["time"].to_list(),
            ratings=own["rating"].to_list(),
            request_time=int(rated["time"].max()),  # type: ignore[arg-type]  # whole seconds
        )
        expected = other.filter(pl.col("user_id") == user)
        same_lists(as_frame(rows, expected), expected, rounding=1e-4)


def test_with_signals_all_items_can_be_asked_for(informed: Run, log: pl.DataFrame, tmp_path: Path) -> None:
    recsys(
        "recommend", "--bundle", informed.bundle, "--output", tmp_path / "all.parquet", "--k", 500, "--users", "[3, 7]"
    )
    table = pl.read_parquet(tmp_path / "all.parquet")
    for user in (3, 7):
        rows, met = (own.filter(pl.col("user_id") == user)["item_id"].to_list() for own in (table, log))
        assert sorted(rows + list(set(met))) == sorted(log["item_id"].unique().to_list())


def test_signals_of_users_never_seen(
    informed: Run, told: Recommender, rated: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of whom nothing is known gets what is popular, and changes nothing for the others of the batch."""
    items, now = rated["item_id"].unique().sort().to_list(), int(rated["time"].max())  # type: ignore[arg-type]
    rows = [("ann", items[3], now - 900), ("ann", items[8], now - 60), ("bob", 10**9, now), ("zoë", items[1], now - 5)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "time"], orient="row").write_csv(tmp_path / "new.csv")
    of = (
        "--bundle",
        informed.bundle,
        "--histories",
        tmp_path / "new.csv",
        "--output",
        tmp_path / "o.parquet",
        "--k",
        7,
    )
    recsys("recommend", *of, "--request_time", now)
    out = pl.read_parquet(tmp_path / "o.parquet")
    assert "has no column rating, which the model reads" in caplog.text
    bob = out.filter(pl.col("user_id") == "bob")
    best = np.argsort(-told.popularity[1:], kind="stable")[:7]
    assert bob["item_id"].to_list() == told.catalogue.items["item_id"].to_numpy()[best].tolist()
    assert bob["score"].to_list() == told.popularity[1:][best].tolist()
    assert bob["item_id"].to_list() == [row["item_id"] for row in told.recommend([], k=7, request_time=now)]
    for user in ("ann", "zoë"):
        own = [row for row in rows if row[0] == user]
        alone = told.recommend([row[1] for row in own], k=7, times=[row[2] for row in own], request_time=now)
        mine = out.filter(pl.col("user_id") == user)
        same_lists(mine, as_frame(alone, mine), rounding=1e-4)


def test_what_is_asked_for_later_is_asked_of_other_signals(told: Recommender, rated: pl.DataFrame) -> None:
    own = rated.filter(pl.col("user_id") == 5)
    history, times, last = own["item_id"].to_list(), own["time"].to_list(), own["time"].to_list()[-1]
    soon, late = (told.recommend(history, times=times, request_time=last + wait) for wait in (60, 10**7))
    assert [row["score"] for row in soon] != [row["score"] for row in late]
    ratings = [1.0 + place % 5 for place in range(len(history))]
    other = told.recommend(history, times=times, request_time=last + 60, ratings=ratings)
    assert [row["score"] for row in soon] != [row["score"] for row in other], "how events were rated counts"


def test_where_the_time_is_not_told_signals_take_that_of_the_newest_event(
    untold: Run, rated: pl.DataFrame, tmp_path: Path
) -> None:
    served, own = Recommender.load(untold.bundle), rated.filter(pl.col("user_id") == 5)
    assert served.request_time == "none"
    history, times = own["item_id"].to_list(), own["time"].to_list()
    rows = [served.recommend(history, times=times, request_time=now) for now in (None, times[-1], times[-1] + 10**8)]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0]) == 10
    later = [time + 10**7 for time in times]
    scores = [[row["score"] for row in served.recommend(history, times=when)] for when in (times, later)]
    assert scores[0] != scores[1], "but the times of events are looked at"
    with pytest.raises(ValueError, match=r"times are missing: .*read.* times; pass times"):
        served.recommend(history)
    (tmp_path / "timeless.csv").write_text(f"user_id,item_id\n1,{history[0]}\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['time'\]"):
        FileRequests(tmp_path / "timeless.csv", served)


def test_where_the_time_is_not_told_what_is_mined_is_what_is_served(untold: Run, dataset: Dataset) -> None:
    served, data = Recommender.load(untold.bundle), Candidates(untold.candidates)
    data.setup("fit")
    selects = np.flatnonzero(data.lists.fold == "select")
    users, ends = data.lists.user[selects], data.lists.position[selects]
    padded = dataset.histories(users, ends, served.towers.max_length)
    assert data.lists.request_time[selects].tolist() == dataset.times[ends - 1].tolist()
    for request in (dataset.request_times(users, ends), None):
        queries = served.queries(padded, request)
        found = served.candidates(queries, dataset.filtered_items(users, ends), padded, request)
        listed = served.candidate_batch(queries, found, padded, request)
        for name, one in data.read(selects).candidates._asdict().items():
            torch.testing.assert_close(one, getattr(listed, name), rtol=1e-4, atol=1e-4, msg=name)


def test_masked_ids_hide_all_but_what_does_not_come_from_them(told: Recommender, informed: Run) -> None:
    dataset = Dataset(informed.data)
    users = dataset.users("test")[:20]
    padded, now = dataset.histories(users, "test", told.towers.max_length), dataset.request_times(users, "test")
    queries = told.queries(padded, now)
    found = told.candidates(queries, dataset.filtered_items(users, "test"), padded, now)
    listed = told.candidate_batch(queries, found, padded, now)
    by_id = torch.tensor([number["by_id"] for number in told.signal_names])
    for ours, changes in ((by_id, False), (~by_id, True)):
        signals = torch.where(ours, listed.signals + torch.randn_like(listed.signals), listed.signals)
        masked = told.rerank(listed, ids_masked=True)
        other = told.rerank(listed._replace(signals=signals), ids_masked=True)
        assert np.array_equal(masked, other) != changes
        assert not np.array_equal(told.rerank(listed), told.rerank(listed._replace(signals=signals)))


# the bundle


def test_another_process_serves_from_the_bundle_alone(
    trained: Run, informed: Run, recommender: Recommender, told: Recommender, tmp_path: Path
) -> None:
    """Without the training data, the runs it was made from, and Lightning."""
    for run, name in ((trained, "bundle"), (informed, "informed")):
        bundle = shutil.copytree(run.bundle, tmp_path / name)
        manifest = json.loads((bundle / "manifest.json").read_text())
        for parent in manifest["parents"].values():
            parent["path"] = "/nowhere"
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    history = recommender.catalogue.items["item_id"][:6].to_list()
    when = {"times": [10**9 + 3_600 * place for place in range(6)], "request_time": 10**9 + 10**6}
    code = f"""
import json, sys
from recsys2stage.recommender import Recommender
rows = Recommender.load("bundle").recommend({history}, k=5)
rows += Recommender.load("informed").recommend({history}, k=5, **{when})
assert not [name for name in ("lightning", "torchmetrics", "faiss", "jsonargparse") if name in sys.modules]
print(json.dumps(rows))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, expected = json.loads(done.stdout), recommender.recommend(history, k=5)
    expected += told.recommend(history, k=5, **when)
    assert [row["item_id"] for row in rows] == [row["item_id"] for row in expected]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def test_the_bundle_serves_as_many_candidates_as_it_was_made_for(recommender: Recommender) -> None:
    assert recommender.num_candidates == K


def test_a_folder_without_a_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make a bundle: recsys export-bundle"):
        Recommender.load(tmp_path)


def test_a_checkpoint_is_read_by_part(trained: Run, tmp_path: Path) -> None:
    options, weights = read_checkpoint(trained.retriever, "towers", "make")
    assert options["dim"] == 16
    assert all(not name.startswith("towers.") for name in weights)
    with pytest.raises(
        ValueError, match=r"holds no reranker: .* expected that of a ranker; give such a checkpoint, or run: make"
    ):
        read_checkpoint(trained.retriever, "reranker", "make")
    with pytest.raises(FileNotFoundError, match="run: make"):
        read_checkpoint(tmp_path / "none.ckpt", "towers", "make")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.ckpt is not a checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt", "towers", "make")


def test_a_factory_is_made_from_its_description() -> None:
    made = factory(
        {
            "class_path": "Transformer",
            "init_args": {"layers": 1, "time": {"class_path": "RequestGap", "init_args": {"buckets": 5}}},
        },
        Encoder,
        "a file",
    )(8, 4)
    assert isinstance(made, Transformer)
    assert made.time.vectors.weight.shape == (5, 8)
    assert factory({"class_path": "recsys2stage.of_old.Transformer"}, Encoder, "a file").func is Transformer
    plain = {"dim": 3, "features": [{"plain": 1}], "user": None}
    assert arguments(TwoTower, plain, "a file") == plain
