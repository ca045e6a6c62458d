"""Quotes in delimited text take no row away, and lines are numbered as an editor numbers them."""

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pipeline_fixtures import recsys

from recsys2stage import columns as c
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import MovieLens, SideTable, Table
from recsys2stage.data.sources.quotes import detect_layout
from recsys2stage.serving.event_files import read_log

HEADER = ["user_id", "item_id", "note", "timestamp"]
NOW = 1_600_000_000


def lines(notes: dict[int, str], count: int = 200, separator: str = ",") -> str:
    rows = [[str(k // 10), str(k), notes.get(k, "x"), str(NOW + k)] for k in range(count)]
    return "".join(separator.join(row) + "\n" for row in [HEADER, *rows])


def table(tmp_path: Path, content: str, end: str = "csv", **options: Any) -> Table:
    file = tmp_path / f"e.{end}"
    file.write_bytes(content.encode())
    return Table(file, action="note", **options)


def notes_of(source: Table, tmp_path: Path) -> list[str]:
    assert prepare(source, tmp_path / "data")["counts"]["events"] > 0
    return prepare(source, tmp_path / "data")["actions"]


@pytest.mark.parametrize(("end", "separator"), [("csv", ","), ("tsv", "\t"), ("txt", ";")])
@pytest.mark.parametrize("quote", ["auto", '"'])
def test_a_quote_that_only_another_row_closes_is_an_error(tmp_path: Path, end: str, separator: str, quote: str) -> None:
    source = table(tmp_path, lines({50: '"Heroes', 150: '"Heroes'}, separator=separator), end, quote=quote)
    if end == "txt":
        source.separator = separator
    with pytest.raises(ValueError, match=r"line 52: a quote opens a field.* 100 lines below.*--source.quote null"):
        prepare(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    source.quote = None
    assert prepare(source, tmp_path / "data")["counts"]["events"] == 200
    assert prepare(source, tmp_path / "data")["actions"] == ['"Heroes', "x"]


@pytest.mark.parametrize(
    ("notes", "line", "message"),
    [
        ({50: '"Heroes'}, 52, "not closed before the end of the file"),
        ({198: '"a', 199: 'b"'}, 200, "contains the next 1 lines, which look like rows"),
        ({10: '"a', 90: 'b"'}, 12, "contains the next 80 lines, which look like rows"),
        ({3: '"a" b'}, 5, "the next one does not end it"),
        ({3: '"a,b"', 7: '12" vinyl'}, 9, "a quote occurs within an unquoted field"),
        ({3: '"a\nb"', 7: '12" vinyl'}, 10, "a quote occurs within an unquoted field"),
        ({3: ' "a b"'}, 5, "a quote occurs within an unquoted field"),
    ],
)
def test_quotes_against_the_rules_are_named_by_line(
    tmp_path: Path, notes: dict[int, str], line: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"e.csv, line {line}: .*{re.escape(message)}.*set quote: null for this table"):
        prepare(table(tmp_path, lines(notes)), tmp_path / "data", on_bad_rows="quarantine")


def test_a_field_that_takes_in_rows_may_be_meant(tmp_path: Path) -> None:
    content = lines({10: '"a,b\n1,2,3,4\n"'})
    with pytest.raises(ValueError, match=r"""if they are one field, set quote: '"'"""):
        prepare(table(tmp_path, content), tmp_path / "data")
    source = table(tmp_path, content, quote='"')
    assert notes_of(source, tmp_path) == ["a,b\n1,2,3,4\n", "x"]


def test_inch_marks_are_characters_where_no_field_is_enclosed(tmp_path: Path) -> None:
    assert notes_of(table(tmp_path, lines({5: '12" vinyl', 9: '7"'})), tmp_path) == ['12" vinyl', '7"', "x"]
    with pytest.raises(ValueError, match=r"line 7: a quote occurs within an unquoted field"):
        prepare(table(tmp_path, lines({5: '12" vinyl'}), quote='"'), tmp_path / "data")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("first", ["", "\ufeff"])
def test_enclosed_fields_are_read_as_csv_has_them(tmp_path: Path, end: str, last: bool, first: str) -> None:
    content = (
        first + '"user_id","item_id",note,timestamp\n1,"10","a, ""b""",5\n"1",11,"",6\n1,12,"two\nlines",7\n1,13,"","8"'
    )
    source = table(tmp_path, (content + "\n" * last).replace("\n", end))
    assert notes_of(source, tmp_path) == ['a, "b"', f"two{end}lines"]
    assert pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["item_id"].to_list() == [10, 11, 12, 13]


def test_another_quote_and_none(tmp_path: Path) -> None:
    content = "user_id,item_id,note,timestamp\n1,10,'a,b',5\n1,11,\"c,6\n"
    assert notes_of(table(tmp_path, content, quote="'"), tmp_path) == ['"c', "a,b"]
    for none in (None, "none"):
        plain = table(tmp_path, content.replace("'a,b'", "'a'"), quote=none)
        assert notes_of(plain, tmp_path) == ['"c', "'a'"]
    for wrong in ("''", ",", "", "«"):
        for options in ({"quote": wrong}, {"items": SideTable("i.csv", "id", quote=wrong)}):
            with pytest.raises(ValueError, match="expected one ASCII character other than the separator, null or auto"):
                Table(tmp_path / "e.csv", **options)
    with pytest.raises(ValueError, match="separator is '::', expected one ASCII character"):
        Table(tmp_path / "e.csv", separator="::")


def test_the_option_is_taken_from_the_command_line(tmp_path: Path) -> None:
    table(tmp_path, lines({50: '"Heroes'}))
    words = ("prepare-data", "--source", "Table", "--source.path", tmp_path / "e.csv", "--output", tmp_path / "data")
    with pytest.raises(SystemExit, match="line 52"):
        recsys(*words)
    recsys(*words, "--source.quote", "null")
    assert (tmp_path / "data" / c.MANIFEST).is_file()


def test_bad_rows_are_on_the_lines_of_the_file(tmp_path: Path) -> None:
    notes = {0: '"a\nb\nc"', 1: '"d\ne"', 2: '"f"', 5: '"\n\n"'}
    content = lines(notes, 8).replace(str(NOW + 2), "oops").replace(str(NOW + 5), "soon").replace(str(NOW + 7), "late")
    places = [place for place, line in enumerate(content.split("\n"), 1) if re.search("oops|late", line)]
    assert places == [7, 14]
    with pytest.raises(
        ValueError, match=r"3 bad rows \(line 7: oops is not .*; line 10: soon is not .*; line 14: late"
    ):
        prepare(table(tmp_path, content), tmp_path / "data")


def test_lines_after_two_fields_of_several_lines_in_one_row(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('a,b,c\n"1\n1","2\n\n2",3\n4,5,6\n"7\n",8,9\n10,11,12\n')
    layout = detect_layout(tmp_path / "e.csv", ",")
    places = pl.DataFrame({"row": range(4)}).select(layout.line_of(pl.col("row"), 2)).to_series()
    assert places.to_list() == [2, 6, 7, 9]


def test_side_tables_and_shards_are_looked_through_too(tmp_path: Path) -> None:
    source = table(tmp_path, lines({}))
    (tmp_path / "i.csv").write_text('id,name\n1,"One\n2,Two\n3,"Three\n')
    with pytest.raises(ValueError, match=r"i\.csv, line 2: a quote opens a field"):
        prepare(Table(source.path, items=SideTable("i.csv", "id", title="name")), tmp_path / "data")
    (tmp_path / "i.csv").write_text('id,name\n1,"One\n2,Two\n3,"Three\n')
    prepare(Table(source.path, items=SideTable("i.csv", "id", title="name", quote=None)), tmp_path / "data")
    titles = pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE).filter(pl.col("item_id") < 4)["title"]
    assert titles.to_list() == [None, '"One', "Two", '"Three']
    (tmp_path / "i.csv").write_text('id,name\n1,"One, two"\n')  # beside events without quotes
    side = SideTable("i.csv", "id", title="name")
    prepare(Table(source.path, quote=None, items=side), tmp_path / "data")
    assert "One, two" in pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["title"].to_list()


def test_histories_are_looked_through_too(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text('user_id,item_id,note\n1,10,"Heroes\n1,11,x\n2,12,"Heroes\n')
    with pytest.raises(ValueError, match=r"h\.csv, line 2: a quote opens a field"):
        read_log(path)
    path.write_text('user_id,item_id,note\n1,10,12" vinyl\n"2","12","a, b"\n'.replace('12" v', "v"))
    assert read_log(path).rows() == [(1, "10", "vinyl"), (2, "12", "a, b")]
    path.write_text('user_id,item_id,note\n007,10,12" vinyl\n')
    assert read_log(path).rows() == [("007", "10", '12" vinyl')]
    path.write_text("user_id,item_id,user_id\n1,10,2\n")
    with pytest.raises(ValueError, match=r"h\.csv has more than one column 'user_id'; remove all but one"):
        read_log(path)


def test_movielens_has_quotes_in_csv_and_none_in_dat(tmp_path: Path) -> None:
    """And a title may hold what Python takes for the end of a line."""
    csv, dat = tmp_path / "csv", tmp_path / "dat"
    csv.mkdir()
    dat.mkdir()
    (csv / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n1,10,4.0,{NOW}\n1,20,3.0,{NOW}\n")
    (csv / "movies.csv").write_text('movieId,title,genres\n10,"Say ""Hi"", (1999)",Drama\n20,"""Two""",Drama\n')
    (dat / "ratings.dat").write_text(f"1::10::4::{NOW}\n1::20::3::{NOW}\n")
    (dat / "movies.dat").write_bytes(b'10::"Heroes (1999)::Drama\n20::12" \x85 (2000)::Drama\n')
    for folder, wanted in ((csv, ['Say "Hi", (1999)', '"Two"']), (dat, ['"Heroes (1999)', '12" \x85 (2000)'])):
        prepare(MovieLens(folder), tmp_path / "data")
        assert pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["title"].to_list() == wanted
    (csv / "movies.csv").write_text('movieId,title,genres\n10,"Say,Drama\n20,"Two,Drama\n')
    with pytest.raises(ValueError, match=r"movies\.csv, line 2: a quote opens a field"):
        prepare(MovieLens(csv), tmp_path / "data")


def test_columns_of_one_name_do_not_shift_the_others(tmp_path: Path) -> None:
    source = table(tmp_path, f"user_id,x,x,item_id,note,timestamp\n1,5,6,10,a,{NOW}\n1,5,6,20,b,{NOW}\n")
    prepare(source, tmp_path / "data")
    assert pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["item_id"].to_list() == [10, 20]
    source = table(tmp_path, f"user_id,item_id,item_id,note,timestamp\n1,10,11,a,{NOW}\n")
    with pytest.raises(ValueError, match="2 columns named 'item_id'"):
        prepare(source, tmp_path / "data")


def test_lines_that_end_in_a_carriage_return_alone_are_lines(tmp_path: Path) -> None:
    prepared = [prepare(table(tmp_path, lines({}).replace("\n", end)), tmp_path / "data") for end in ("\n", "\r")]
    assert prepared[0]["split_hash"] == prepared[1]["split_hash"]
