"""MovieLens datasets of GroupLens (https://grouplens.org/datasets/movielens/), in the .csv and .dat layouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl

from recsys2stage.columns import ACTION, ITEM_ID, RATING, TIME, TITLE, USER_ID
from recsys2stage.data.checks import FILE, LINE, Column, Rows, parse_float, parse_int, rating_column, time_column
from recsys2stage.data.download import download
from recsys2stage.data.sources.base import Kind, Source, Tables, csv_rows, unpacked

URL = "https://files.grouplens.org/datasets/movielens/{}.zip"
MD5 = {
    "ml-20m": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
}
FILES = ("ratings.csv", "movies.csv", "ratings.dat", "movies.dat", "users.dat")


class MovieLens(Source):
    """MovieLens 20M, 25M, 32M, latest, latest-small (`ratings.csv`) and 1M, 10M (`ratings.dat`).

    Items have a title, year (in the item table) and the features genres and decade; users of 1M have gender, age,
    occupation and zip_prefix.

    Args:
        path: the zip, the unpacked folder or its parent. If None, the official archive is downloaded.
        archive: the name of the official archive: ml-20m, ml-25m, ml-32m, ml-1m, ml-latest, ml-latest-small.
        user_features: whether to read user features, if the archive has them (1M).
        folder: download folder.
        rating_actions: whether to use the rating as the action, as text: "0.5", "4.0".
    """

    def __init__(
        self,
        path: Path | None = None,
        archive: str = "ml-20m",
        user_features: bool = True,
        folder: Path = Path("data/raw"),
        rating_actions: bool = False,
    ):
        self.path = path
        self.archive = archive
        self.user_features = user_features
        self.folder = folder
        self.rating_actions = rating_actions

    @contextmanager
    def open(self) -> Iterator[Tables]:
        path = self.fetch()
        with unpacked(path, FILES) as folder:
            ratings = self._ratings(folder, path)
            legacy = ratings.suffix == ".dat"
            movies, users = ratings.with_name("movies" + ratings.suffix), ratings.with_name("users.dat")
            if not movies.is_file():
                raise FileNotFoundError(
                    f"{path} has {ratings.name} but no {movies.name}, expected it in the same folder; put it there"
                )
            columns = EVENTS | RATING_ACTIONS if self.rating_actions else EVENTS
            features: dict[str, Kind] = {"genres": "multi", "decade": "categorical"}
            with_users = legacy and self.user_features and users.is_file()
            yield Tables(
                events=_dat_events(ratings, columns) if legacy else csv_rows([ratings], columns),
                items=_dat(movies, ["movieId", "title", "genres"], ITEMS) if legacy else csv_rows([movies], ITEMS),
                users=_dat(users, list(USER_RAW), USERS) if with_users else None,
                item_features=features,
                user_features=dict.fromkeys(list(USERS)[1:], "categorical") if with_users else {},
                files=[path] if path.is_file() else [ratings, movies, *([users] if with_users else [])],
            )

    def fetch(self) -> Path:
        """The given path, or that of the official archive, which is downloaded if missing."""
        if self.path is not None:
            if not self.path.exists():
                raise FileNotFoundError(
                    f"{self.path} does not exist; expected the zip or the folder of a MovieLens data set (ratings.csv "
                    "or ratings.dat): pass yours with --source.path PATH (make: RAW=PATH)"
                )
            return self.path
        path, url = self.folder / f"{self.archive}.zip", URL.format(self.archive)
        advice = f"put {url} there, or pass the zip or folder you have: --source.path PATH (make: RAW=PATH)"
        return download(url, path, MD5.get(self.archive), advice)

    def _ratings(self, folder: Path, path: Path) -> Path:
        found = [file for name in ("ratings.csv", "ratings.dat") for file in (folder / name, *folder.glob(f"*/{name}"))]
        found = [file for file in found if file.is_file()]
        named = [file for file in found if file.parent.name == self.archive]
        if len(found) == 1 or len(named) == 1:
            return (named or found)[0]
        if found:
            raise ValueError(f"{path} holds several data sets: {', '.join(map(str, found))}; pass the folder of one")
        existing = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        raise FileNotFoundError(
            f"{path} has neither ratings.csv nor ratings.dat, in itself or one folder below"
            + (f"; it has: {', '.join(existing[:10]) or 'nothing'}" if path.is_dir() else "")
        )


def parse_year(title: pl.Expr) -> pl.Expr:
    """Year in a title: 1995 in "Toy Story (1995)", 1975 in "(1975-1979)"; the last of several, else null."""
    return title.str.extract(r".*\(((?:18|19|20)\d\d)(?:\s*[-–]\s*(?:\d{4})?\s*)?\)", 1).cast(pl.Int32)


def parse_decade(title: pl.Expr) -> pl.Expr:
    """Decade of the year in a title: "Pre-1970", "1970s", "1980s", ...; null without a year."""
    year = parse_year(title)
    return pl.when(year < 1970).then(pl.lit("Pre-1970")).otherwise(pl.format("{}0s", year // 10))


def parse_genres(raw: pl.Expr) -> pl.Expr:
    """ "Comedy|Drama" -> ["Comedy", "Drama"]; null for "(no genres listed)"."""
    return pl.when(raw != "(no genres listed)").then(raw.str.split("|"))


def _number(name: str) -> Column:
    return Column(name, "a whole number", parse_int, pl.Int32())


EVENTS = {
    USER_ID: _number("userId"),
    ITEM_ID: _number("movieId"),
    RATING: rating_column("rating", 0.5, 5.0),
    TIME: time_column("timestamp"),
}
RATING_ACTIONS = {  # rating and action share a raw column, so it is read as text
    RATING: replace(EVENTS[RATING], dtype=pl.String()),
    ACTION: Column("rating", "", lambda raw: parse_float(raw).cast(pl.Float32).cast(pl.String), required=False),
}
ITEMS = {
    ITEM_ID: _number("movieId"),
    TITLE: Column("title", required=False),
    "year": Column("title", "", parse_year, required=False),
    "genres": Column("genres", "", parse_genres, required=False),
    "decade": Column("title", "", parse_decade, required=False),
}
USER_RAW = ("userId", "gender", "age", "occupation", "zip")
USERS = {
    USER_ID: _number("userId"),
    "gender": Column("gender", required=False),
    "age": Column("age", required=False),
    "occupation": Column("occupation", required=False),
    "zip_prefix": Column("zip", "", lambda raw: raw.str.slice(0, 1), required=False),
}


def _dat_events(file: Path, columns: dict[str, Column]) -> Rows:
    # polars has no two-character separators; splitting "::" at ":" gives empty columns in between
    header = ["userId", "_1", "movieId", "_2", "rating", "_3", "timestamp"]
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty (0 bytes), expected rows of ratings; download it again")
    return csv_rows([file], columns, ":", header, quote=None)


def _dat(file: Path, header: list[str], columns: dict[str, Column]) -> Rows:
    """A small `::`-separated file; 1M is in latin-1, 10M in UTF-8."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    rows = text.removesuffix("\n").split("\n")  # splitlines() also splits at characters that titles may hold
    lines = pl.Series("all", [row.removesuffix("\r") for row in rows], dtype=pl.String)
    fields = lines.str.split_exact("::", len(header) - 1).struct.rename_fields(header).struct.unnest()
    raw = fields.lazy().with_row_index(LINE, 1)
    unparsed = raw.select(
        *(pl.col(column.name).alias(name) for name, column in columns.items()), LINE, pl.lit(str(file)).alias(FILE)
    )
    typed = raw.select(column.parse(pl.col(column.name)).alias(name) for name, column in columns.items())
    return Rows(typed, str(file), columns, unparsed)
