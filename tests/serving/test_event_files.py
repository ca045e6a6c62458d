"""Histories in files: the formats, our column names and the log's own, times, and ids that no model knows."""

import gzip
import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest
from pipeline_fixtures import TOLD, Run, recsys

from recsys2stage.artifacts import read_manifest
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.manifest import SourceLog
from recsys2stage.ranking.bundle import bundle_log
from recsys2stage.recommender import Recommender
from recsys2stage.serving.event_files import read_events, read_log, read_times
from recsys2stage.serving.requests import FileRequests, read_target_actions

COLUMNS = {"user_id": "customer", "item_id": "sku", "time": "created_at"}
SHOP = SourceLog(COLUMNS | {"rating": "stars", "action": "event_type"}, "iso")
DAY = 86_400


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    """40 users walk a cycle of 20 items, three events a day in one second of which only the milliseconds differ."""
    rows = [
        (f"u{user}", f"sku-{(user + step) % 20:02}", 1_700_000_000_000 + (step // 3) * DAY * 1000 + step % 3)
        for user in range(40)
        for step in range(6 + user % 3)
    ]
    frame = pl.DataFrame(rows, schema=["customer", "sku", "ms"], orient="row").sample(fraction=1, shuffle=True, seed=1)
    time = pl.col("ms").cast(pl.Datetime("ms"))
    return frame.with_columns(created_at=time.dt.strftime("%Y-%m-%dT%H:%M:%S%.3fZ"))


@pytest.fixture(scope="module")
def shop(log: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A first stage with request time, of a log with other column names and ISO times."""
    run = Run(tmp_path_factory.mktemp("shop"))
    log.drop("ms").write_csv(run.folder / "events.csv")
    names = ("--source.user", "customer", "--source.item", "sku", "--source.time", "created_at")
    of = ("--source", "Table", "--source.path", run.folder / "events.csv", *names, "--source.time_unit", "iso")
    recsys("prepare-data", *of, "--output", run.data)
    run.fit_retriever(*TOLD, "--trainer.max_epochs", 1)
    run.export_index()
    return run


@pytest.fixture(scope="module")
def expected(shop: Run) -> pl.DataFrame:
    recsys("recommend", "--bundle", shop.index, "--output", shop.folder / "expected.parquet", "--k", 4)
    return pl.read_parquet(shop.folder / "expected.parquet")


def json_lines(frame: pl.DataFrame) -> bytes:
    return "".join(json.dumps(row) + "\n\n" for row in frame.iter_rows(named=True)).encode()


def write(frame: pl.DataFrame, path: Path) -> Path:
    """Writes a frame in the format of the path."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        frame.write_parquet(path)
        return path
    text = json_lines(frame) if name.endswith(("jsonl", "ndjson")) else b""
    text = text or frame.write_csv(separator="," if name.endswith(".csv") else "\t").encode()
    path.write_bytes(gzip.compress(text) if path.name.lower().endswith(".gz") else text)
    return path


@pytest.mark.parametrize(
    "name", ["h.csv", "h.CSV.gz", "h.tsv", "h.tab.gz", "h.jsonl", "h.ndjson", "h.jsonl.gz", "h.parquet", "h.pq"]
)
@pytest.mark.parametrize("naming", ["source", "own"])
def test_the_log_itself_gives_the_lists_of_the_data_in_every_format(
    name: str, naming: str, shop: Run, log: pl.DataFrame, tmp_path: Path
) -> None:
    """Also under our own names: the milliseconds decide the order."""
    frame = log.drop("ms")
    if naming == "own":
        time = pl.col("ms").cast(pl.Datetime("ms")) if name.endswith((".parquet", ".pq")) else pl.col("created_at")
        frame = log.select(pl.col("customer").alias("user_id"), pl.col("sku").alias("item_id"), time.alias("time"))
    path = write(frame, tmp_path / name)
    served = Recommender.load(shop.index)
    requests = FileRequests(path, served, source=bundle_log(shop.index))
    assert requests.user_ids.tolist() == sorted({f"u{user}" for user in range(40)})
    order = pl.read_parquet(shop.data / "users.parquet").sort("user_id")["user"].to_numpy()
    mine, theirs = requests.read(slice(0, 40))[0], Dataset(shop.data).histories(order, "all", 20)
    assert mine.items.tolist() == theirs.items.tolist()
    assert mine.times.tolist() == theirs.times.tolist()


def test_the_verb_takes_the_log_s_own_columns(
    shop: Run, log: pl.DataFrame, expected: pl.DataFrame, tmp_path: Path
) -> None:
    path = write(log.drop("ms"), tmp_path / "h.jsonl.gz")
    recsys(*("recommend", "--bundle", shop.index, "--histories", path, "--output", tmp_path / "o.parquet", "--k", 4))
    by = ["user_id", "rank"]
    mine = pl.read_parquet(tmp_path / "o.parquet").sort(by)
    assert mine["item_id"].to_list() == expected.sort(by)["item_id"].to_list()


def test_artifacts_remember_the_columns_of_the_log(shop: Run, trained: Run) -> None:
    assert bundle_log(shop.index) == SourceLog(COLUMNS, "iso")
    movielens = {"user_id": "userId", "item_id": "movieId", "time": "timestamp", "rating": "rating"}
    for folder, kind in ((trained.data, "dataset"), (trained.index, "index"), (trained.bundle, "bundle")):
        assert read_manifest(folder, kind, "")["log"] == {"columns": movielens, "time_unit": "seconds"}


def test_an_index_of_an_older_version_reads_our_names(shop: Run, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({k: v for k, v in json.loads((shop.index / "manifest.json").read_text()).items() if k != "log"})
    )
    assert bundle_log(tmp_path) == SourceLog({}, "seconds")


# names


def named(columns: str, source: SourceLog, tmp_path: Path) -> dict[str, str]:
    """Our name -> which column of a file was taken; each column holds its own name."""
    (tmp_path / "h.csv").write_text(f"{columns}\n{columns}\n")
    return read_log(tmp_path / "h.csv", source=source).row(0, named=True)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ("customer,sku,created_at", {"user_id": "customer", "item_id": "sku", "time": "created_at"}),
        ("user_id,item_id,time", {"user_id": "user_id", "item_id": "item_id", "time": "time"}),
        ("user_id,sku,created_at,note", {"user_id": "user_id", "item_id": "sku", "time": "created_at", "note": "note"}),
        # in the source's format its names come first, and ours where it has none
        ("user_id,customer,sku,time", {"user_id": "customer", "item_id": "sku", "time": "time"}),
        ("customer,sku,stars,event_type", {"rating": "stars", "action": "event_type"}),
        # not in it ours come first
        ("user_id,item_id,sku,time,created_at", {"user_id": "user_id", "item_id": "item_id", "time": "time"}),
    ],
)
def test_columns_have_our_names_or_those_of_the_source(columns: str, chosen: dict[str, str], tmp_path: Path) -> None:
    got = named(columns, SHOP, tmp_path)
    assert {name: got[name] for name in chosen} == chosen
    assert set(got) <= {"user_id", "item_id", "time", "rating", "action", "note", "sku", "created_at"}


def test_a_column_of_the_source_is_not_read_as_another_of_ours(tmp_path: Path) -> None:
    swapped = SourceLog({"user_id": "who", "item_id": "action"}, "seconds")
    assert named("who,action", swapped, tmp_path) == {"user_id": "who", "item_id": "action"}
    swapped = SourceLog({"user_id": "item_id", "item_id": "user_id"}, "seconds")
    assert named("item_id,user_id", swapped, tmp_path) == {"user_id": "item_id", "item_id": "user_id"}


def test_an_action_that_is_a_rating_is_read_as_movielens_has_it(tmp_path: Path) -> None:
    source = SourceLog({"user_id": "userId", "item_id": "movieId", "rating": "rating", "action": "rating"}, "seconds")
    (tmp_path / "h.csv").write_text("userId,movieId,rating\n1,5,4\n1,6,0.5\n")
    assert read_log(tmp_path / "h.csv", source=source)["action"].to_list() == ["4.0", "0.5"]


def test_a_missing_column_is_named_by_both_names(shop: Run, tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("client,sku\n1,2\n")
    served = Recommender.load(shop.index)
    message = (
        r"lacks the columns \['user_id', 'time'\]; it has \['client', 'item_id'\]; rename or add them, or use the "
    )
    with pytest.raises(ValueError, match=message + r"source's names: 'customer' for user_id, 'created_at' for time"):
        FileRequests(tmp_path / "h.csv", served, source=bundle_log(shop.index))


def test_a_file_of_target_actions_may_have_the_source_s_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"customer": "007", "event_type": "buy"}\n')
    assert read_target_actions(tmp_path / "a.jsonl", SHOP) == {"007": "buy"}


# formats


@pytest.mark.parametrize("name", ["h.txt", "h.json", "h", "h.csv.zip", "h.parquet.gz", "h.xlsx", "h.csv.bz2", "csv"])
def test_another_ending_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("user_id,item_id\n1,2\n")
    with pytest.raises(ValueError, match=r"has the ending '.*', expected one of \.csv, .*; convert or rename it"):
        read_log(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("h.jsonl", b"", "is empty, expected a JSON object"),
        ("h.jsonl", b'{"user_id": 1}\n{"user_id": \n', r"line 2 is b'.*', expected a JSON object with one event"),
        ("h.jsonl", b'{"user_id": 1}\n\n[1, 2]\n', r"line 3 is b'\[1, 2\]\\n', expected a JSON object"),
        ("h.jsonl", b'{"user_id": 1}\n{"user_id": true}\n', "the same type in each field"),
        ("h.ndjson", b"user_id,item_id\n1,2\n", "line 1 is b'user_id,item_id.n', expected a JSON object"),
        ("h.jsonl", b"\xff\xfe{}", "line 1 is .*, expected a JSON object"),
        ("h.pq", b"PAR1", "cannot be read"),
        ("h.csv.gz", b"user_id,item_id\n", "is not a complete gzip file .*; make or download it again"),
        ("h.csv.gz", gzip.compress(b"user_id,item_id\n1,2\n" * 99, mtime=0)[:-9], "is not a complete gzip file"),
        ("h.csv", b"", "cannot be read: empty CSV"),
    ],
)
def test_a_file_that_is_not_of_its_format_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_log(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"h\.csv does not exist, expected a file with a row for each event"):
        read_log(tmp_path / "h.csv")


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys2stage.data.sources.plain.LARGE", 1 << 20)
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress(b"user_id,item_id\n" + b"1,2\n" * (1 << 20)))
    with pytest.raises(ValueError, match=r"h.csv.gz unpacks from [0-9,]+ to over [0-9,]+ bytes, expected at most 200"):
        read_log(tmp_path / "h.csv.gz")


