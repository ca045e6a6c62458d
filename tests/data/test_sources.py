"""Raw formats read to the value: both MovieLens layouts, and anyone's tables."""

import os
import zipfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys2stage.data.checks import read
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, MovieLens, SideTable, Source, Table
from recsys2stage.data.sources import movielens as movielens_module

# the same world in both layouts; titles that are hard to read
RATINGS = [(1, 10, 4.0, 100), (1, 20, 3.0, 200), (2, 10, 5.0, 50), (2, 40, 1.0, 50)]
MOVIES = [
    (10, "Léon: The Professional (a.k.a. The Professional) (1994)", "Action|Crime"),
    (20, "2001: A Space Odyssey (1968)", "Sci-Fi"),
    (30, "Nobody rated this, ever (2023)", "Drama"),
    (40, 'Babylon 5, "pilot"', "(no genres listed)"),
]
EVENTS = [dict(zip(("user_id", "item_id", "rating", "time"), row, strict=True)) for row in RATINGS]


def as_csv(folder: Path) -> Path:
    folder.mkdir(parents=True)
    pl.DataFrame(RATINGS, schema=["userId", "movieId", "rating", "timestamp"], orient="row").write_csv(
        folder / "ratings.csv"
    )
    pl.DataFrame(MOVIES, schema=["movieId", "title", "genres"], orient="row").write_csv(folder / "movies.csv")
    return folder


