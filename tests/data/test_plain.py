"""Text files as people have them: gzipped, with a byte order mark or other line ends; features of any name."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys2stage.data.dataset import Dataset, feature_stem
from recsys2stage.data.ids import read_id_lines
from recsys2stage.data.prepare import prepare
from recsys2stage.data.sources import Feature, SideTable, Table, Vectors

NOW = 1_600_000_000
LINES = "".join(f"u{user},i{(user + 3 * j) % 7},{NOW + 100 * j}\n" for user in range(4) for j in range(5))
TEXT = "user_id,item_id,timestamp\n" + LINES
ITEMS = "id,kind/of\n" + "".join(f"i{item},{'ab'[item % 2]}\n" for item in range(7))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "e.csv").write_text(TEXT)
    return prepare(Table(folder / "e.csv"), folder / "data")


def same(path: Path, plain: dict[str, Any], **options: Any) -> None:
    """Asserts that a file gives the dataset of the plain one."""
    assert prepare(Table(path, **options), path.parent / "data")["split_hash"] == plain["split_hash"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("e.csv.gz", gzip.compress(TEXT.encode())),
        ("E.CSV.GZ", gzip.compress(TEXT.encode())),
        ("e.tsv.gz", gzip.compress(TEXT.replace(",", "\t").encode())),
        ("e.csv", b"\xef\xbb\xbf" + TEXT.encode()),
        ("e.csv", TEXT.replace("\n", "\r").encode()),
        ("e.csv", TEXT.replace("\n", "\r\n").encode()),
        ("e.csv.gz", gzip.compress(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r").encode())),
        ("e.csv.gz", gzip.compress(TEXT[:200].encode()) + gzip.compress(TEXT[200:].encode())),
    ],
)
def test_a_file_is_read_however_it_is_written(name: str, content: bytes, tmp_path: Path, plain: dict[str, Any]) -> None:
    (tmp_path / name).write_bytes(content)
    same(tmp_path / name, plain)


def test_gzipped_shards_and_members_of_a_zip_are_read(tmp_path: Path, plain: dict[str, Any]) -> None:
    head, *lines = TEXT.splitlines(keepends=True)
    shards = ["".join([head, *lines[:10]]), "".join([head, *lines[10:]])]
    (tmp_path / "shards").mkdir()
    for number, text in enumerate(shards):
        (tmp_path / "shards" / f"{number}.csv.gz").write_bytes(gzip.compress(text.encode()))
    same(tmp_path / "shards", plain)
    same(tmp_path / "shards" / "*.csv.gz", plain)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("log/e.csv.gz", gzip.compress(TEXT.encode()))
    same(tmp_path / "raw.zip", plain)


def test_rejected_rows_name_the_file_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(f"{TEXT}u1,i1,soon\n".encode()))
    prepare(Table(tmp_path / "e.csv.gz"), tmp_path / "data", on_bad_rows="quarantine")
    rejected = pl.read_parquet(tmp_path / "data" / "rejected.parquet")
    assert rejected["file"].to_list() == [str(tmp_path / "e.csv.gz")]
    assert rejected["line"].to_list() == [22]


def test_a_feature_may_have_a_slash_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text(TEXT)
    (tmp_path / "items.csv.gz").write_bytes(gzip.compress(ITEMS.encode()))
    np.save(tmp_path / "v.npy", np.ones((1, 3), np.float32))
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfi3")
    source = Table(tmp_path / "e.csv", items=SideTable("items.csv.gz", "id", {"kind/of": Feature("categorical")}))
    prepare(source, tmp_path / "data", item_vectors={"text/title": Vectors(tmp_path / "v.npy", tmp_path / "ids.txt")})
    dataset = Dataset(tmp_path / "data")
    kinds, vectors = dataset.item_features
    assert (kinds["name"], vectors["name"]) == ("kind/of", "text/title")
    assert kinds["values"].tolist() == [0, 1, 2, 1, 2, 1, 2, 1]
    assert np.isfinite(vectors["values"]).all(1).tolist() == [False, False, False, False, True, False, False, False]
    assert feature_stem("items", "a.b") == "items.a.b"  # as in earlier datasets


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_ids_of_a_file_are_read_with_any_line_end(end: str, mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_bytes(mark + end.join(["a", "0012", " b", ""]).encode())
    assert read_id_lines(tmp_path / "ids.txt") == ["a", "0012", " b"]


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys2stage.data.sources.plain.LARGE", 1 << 20)
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(b"0" * (4 << 20)))
    with pytest.raises(ValueError, match=r"e.csv.gz unpacks from .* expected at most 200 times .* unpack it yourself"):
        prepare(Table(tmp_path / "e.csv.gz"), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["e.csv.gz"]


def test_no_space_left_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "e.csv").write_text(TEXT)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"data cannot be written: no space is left on its disk; free some, or choose"):
        prepare(Table(tmp_path / "e.csv"), tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["e.csv"]