def test_ids_in_json_lines_keep_their_text(tmp_path: Path) -> None:
    rows = [("0012", 1), ("no", 2), ("1e3", 3)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps({"user_id": a, "item_id": b}) + "\n" for a, b in rows))
    assert read_log(tmp_path / "h.jsonl").rows() == rows
    (tmp_path / "h.jsonl").write_text('{"user_id": 18446744073709551615, "item_id": "x"}\n')
    assert [str(one) for one in read_log(tmp_path / "h.jsonl").row(0)] == ["18446744073709551615", "x"]


# times

NOON = 1_717_156_800  # 2024-05-31 12:00:00 UTC


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([NOON], "seconds"),
        ([float(NOON)], "seconds"),
        ([str(NOON)], "seconds"),
        ([f"{NOON}.0"], "seconds"),
        ([NOON * 1000 + 999], "milliseconds"),
        (["2024-05-31T12:00:00Z"], "seconds"),
        (["2024-05-31 14:00:00.999+02:00"], "iso"),
        (["2024-05-31T12:00:00.5"], "milliseconds"),
        ([datetime(2024, 5, 31, 12, tzinfo=UTC)], "milliseconds"),
        ([datetime(2024, 5, 31, 12, 0, 0, 7)], "seconds"),
        ([NOON], "iso"),
    ],
)
def test_times_are_read_as_whole_seconds(values: list[object], unit: str) -> None:
    seconds, ticks = read_times(pl.Series("time", values), unit, Path("h.csv"), NOON)
    assert seconds.to_list() == [NOON]
    assert len(ticks) == 1


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        (
            [float(NOON), NOON + 0.5],
            "seconds",
            r"has the time 1717156800.5 in row 2, expected whole seconds since 1970, or ISO",
        ),
        (["2024-05-31", "yesterday"], "seconds", "has the time 'yesterday' in row 2, expected whole seconds"),
        (["31.05.2024"], "iso", "has the time '31.05.2024' in row 1"),
        ([20240531], "iso", "holds 20240531, expected ISO text as in 2024-05-31, or seconds"),
        ([NOON], "milliseconds", f"holds {NOON}, expected milliseconds .* looks like seconds: multiply by 1000"),
        ([NOON * 1000 + 0.5], "milliseconds", "expected whole milliseconds since 1970"),
        ([True], "seconds", "has the time True in row 1"),
        (["2024-05-31"], "order", "has the time '2024-05-31' in row 1, expected whole numbers"),
        ([[5]], "seconds", "has the time "),
    ],
)
def test_times_of_another_kind_are_refused(values: list[object], unit: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_times(pl.Series("time", values), unit, Path("h.csv"), NOON)
    assert "\n" not in str(caught.value)


def test_the_unit_of_the_source_holds_for_its_column_only(tmp_path: Path) -> None:
    source = SourceLog({"user_id": "who", "item_id": "what", "time": "ms"}, "milliseconds")
    for header, in_unit in (("who,what,ms", True), ("who,what,time", False), ("user_id,item_id,ms", True)):
        (tmp_path / "h.csv").write_text(f"{header}\n1,2,{NOON}\n")
        assert read_events(tmp_path / "h.csv", source=source)[1] == in_unit


# histories of which nothing is known


def test_users_of_whose_items_none_is_known_are_named(
    shop: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{row},{NOON}\n" for row in ("a,sku-01", "b,SKU-07", "b,SKU-08", "c,9")]
    (tmp_path / "h.csv").write_text("".join(["user_id,item_id,time\n", *rows]))
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        FileRequests(tmp_path / "h.csv", Recommender.load(shop.index))
    assert (
        "the model knows no item of 2 of 3 users, such as 'SKU-07' of user 'b' (known ids look like 'sku-00'); they "
        "get the most popular items; check their item ids, or leave them out" in caplog.text
    )
    caplog.clear()
    (tmp_path / "h.csv").write_text(f"user_id,item_id,time\na,sku-01,{NOON}\nb,sku-07,{NOON}\nb,SKU-08,{NOON}\n")
    with caplog.at_level(logging.WARNING, "recsys2stage"):
        FileRequests(tmp_path / "h.csv", Recommender.load(shop.index))
    assert "knows no item" not in caplog.text
