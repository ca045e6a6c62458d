"""Small worlds whose answers are known."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from recsys2stage.artifacts import checksums, write_manifest
from recsys2stage.checkpoints import build
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, MovieLens, SideTable, Table
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.towers import TOWERS, TwoTower
from recsys2stage.trust import arguments

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


def forks_world(
    folder: Path,
    decides: Literal["target_action", "action", "rating"],
    users: int = 300,
    items: int = 60,
    length: int = 8,
) -> Path:
    """After item i comes i + 1 or i + 7, as the world has it; gives the dataset.

    Every event is of the kind "look" or "buy" and rated 1 or 5, at random. A purchase or the better rating leads to
    i + 7. Without what decides, both are as likely; no item comes twice, so nothing is learned from what is known.

    Args:
        decides: the kind of the next event (asked), or the kind or the rating of the newest one.
    """
    rng = np.random.default_rng(5)
    rows = ["user_id,item_id,action,rating,timestamp"]
    for user in range(users):
        item, far = int(rng.integers(items)), False
        for place in range(length):
            buys, likes = rng.random(2) < 0.5
            if place:
                item = (item + (7 if (buys if decides == "target_action" else far) else 1)) % items
            far = buys if decides == "action" else likes
            rows.append(f"{user},{item + 1},{'buy' if buys else 'look'},{5 if likes else 1},{10**9 + place * 86_400}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.csv").write_text("\n".join([*rows, ""]))
    prepare(Table(folder / "events.csv", action="action", rating="rating"), folder / "data")
    return folder / "data"


def cold_world(folder: Path, users: int = 400, items: int = 1_000, groups: int = 40, length: int = 16) -> Path:
    """After an item of a group (its genre) comes any item of the next group; half of the items are cold.

    Cold ones are seen in no event but the last of a user. Since they are withheld, the groups of a history have gaps,
    and the target lies 1 group after the newest known item with probability 1/2, 2 groups with 1/4, ...; gives the
    dataset.
    """
    rng = np.random.default_rng(6)
    starts = rng.integers(groups, size=users)
    events = [
        (user, int((starts[user] + step) % groups + groups * rng.integers(items // groups)) + 1, 4.0, 10**9 + step)
        for user in range(users)
        for step in range(length)
    ]
    movies = {item: (f"Movie {item} (2000)", f"Group {(item - 1) % groups}") for item in range(1, items + 1)}
    events += [(users, item, 4.0, 10**9) for item in movies]  # one who has seen everything, so that all items are there
    prepare(MovieLens(write_movielens(folder / "raw", events, movies)), folder / "data", cold_items=0.5)
    return folder / "data"


def directions_world(folder: Path, users: int = 900, items: int = 40) -> Path:
    """Users of side "on" go from item i to i + 1 of a cycle, those of side "back" to i − 1; gives the dataset.

    A third of the users have three events, of which the first is all that is known when the second, the validation
    target, is asked for; the others have two, and train. So only the user's side says which way it goes.
    """
    rng = np.random.default_rng(7)
    rows, people = ["user_id,item_id,timestamp"], ["user_id,side,age"]
    for user in range(users):
        way, start = (1, -1)[user % 2], int(rng.integers(items))
        people.append(f"{user},{'on' if way == 1 else 'back'},{rng.integers(18, 80)}")
        for step in range(3 if user % 3 == 0 else 2):
            rows.append(f"{user},{(start + way * step) % items + 1},{10**9 + step * 86_400}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.csv").write_text("\n".join([*rows, ""]))
    (folder / "users.csv").write_text("\n".join([*people, ""]))
    features = {"side": Feature("categorical"), "age": Feature("numeric")}
    source = Table(folder / "events.csv", users=SideTable("users.csv", "user_id", features))
    prepare(source, folder / "data")
    return folder / "data"


def seal(folder: Path, **changed: object) -> None:
    """Writes the manifest anew after its folder's files were changed, as whoever made the folder could."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) | changed
    path.write_text(json.dumps(manifest | {"files": checksums(folder)}), encoding="utf-8")


def untrained_index(folder: Path, dataset: Dataset, seed: int = 9, inputs: Iterable[str] = ()) -> TwoTower:
    """Writes what a second retriever leaves: random weights, told the request time; gives its towers."""
    torch.manual_seed(seed)
    time = {"class_path": "recsys2stage.retrieval.encoders.times.RequestGap"}
    encoder = {
        "class_path": "recsys2stage.retrieval.encoders.Transformer",
        "init_args": {"layers": 1, "heads": 2, "time": time},
    }
    options = {"num_items": dataset.num_items, "max_length": 5, "dim": 8, "encoder": encoder}
    options |= {
        "inputs": [{"class_path": name} for name in inputs],
        "actions": ["look"],
    }
    towers = TwoTower(**arguments(TwoTower, options, folder))
    for part in towers.modules():  # so that what is told of times and ratings shows
        if isinstance(part, torch.nn.Embedding):
            torch.nn.init.normal_(part.weight)
    folder.mkdir()
    index = Exact()
    index.build(towers.all_item_vectors().detach().numpy())
    index.save(folder)
    torch.save(towers.state_dict(), folder / TOWERS)
    facts = {"split_hash": dataset.manifest["split_hash"], "request_time": "target", "towers": options}
    write_manifest(folder, "index", {}, {"data": dataset.path}, **facts)
    return build(TwoTower, options, towers.state_dict(), folder)


def featured_world(folder: Path, users: int = 40, items: int = 30, length: int = 9) -> Path:
    """Events with times, ratings and actions, of items and users with features: all that a model can read."""
    rng = np.random.default_rng(8)
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["user_id,item_id,action,rating,timestamp"]
    for user in range(users):
        for step, item in enumerate(rng.permutation(items)[: length - user % 4].tolist()):
            action, rating, time = ("look", "buy")[item % 2], 1 + rng.integers(5), 10**9 + user * 1_000 + step * 86_400
            rows.append(f"{user},{item + 1},{action},{rating},{time}")
    ages = ["user_id,side,age", *(f"{user},{('on', 'back')[user % 2]},{20 + user}" for user in range(users))]
    genres = ["item_id,genre,price", *(f"{item + 1},{'abc'[item % 3]},{item / 10}" for item in range(items))]
    for name, lines in (("events", rows), ("users", ages), ("items", genres)):
        (folder / f"{name}.csv").write_text("\n".join([*lines, ""]))
    kinds = {"users": {"side": "categorical", "age": "numeric"}, "items": {"genre": "categorical", "price": "numeric"}}
    sides = {
        side: SideTable(f"{side}.csv", f"{side[:-1]}_id", {name: Feature(kind) for name, kind in features.items()})
        for side, features in kinds.items()
    }
    prepare(Table(folder / "events.csv", action="action", rating="rating", **sides), folder / "data")
    return folder / "data"
