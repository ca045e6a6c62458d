"""Small worlds whose answers are known."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from recsys2stage.prepare import prepare
from recsys2stage.sources import MovieLens

Event = tuple[int, int, float, int]  # user, item, rating, time


def write_movielens(folder: Path, events: Iterable[Event], movies: Mapping[int, tuple[str, str]] | None = None) -> Path:
    """Writes ratings.csv and movies.csv in the layout of MovieLens 20M.

    Args:
        folder: made where it is missing.
        events: in the order of the file.
        movies: item -> (title, genres); what is not named is "Movie <item> (2000)" without genres.
    """
    folder.mkdir(parents=True, exist_ok=True)
    events, movies = list(events), movies or {}
    rows = (f"{user},{item},{rating},{time}" for user, item, rating, time in events)
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows, ""]))
    lines = ["movieId,title,genres"]
    for item in sorted({event[1] for event in events} | set(movies)):
        title, genres = movies.get(item, (f"Movie {item} (2000)", "(no genres listed)"))
        lines.append(f'{item},"{title}",{genres}')
    (folder / "movies.csv").write_text("\n".join([*lines, ""]))
    return folder


def cycle_world(folder: Path, users: int = 120, items: int = 40, length: int = 12) -> Path:
    """Users walk the cycle 1, 2, ..., items, 1, ... from different starts, an event a day; gives the dataset.

    The next item is always the newest plus one. Histories are shorter than the cycle, so it is never known already;
    every item is as popular as any other, so popularity says nothing. Item i is of genre "Even" or "Odd".
    """
    events = [
        (user, (user * 7 + step) % items + 1, 4.0, 1_000_000_000 + user * 1_000 + step * 86_400)
        for user in range(1, users + 1)
        for step in range(length)
    ]
    movies = {item: (f"Movie {item} ({1970 + item % 40})", ("Even", "Odd")[item % 2]) for item in range(1, items + 1)}
    prepare(MovieLens(write_movielens(folder / "raw", events, movies)), folder / "data")
    return folder / "data"


def ragged_world(folder: Path, users: int = 30, items: int = 25) -> Path:
    """Users of 1 to 24 events in random order, no item twice; returns the prepared dataset."""
    rng = np.random.default_rng(7)
    events = [
        (user, int(item) + 1, 4.0, 10**9 + int(time))
        for user in range(users)
        for item, time in zip(
            rng.permutation(items)[: 1 + 7 * user % 24], rng.integers(10**6, size=items), strict=False
        )
    ]
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data")
    return folder / "data"


def two_walks_world(folder: Path, users: int = 200, items: int = 20, length: int = 9) -> Path:
    """Users take turns on two cycles, 1..items and items + 1..2 items, from independent starts; gives the dataset.

    The next item follows the last but one; the newest says only on which cycle it is. Histories are of `length` to
    `length` + 3 events, so that no place belongs to either cycle.
    """
    rng = np.random.default_rng(3)
    starts = rng.integers(items, size=(users, 2))
    events = [
        (user, int((starts[user, step % 2] + step // 2) % items + 1 + items * (step % 2)), 4.0, 10**9 + step * 86_400)
        for user in range(users)
        for step in range(length + user // 2 % 4)
    ]
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data")
    return folder / "data"


def gap_world(folder: Path, users: int = 300, items: int = 40, length: int = 10) -> Path:
    """The longer a user waits the further the next item is, 1 + 9 k after 16^k minutes, k < 4; gives the dataset.

    The gap is drawn among those that lead to an item not met before. Without it four items are as likely.
    """
    rng = np.random.default_rng(4)
    events: list[Event] = []
    for user in range(users):
        item, time, met = int(rng.integers(items)), 10**9, set[int]()
        for _ in range(length):
            met.add(item)
            events.append((user, item + 1, 4.0, time))
            waits = [k for k in range(4) if (item + 1 + 9 * k) % items not in met]
            if not waits:
                break
            k = int(rng.choice(waits))
            item, time = (item + 1 + 9 * k) % items, time + 60 * 16**k
    prepare(MovieLens(write_movielens(folder / "raw", events)), folder / "data")
    return folder / "data"
