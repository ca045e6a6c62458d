"""The simulated world: MovieLens's layout to the letter, exact in its counts, with an order that is worth learning."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys2stage.data import simulate as simulate_module
from recsys2stage.data.simulate import GENRES, NO_GENRES, simulate

USERS, ITEMS, EVENTS = 700, 400, 28_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "small"
    simulate(folder, users=USERS, items=ITEMS, events=EVENTS)
    return folder


@pytest.fixture(scope="module")
def ratings(world: Path) -> pl.DataFrame:
    return pl.read_csv(world / "ratings.csv")


@pytest.fixture(scope="module")
def movies(world: Path) -> pl.DataFrame:
    return pl.read_csv(world / "movies.csv")


def test_the_layout_is_movielens(world: Path, ratings: pl.DataFrame, movies: pl.DataFrame) -> None:
    assert sorted(file.name for file in world.iterdir()) == ["README.txt", "movies.csv", "ratings.csv"]
    lines = (world / "ratings.csv").read_text().splitlines()
    assert lines[0] == "userId,movieId,rating,timestamp"
    user, movie, rating, time = lines[1].split(",")
    assert user == "1"
    assert movie.isdigit()
    assert time.isdigit()
    assert rating in {f"{half / 2:.1f}" for half in range(1, 11)}
    assert movies.columns == ["movieId", "title", "genres"]
    assert ratings.equals(ratings.sort("userId", "movieId"))
    assert movies["movieId"].is_sorted()
    assert movies["movieId"].is_unique().all()
    assert set(ratings["rating"]) == {half / 2 for half in range(1, 11)}
    assert (world / "README.txt").read_text().startswith("SIMULATED DATA")


def test_counts_are_exact(ratings: pl.DataFrame, movies: pl.DataFrame) -> None:
    assert len(ratings) == EVENTS
    assert ratings["userId"].unique().sort().to_list() == list(range(1, USERS + 1))
    assert ratings["movieId"].n_unique() == ITEMS
    assert set(ratings["movieId"]) < set(movies["movieId"])  # some movies have no rating
    assert ratings.select("userId", "movieId").is_unique().all()
    lengths = ratings["userId"].value_counts()["count"]
    assert lengths.min() == 10
    assert np.quantile(lengths, 0.99) > 3 * np.median(lengths)


@pytest.mark.parametrize(("users", "items", "events"), [(40, 400, 440), (300, 40, 3000), (40, 400, 2000)])
def test_counts_are_exact_in_odd_worlds_too(users: int, items: int, events: int, tmp_path: Path) -> None:
    simulate(tmp_path / "odd", users=users, items=items, events=events, seed=3)
    ratings = pl.read_csv(tmp_path / "odd" / "ratings.csv")
    assert (ratings["userId"].n_unique(), ratings["movieId"].n_unique(), len(ratings)) == (users, items, events)
    assert ratings.select("userId", "movieId").is_unique().all()
    assert (ratings["userId"].value_counts()["count"] >= 10).all()
    assert_released(ratings, pl.read_csv(tmp_path / "odd" / "movies.csv"))


def test_several_chunks_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate_module, "USERS_AT_ONCE", 64)
    simulate(tmp_path / "chunks", users=200, items=300, events=8000)
    ratings = pl.read_csv(tmp_path / "chunks" / "ratings.csv")
    assert (ratings["userId"].n_unique(), ratings["movieId"].n_unique(), len(ratings)) == (200, 300, 8000)
    assert ratings.equals(ratings.sort("userId", "movieId"))
    assert ratings.select("userId", "movieId").is_unique().all()
    assert_released(ratings, pl.read_csv(tmp_path / "chunks" / "movies.csv"))


def test_sizes_are_those_of_movielens_20m() -> None:
    assert simulate_module.SIZES["ml-20m"] == (138_493, 26_744, 20_000_263, 20)
    users, items, events, shortest = simulate_module.SIZES["demo"]
    assert events >= max(items, users * shortest)


def test_events_follow_the_users_unless_said(tmp_path: Path) -> None:
    simulate(tmp_path / "few", users=100, items=300)
    assert len(pl.read_csv(tmp_path / "few" / "ratings.csv")) == 4500


def assert_released(ratings: pl.DataFrame, movies: pl.DataFrame) -> None:
    joined = ratings.join(movies, on="movieId").select(
        released=pl.col("title").str.extract(r"\((\d{4})\)$").cast(pl.Int64),
        rated=pl.from_epoch("timestamp", time_unit="s").dt.year().cast(pl.Int64),
    )
    assert len(joined) == len(ratings)
    assert (joined["released"] <= joined["rated"]).all()


def test_nothing_is_rated_before_its_release(ratings: pl.DataFrame, movies: pl.DataFrame) -> None:
    assert_released(ratings, movies)
    years = movies["title"].str.extract(r"\((\d{4})\)$").cast(pl.Int64).to_numpy()
    assert years.min() < 1975
    assert years.max() > 2010


def test_titles_and_genres(world: Path, movies: pl.DataFrame) -> None:
    titles = "\n".join(movies["title"])
    assert ", The (" in titles
    assert '"' in titles
    assert "é" in titles
    genres = movies["genres"].str.split("|")
    assert {genre for own in genres for genre in own} <= {*GENRES, NO_GENRES}
    assert genres.list.len().max() == 3
    with (world / "movies.csv").open(encoding="utf-8", newline="") as file:  # another reader sees the same
        rows = list(csv.reader(file))
    assert rows[1:] == [[str(value) for value in row] for row in movies.rows()]


def test_some_movies_have_no_genres(tmp_path: Path) -> None:
    simulate(tmp_path / "many", users=100, items=2000, events=4500)
    genres = pl.read_csv(tmp_path / "many" / "movies.csv")["genres"]
    assert 0 < (genres == NO_GENRES).mean() < 0.03


def test_sessions_and_ties(ratings: pl.DataFrame) -> None:
    tied = ratings.select(pl.len().over("userId", "timestamp") > 1).to_numpy()
    assert 0.15 < tied.mean() < 0.25
    times = ratings.sort("userId", "timestamp")
    gaps = times.select(pl.col("timestamp").diff().over("userId")).drop_nulls().to_numpy()
    assert (gaps < 3600).mean() > 0.8  # most within a session
    days = gaps[gaps > 3600] / 86_400
    assert 3 < np.median(days) < 30
    assert days.max() > 90
    assert times["timestamp"].to_numpy().min() >= simulate_module.FIRST_RATING
    assert times["timestamp"].to_numpy().max() <= simulate_module.LAST_RATING


def test_popularity_has_a_head_and_a_long_tail(ratings: pl.DataFrame) -> None:
    counts = ratings["movieId"].value_counts()["count"].sort(descending=True)
    assert counts[: ITEMS // 10].sum() > 0.28 * EVENTS
    assert counts[0] > 5 * counts[ITEMS // 2]


def test_a_seed_is_a_world(world: Path, tmp_path: Path) -> None:
    simulate(tmp_path / "again", users=USERS, items=ITEMS, events=EVENTS, seed=0)
    simulate(tmp_path / "other", users=USERS, items=ITEMS, events=EVENTS, seed=1)
    for name in ("ratings.csv", "movies.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def leave_one_out(ratings: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items by user and time, ties as in the file; users; place counted from each user's last event."""
    table = ratings.with_columns(item=pl.col("movieId").rank("dense") - 1).sort(
        "userId", "timestamp", maintain_order=True
    )
    user = table["userId"].to_numpy() - 1
    from_end = table.select(pl.int_range(pl.len()).reverse().over("userId")).to_series().to_numpy()
    return table["item"].to_numpy().astype(np.int64), user, from_end


