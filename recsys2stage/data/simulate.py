"""A simulated world in MovieLens's own layout: ratings that look real, from rules that are known.

Movies belong to niches, each a point in a space of tastes with genres of its own, and are released over a century.
Users have a taste that drifts from session to session. What a user sees next is, more often than not, one of the few
likely successors of a recent movie; else it is drawn by the user's taste times the movies' popularity at that time. So
transitions can be learnt by a sequential model and not by popularity, and time, genre and quality say something too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import polars as pl
from tqdm import tqdm

from recsys2stage.artifacts import atomic_write
from recsys2stage.data.options import check_option

RATINGS, MOVIES, README = "ratings.csv", "movies.csv", "README.txt"
MARK = "SIMULATED DATA"  # the README's first words: only a folder that has them is replaced
OFTEN = {  # how many movies of MovieLens-20M have a genre
    **{"Action": 3520, "Adventure": 2329, "Animation": 1027, "Children": 1139, "Comedy": 8374, "Crime": 2939},
    **{"Documentary": 2471, "Drama": 13344, "Fantasy": 1412, "Film-Noir": 330, "Horror": 2611, "Musical": 1036},
    **{"Mystery": 1514, "Romance": 4127, "Sci-Fi": 1743, "Thriller": 4178, "War": 1194, "Western": 676},
}
GENRES = tuple(OFTEN)
NO_GENRES = "(no genres listed)"

DAY = 86_400
OPEN, CLOSE = 789_652_009, 1_427_784_002  # first and last rating of MovieLens-20M: 1995-01-09, 2015-03-31
MONTH = 30 * DAY
USERS_AT_ONCE = 8192  # of whom a table says which movies they have seen: 220 MB in the largest world

WIDTH = 8  # of the space of tastes
NICHES = 36
SHARPNESS = 2.0  # how strongly taste decides between niches
DRIFT = 0.3  # share of a taste that is new in each session
POWER, HEAD = 1.7, 30  # popularity is (rank + items / HEAD) ** -POWER
FOLLOW = 0.6  # how often the next movie follows a recent one, where it can
FOLLOW_TRIES, TASTE_TRIES = 3, 8  # what is drawn may be seen or not out yet; then once more, then something else
FROM_LAST = 0.5
SUCCESSORS = np.array([0.45, 0.25, 0.15, 0.1, 0.05])  # how often each of a movie's successors is the one

FORMS = (
    "{adjective} {noun}",
    "{adjective} {noun}",
    "{adjective} {noun}, The",
    "{noun}, A",
    "{noun} of {place}, The",
    "{noun} in {place}",
    "{adjective} {noun} II",
    "{place}, My {noun}",
    '"{adjective}" {noun}',
    "{place}: The {adjective} {noun}",
    "{adjective} {noun}, The (a.k.a. {noun} of {place})",
)
ADJECTIVES = (
    "Silent Golden Broken Hidden Last First Long Dark Bright Lonely Wild Quiet Red Blue White Secret Perfect Lost"
)
NOUNS = (
    "River House Night Train Garden Letter Stranger Summer Winter Promise Road Island Song Shadow Mirror Bridge Storm"
)
PLACES = "Lisbon Montréal Cairo Brooklyn Kyoto Århus Texas Venice Bombay Málaga Warsaw Nairobi Cork Havana Oslo Lima"


class Counts(NamedTuple):
    users: int
    items: int
    events: int
    shortest: int  # events of a user at least


Size = Literal["demo", "ml-20m"]
SIZES = {"demo": Counts(3_000, 900, 135_000, 10), "ml-20m": Counts(138_493, 26_744, 20_000_263, 20)}


def simulate(
    output: Path = Path("data/raw/demo"),
    size: Size = "demo",
    users: int | None = None,
    items: int | None = None,
    events: int | None = None,
    seed: int = 0,
) -> None:
    """Writes a simulated world in the layout of MovieLens-20M: ratings.csv, movies.csv and a README.txt that says so.

    Args:
        output: folder to write; an earlier simulation there is replaced, anything else is not.
        size: demo (3,000 users, 900 movies, 135,000 ratings) or ml-20m (138,493, 26,744, 20,000,263).
        users: number of users instead of the size's.
        items: number of rated movies instead of the size's; movies.csv has 2 % more, which nobody rated.
        events: number of ratings; by default as many for each user as in the size.
        seed: the same seed gives the same bytes.
    """
    check_option("size", size, Size)
    default = SIZES[size]
    users, items = default.users if users is None else users, default.items if items is None else items
    counts = Counts(
        users, items, round(default.events / default.users * users) if events is None else events, default.shortest
    )
    if output.exists() and not _may_be_replaced(output):
        raise FileExistsError(
            f"{output} exists and is no simulated world, so it is not replaced; choose another --output"
        )
    rng = np.random.default_rng(seed)
    catalogue = Catalogue(counts.items, rng)
    lengths = _lengths(counts, int((catalogue.available < OPEN).sum() * 0.55), rng)
    chunks = np.array_split(np.arange(counts.users), -(-counts.users // USERS_AT_ONCE))
    rated = np.zeros(len(catalogue.release), np.int64)  # how often each movie was
    with atomic_write(output) as temporary:
        temporary.mkdir(exist_ok=True)  # a name with a dot in it is a folder, too
        with (temporary / RATINGS).open("wb") as file:
            file.write(b"userId,movieId,rating,timestamp\n")
            for chunk in tqdm(chunks, desc="simulate", unit=f" x {len(chunks[0]):,} users", disable=None):
                happened = _events(catalogue, lengths[chunk], rng)
                if chunk is chunks[-1]:
                    _rate_the_rest(catalogue, happened, rated, rng)
                rated += np.bincount(happened.item, minlength=len(rated))
                _write_ratings(file, catalogue, happened, int(chunk[0]) + 1, rng)
        _write_movies(temporary / MOVIES, catalogue, rng)
        (temporary / README).write_text(_readme(counts, size, seed), encoding="utf-8")
    print(f"{output}: {counts.users:,} users, {counts.items:,} rated movies, {counts.events:,} ratings, all simulated")


class Catalogue:
    """The movies: when they appear, what they are like, how popular they are and what follows them. N movies, M months.

    Attributes:
        movie_id: (N,) as in the files, with gaps, in the order in which movies come to the site.
        release: (N,) seconds since 1970.
        available: (N,) release, or never for the movies that nobody rates.
        niche: (N,) movies are sorted by niche; those of niche n are [bounds[n], bounds[n + 1]).
        quality: (N,) how much better than others a movie is.
        successor: (N, S) movies that are likely to follow, the likeliest first.
        share: (M, N) month + the share of the popularity in that month of all movies up to this one.
    """

    def __init__(self, items: int, rng: np.random.Generator) -> None:
        count = items + items // 50
        self.primary = rng.choice(len(GENRES), NICHES, p=np.array([*OFTEN.values()]) / sum(OFTEN.values()))
        self.secondary = (self.primary + rng.integers(1, len(GENRES), NICHES)) % len(GENRES)
        genre = rng.standard_normal((len(GENRES), WIDTH))
        niches = genre[self.primary] + 0.6 * genre[self.secondary] + 0.4 * rng.standard_normal((NICHES, WIDTH))
        self.niches = niches / np.linalg.norm(niches, axis=1, keepdims=True)  # (NICHES, WIDTH)
        self.niche = np.sort(rng.choice(NICHES, count, p=rng.dirichlet(np.full(NICHES, 4.0))))
        self.bounds = np.searchsorted(self.niche, np.arange(NICHES + 1))

        # six in ten are there when the site opens, most of them from the last decades; none comes in the last year
        old = OPEN - 400 * DAY - np.minimum(rng.exponential(14 * 365, count), 70 * 365) * DAY
        young = rng.uniform(OPEN - 400 * DAY, CLOSE - 365 * DAY, count)
        self.release = np.where(rng.random(count) < 0.6, old, young).astype(np.int64)
        ids = np.sort(rng.choice(5 * count, count, replace=False)) + 1
        self.movie_id = ids[np.argsort(np.lexsort((rng.random(count), self.release.clip(OPEN))))]

        self.quality = rng.standard_normal(count)
        rank = np.argsort(np.argsort(-(0.7 * self.quality + rng.standard_normal(count))))
        weight = (rank + items / HEAD) ** -POWER
        unrated = rng.permutation(count)[items:]
        weight[unrated] = 0.0
        self.available = self.release.copy()
        self.available[unrated] = np.iinfo(np.int64).max
        self.successor = self._successors(weight, rng)
        self.share = self._share(weight, rng)

    def _successors(self, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Movies alike, of the same years and well known, from the same niche; the last of them from anywhere."""
        successor = np.empty((len(weight), len(SUCCESSORS)), np.int64)
        for start, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            if start == stop:
                continue
            kind, years = 0.6 * rng.standard_normal((stop - start, WIDTH)), self.release[start:stop] / (365 * DAY)
            apart = (kind**2).sum(1)[:, None] + (kind**2).sum(1) - 2 * kind @ kind.T  # squared distances
            apart += abs(years[:, None] - years) / 6
            score = 0.7 * np.log(weight[start:stop].clip(1e-99)) - apart
            np.fill_diagonal(score, -np.inf)
            best = np.argsort(-score, axis=1, kind="stable")[:, : len(SUCCESSORS)] + start
            successor[start:stop] = np.pad(best, ((0, 0), (0, len(SUCCESSORS) - best.shape[1])), mode="edge")
        successor[:, -1] = rng.choice(len(weight), len(weight), p=weight / weight.sum())
        return successor

    def _share(self, weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """New movies draw attention, which fades over years to a fifth; niches come into fashion and go out of it."""
        months = np.arange((CLOSE - OPEN) // MONTH + 1)[:, None]
        age = (OPEN + MONTH * months - self.release) / (365 * DAY)  # (M, N) years
        fashion = np.exp(0.5 * np.sin(2 * np.pi * (months / 60 + rng.random(NICHES))))  # (M, NICHES)
        mass = np.where(age >= 0, 0.25 + np.exp(-age.clip(0) / 3), 0.0) * weight * fashion[:, self.niche]
        total = np.cumsum(mass, axis=1)
        return total / total[:, -1:] + months


@dataclass
class Events:
    """E events of some users, each user's in the order in which they happen."""

    owner: np.ndarray  # (E,) which of the users
    time: np.ndarray  # (E,) seconds since 1970
    item: np.ndarray  # (E,) row of the catalogue
    liking: np.ndarray  # (E,) how well the movie's niche suits the user's taste at that time


def _lengths(counts: Counts, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Events of each user: lognormal as in MovieLens, from shortest to longest, counts.events in all."""
    if longest < counts.shortest:
        raise ValueError(
            f"{counts.items:,} movies are too few: a user can rate {longest:,} of them, expected {counts.shortest} or "
            "more; raise --items"
        )
    fewest, most = max(counts.users * counts.shortest, counts.items), counts.users * longest
    if min(counts.users, counts.items) < 1 or not fewest <= counts.events <= most:
        raise ValueError(
            f"{counts.events:,} ratings do not fit {counts.users:,} users with {counts.shortest} to {longest:,} each "
            f"and {counts.items:,} movies with at least one each; expected {fewest:,} to {most:,} ratings"
        )
    spread = rng.lognormal(0.0, 1.38, counts.users)
    lengths = np.full(counts.users, counts.shortest)
    while left := counts.events - lengths.sum():
        room = longest - lengths
        open_to = np.flatnonzero(room > 0)
        share = spread[open_to] / spread[open_to].sum() * left
        lengths[open_to] += np.minimum(share, room[open_to]).astype(np.int64)
        if share.max() < 1:  # what rounding left goes one by one
            lengths[rng.choice(open_to, min(left, len(open_to)), replace=False)] += 1
    return lengths


def _events(catalogue: Catalogue, lengths: np.ndarray, rng: np.random.Generator) -> Events:
    """What some users do, step by step over their histories, all users at once in each step."""
    order = np.argsort(-lengths, kind="stable")  # longest first: those still active at a step come first
    lengths = lengths[order]
    first = np.cumsum(lengths) - lengths
    time, fresh = _times(lengths, rng)
    month = (time - OPEN) // MONTH
    months = np.arange(len(catalogue.share))[:, None]
    edges = np.concatenate([months, catalogue.share], axis=1)[:, catalogue.bounds]  # (M, NICHES + 1)
    niche_share = np.diff(edges, axis=1)  # (M, NICHES)
    flat, count = catalogue.share.ravel(), len(catalogue.release)

    item, liking = np.empty(len(time), np.int64), np.empty(len(time), np.float32)
    seen = np.zeros((len(lengths), count), np.bool_)
    taste = rng.standard_normal((len(lengths), WIDTH))
    suits = np.empty((len(lengths), NICHES), np.float32)  # how well a niche suits the taste
    up_to = np.empty((len(lengths), NICHES), np.float32)  # chance of a niche or one before it
    last = before = np.zeros(len(lengths), np.int64)
    choices = np.cumsum(SUCCESSORS)[:-1]
    for step in range(lengths[0]):
        active = int(np.searchsorted(-lengths, -step))  # users with more than `step` events
        at = first[:active] + step
        now, when = time[at], month[at]
        new = np.flatnonzero(fresh[at])
        taste[new] = np.sqrt(1 - DRIFT**2) * taste[new] + DRIFT * rng.standard_normal((len(new), WIDTH))
        suits[new] = SHARPNESS * taste[new] @ catalogue.niches.T
        chance = np.exp(suits[new]) * niche_share[when[new]]
        up_to[new] = np.cumsum(chance, axis=1) / chance.sum(axis=1, keepdims=True)

        chosen = np.full(active, -1)
        rows = np.flatnonzero(rng.random(active) < FOLLOW * (step > 0))
        for _ in range(FOLLOW_TRIES):
            recent = np.where(rng.random(len(rows)) < FROM_LAST, last[rows], before[rows])
            candidate = catalogue.successor[recent, np.searchsorted(choices, rng.random(len(rows)))]
            good = (catalogue.available[candidate] <= now[rows]) & ~seen[rows, candidate]
            chosen[rows[good]] = candidate[good]
            rows = rows[~good]
        rows = np.flatnonzero(chosen < 0)
        for _ in range(TASTE_TRIES):
            niche = (rng.random((len(rows), 1)) > up_to[rows]).sum(axis=1).clip(max=NICHES - 1)
            low, high = edges[when[rows], niche], edges[when[rows], niche + 1]
            place = np.searchsorted(flat, low + (high - low) * rng.random(len(rows)), side="right")
            candidate = (place - when[rows] * count).clip(0, count - 1)
            good = (catalogue.available[candidate] <= now[rows]) & ~seen[rows, candidate]
            chosen[rows[good]] = candidate[good]
            rows = rows[~good]
            if not len(rows):
                break
        if len(rows):  # who has seen nearly all that taste offers takes anything popular
            mass = np.diff(catalogue.share[when[rows]], axis=1, prepend=when[rows][:, None]) * ~seen[rows]
            total = np.cumsum(mass, axis=1)
            chosen[rows] = (total > rng.random((len(rows), 1)) * total[:, -1:]).argmax(axis=1)

        seen[np.arange(active), chosen] = True
        item[at], liking[at] = chosen, suits[np.arange(active), catalogue.niche[chosen]]
        before, last = (last[:active] if step else chosen), chosen
    return Events(np.repeat(order, lengths), time, item, liking)


def _times(lengths: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Times of users' events (E,), and which of them begin a session (E,).

    Ratings come in sessions, seconds and minutes apart, a tenth of them in the same second as the one before; between
    sessions lie days to months.
    """
    total, first = int(lengths.sum()), np.cumsum(lengths) - lengths
    sessions = np.repeat(np.exp(rng.normal(np.log(12), 0.5, len(lengths))), lengths)  # mean events of a session
    fresh = rng.random(total) * sessions < 1
    fresh[first] = True
    within = np.exp(rng.normal(np.log(50), 1.1, total)).clip(1, 1800)
    within[rng.random(total) < 0.12] = 0
    between = (np.exp(rng.normal(np.log(10), 1.5, total)).clip(0.3, 500) * DAY) * fresh
    between[first] = 0
    within *= ~fresh
    # who would not fit between the first and the last day comes more often
    spans, inside = np.add.reduceat(between, first), np.add.reduceat(within, first)
    room = CLOSE - OPEN - DAY - inside
    shrink = np.minimum(1, 0.95 * room / spans.clip(1))
    gaps = (within + between * np.repeat(shrink, lengths)).astype(np.int64)
    passed = np.cumsum(gaps)
    passed -= np.repeat(passed[first], lengths)
    ends = passed[first + lengths - 1]
    begin = OPEN + (rng.random(len(lengths)) * (CLOSE - OPEN - ends)).astype(np.int64)
    return np.repeat(begin, lengths) + passed, fresh


def _rate_the_rest(catalogue: Catalogue, events: Events, rated: np.ndarray, rng: np.random.Generator) -> None:
    """Movies that nobody rated take the place of others rated more than once, after their release if possible."""
    times = rated + np.bincount(events.item, minlength=len(rated))
    missing = np.flatnonzero((catalogue.available <= CLOSE) & (times == 0))
    shuffled = rng.permutation(len(events.item))
    needed = np.zeros(len(shuffled), np.bool_)
    needed[shuffled[np.unique(events.item[shuffled], return_index=True)[1]]] = True  # one event of each movie
    spare = np.flatnonzero(~needed | (rated[events.item] > 0))
    if len(spare) < len(missing):
        raise ValueError(
            f"{len(missing):,} movies were never rated and {len(spare):,} ratings can be changed: raise --events"
        )
    spare = spare[np.argsort(events.time[spare], kind="stable")]
    for item in missing[np.argsort(-catalogue.release[missing], kind="stable")]:
        after = int(np.searchsorted(events.time[spare], catalogue.release[item]))
        place = int(rng.integers(min(after, len(spare) - 1), len(spare)))
        event, spare = spare[place], np.delete(spare, place)
        events.item[event] = item
        catalogue.release[item] = min(catalogue.release[item], events.time[event])  # free to move: nobody else rated it


def _write_ratings(file: IO[bytes], catalogue: Catalogue, events: Events, first: int, rng: np.random.Generator) -> None:
    """Ratings by quality, by how the movie suits the user, by the user's habit and by chance."""
    habit = rng.normal(3.2, 0.4, int(events.owner.max()) + 1)
    rating = habit[events.owner] + 0.35 * catalogue.quality[events.item] + 0.15 * events.liking
    rating = (np.round(2 * (rating + rng.normal(0, 0.75, len(rating)))) / 2).clip(0.5, 5)
    movie = catalogue.movie_id[events.item]
    order = np.argsort(events.owner * (catalogue.movie_id.max() + 1) + movie)
    columns = {"userId": events.owner + first, "movieId": movie, "rating": rating, "timestamp": events.time}
    table = pl.DataFrame({name: column[order] for name, column in columns.items()})
    table.write_csv(file, include_header=False, float_precision=1)


def _write_movies(path: Path, catalogue: Catalogue, rng: np.random.Generator) -> None:
    order = np.argsort(catalogue.movie_id)
    years = catalogue.release.astype("datetime64[s]").astype("datetime64[Y]").astype(int) + 1970
    adjectives, nouns, places = ADJECTIVES.split(), NOUNS.split(), PLACES.split()
    titles, genres = [], []
    for movie in order:
        title = rng.choice(FORMS).format(
            adjective=rng.choice(adjectives), noun=rng.choice(nouns), place=rng.choice(places)
        )
        titles.append(f"{title} ({years[movie]})")
        niche = catalogue.niche[movie]
        chance = rng.random(3)
        own = {int(catalogue.primary[niche])}
        own |= {int(catalogue.secondary[niche])} if chance[0] < 0.6 else set()
        own |= {int(rng.integers(len(GENRES)))} if chance[1] < 0.15 else set()
        genres.append("|".join(GENRES[genre] for genre in sorted(own)) if chance[2] > 0.01 else NO_GENRES)
    pl.DataFrame({"movieId": catalogue.movie_id[order], "title": titles, "genres": genres}).write_csv(path)


def _may_be_replaced(path: Path) -> bool:
    if not path.is_dir() or not any(path.iterdir()):
        return path.is_dir()
    readme = path / README
    return readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(MARK)


def _readme(counts: Counts, size: str, seed: int) -> str:
    return f"""{MARK}

These ratings, movies and users do not exist. They were made by `recsys simulate` ({size}, seed {seed}) in the layout of
MovieLens-20M, to try a recommender on. No person rated anything, and nothing here comes from MovieLens but the layout.

{counts.users:,} users, {counts.items:,} rated movies, {counts.events:,} ratings
{RATINGS}: userId,movieId,rating,timestamp, sorted by userId, then movieId; at least {counts.shortest} ratings a user
{MOVIES}: movieId,title,genres; some movies have no rating
"""
