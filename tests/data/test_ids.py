"""One rule for ids: a table of types, each in every place where ids are read."""

import functools
import json
import logging
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from pipeline_fixtures import recsys

from recsys2stage import columns as c
from recsys2stage.cli.main import keep_ids_as_written
from recsys2stage.data import ids
from recsys2stage.data.events import encode_ids, factorize, stable_order
from recsys2stage.data.frames import FrameColumns, as_polars
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import SideTable, Table, Vectors
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Transformer
from recsys2stage.retrieval.index import Exact
from recsys2stage.retrieval.towers import TwoTower
from recsys2stage.serving.requests import FileRequests, read_target_actions, resolve_target_actions

NOW = 1_600_000_000
UUIDS = [uuid.UUID(int=2**100 + place) for place in range(3)]
INTEGERS = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.Int128, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64, pl.UInt128]

# a column of ids as it comes, and the texts that they are
TYPES: dict[str, tuple[pl.Series, list[str]]] = {
    **{str(dtype): (pl.Series([7, 100, 9], dtype=dtype), ["7", "100", "9"]) for dtype in INTEGERS},
    "negative": (pl.Series([-7, 100, -128], dtype=pl.Int16), ["-7", "100", "-128"]),
    "above 2^63": (pl.Series([2**63 + 7, 2**64 - 1, 9], dtype=pl.UInt64), [str(2**63 + 7), str(2**64 - 1), "9"]),
    "beyond 64 bits": (pl.Series([2**100, -7, 9], dtype=pl.Int128), [str(2**100), "-7", "9"]),
    "Float64": (pl.Series([7.0, 2.0**53, -0.0]), ["7", str(2**53), "0"]),
    "Float32": (pl.Series([7.0, 2.0**24, 9.0], dtype=pl.Float32), ["7", str(2**24), "9"]),
    "Decimal": (pl.Series([Decimal("7.00"), Decimal(100), Decimal(-9)], dtype=pl.Decimal(30, 2)), ["7", "100", "-9"]),
    "String": (pl.Series(["7", "b c", "é"]), ["7", "b c", "é"]),
    "blanks": (pl.Series([" 7", "7", "7 "]), [" 7", "7", "7 "]),
    "digits": (pl.Series(["007", "7", "7.0"]), ["007", "7", "7.0"]),
    "digits of others": (pl.Series(["1e3", "+5", "1,000"]), ["1e3", "+5", "1,000"]),
    "missing in words": (pl.Series(["NaN", "NULL", "\\N"]), ["NaN", "NULL", "\\N"]),
    "Categorical": (pl.Series(["b", "a", "c"], dtype=pl.Categorical), ["b", "a", "c"]),
    "named Categorical": (
        pl.Series(["b", "a", "c"], dtype=pl.Categorical(pl.Categories("products"))),
        ["b", "a", "c"],
    ),
    "Enum": (pl.Series(["b", "a", "c"], dtype=pl.Enum(["c", "b", "a"])), ["b", "a", "c"]),
    "long": (pl.Series(["x" * 5000, "x" * 5001, "y"]), ["x" * 5000, "x" * 5001, "y"]),
}
NO_IDS: dict[str, tuple[pl.Series, str]] = {
    "fraction": (pl.Series([7.0, 1.5, 9.0]), "1.5 is not an id: floats are ids only if"),
    "inexact": (pl.Series([7.0, 2.0**53 + 2, 9.0]), "is not an id: floats are ids only if"),
    "Float32": (pl.Series([7.0, 2.0**24 + 2, 9.0], dtype=pl.Float32), "is not an id: floats are ids only if"),
    "infinite": (pl.Series([7.0, float("inf"), 9.0]), "inf is not an id"),
    "Decimal": (pl.Series([Decimal("7.50"), Decimal(1), Decimal(2)], dtype=pl.Decimal(9, 2)), "7.50 is not an id"),
    "Boolean": (pl.Series([True, False, True]), "the type Boolean holds no ids"),
    "Binary": (pl.Series([b"a", b"b", b"c"]), "the type Binary holds no ids"),
    "Date": (pl.Series([1, 2, 3]).cast(pl.Date), "the type Date holds no ids"),
    "Duration": (pl.Series([1, 2, 3]).cast(pl.Duration), "holds no ids"),
    "List": (pl.Series([[1], [2], [3]]), "holds no ids"),
}


def parquet(path: Path, **columns: Any) -> Path:
    pl.DataFrame(columns).write_parquet(path)
    return path