def as_dat(folder: Path, encoding: str = "latin-1") -> Path:
    folder.mkdir(parents=True)
    ratings = "".join(f"{user}::{item}::{rating:.0f}::{time}\n" for user, item, rating, time in RATINGS)
    movies = "".join("::".join(map(str, movie)) + "\n" for movie in MOVIES)
    (folder / "ratings.dat").write_text(ratings)
    (folder / "movies.dat").write_text(movies, encoding=encoding)
    (folder / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072-3123\n")
    return folder


def zipped(folder: Path) -> Path:
    path = folder.with_name(folder.name + ".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"{folder.name}/{file.name}")
    return path


def events_of(source: Source) -> list[dict[str, Any]]:
    with source.open() as tables:
        return read(tables.events)[0].to_dicts()


Layout = Callable[[Path], Path]


@pytest.mark.parametrize("layout", [as_csv, as_dat])
@pytest.mark.parametrize("where", ["folder", "parent", "zip"])
def test_movielens_reads_both_layouts_from_folder_parent_and_zip(tmp_path: Path, layout: Layout, where: str) -> None:
    folder = layout(tmp_path / "raw" / "ml")
    path = {"folder": folder, "parent": folder.parent, "zip": folder}[where]
    source = MovieLens(zipped(folder) if where == "zip" else path)
    with source.open() as tables:
        assert read(tables.events)[0].to_dicts() == EVENTS
        assert tables.items is not None
        items = read(tables.items)[0]
    assert items["item_id"].to_list() == [10, 20, 30, 40]
    assert items["title"].to_list() == [movie[1] for movie in MOVIES]
    assert items["year"].to_list() == [1994, 1968, 2023, None]
    assert items["decade"].to_list() == ["1990s", "Pre-1970", "2020s", None]
    assert items["genres"].to_list() == [["Action", "Crime"], ["Sci-Fi"], ["Drama"], None]
    assert tables.item_features == {"genres": "multi", "decade": "categorical"}


@pytest.mark.parametrize("layout", [as_csv, as_dat])
def test_movielens_ratings_may_be_kinds_of_events(tmp_path: Path, layout: Layout) -> None:
    folder = layout(tmp_path / "ml")
    source = MovieLens(folder, rating_actions=True)
    assert events_of(source) == [event | {"action": f"{event['rating']:.1f}"} for event in EVENTS]
    prepare(source, tmp_path / "data")
    dataset = Dataset(tmp_path / "data")
    assert dataset.action_names == ["1.0", "3.0", "4.0", "5.0"]
    assert [float(dataset.action_names[kind - 1]) for kind in dataset.actions] == dataset.ratings.tolist()
    assert dataset.ratings.dtype == np.float32
    prepare(MovieLens(folder), tmp_path / "plain")
    assert not Dataset(tmp_path / "plain").action_names


def test_bad_ratings_are_found_where_they_are_kinds_of_events(tmp_path: Path) -> None:
    folder = as_csv(tmp_path / "ml")
    with (folder / "ratings.csv").open("a") as file:
        file.write("3,10,0.5,60\n3,20,great,70\n3,30,7.0,80\n3,30,,90\n")
    source = MovieLens(folder, rating_actions=True)
    with pytest.raises(ValueError, match=r"column 'rating': 3 bad rows \(line 7: great is not a number"):
        events_of(source)
    with source.open() as tables:
        good, bad = read(tables.events, "quarantine")
    assert good["action"].to_list() == ["4.0", "3.0", "5.0", "1.0", "0.5"]
    assert bad["line"].to_list() == [7, 8, 9]


def test_movielens_1m_in_utf8_is_read_as_utf8(tmp_path: Path) -> None:
    with MovieLens(as_dat(tmp_path / "ml", encoding="utf-8")).open() as tables:
        assert tables.items is not None
        assert read(tables.items)[0]["title"][0].startswith("Léon")


def test_movielens_1m_has_users(tmp_path: Path) -> None:
    with MovieLens(as_dat(tmp_path / "ml")).open() as tables:
        assert tables.users is not None
        assert read(tables.users)[0].rows() == [(1, "F", "1", "10", "4"), (2, "M", "56", "16", "7")]
        assert tables.user_features == dict.fromkeys(("gender", "age", "occupation", "zip_prefix"), "categorical")
    with MovieLens(tmp_path / "ml", user_features=False).open() as tables:
        assert tables.users is None


@pytest.mark.parametrize(
    ("title", "year", "decade"),
    [
        ("Toy Story (1995)", 1995, "1990s"),
        ("Toy Story (1995) ", 1995, "1990s"),
        ("1984 (Nineteen Eighty-Four) (1984)", 1984, "1980s"),
        ("Fawlty Towers (1975-1979)", 1975, "1970s"),
        ("Big Bang Theory, The (2007-)", 2007, "2000s"),
        ("Diplomatic Immunity (2009\N{EN DASH} )", 2009, "2000s"),
        ("Mona and the Time of Burning Love (1983))", 1983, "1980s"),
        ("Der Letzte (1924)", 1924, "Pre-1970"),
        ("Room (1408)", None, None),
        ("Babylon 5", None, None),
        ("2046", None, None),
    ],
)
def test_years_in_titles(title: str, year: int | None, decade: str | None) -> None:
    frame = pl.DataFrame({"title": [title]}).select(
        year=movielens_module.parse_year(pl.col("title")), decade=movielens_module.parse_decade(pl.col("title"))
    )
    assert frame.row(0) == (year, decade)


def test_movielens_says_what_is_missing_or_ambiguous(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*RAW=PATH"),
        MovieLens(tmp_path / "nowhere").open(),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.txt").touch()
    with (
        pytest.raises(FileNotFoundError, match=r"neither ratings.csv nor .*it has: log.txt"),
        MovieLens(tmp_path / "other").open(),
    ):
        pass
    raw = tmp_path / "raw"
    as_csv(raw / "ml-20m")
    as_dat(raw / "ml-1m")
    with pytest.raises(ValueError, match="several data sets"), MovieLens(raw, archive="ml-25m").open():
        pass
    with MovieLens(raw, archive="ml-1m").open() as tables:
        assert tables.events.file.endswith("ratings.dat")
    (raw / "ml-20m" / "movies.csv").unlink()
    with (
        pytest.raises(FileNotFoundError, match=r"no movies\.csv, expected it in the same folder"),
        MovieLens(raw / "ml-20m").open(),
    ):
        pass


def test_movielens_without_a_path_fetches_its_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(as_csv(tmp_path / "server" / "ml-latest-small"))
    monkeypatch.setattr(movielens_module, "URL", archive.as_uri().replace("ml-latest-small", "{}"))
    source = MovieLens(archive="ml-latest-small", folder=tmp_path / "raw")
    assert events_of(source) == EVENTS
    assert (tmp_path / "raw" / "ml-latest-small.zip").read_bytes() == archive.read_bytes()
    archive.unlink()
    assert events_of(source) == EVENTS  # from the copy
    with pytest.raises(ConnectionError, match=r"raw/ml-20m.zip does not exist.*put .*ml-20m.zip there.*RAW=PATH"):
        MovieLens(folder=tmp_path / "raw").fetch()


def test_what_was_unpacked_is_removed(tmp_path: Path) -> None:
    with MovieLens(zipped(as_csv(tmp_path / "ml"))).open() as tables:
        unpacked = Path(tables.events.file)
        assert unpacked.is_file()
        assert tables.files == [tmp_path / "ml.zip"]
    assert not unpacked.parent.parent.exists()


TIMES = [978_300_760, 978_300_761, 978_300_000]
LOG = pl.DataFrame(
    {"who": [3, 1, 3], "what": [7, 8, 9], "when": TIMES, "stars": [1.0, 2.5, 3.0], "did": ["buy", None, "see"]}
)
WORDS = {"user": "who", "item": "what", "time": "when"}
ALL = {**WORDS, "rating": "stars", "action": "did"}
WANTED = [
    {"user_id": who, "item_id": what, "time": when, "rating": stars, "action": did}
    for who, what, when, stars, did in LOG.rows()
]


def with_text_ids(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a file without types says of ids; prepare makes numbers of them."""
    return [event | {"user_id": str(event["user_id"]), "item_id": str(event["item_id"])} for event in events]


def one_csv(folder: Path) -> Table:
    LOG.write_csv(folder / "log.csv")
    return Table(folder / "log.csv", **ALL)


def one_tsv(folder: Path) -> Table:
    LOG.write_csv(folder / "log.tsv", separator="\t")
    return Table(folder / "log.tsv", **ALL)


def semicolons(folder: Path) -> Table:
    LOG.write_csv(folder / "log.csv", separator=";")
    return Table(folder / "log.csv", separator=";", **ALL)


def shards(folder: Path) -> Table:
    (folder / "log").mkdir()
    for place, columns in enumerate((LOG.columns, LOG.columns[::-1], LOG.columns)):  # each file in its own order
        LOG[place : place + 1].select(columns).write_csv(folder / "log" / f"part-{place}.csv")
    (folder / "log" / "_SUCCESS").touch()
    return Table(folder / "log", **ALL)


def csv_glob(folder: Path) -> Table:
    shards(folder)
    (folder / "log" / "other.csv").write_text("a,b\n1,2\n")
    return Table(folder / "log" / "part-*.csv", **ALL)


def csv_in_zip(folder: Path) -> Table:
    one_csv(folder)
    with zipfile.ZipFile(folder / "log.zip", "w") as archive:
        archive.write(folder / "log.csv", "deep/down/log.csv")
        archive.writestr("deep/README.md", "hello")
        archive.writestr("other.csv", "a,b\n1,2\n")
    return Table(folder / "log.zip", member="log.csv", **ALL)


def one_parquet(folder: Path) -> Table:
    LOG.write_parquet(folder / "log.parquet")
    return Table(folder / "log.parquet", **ALL)


def parquet_shards(folder: Path) -> Table:
    LOG[:1].write_parquet(folder / "a.parquet")
    LOG[1:].with_columns(pl.col("when").cast(pl.Int32), pl.col("stars").cast(pl.Float32)).write_parquet(
        folder / "b.parquet"
    )
    return Table(folder, **ALL)


@pytest.mark.parametrize("write", [one_csv, one_tsv, semicolons, shards, csv_glob, csv_in_zip])
def test_a_table_of_delimited_text(tmp_path: Path, write: Callable[[Path], Table]) -> None:
    assert events_of(write(tmp_path)) == with_text_ids(WANTED)


@pytest.mark.parametrize("write", [one_parquet, parquet_shards])
def test_a_table_of_parquet(tmp_path: Path, write: Callable[[Path], Table]) -> None:
    assert events_of(write(tmp_path)) == WANTED


def test_a_table_names_the_files_that_were_read_and_where_shards_are_looked_for(tmp_path: Path) -> None:
    for write, files, folders in (
        (one_csv, ["log.csv"], []),
        (csv_glob, ["log/part-0.csv", "log/part-1.csv", "log/part-2.csv"], ["log"]),
    ):
        (tmp_path / write.__name__).mkdir()
        with write(tmp_path / write.__name__).open() as tables:
            found = [
                [str(path.relative_to(tmp_path / write.__name__)) for path in paths]
                for paths in (tables.files, tables.folders)
            ]
        assert found == [files, folders]


def test_a_table_is_read_lazily(tmp_path: Path) -> None:
    source = shards(tmp_path)
    with source.open() as tables:
        assert isinstance(tables.events.typed, pl.LazyFrame)
        (tmp_path / "log" / "part-1.csv").write_text("who,what,when,stars,did\n5,5,5,5,5\n")
        assert read(tables.events)[0]["item_id"].to_list() == ["7", "5", "9"]


@pytest.mark.parametrize(
    ("unit", "written", "ticks"),
    [
        ("seconds", TIMES, 1),
        ("milliseconds", [time * 1000 + 7 for time in TIMES], 1000),
        ("iso", ["2000-12-31T22:12:40.007Z", "2000-12-31 22:12:41", "2000-12-31T23:00+01:00"], 1000),
    ],
)
def test_times_come_in_seconds_milliseconds_and_iso(tmp_path: Path, unit: Any, written: list[Any], ticks: int) -> None:
    LOG.with_columns(when=pl.Series(written)).write_csv(tmp_path / "log.csv")
    LOG.with_columns(when=pl.Series(written)).write_parquet(tmp_path / "log.parquet")
    for name in ("log.csv", "log.parquet"):
        with Table(tmp_path / name, time_unit=unit, **WORDS).open() as tables:
            assert tables.ticks == ticks
            assert (read(tables.events)[0]["time"] // ticks).to_list() == [*TIMES[:2], 978_300_000]


def test_iso_reads_what_people_write() -> None:
    from recsys2stage.data.sources.table import iso

    texts = [
        "1970-01-02",
        "1970-01-02T00:00",
        "1970-01-02 00:00:00",
        "1970-01-02T02:00:00+02:00",
        " 1970-01-02T00:00:00.000Z",
        "no",
    ]
    assert pl.Series("t", texts).to_frame().select(iso(pl.col("t")))["t"].to_list() == [86_400_000] * 5 + [None]


@pytest.mark.parametrize("unit", ["seconds", "milliseconds"])
def test_parquet_dates_are_times_whatever_their_precision(tmp_path: Path, unit: Any) -> None:
    moments = [datetime(1970, 1, 1, 0, 0, second) for second in (1, 2, 3)]
    for precision in ("ms", "us", "ns"):
        LOG.with_columns(when=pl.Series(moments, dtype=pl.Datetime(precision))).write_parquet(tmp_path / "log.parquet")
        with Table(tmp_path / "log.parquet", time_unit=unit, **WORDS).open() as tables:
            assert (read(tables.events)[0]["time"] // tables.ticks).to_list() == [1, 2, 3]


def test_order_needs_no_time_column_and_everything_else_does(tmp_path: Path) -> None:
    LOG.drop("when").write_csv(tmp_path / "log.csv")
    with Table(tmp_path / "log.csv", user="who", item="what", time=None, time_unit="order").open() as tables:
        assert read(tables.events)[0].columns == ["user_id", "item_id"]
        assert not tables.has_time
    with pytest.raises(ValueError, match="time_unit: order"):
        Table(tmp_path / "log.csv", time=None)


def test_side_tables_lie_beside_the_events_or_in_the_zip(tmp_path: Path) -> None:
    one_csv(tmp_path)
    (tmp_path / "things.csv").write_text("id,name,tags,price,colour\n7,Seven,a;b;;a,1.5,red\n8,Eight,,,\n")
    (tmp_path / "people.tsv").write_text("who\tage\n1\t20\n3\t30\n")
    LOG.write_csv(tmp_path / "log.tsv", separator="\t")
    features = {"labels": Feature("multi", ";", "tags"), "price": Feature("numeric"), "colour": Feature("categorical")}
    items = SideTable("things.csv", "id", features, title="name")
    users = SideTable("people.tsv", "who", {"age": Feature("numeric")})
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("log.csv", "things.csv", "people.tsv"):
            archive.write(tmp_path / name, f"x/{name}")
    elsewhere = SideTable(str(tmp_path / "things.csv"), "id", features, title="name")
    for path, table in (
        (tmp_path / "log.csv", items),
        (tmp_path / "all.zip", items),
        (tmp_path / "log.csv", elsewhere),
    ):
        with Table(path, items=table, users=users, **WORDS).open() as tables:
            assert len(read(tables.events)[0]) == 3
            assert tables.item_features == {"labels": "multi", "price": "numeric", "colour": "categorical"}
            assert tables.user_features == {"age": "numeric"}
            assert tables.items is not None
            assert tables.users is not None
            assert read(tables.items)[0].rows() == [
                ("7", "Seven", ["a", "b", "", "a"], 1.5, "red"),
                ("8", "Eight", None, None, None),
            ]
            assert read(tables.users)[0]["age"].to_list() == [20, 30]


def test_a_table_says_what_it_cannot_find(tmp_path: Path) -> None:
    source = one_csv(tmp_path)
    lost = Table(source.path, items=SideTable("things.csv", "id"), **WORDS)
    with pytest.raises(FileNotFoundError, match=r"has no files 'things.csv'"), lost.open():
        pass
    with pytest.raises(FileNotFoundError, match=r"none-\*.csv matches no file"), Table(tmp_path / "none-*.csv").open():
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no file \*.csv or"), Table(tmp_path / "empty").open():
        pass
    LOG.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"several file types: .csv, .parquet"), Table(tmp_path, **WORDS).open():
        pass
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.csv", "x\n1\n")
        archive.writestr("b.csv", "x\n1\n")
    two = Table(tmp_path / "two.zip")
    with pytest.raises(ValueError, match=r"several tables: a.csv, b.csv; choose the events with member"), two.open():
        pass


def test_a_source_describes_itself_in_plain_values() -> None:
    table = Table(Path("x.csv"), items=SideTable("i.csv", "id", {"a": Feature("numeric")}))
    said = table.describe()
    assert said["class_path"] == "Table"
    assert said["init_args"]["items"]["columns"] == {"a": {"kind": "numeric", "separator": "|", "column": None}}


def real_data(name: str) -> Path:
    if "RECSYS_DATA" not in os.environ:
        pytest.skip("RECSYS_DATA is not set: the folder with ml-1m.zip, ml-latest-small.zip and amazon-beauty.zip")
    return Path(os.environ["RECSYS_DATA"]) / f"{name}.zip"


@pytest.mark.parametrize(
    ("name", "events", "movies"), [("ml-1m", 1_000_209, 3_883), ("ml-latest-small", 100_836, 9_742)]
)
def test_real_movielens(name: str, events: int, movies: int) -> None:
    with MovieLens(real_data(name)).open() as tables:
        assert len(read(tables.events)[0]) == events
        assert tables.items is not None
        items = read(tables.items)[0]
    assert len(items) == movies
    assert items["year"].null_count() < 30
    assert items["genres"].null_count() < 40
