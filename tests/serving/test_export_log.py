"""recsys export-log: what a service stored, as Parquet that prepare-data reads."""

import sqlite3
from pathlib import Path

import polars as pl
import pytest
from pipeline_fixtures import recsys

from recsys2stage.data.dataset import Dataset
from recsys2stage.serving import export_log as module
from recsys2stage.serving.store import Event, Store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with seven impressions and events of three users."""
    path = tmp_path / "store.sqlite"
    with Store(path) as store:
        for user in range(3):
            for step in range(4):
                rating, action = (4.5, "buy") if step % 2 else (None, None)
                store.append([Event(f"u{user}", f"i{step}", 10**9 + step, rating, action, f"r{step}")])
        for number in range(7):
            user_id = None if number == 6 else "u1"
            store.log_impression(f"r{number}", "abc", user_id, ["é", f"i{number}"], [11, 12], number + 0.5)
        store.log_impression("none", "abc", "u1", [], [], 9.0)
    return path


def test_events_and_impressions_are_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 30)  # in several chunks
    with Store(path) as running:
        recsys("export-log", "--store", path)
        running.append([Event("later", "x", 1)])
    events = pl.read_parquet(path.parent / "log/events.parquet")
    assert events.columns == ["user_id", "item_id", "time", "rating", "action", "request_id", "received"]
    assert events.drop("received").rows()[:2] == [
        ("u0", "i0", 10**9, None, None, "r0"),
        ("u0", "i1", 10**9 + 1, 4.5, "buy", "r1"),
    ]
    assert (len(events), "later" in events["user_id"]) == (12, False)
    shown = pl.read_parquet(path.parent / "log/impressions.parquet")
    assert shown.columns == ["request_id", "bundle", "user_id", "time", "item_id", "position"]
    assert shown.rows()[:2] == [("r0", "abc", "u1", 0.5, "é", 11), ("r0", "abc", "u1", 0.5, "i0", 12)]
    assert shown.rows()[-1] == ("r6", "abc", None, 6.5, "i6", 12)
    assert len(shown) == 14


def test_the_exported_events_can_be_prepared(path: Path, tmp_path: Path) -> None:
    recsys("export-log", "--store", path, "--output", tmp_path / "export")
    source = ("--source", "Table", "--source.path", tmp_path / "export/events.parquet", "--source.time", "time")
    recsys("prepare-data", *source, "--output", tmp_path / "data")
    assert Dataset(tmp_path / "data").manifest["counts"]["events"] == 12


def test_exported_impressions_can_be_removed_and_events_stay(path: Path) -> None:
    recsys("export-log", "--store", path, "--remove", "true")
    with sqlite3.connect(path) as connection:
        counts = [
            connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("impressions", "events")
        ]
    assert counts == [0, 12]
    recsys("export-log", "--store", path)
    assert len(pl.read_parquet(path.parent / "log/impressions.parquet")) == 0


def test_an_empty_store_gives_empty_tables(tmp_path: Path) -> None:
    Store(tmp_path / "store.sqlite").close()
    recsys("export-log", "--store", tmp_path / "store.sqlite")
    assert len(pl.read_parquet(tmp_path / "log/events.parquet")) == 0


def test_what_is_no_store_is_refused_and_left_as_it_is(path: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gone.sqlite does not exist.* --store"):
        recsys("export-log", "--store", tmp_path / "gone.sqlite")
    assert not (tmp_path / "gone.sqlite").exists()
    (tmp_path / "text").write_text("x" * 1_000)
    with pytest.raises(SystemExit, match=r"text cannot be read .* --store"):
        recsys("export-log", "--store", tmp_path / "text")
    (tmp_path / "empty").touch()
    with pytest.raises(SystemExit, match="is empty, expected a store"):
        recsys("export-log", "--store", tmp_path / "empty")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(SystemExit, match="would be lost"):
        recsys("export-log", "--store", path, "--output", tmp_path / "mine", "--remove", "true")
    with Store(path) as store:
        assert store._read("SELECT count(*) FROM impressions", ())[0][0] == 8