def of_log(folder: Path, column: pl.Series) -> list[str]:
    """As users and as items of the events."""
    found = []
    for name, other, table in ((c.USER_ID, c.ITEM_ID, c.USER_TABLE), (c.ITEM_ID, c.USER_ID, c.ITEM_TABLE)):
        path = parquet(folder / "e.parquet", **{name: column, other: [1, 2, 3], "timestamp": [NOW, NOW, NOW]})
        prepare(Table(path), folder / "data")
        numbered = pl.read_parquet(folder / "data" / table)
        place = {str(one): place for place, one in enumerate(numbered[name])}
        found.append(list(place))
    assert found[0] == found[1]
    return found[0]


def of_side_table(folder: Path, column: pl.Series, known: list[str]) -> list[str]:
    """Those that find their item."""
    path = folder / "e.csv"
    pl.DataFrame({"user_id": 1, "item_id": known, "timestamp": NOW}).write_csv(path)
    parquet(folder / "i.parquet", id=column, title=["a", "b", "c"])
    prepare(Table(path), folder / "plain")
    side = SideTable("i.parquet", "id", title="title")
    parquet(folder / "e.parquet", user_id=[1] * len(known), item_id=known, timestamp=[NOW] * len(known))
    prepare(Table(folder / "e.parquet", items=side), folder / "data")
    items = pl.read_parquet(folder / "data" / c.ITEM_TABLE)
    return [items.filter(pl.col("title") == title)["item_id"][0] for title in "abc"]


def of_vectors(folder: Path, column: pl.Series) -> list[str]:
    path = parquet(folder / "v.parquet", item_id=column, vector=[[1.0], [2.0], [3.0]])
    return Vectors(path).read()[0].to_list()


def of_frame(folder: Path, column: pl.Series) -> list[str]:
    return as_polars(pl.DataFrame({"u": column}), ("u",))["u"].cast(pl.String).to_list()


def of_actions(folder: Path, column: pl.Series) -> list[str]:
    return list(read_target_actions(parquet(folder / "a.parquet", user_id=column, action=["x", "y", "z"])))


@functools.cache
def towers() -> TwoTower:
    return TwoTower(num_items=3, max_length=9, dim=4, encoder=functools.partial(Transformer, layers=1, heads=1))


def recommender_of(known: list[str], **options: Any) -> Recommender:
    index = Exact()
    index.build(towers().all_item_vectors().detach().numpy())
    catalogue = pl.DataFrame({c.ITEM: range(1, len(known) + 1), c.ITEM_ID: known})
    return Recommender(towers(), index, None, catalogue, np.zeros(4), "none", has_time=False, **options)


def of_histories(folder: Path, column: pl.Series, known: list[str], only: list[str] | None = None) -> list[str]:
    """Of users; each has met the item of the same id."""
    path = parquet(folder / "h.parquet", user_id=column, item_id=column)
    people = FileRequests(path, recommender_of(known), only)
    texts = [str(one) for one in people.user_ids]
    assert [known[item - 1] for item in people.items] == texts
    return texts


@pytest.mark.parametrize("name", TYPES)
def test_what_ids_are_in_every_place(tmp_path: Path, name: str) -> None:
    column, texts = TYPES[name]
    assert sorted(of_log(tmp_path, column)) == sorted(texts)
    assert of_side_table(tmp_path, column, texts) == texts
    assert of_vectors(tmp_path, column) == texts
    assert of_frame(tmp_path, column) == texts
    assert of_actions(tmp_path, column) == texts
    assert sorted(of_histories(tmp_path, column, texts)) == sorted(texts)
    assert of_histories(tmp_path, column, texts, only=texts[:1]) == texts[:1]  # --users, joined to histories
    assert ids.given_ids(column.to_list()) == texts  # Python values: users and histories
    assert recommender_of(texts).catalogue.numbers(column.to_list()).tolist() == [1, 2, 3]
    assert ids.select(texts[:2], pl.Series(texts), "data").to_list() == [True, True, False]
    if name not in ("Float64", "Float32", "Decimal"):  # in text a float is what is written
        pl.DataFrame({"user_id": texts, "item_id": texts, "timestamp": NOW}).write_csv(tmp_path / "t.csv")
        prepare(Table(tmp_path / "t.csv"), tmp_path / "data")
        assert sorted(map(str, pl.read_parquet(tmp_path / "data" / c.USER_TABLE)["user_id"])) == sorted(texts)


