"""Every bad input gets its error: file, column, count, first rows; and nothing half-written stays behind."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from recsys2stage import columns as c
from recsys2stage.artifacts import read_manifest
from recsys2stage.columns import YEAR_2100
from recsys2stage.data.checks import Rows, read, require
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, MovieLens, SideTable, Source, Table, Tables

HEADER = "userId,movieId,rating,timestamp"
GOOD = ["1,10,4.0,100", "1,20,3.5,200", "1,30,5.0,300", "2,10,0.5,100", "2,30,1.0,150"]  # lines 2 to 6
MOVIES = (
    'movieId,title,genres\n10,Ten (1990),Drama\n20,"Twenty, The (2000)",Comedy|Drama\n30,Thirty,(no genres listed)\n'
)


def movielens(folder: Path, *lines: str, header: str = HEADER, movies: str = MOVIES) -> MovieLens:
    folder.mkdir()
    (folder / "ratings.csv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    (folder / "movies.csv").write_text(movies, encoding="utf-8")
    return MovieLens(folder)


def error_of(source: Source, tmp_path: Path) -> str:
    """The message of the error; the output folder must not exist after it."""
    output = tmp_path / "data" / "world"
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        prepare(source, output)
    assert not output.parent.exists() or list(output.parent.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        ("1,40,abc,400", "rating", "abc is not a number within 0.5..5"),
        ("1,x40,3.0,400", "movieId", "x40 is not a whole number"),
        ("1.5,40,3.0,400", "userId", "1.5 is not a whole number"),
        ("1,40,3.0,yesterday", "timestamp", "yesterday is not seconds from 1970 to 2100"),
        ("1,,3.0,400", "movieId", "missing"),
        (",40,3.0,400", "userId", "missing"),
        ("1,40,,400", "rating", "missing"),
        ("1,40,3.0,", "timestamp", "missing"),
        ("1,40,3.0", "timestamp", "missing"),
        ("1,40,NaN,400", "rating", "NaN is not a number within 0.5..5"),
        ("1,40,inf,400", "rating", "inf is not a number within 0.5..5"),
        ("1,40,0.0,400", "rating", "0.0 is not a number within 0.5..5"),
        ("1,40,5.5,400", "rating", "5.5 is not a number within 0.5..5"),
        ("1,40,3.0,-1", "timestamp", "-1 is not seconds from 1970 to 2100"),
        ("1,40,3.0,4102444801", "timestamp", "4102444801 is not seconds from 1970 to 2100"),
        ("1,40,3.0,400,surplus", "(all)", "the line has more fields than columns"),
        ("1,4\N{REPLACEMENT CHARACTER}0,3.0,400", "movieId", "is not UTF-8"),
    ],
)
def test_a_bad_row_is_named_or_put_aside(tmp_path: Path, line: str, column: str, reason: str) -> None:
    source = movielens(tmp_path / "raw", *GOOD[:3], line, *GOOD[3:])
    message = error_of(source, tmp_path)
    for part in ("ratings.csv", f"column {column!r}", "1 bad row", "line 5", reason, "on_bad_rows quarantine"):
        assert part in message

    manifest = prepare(source, tmp_path / "data" / "world", on_bad_rows="quarantine")
    assert manifest["counts"]["events_read"] == 6
    assert manifest["counts"]["events"] == 5
    assert manifest["counts"]["rejected"] == 1
    rejected = pl.read_parquet(tmp_path / "data" / "world" / c.REJECTED)
    assert rejected.select("line", "column").rows() == [(5, column)]
    assert reason in rejected["reason"][0]
    assert rejected["file"][0].endswith("ratings.csv")
    assert '"item_id"' in rejected["row"][0]


def test_quarantine_leaves_the_dataset_as_if_the_bad_rows_had_not_been_there(tmp_path: Path) -> None:
    prepare(movielens(tmp_path / "clean", *GOOD), tmp_path / "a")
    bad = movielens(tmp_path / "dirty", "7,70,9,1", *GOOD[:2], "8,80,1,-1", *GOOD[2:], "x,1,1,1")
    prepare(bad, tmp_path / "b", on_bad_rows="quarantine")
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert {file.name for file in (tmp_path / "b").iterdir()} == names | {c.REJECTED}
    for name in names - {c.MANIFEST}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_without_bad_rows_quarantine_writes_no_rejected_file(tmp_path: Path) -> None:
    manifest = prepare(movielens(tmp_path / "raw", *GOOD), tmp_path / "out", on_bad_rows="quarantine")
    assert manifest["counts"]["rejected"] == 0
    assert not (tmp_path / "out" / c.REJECTED).exists()


def test_one_error_counts_each_column_and_shows_three_rows(tmp_path: Path) -> None:
    source = movielens(tmp_path / "raw", *(f"1,{item},9,100" for item in range(5)), "1,a,3,100", *GOOD)
    message = error_of(source, tmp_path)
    assert "column 'rating': 5 bad rows (line 2: 9 is not" in message
    assert "line 4: 9 is not" in message
    assert "line 5: 9 is not" not in message
    assert "column 'movieId': 1 bad row (line 7: a is not" in message


def test_blank_lines_are_no_rows_but_are_counted_as_lines(tmp_path: Path) -> None:
    assert prepare(movielens(tmp_path / "raw", *GOOD, "", ""), tmp_path / "out")["counts"]["events_read"] == 5
    message = error_of(movielens(tmp_path / "bad", *GOOD[:2], "", "1,40,9,1", "", *GOOD[2:]), tmp_path)
    assert "1 bad row (line 5: 9 is not" in message


def test_quoted_fields_are_one_field(tmp_path: Path) -> None:
    movies = MOVIES + '40,"A ""quoted"" one, with comma (2001)",Drama\nforty-one,Bad,Drama\n'
    message = error_of(movielens(tmp_path / "raw", *GOOD, movies=movies), tmp_path)
    assert "movies.csv, column 'movieId': 1 bad row (line 6: forty-one is not a whole number)" in message


def test_whole_numbers_written_as_floats_are_whole_numbers(tmp_path: Path) -> None:
    plain, pandas = movielens(tmp_path / "a", *GOOD), movielens(tmp_path / "b", *(f"{line}.0" for line in GOOD))
    assert prepare(plain, tmp_path / "x")["split_hash"] == prepare(pandas, tmp_path / "y")["split_hash"]


def test_milliseconds_are_recognised(tmp_path: Path) -> None:
    source = movielens(tmp_path / "raw", "1,10,3.0,978300760000", "1,20,3.0,978300761000")
    assert "look like milliseconds" in error_of(source, tmp_path)
    assert "look like" not in error_of(movielens(tmp_path / "raw2", "1,10,3.0,-5"), tmp_path)


def test_a_misnamed_column_is_missed_and_guessed(tmp_path: Path) -> None:
    message = error_of(movielens(tmp_path / "raw", *GOOD, header="user_id,movieId,stars,timestamp"), tmp_path)
    assert "has no column 'userId' (did you mean 'user_id'?), 'rating'" in message
    assert "its columns are: 'user_id', 'movieId', 'stars', 'timestamp'" in message


def test_a_column_named_twice_is_ambiguous() -> None:
    with pytest.raises(ValueError, match=r"f.csv has 2 columns named 'a'"):
        require(["a"], ["a", "b", "a"], "f.csv")


@pytest.mark.parametrize("name", ["ratings.csv", "movies.csv"])
def test_an_empty_file_and_one_with_only_a_header(tmp_path: Path, name: str) -> None:
    source = movielens(tmp_path / "raw", *GOOD)
    file = tmp_path / "raw" / name
    header = file.read_text().splitlines()[0]
    file.write_text("")
    assert f"{name} is empty (0 bytes)" in error_of(source, tmp_path)
    file.write_text(header + "\n")
    assert f"{name} has no rows" in error_of(source, tmp_path)


def test_a_file_with_no_good_row_is_an_error_even_in_quarantine(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ratings.csv has no good rows"):
        prepare(movielens(tmp_path / "raw", "1,10,9,1"), tmp_path / "out", on_bad_rows="quarantine")


def test_wrong_encodings(tmp_path: Path) -> None:
    source = movielens(tmp_path / "raw", *GOOD)
    (tmp_path / "raw" / "ratings.csv").write_text("\n".join([HEADER, *GOOD]), encoding="utf-16")
    message = error_of(source, tmp_path)
    assert "ratings.csv is not UTF-8 text" in message
    assert "iconv" in message

    source = movielens(tmp_path / "raw2", *GOOD)
    (tmp_path / "raw2" / "movies.csv").write_text(MOVIES.replace("Ten", "Amélie"), encoding="latin-1")
    message = error_of(source, tmp_path)
    assert (
        "movies.csv, column 'title': 1 bad row (line 2: Am\N{REPLACEMENT CHARACTER}lie (1990) is not UTF-8)" in message
    )


def test_a_utf8_file_with_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    source = movielens(tmp_path / "raw", *GOOD)
    (tmp_path / "raw" / "ratings.csv").write_text("\n".join([HEADER, *GOOD]), encoding="utf-8-sig")
    assert prepare(source, tmp_path / "out")["counts"]["events"] == 5


def test_a_truncated_and_a_damaged_zip(tmp_path: Path) -> None:
    movielens(tmp_path / "raw", *GOOD * 500)
    path = tmp_path / "world.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (tmp_path / "raw").iterdir():
            archive.write(file, f"ml/{file.name}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = error_of(MovieLens(path), tmp_path)
    assert "world.zip is not a complete zip file" in message
    assert f"{len(whole) // 2:,} bytes" in message

    path.write_bytes(whole[:60] + bytes(20) + whole[80:])
    assert "world.zip is" in error_of(MovieLens(path), tmp_path)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    pl.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [1]}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "events.parquet cannot be read as Parquet" in error_of(Table(path), tmp_path)
    path.write_bytes(b"")
    assert "events.parquet is empty" in error_of(Table(path), tmp_path)


def test_bad_rows_of_parquet_are_named_by_row(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    times = [1, None, 3, YEAR_2100 + 1]
    pl.DataFrame({"user_id": ["a", "a", "", "b"], "item_id": [1, 2, 3, 4], "timestamp": times}).write_parquet(path)
    message = error_of(Table(path), tmp_path)
    assert "column 'user_id': 1 bad row (row 3: missing)" in message
    assert "column 'timestamp': 2 bad rows (row 2: missing; row 4: 4102444801 is not seconds" in message


@pytest.mark.parametrize(
    ("unit", "value"), [("iso", "2020-13-01"), ("iso", "soon"), ("iso", "1969-12-31"), ("milliseconds", "-1")]
)
def test_impossible_times_of_a_table(tmp_path: Path, unit: str, value: str) -> None:
    good = {"iso": "2020-12-01", "milliseconds": "1"}[unit]
    (tmp_path / "e.csv").write_text(f"user_id,item_id,timestamp\n1,1,{good}\n1,2,{value}\n")
    message = error_of(Table(tmp_path / "e.csv", time_unit=unit), tmp_path)
    assert f"e.csv, column 'timestamp': 1 bad row (line 3: {value} is not" in message


def test_bad_numbers_in_an_item_table(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n1,1,1\n1,2,2\n")
    (tmp_path / "i.csv").write_text("id,price\n1,cheap\n2,\n")
    items = SideTable("i.csv", "id", {"price": Feature("numeric")})
    message = error_of(Table(tmp_path / "e.csv", items=items), tmp_path)
    assert "i.csv, column 'price': 1 bad row (line 2: cheap is not a number)" in message


class Plays(Source):
    """A stranger's source: no text, no rules of its own."""

    def __init__(self, frame: pl.DataFrame, items: pl.DataFrame | None = None) -> None:
        self.frame = frame
        self.items = items

    @contextmanager
    def open(self) -> Iterator[Tables]:
        items = None if self.items is None else Rows(self.items.lazy(), "songs")
        yield Tables(
            Rows(self.frame.lazy(), "plays"), items=items, item_features={"mood": "categorical"} if items else {}
        )