def ndcg(scores: np.ndarray, user: np.ndarray, item: np.ndarray, from_end: np.ndarray) -> float:
    """NDCG@10 of the last events over all items, known ones filtered, ties counted against the scores."""
    scores, known, target = scores.copy(), from_end > 0, item[from_end == 0]
    rows = np.arange(len(target))
    wanted = scores[rows, target]
    scores[user[known], item[known]] = -np.inf
    rank = (scores >= wanted[:, None]).sum(axis=1)
    return float(np.where(rank <= 10, 1 / np.log2(rank + 1), 0).mean())


@pytest.mark.parametrize("options", [{"users": USERS, "items": ITEMS, "events": EVENTS}, {}], ids=["small", "demo"])
def test_transitions_say_what_popularity_does_not(options: dict[str, Any], tmp_path: Path) -> None:
    simulate(tmp_path / "world", seed=5, **options)
    item, user, from_end = leave_one_out(pl.read_csv(tmp_path / "world" / "ratings.csv"))
    count, train = item.max() + 1, from_end >= 2
    popularity = np.bincount(item[train], minlength=count).astype(np.float64)
    pairs = train[1:] & (user[1:] == user[:-1])
    markov = np.zeros((count, count))
    np.add.at(markov, (item[:-1][pairs], item[1:][pairs]), 1)
    popular = ndcg(np.tile(popularity, (user.max() + 1, 1)), user, item, from_end)
    first_order = ndcg(markov[item[from_end == 1]] + popularity / popularity.sum(), user, item, from_end)
    assert popular > 0.02
    assert first_order > 3 * popular


def test_taste_lasts(ratings: pl.DataFrame, movies: pl.DataFrame) -> None:
    """Two events of a user, far apart, share genres more often than events of different users do."""
    genres = movies.with_columns(own=pl.col("genres").str.split("|").list.first())
    events = ratings.join(genres, on="movieId").sort("userId", "timestamp")
    sides = events.group_by("userId", maintain_order=True).agg(
        start=pl.col("own").head(5),
        end=pl.col("own").tail(5),  # several of each, since one pair a user says little
    )
    start, end = (np.stack(sides[side].to_list()) for side in ("start", "end"))  # (users, 5)

    def alike(end: np.ndarray) -> np.ndarray:
        return (start[:, :, None] == end[:, None]).mean(axis=(1, 2))

    own = alike(end) - np.mean([alike(np.roll(end, shift, axis=0)) for shift in range(1, 50)], axis=0)
    assert own.mean() > 3 * own.std() / len(own) ** 0.5


def test_only_a_simulated_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ratings.csv").write_text("dear")
    with pytest.raises(FileExistsError, match="choose another --output"):
        simulate(tmp_path / "mine", users=50, items=300)
    assert (tmp_path / "mine" / "ratings.csv").read_text() == "dear"
    (tmp_path / "v1.0").mkdir()  # empty: nothing to lose
    simulate(tmp_path / "v1.0", users=50, items=300)
    simulate(tmp_path / "v1.0", users=60, items=300)
    assert pl.read_csv(tmp_path / "v1.0" / "ratings.csv")["userId"].max() == 60


def test_impossible_sizes_say_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"400 ratings do not fit 50 users with 10 to .* expected 500 to"):
        simulate(tmp_path / "few", users=50, items=300, events=400)
    with pytest.raises(ValueError, match="50,000 ratings do not fit"):
        simulate(tmp_path / "many", users=50, items=300, events=50_000)
    with pytest.raises(ValueError, match=r"20 movies are too few.*raise --items"):
        simulate(tmp_path / "none", users=50, items=20)
    with pytest.raises(ValueError, match="users is 0, expected at least 1"):
        simulate(tmp_path / "none", users=0, items=300)
    assert not list(tmp_path.iterdir())