@pytest.mark.parametrize("name", NO_IDS)
def test_what_no_id_is_in_any_place(tmp_path: Path, name: str) -> None:
    column, message = NO_IDS[name]
    (tmp_path / "data").mkdir()
    places: list[Callable[[], Any]] = [
        lambda: of_log(tmp_path, column),
        lambda: of_side_table(tmp_path, column, ["1", "2", "3"]),
        lambda: of_vectors(tmp_path, column),
        lambda: of_frame(tmp_path, column),
        lambda: of_actions(tmp_path, column),
        lambda: of_histories(tmp_path, column, ["1"]),
    ]
    for place in places:
        with pytest.raises(ValueError, match=message):
            place()


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_id_of_a_type_is_a_bad_row(tmp_path: Path, missing: float | None) -> None:
    column = pl.Series([7.0, missing, 9.0])
    with pytest.raises(ValueError, match=r"column 'user_id': 1 bad row \(row 2: missing\)"):
        of_log(tmp_path, column)
    with pytest.raises(ValueError, match=r"column 'id': 1 bad row \(row 2: missing\)"):
        of_side_table(tmp_path, column, ["7", "9"])
    with pytest.raises(ValueError, match="row 2: the item id is missing"):
        of_vectors(tmp_path, column)
    with pytest.raises(ValueError, match=r"1 of 3 rows have no user_id in .*, the first is row 2"):
        of_histories(tmp_path, column, ["7", "9"])
    with pytest.raises(ValueError, match="1 of 3 rows have no user_id"):
        of_actions(tmp_path, column)
    assert as_polars(pl.DataFrame({"u": column}), ("u",))["u"].to_list() == [7, None, 9]
    with pytest.raises(ValueError, match="id 2 of 3 is missing"):
        ids.given_ids(column.to_list())


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_a_missing_id(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"row 2: missing"):
        of_log(tmp_path, pl.Series(["a", text, "b"]))
    with pytest.raises(ValueError, match="have no user_id"):
        of_histories(tmp_path, pl.Series(["a", text, "b"]), ["a", "b"])


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (UUIDS, [str(one) for one in UUIDS]),
        ([7, "b", None], ["7", "b", None]),
        ([7, 8.0, None], [7, 8, None]),
        ([np.int64(7), np.float32(8), float("nan")], [7, 8, None]),
        ([Decimal("7.0"), 2**64, -1], ["7", str(2**64), "-1"]),
        (["7", "8", "9"], ["7", "8", "9"]),
        (np.array(["a", 7, UUIDS[0]], dtype=object), ["a", "7", str(UUIDS[0])]),
        (pl.Series([UUIDS[0], 7, "x"], dtype=pl.Object), [str(UUIDS[0]), "7", "x"]),
    ],
)
def test_objects_of_python_are_their_text(values: Any, texts: list[Any]) -> None:
    assert as_polars({"x": [1, 2, 3], "u": values}, ("u",)).to_dict(as_series=False) == {"x": [1, 2, 3], "u": texts}
    if isinstance(values, pl.Series):
        assert as_polars(pl.DataFrame({"u": values}), ("u",))["u"].to_list() == texts


@pytest.mark.parametrize("value", ["12", b"12"])
def test_one_text_is_no_list_of_ids(value: Any) -> None:
    """recommend(users="12") answered for the users 1 and 2."""
    with pytest.raises(ValueError, match=r"ids is b?'12', expected a list of ids"):
        ids.given_ids(value)


@pytest.mark.parametrize("value", [True, np.True_, b"a", 1.5, float("inf"), np.float32(2**25), Decimal("1.5")])
def test_values_that_are_no_ids(value: Any) -> None:
    for call in (ids.as_text, lambda one: ids.given_ids([one]), lambda one: as_polars({"u": ["a", one]}, ("u",))):
        with pytest.raises(ValueError, match="is not an id"):
            call(value)


def test_frames_of_events_and_later_ones_may_type_ids_otherwise() -> None:
    frames = FrameColumns("u", "i", None, None, None, None, None, None)
    log = frames.mark_parts({"u": [1, 2], "i": [10, 20]}, {"u": ["1", "x"], "i": [30.0, 40.0]})
    assert log.rows() == [("1", 10, "train"), ("2", 20, "train"), ("1", 30, "val")]