def test_a_source_without_rules_is_held_to_those_of_events(tmp_path: Path) -> None:
    good = pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "time": [1, 2]})
    assert len(read(Rows(good.lazy(), "plays"))[0]) == 2
    assert "column 'user_id': 1 bad row (row 2: missing)" in error_of(
        Plays(good.with_columns(user_id=pl.Series([1, None]))), tmp_path
    )
    assert "column 'time': 1 bad row (row 1: -1 is not" in error_of(
        Plays(good.with_columns(time=pl.Series([-1, 2]))), tmp_path
    )
    for name in good.columns:
        assert f"plays has no column {name!r}" in error_of(Plays(good.drop(name)), tmp_path)
    songs = pl.DataFrame({"item_id": [2, None], "mood": ["sad", "glad"]})
    assert "songs, column 'item_id': 1 bad row (row 2: missing)" in error_of(Plays(good, songs), tmp_path)
    assert "songs has no column 'mood'" in error_of(Plays(good, songs.drop("mood")), tmp_path)
    assert prepare(Plays(good, songs[:1]), tmp_path / "out")["features"]["items"][0]["size"] == 2


def test_a_failed_run_leaves_the_old_dataset_as_it_was(tmp_path: Path) -> None:
    output = tmp_path / "data" / "world"
    prepare(movielens(tmp_path / "good", *GOOD), output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(ValueError, match="bad row"):
        prepare(movielens(tmp_path / "bad", "1,1,9,1"), output)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert [entry.name for entry in output.parent.iterdir()] == ["world"]
    read_manifest(output, "dataset", "")