# numbers


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_type_of_whole_number_is_numbered_in_order(dtype: Any) -> None:
    low, high = pl.select(dtype.min() if dtype not in (pl.Int128, pl.UInt128) else pl.lit(0)).item(), 100
    if dtype not in (pl.Int128, pl.UInt128):
        high = pl.select(dtype.max()).item()
    values = pl.Series([high, low, high - 1, low + 1, high, low + 2], dtype=dtype)
    codes, found = encode_ids(values, untyped=False)
    assert found.to_list() == [low, low + 1, low + 2, high - 1, high]
    assert codes.tolist() == [4, 0, 3, 1, 4, 2]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_numbers_and_orders_do_not_overflow(dtype: str) -> None:
    info = np.iinfo(dtype)
    near = [int(info.max) - 3, int(info.max), int(info.max) - 3] if info.bits > 16 else [info.max, info.min, info.max]
    for values in (np.array(near, dtype), np.array([info.max, info.min, info.max, 1], dtype)):
        assert stable_order(values).tolist() == np.argsort(values, kind="stable").tolist()
        if info.bits <= 16 or int(values.max()) - int(values.min()) < 100:
            codes, found = factorize(values)
            wanted, places = np.unique(values, return_inverse=True)
            assert [int(one) for one in found] == [int(one) for one in wanted]
            assert codes.tolist() == places.tolist()


@pytest.mark.parametrize(
    ("shards", "wanted"),
    [
        ([pl.Series([2**53 + 1, 2**53]), pl.Series([7], dtype=pl.UInt64)], [7, 2**53, 2**53 + 1]),
        ([pl.Series([2**53 + 1, 2**53]), pl.Series([7.0])], [7, 2**53, 2**53 + 1]),
        ([pl.Series([-1]), pl.Series([2**63], dtype=pl.UInt64)], ["-1", str(2**63)]),
        ([pl.Series([7], dtype=pl.Int8), pl.Series([300], dtype=pl.Int16), pl.Series([7, 2])], [2, 7, 300]),
        ([pl.Series([7, 8]), pl.Series(["7", "x"])], ["7", "8", "x"]),
        ([pl.Series([7.0, 8.0]), pl.Series(["7", "x"], dtype=pl.Categorical)], ["7", "8", "x"]),
        ([pl.Series([7, 8]), pl.Series([Decimal("7.0")])], [7, 8]),
    ],
)
def test_shards_of_unlike_types_have_the_same_ids(tmp_path: Path, shards: list[pl.Series], wanted: list[Any]) -> None:
    (tmp_path / "raw").mkdir()
    for place, column in enumerate(shards):
        parquet(tmp_path / "raw" / f"{place}.parquet", user_id=column, item_id=column, timestamp=[NOW] * len(column))
    prepare(Table(tmp_path / "raw"), tmp_path / "data")
    assert pl.read_parquet(tmp_path / "data" / c.ITEM_TABLE)["item_id"].to_list() == wanted
    assert pl.read_parquet(tmp_path / "data" / c.USER_TABLE)["user_id"].to_list() == wanted


# words of warning


def test_ids_that_look_alike_and_missing_ones_in_words_are_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(*users: str) -> str:
        caplog.clear()
        (tmp_path / "e.csv").write_text(
            "user_id,item_id,timestamp\n" + "".join(f"{user},{place},{NOW}\n" for place, user in enumerate(users))
        )
        with caplog.at_level(logging.WARNING, "recsys2stage"):
            prepare(Table(tmp_path / "e.csv"), tmp_path / "data")
        return caplog.text

    for pair in ((" 1", "1"), ("100.0", "100"), ("007", "7"), ("1e3", "1000"), ("b ", "b")):
        assert f"1 values of user_id look like others.*for example {pair[0]!r} and {pair[1]!r}".replace(
            ".*", " but are separate ids, "
        ) in said(*pair, "x")
    assert "look like" not in said("007", "8", "x", "9.0")
    for text in ("NULL", "NaN", "\\N", "None"):
        assert f"the user_id {text!r} is read as an id" in said(text, "1", "2")
    assert "is read as an id" not in said("nullable", "1", "2")


def test_a_side_table_of_which_nothing_is_known_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(f"user_id,item_id,timestamp\n1,7,{NOW}\n1,8,{NOW}\n")
    for owner, wrong in (("items", "007"), ("users", "1.0")):
        (tmp_path / "s.csv").write_text(f"id\n{wrong}\nx\n")
        table = Table(tmp_path / "e.csv", **{owner: SideTable("s.csv", "id")})
        with pytest.raises(ValueError, match=rf"s.csv has none of the . {owner} of the events: .* '{wrong}', those"):
            prepare(table, tmp_path / "data")
        assert not (tmp_path / "data").exists()


def test_actions_of_which_no_user_is_known_are_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = recommender_of(["1"], next_action="target", actions=["buy", "see"])
    (tmp_path / "a.csv").write_text("user_id,action\n05,buy\n5.0,see\n")
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        assert resolve_target_actions(np.array([5, 7]), str(tmp_path / "a.csv"), served).tolist() == [0, 0]
    assert "has user ids such as '05', the requests '5'" in caplog.text
    parquet(tmp_path / "a.parquet", user_id=[5.0, 7.0], action=["buy", "see"])
    assert resolve_target_actions(np.array([5, 7]), str(tmp_path / "a.parquet"), served).tolist() == [1, 2]


def test_ids_of_a_text_file_hold_what_python_takes_for_line_ends(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes("\ufeffa\x85b\r\n\u2028\r\nc\n".encode())
    assert ids.read_id_lines(tmp_path / "ids.txt") == ["a\x85b", "\u2028", "c"]


# --users


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("[0012]", ["0012"]),
        ("[007, 7]", ["007", "7"]),
        ("[1_000, 1e3, 0x10, 0b1, 0o7]", ["1_000", "1e3", "0x10", "0b1", "0o7"]),
        ("[yes, no, null, ~, true, .inf]", ["yes", "no", "null", "~", "true", ".inf"]),
        ("[2020-01-01, 12:30:45]", ["2020-01-01", "12:30:45"]),
        ("[5, 7]", ["5", "7"]),
        ("['0012', \"a, b\", ann lee]", ["0012", "a, b", "ann lee"]),
        ('["0012"]', ["0012"]),
        ("[]", []),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("option", ["--users", "--users+"])
def test_users_are_the_text_that_was_typed(typed: str, wanted: list[str], joined: bool, option: str) -> None:
    argv = ["recsys", "recommend", *([f"{option}={typed}"] if joined else [option, typed]), "--k", "3"]
    keep_ids_as_written(argv)
    assert json.loads(argv[2].removeprefix(f"{option}=") if joined else argv[3]) == wanted
    assert argv[-2:] == ["--k", "3"]


def test_users_of_a_config_are_the_text_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("k: 3\nusers: [0012, '7', no]\n")
    argv = ["recsys", "recommend", "--config", str(tmp_path / "r.yaml"), "--users", "users.txt"]
    keep_ids_as_written(argv)
    assert argv[4:] == ["--users", '["0012", "7", "no"]', "--users", "users.txt"]
    for other in ("k: 3\n", "users: people.txt\n", "[1]\n", "a: [\n", ""):
        (tmp_path / "r.yaml").write_text(other)
        argv = ["recsys", "recommend", f"--config={tmp_path / 'r.yaml'}"]
        keep_ids_as_written(argv)
        assert len(argv) == 3
    with pytest.raises(ValueError, match="a list of ids holds a list or a mapping"):
        ids.parse_yaml_ids("[a: b]")


def test_blanks_around_a_wanted_id_count_only_where_such_an_id_exists() -> None:
    assert ids.select([" 7"], pl.Series(["7", " 7"]), "data").to_list() == [False, True]
    assert ids.select([" 7 "], pl.Series(["7", "8"]), "data").to_list() == [True, False]
    with pytest.raises(
        ValueError, match="2 of 3 users are not in data, for example '007', '10', expected ids such as '7'; check"
    ):
        ids.select(["007", "10", "7"], pl.Series([7, 8]), "data")


def test_recommend_answers_for_the_user_that_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the parser of the command line, to what the verb is given."""
    from recsys2stage.cli import main as cli

    given: list[Any] = []

    def recommend(users: list[str | int] | Path | None = None, k: int = 10) -> None:
        given.append(users)

    monkeypatch.setitem(cli.COMMANDS, "recommend", recommend)
    recsys("recommend", "--users", "[0012, 1_000, no]")
    recsys("recommend", "--users=[5, 7]", "--k", 3)
    recsys("recommend", "--users", tmp_path / "users.txt")
    (tmp_path / "r.yaml").write_text("users: [0012, 7]\n")
    recsys("recommend", "--config", tmp_path / "r.yaml")
    recsys("recommend", "--config", tmp_path / "r.yaml", "--users", "[8]")
    assert given == [["0012", "1_000", "no"], ["5", "7"], tmp_path / "users.txt", ["0012", "7"], ["8"]]
