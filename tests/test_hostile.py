"""Artifacts from a stranger: whatever they hold, loading them runs no code, leaves no folder and says what is wrong."""

import importlib
import json
import os
import pkgutil
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from pipeline_fixtures import Run, recsys
from worlds import seal, untrained_index

import recsys2stage
from recsys2stage.artifacts import MAX_JSON_BYTES, read_array, read_json
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.sources import base
from recsys2stage.data.sources.base import unpacked
from recsys2stage.ranking.candidates import Candidates
from recsys2stage.ranking.lists import CANDIDATES, REQUESTS, STATES
from recsys2stage.ranking.scorers import Scorer
from recsys2stage.ranking.signals import OtherRetriever, Signal
from recsys2stage.recommender import Recommender
from recsys2stage.retrieval.encoders import Encoder
from recsys2stage.retrieval.encoders.blocks import Block
from recsys2stage.retrieval.encoders.layers import FeedForward, Norm
from recsys2stage.retrieval.encoders.positions import Position
from recsys2stage.retrieval.encoders.times import Time
from recsys2stage.retrieval.index import Faiss, Index
from recsys2stage.retrieval.inputs import Input
from recsys2stage.retrieval.items import ItemTable
from recsys2stage.retrieval.retriever import Retriever
from recsys2stage.retrieval.users import UserTower
from recsys2stage.trust import _members

Edit = Callable[[Path, Path], object]  # (folder, canary): makes the folder hostile; what it would run makes the canary


@pytest.fixture
def bundle(informed: Run, tmp_path: Path) -> Path:
    return shutil.copytree(informed.bundle, tmp_path / "bundle")


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears when code of the test's artifacts or of the module evil_parts runs."""
    path = tmp_path / "canary"
    (tmp_path / "evil_parts.py").write_text(
        f"import pathlib\npathlib.Path({str(path)!r}).touch()\n"
        "from recsys2stage.ranking.signals import Session\n"
        "class NoSignal:\n    pass\n"
        "class Mine(Session):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    monkeypatch.delitem(sys.modules, "evil_parts", raising=False)


def popen(canary: Path) -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(canary)]}}


def edited(path: Path, *keys: str | int, value: Any) -> None:
    """Replaces one value of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def in_manifest(*keys: str | int, value: Callable[[Path], Any] | Any) -> Edit:
    def edit(folder: Path, canary: Path) -> None:
        edited(folder / "manifest.json", *keys, value=value(canary) if callable(value) else value)

    return edit


def one_signal(class_path: Any, **init_args: Any) -> Edit:
    def edit(folder: Path, canary: Path) -> None:
        described = {"class_path": class_path, "init_args": init_args}
        (folder / "signals/signals.json").write_text(json.dumps([described]), encoding="utf-8")

    return edit


def written(name: str, content: bytes) -> Edit:
    return lambda folder, canary: (folder / name).write_bytes(content)


def neighbours(message: str, **tables: Any) -> tuple[Edit, str]:
    """A signal that looks up stored neighbours, with tables of which one is wrong."""

    def edit(folder: Path, canary: Path) -> None:
        right = {"offsets": [0, 0, 1, *[2] * 119], "neighbours": np.array([2, 1], np.int32), "scores": np.ones(2)}
        shutil.rmtree(folder / "signals")
        (folder / "signals").mkdir()
        one_signal("ItemKNN")(folder, canary)
        for name, table in (right | tables).items():
            if table is not None:
                np.save(folder / f"signals/0.{name}.npy", table)

    return edit, f"tables of ItemKNN {message}.*; mine again"


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickled_array(name: str) -> Edit:
    return lambda folder, canary: np.save(folder / name, np.array([Evil(canary)], dtype=object), allow_pickle=True)


def pickled_weights(folder: Path, canary: Path) -> None:
    torch.save({"weight": Evil(canary)}, folder / "towers.pt")


def compressed_weights(folder: Path, canary: Path) -> None:
    """A zip bomb: torch reads what is compressed, too."""
    with zipfile.ZipFile(folder / "towers.pt") as plain:
        members = {member: plain.read(member) for member in plain.namelist()}
    with zipfile.ZipFile(folder / "towers.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member, content in members.items():
            packed.writestr(member, content + b"\0" * (1 << 20))


def repeated_weights(folder: Path, canary: Path) -> None:
    """One number that says it is many."""
    weights = torch.load(folder / "towers.pt", weights_only=True)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    weights[name] = torch.zeros(1, 1).expand(10**9, 10**3)
    torch.save(weights, folder / "towers.pt")


def giant_array(name: str) -> Edit:
    def edit(folder: Path, canary: Path) -> None:
        with (folder / name).open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 16)}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]

    return edit


def linked(folder: Path, canary: Path) -> None:
    shutil.move(folder / "popularity.npy", canary.parent / "outside.npy")
    (folder / "popularity.npy").symlink_to(canary.parent / "outside.npy")


def fewer_items(folder: Path, canary: Path) -> None:
    pl.read_parquet(folder / "items.parquet").head(7).write_parquet(folder / "items.parquet")


HOSTILE: dict[str, tuple[Edit, str]] = {
    "a process as a signal": (
        lambda folder, canary: (folder / "signals/signals.json").write_text(json.dumps([popen(canary)])),
        "signals.json names subprocess.Popen, which is not part of recsys2stage",
    ),
    "os.system as a scorer": (
        in_manifest("reranker", "scorer", value={"class_path": "os.system", "init_args": {}}),
        "manifest.json names os.system, which is not part of recsys2stage",
    ),
    "eval as an encoder": (
        in_manifest("towers", "encoder", value={"class_path": "builtins.eval"}),
        "names builtins.eval, which is not",
    ),
    "a process in an option of an option": (
        in_manifest("towers", "encoder", "init_args", "time", value=popen),
        "names subprocess.Popen, which is not",
    ),
    "a process in a list": (in_manifest("towers", "inputs", value=lambda canary: [popen(canary)]), "subprocess.Popen"),
    "a process as text": (
        in_manifest("towers", "encoder", value="subprocess.Popen"),
        "gives encoder of TwoTower as 'subprocess.Popen', expected class_path",
    ),
    "a class where none belongs": (
        in_manifest("towers", "features", value=lambda canary: [popen(canary)]),
        "names a class for features of TwoTower, where none is expected",
    ),
    "a process as an index": (
        lambda folder, canary: (folder / "index.json").write_text(
            json.dumps({"class": "subprocess.Popen", "options": {"args": ["touch", str(canary)]}})
        ),
        "index.json names subprocess.Popen, which is not",
    ),
    "a function of the package": (
        one_signal("recsys2stage.data.download.download", url="http://localhost", path="x"),
        "names the Signal 'recsys2stage.data.download.download', which this version does not have",
    ),
    "what the package imports": (
        one_signal("recsys2stage.artifacts.shutil.rmtree", path="x"),
        "names the Signal 'recsys2stage.artifacts.shutil.rmtree', which this version does not have",
    ),
    "a class of the package that is no signal": (one_signal("Transformer"), "names the Signal 'Transformer', which"),
    "a signal as an encoder": (
        in_manifest("towers", "encoder", value={"class_path": "Session"}),
        "names the Encoder 'Session', which this version does not have; expected one of .*Transformer",
    ),
    "a module that is not allowed": (one_signal("evil_parts.Mine"), "names evil_parts.Mine, .*trust=.'evil_parts'."),
    "a name that is no text": (one_signal(["subprocess", "Popen"]), "names the class .* expected text"),
    "a pickle as an array": (pickled_array("popularity.npy"), "popularity.npy cannot be read as an array"),
    "a pickle as item vectors": (pickled_array("index.npy"), "index.npy cannot be read as an array"),
    "a pickle as a table": (pickled_array("signals/0.items.npy"), "0.items.npy cannot be read as an array"),
    "a pickle as weights": (pickled_weights, "towers.pt is not a checkpoint, or is incomplete"),
    "compressed weights": (compressed_weights, "towers.pt unpacks from [0-9,]+ to [0-9,]+ bytes"),
    "one number as many weights": (
        repeated_weights,
        "the weights .* are not a tensor, or are larger than their storage",
    ),
    "an array larger than its file": (giant_array("index.npy"), "index.npy cannot be read as an array"),
    "a table larger than its file": (giant_array("signals/0.keys.npy"), "0.keys.npy cannot be read as an array"),
    "more items than weights": (
        in_manifest("towers", "num_items", value=10**9),
        r"one TwoTower \(.* has shape \(121, 16\), expected \(1000000001, 16\)\)",
    ),
    "more items than weights, in a model that looks at its numbers": (
        lambda folder, canary: (
            (
                in_manifest("towers", "num_items", value=10**9)(folder, canary),
                in_manifest("towers", "encoder", "init_args", "time", value={"class_path": "LogSpaced"})(
                    folder, canary
                ),
            )
        ),
        r"one TwoTower \(num_items is 1,000,000,000, but no weights have more than 121 rows",
    ),
    "places without end": (
        in_manifest("towers", "max_length", value=10**12),
        r"one TwoTower \(max_length is 1000000000000, expected at most",
    ),
    "weights cut short": (
        lambda folder, canary: os.truncate(folder / "reranker.pt", 9_999),
        "reranker.pt is not a checkpoint, or is incomplete",
    ),
    "fewer items": (fewer_items, "items.parquet has 7 rows .* expected 120"),
    "items that are no Parquet": (written("items.parquet", b"PAR1"), "items.parquet cannot be read as Parquet"),
    "a link": (linked, "popularity.npy is a symbolic link, expected a regular file"),
    "no JSON": (written("signals/signals.json", b"[{"), "signals.json is not JSON"),
    "JSON without end": (written("signals/signals.json", b"[" * 100_000), "signals.json is not JSON"),
    "another JSON": (written("signals/signals.json", b"{}"), "signals.json is not a JSON list"),
    "a list as an index": (written("index.json", b"[]"), "index.json is not a JSON object"),
    "options that no index takes": (
        written("index.json", b'{"class": "Exact", "options": {"depth": 3}}'),
        "index.json has options that Exact does not accept",
    ),
    "options that no signal takes": (one_signal("Session", depth=3), "signals.json has a Session with other options"),
    "neighbours beyond their table": neighbours(
        "have 122 offsets from 0 to 2147483648, expected ascending ones from 0 to 2, their number",
        offsets=[0, 0, *[2**31] * 120],
    ),
    "neighbours that go back": neighbours("have 122 offsets from 0 to 2, expected", offsets=[0, 2, 1, *[2] * 119]),
    "neighbours of half an item": neighbours("have offsets of float64 and neighbours", offsets=np.full(122, 2.0)),
    "neighbours that are no items": neighbours(
        "have neighbours from 0 to 121, expected items from 0 to 120", neighbours=[121, 1]
    ),
    "neighbours with fewer scores": neighbours("have 1 scores, expected 2", scores=[0.5]),
    "neighbours without scores": neighbours("lack scores", scores=None),
    "another format": (in_manifest("format", value=2), "manifest.json has the format 2, expected 1; it was written by"),
    "no format": (
        in_manifest("format", value=None),
        "has no format number, expected 1; it was .* again: recsys",
    ),
    "no candidates": (in_manifest("candidates", value=-1), "has -1 candidates and .* expected 1 to"),
    "more candidates than memory": (in_manifest("candidates", value=10**13), "10,000,000,000,000 candidates"),
    "more recent events than memory": (in_manifest("recent", value=10**13), "10,000,000,000,000 recent events"),
    "a newest time before 1970": (in_manifest("newest_time", value=-1), "and the newest time -1, expected"),
    "true as the newest time": (in_manifest("newest_time", value=True), "has the newest_time True, expected int"),
    "repeats of another kind": (
        in_manifest("repeats", value="keeps"),
        "has repeats 'keeps' .* one of first, last, keep",
    ),
    "half an event": (in_manifest("towers", "max_length", value=20.5), "has the max_length 20.5|does not hold options"),
    "true as a format": (in_manifest("format", value=True), "has the format True, expected 1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_starts_nothing_and_says_what_is_wrong(name: str, bundle: Path, canary: Path) -> None:
    edit, message = HOSTILE[name]
    edit(bundle, canary)
    if name != "a link":
        seal(bundle)  # whoever made it gives fitting checksums
    with pytest.raises(ValueError, match=message) as caught:
        Recommender.load(bundle)
    assert "\n" not in str(caught.value), "one sentence"
    assert not canary.exists()


def test_a_module_is_imported_only_where_the_caller_allows_it(bundle: Path, canary: Path) -> None:
    signals = bundle / "signals/signals.json"
    described = json.loads(signals.read_text(encoding="utf-8"))
    session = next(number for number, one in enumerate(described) if one["class_path"] == "Session")
    edited(signals, session, "class_path", value="evil_parts.Mine")
    seal(bundle, trust=["evil_parts"])  # what the file says of trust does not count
    for trust in ([], ["evil"], ["evil_parts.deeper"], ["os", "subprocess"]):
        with pytest.raises(ValueError, match=r"names evil_parts.Mine, which is not part of recsys2stage"):
            Recommender.load(bundle, trust=trust)
    words = ("recommend", "--bundle", bundle, "--users", "[1]")
    with pytest.raises(SystemExit, match=r"recsys recommend: .*evil_parts.Mine.*--trust evil_parts"):
        recsys(*words)
    assert not canary.exists()
    loaded = Recommender.load(bundle, trust=["evil_parts"])
    assert type(loaded.signals[session]).__name__ == "Mine"
    assert canary.exists(), "trusted code runs"
    with pytest.raises(ValueError, match=r"evil_parts.Mine"):
        Recommender.load(bundle)  # trust ends with the call, although the module is there now
    edited(signals, session, "class_path", value="evil_parts.NoSignal")
    seal(bundle)
    with pytest.raises(ValueError, match=r"names evil_parts.NoSignal, expected a subclass of Signal"):
        Recommender.load(bundle, trust="evil_parts")  # type: ignore[arg-type]  # one module, as the command line has it


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda folder: os.truncate(folder / "reranker.pt", 5_000), "reranker.pt is not the file"),
    "of another bundle": (
        lambda folder: np.save(folder / "index.npy", np.zeros((120, 16), np.float32)),
        "index.npy is not the file that was written with .*manifest.json .*make .* again: recsys export-bundle",
    ),
    "gone": (lambda folder: (folder / "towers.pt").unlink(), "towers.pt is missing; make .* again"),
    "more": (lambda folder: (folder / "signals/7.keys.npy").touch(), "7.keys.npy is not listed in .*manifest.json"),
    "above": (lambda folder: edited(folder / "manifest.json", "files", "../x", value="y"), "lists '../x', expected"),
    "elsewhere": (lambda folder: edited(folder / "manifest.json", "files", "/etc/x", value="y"), "lists '/etc/x', exp"),
    "no list": (
        lambda folder: edited(folder / "manifest.json", "files", value=["index.npy"]),
        " expected dict",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_file_that_is_not_the_one_that_was_written_is_named(name: str, bundle: Path) -> None:
    change, message = CHANGED[name]
    change(bundle)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Recommender.load(bundle)


def places_of(content: Any, depth: int = 3) -> Iterator[tuple[str | int, ...]]:
    """The way to each value of a JSON file, but of lists only to the first of each."""
    if depth and isinstance(content, dict | list) and content:
        for key in content if isinstance(content, dict) else [0]:
            yield (key,)
            yield from ((key, *more) for more in places_of(content[key], depth - 1))


def test_no_value_of_a_manifest_is_taken_for_granted(bundle: Path) -> None:
    """A value of another type is an error that says so, or does no harm; never an accident of whoever reads it."""
    manifest = bundle / "manifest.json"
    whole, refused, rng = json.loads(manifest.read_text()), 0, np.random.default_rng(0)
    ways = [way for way in places_of(whole) if way[0] not in ("command", "created", "versions", "files")]
    values: list[Any] = [[], {}, "x", -1, None, 0.5, [[1]], {"class_path": "Session"}]
    for way in ways:
        for value in rng.permutation(np.array(values, dtype=object))[:2]:
            edited(manifest, *way, value=value)
            try:
                Recommender.load(bundle)
            except (ValueError, FileNotFoundError) as error:
                assert len(str(error)) > 20, (way, value)  # noqa: PT017
                refused += 1
            finally:
                manifest.write_text(json.dumps(whole))
    assert refused > len(ways)


def test_the_sizes_of_json_and_arrays_are_looked_at_first(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match=r"large.json has 67,108,865 bytes, expected at most 67,108,864"):
        read_json(tmp_path / "large.json", dict, "make it")
    np.save(tmp_path / "three.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"three.npy has shape \(3,\) and type float64, expected \(4,\) and float32"):
        read_array(tmp_path / "three.npy", np.float32, (4,))
    with pytest.raises(FileNotFoundError, match=r"none.npy does not exist"):
        read_array(tmp_path / "none.npy")
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x01\x00\x10\x00{(1,2)]        \n"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"x.npy cannot be read as an array"):
            read_array(tmp_path / "x.npy")


def test_a_faiss_index_of_other_vectors_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("index", 30), ("other", 20)):
        index = Faiss("Flat")
        index.build(rng.normal(size=(count, 4)).astype(np.float32))
        index.save(tmp_path / name)
    graph = tmp_path / "index/index.faiss"
    shutil.copy(tmp_path / "other/index.faiss", graph)
    with pytest.raises(ValueError, match=r"index.faiss holds 20 vectors of width 4, expected 30 of width 4"):
        Index.load(tmp_path / "index")
    os.truncate(graph, 50)
    with pytest.raises(ValueError, match=r"index.faiss is not a complete faiss index"):
        Index.load(tmp_path / "index")


# checkpoints


def tampered(checkpoint: Path, path: Path, **changed: Any) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= changed.pop("hyper_parameters", {})
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value for name, value in (content | changed).items() if value is not None}, path)
    return path


def test_a_hostile_checkpoint_starts_nothing(trained: Run, canary: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile/best.ckpt"
    config = ("--config", trained.folder / "retriever.yaml", "--data.init_args.path", trained.data)
    for encoder, message in (
        (popen(canary), "names subprocess.Popen, which is not part of recsys2stage"),
        ({"class_path": "evil_parts.Mine"}, "names evil_parts.Mine, which is not part of recsys2stage"),
        ("evil_parts.Mine", "gives encoder of .* as 'evil_parts.Mine', expected class_path"),
    ):
        tampered(trained.retriever, hostile, hyper_parameters={"encoder": encoder})
        with pytest.raises(SystemExit, match=f"recsys export-index: .*{message}"):
            recsys("export-index", "--retriever", hostile, "--data", trained.data, "--output", tmp_path / "index")
        with pytest.raises(SystemExit, match=f"recsys validate: .*{message}"):
            recsys("validate", *config, "--output", tmp_path / "out", "--ckpt_path", hostile)
        with pytest.raises(ValueError, match=message):
            Retriever.load_from_checkpoint(hostile, map_location="cpu")
    torch.save({"state_dict": Evil(canary)}, hostile)
    with pytest.raises(SystemExit, match=r"best.ckpt is not a checkpoint, or is incomplete"):
        recsys("fit", *config, "--output", tmp_path / "out", "--ckpt_path", hostile)
    start = ("--model.init_args.start", hostile)
    with pytest.raises(SystemExit, match=r"best.ckpt is not a checkpoint, or is incomplete"):
        recsys("fit", *config, "--output", tmp_path / "out", *start)
    assert not canary.exists()
    assert not (tmp_path / "index").exists()


def test_parts_of_a_bundle_that_lack_what_it_needs_are_refused(trained: Run, tmp_path: Path) -> None:
    weights = torch.load(trained.ranker, weights_only=True)["state_dict"]
    weights.pop("reranker.vectors")
    ranker = tampered(trained.ranker, tmp_path / "ranker/best.ckpt", state_dict=weights)
    with pytest.raises(SystemExit, match=r"best.ckpt has no vectors, expected Tensor"):
        recsys("export-bundle", "--index", trained.index, "--ranker", ranker, "--output", tmp_path / "bundle")
    for name in ("repeats", "newest_time", "user_features"):
        index = shutil.copytree(trained.index, tmp_path / name)
        manifest = json.loads((index / "manifest.json").read_text(encoding="utf-8"))
        del manifest[name]
        (index / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(SystemExit, match=f"manifest.json has no {name}, expected"):
            recsys("export-bundle", "--index", index, "--ranker", trained.ranker, "--output", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_of_older_code_is_refused(trained: Run, tmp_path: Path) -> None:
    older = tampered(trained.retriever, tmp_path / "older/best.ckpt", format=None, versions=None)
    sentence = r"best.ckpt has no format number, expected 1; it was written by .*, make it again: recsys fit"
    with pytest.raises(SystemExit, match=sentence):
        recsys("export-index", "--retriever", older, "--data", trained.data)
    with pytest.raises(ValueError, match=sentence):
        Retriever.load_from_checkpoint(older)
    ranker = tampered(trained.ranker, tmp_path / "later/best.ckpt", format=7)
    with pytest.raises(SystemExit, match=r"has the format 7, expected 1; it was written by recsys2stage \d"):
        recsys("export-bundle", "--index", trained.index, "--ranker", ranker)


# candidate lists, and a second retriever


LISTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "more rows than there are": (
        lambda f: pl.read_parquet(f / REQUESTS).with_columns(pl.lit(2**30).alias("rows")).write_parquet(f / REQUESTS),
        "candidates.parquet has [0-9,]+ rows, expected [0-9,]+, the total in requests.parquet",
    ),
    "items that are not there": (
        lambda f: pl.read_parquet(f / CANDIDATES).with_columns(pl.col("item") + 120).write_parquet(f / CANDIDATES),
        "values of item outside 1 to 120",
    ),
    "users that are not there": (
        lambda f: pl.read_parquet(f / REQUESTS).with_columns(pl.col("user") - 150).write_parquet(f / REQUESTS),
        "values of user outside 0 to 149",
    ),
    "test events": (
        lambda f: pl.read_parquet(f / REQUESTS).with_columns(pl.col("place") + 1).write_parquet(f / REQUESTS),
        "targets of .* are test events of",
    ),
    "no column": (
        lambda f: pl.read_parquet(f / CANDIDATES).drop("retriever_score").write_parquet(f / CANDIDATES),
        "column retriever_score of .* cannot be read",
    ),
    "no Parquet": (lambda f: (f / CANDIDATES).write_bytes(b"x" * 99), "column .* cannot be read"),
    "states of others": (lambda f: np.save(f / STATES, np.zeros((3, 16), np.float32)), "states.npy has shape"),
    "pickled states": (
        lambda f: np.save(f / STATES, np.array([Evil(f.parent / "canary")], dtype=object), allow_pickle=True),
        "states.npy cannot be read as an array",
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_hostile_lists_are_refused(name: str, trained: Run, canary: Path, tmp_path: Path) -> None:
    lists = shutil.copytree(trained.candidates, tmp_path / "candidates")
    change, message = LISTS[name]
    change(lists)
    with pytest.raises(ValueError, match="is not the file that was written with"):
        Candidates(lists)
    seal(lists)
    with pytest.raises(ValueError, match=message):
        Candidates(lists).setup("fit")
    assert not canary.exists()


LIST_VALUES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("options", "k"), True, "has the k True, expected an integer from 1 to"),
    (("options", "k"), 10**13, "has the k 10000000000000, expected an integer from 1 to 1,048,576"),
    (("options", "k"), None, "has the k None"),
    (("options", "signals"), {"Session": 1}, "has the option signals {'Session': 1}, expected a list"),
    (("vector_dim",), -16, "has the vector_dim -16"),
    (("max_length",), 0, "has the max_length 0, expected an integer from 1"),
    (("signals",), ["Session.age"], "has the signal 'Session.age', expected a name and the flags"),
    (("signals",), [{"name": "Session.age", "by_id": 1, "counted": False}], "expected a name and the flags"),
    (("signals",), [{"name": ["a"], "by_id": True, "counted": False}], "expected a name and the flags"),
    (("request_time",), "now", "has the request_time 'now', expected one of none, last_event, target"),
    (("scores_cold",), "yes", "has the scores_cold 'yes', expected true or false"),
    (("parents",), {"data": {"path": "x", "hash": None}}, "has the parents data, expected data and index"),
    (("parents", "index", "path"), "a\0b", "expected a path and a hash of each"),
    (("parents", "data", "relative"), 3, "expected a path and a hash of each"),
]


@pytest.mark.parametrize(("keys", "value", "message"), LIST_VALUES)
def test_nested_values_in_the_manifest_of_lists_are_checked(
    keys: tuple[str | int, ...], value: Any, message: str, trained: Run, tmp_path: Path
) -> None:
    lists = shutil.copytree(trained.candidates, tmp_path / "candidates")
    edited(lists / "manifest.json", *keys, value=value)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Candidates(lists)
    assert "recsys mine-negatives" in str(caught.value)
    assert "\n" not in str(caught.value)


FEATURE = {"name": "genres", "kind": "multi", "size": 9}
DATA_VALUES: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("counts", "items"), "120", "counts, has the items '120', expected int"),
    (("counts", "items"), 0, "has 0 items, expected at least 1"),
    (("counts", "items"), 10**12, "items.cold.npy has shape (121,) and type bool, expected (1000000000001,)"),
    (("counts", "val_users"), -1, "has the count val_users -1, expected 0 or more"),
    (("counts",), {}, "counts, has no events, expected int"),
    (("protocol", "repeats"), ["keep"], "has the repeats ['keep'], expected one of first, last, keep, error"),
    (("protocol", "split"), None, "protocol, has the split None, expected str"),
    (("has", "rating"), 1, "has, has the rating 1, expected bool"),
    (("has",), {"time": True}, "has, has no rating, expected bool"),
    (("actions",), [1, 2], "has the actions [1, 2], expected names"),
    (("features", "items"), {}, "features, has the items {}, expected list"),
    (("features",), {"items": []}, "features, has no users, expected list"),
    (("features", "items", 0), "genres", "has the feature 'genres' of items, expected a name, a kind"),
    (("features", "items", 0), FEATURE | {"kind": "text"}, "of items, expected a name, a kind of categorical"),
    (("features", "items", 0), FEATURE | {"size": True}, "of items, expected a name, a kind"),
    (("features", "items", 0), FEATURE | {"size": 0}, "and a size of at least 1"),
    (("features", "items", 0), FEATURE | {"name": "/../../etc"}, "of items, expected a name"),
    (("features", "items", 0), FEATURE | {"name": 7}, "of items, expected a name"),
    (("log",), [], "has the log [], expected columns by name and a time unit of seconds, milliseconds, iso, order"),
    (("log", "columns", "user_id"), 5, "expected columns by name"),
    (("log", "time_unit"), "days", "expected columns by name and a time unit"),
    (("split_hash",), 5, "has the split_hash 5, expected str"),
]


@pytest.mark.parametrize(("keys", "value", "message"), DATA_VALUES)
def test_nested_values_in_the_manifest_of_a_dataset_are_checked(
    keys: tuple[str | int, ...], value: Any, message: str, trained: Run, tmp_path: Path
) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data")
    edited(data / "manifest.json", *keys, value=value)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Dataset(data)
    assert "again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hostile_second_retriever_starts_nothing(ragged: Path, canary: Path, tmp_path: Path) -> None:
    folder, dataset = tmp_path / "index", Dataset(ragged)
    untrained_index(folder, dataset)
    vectors = np.zeros((1, 1), np.float32)
    OtherRetriever(str(folder)).fit(dataset, vectors)
    edited(folder / "manifest.json", "towers", "encoder", value=popen(canary))
    with pytest.raises(ValueError, match=r"the second retriever of .* names subprocess.Popen"):
        OtherRetriever(str(folder)).fit(dataset, vectors)
    (folder / "towers.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"towers.pt is not the file that was written"):
        OtherRetriever(str(folder)).fit(dataset, vectors)
    assert not canary.exists()


# archives of raw data


@pytest.mark.parametrize("name", ["../ratings.csv", "/tmp/ratings.csv", "a/../../ratings.csv", "..\\ratings.csv"])
def test_a_member_that_leaves_the_archive_is_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr(name, "userId,movieId\n")
    patterns = ("*ratings.csv",)
    with (
        pytest.raises(ValueError, match=r"has a member .* expected paths inside the archive"),
        unpacked(tmp_path / "raw.zip", patterns),
    ):
        pass


def test_a_member_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ratings.csv", b"0" * (1 << 20))
    with unpacked(tmp_path / "raw.zip", ("ratings.csv",)) as folder:
        assert (folder / "ratings.csv").stat().st_size == 1 << 20
    monkeypatch.setattr(base, "LARGE", 1 << 10)
    with (
        pytest.raises(ValueError, match=r"unpacks from [0-9,]+ to 1,048,576 bytes"),
        unpacked(tmp_path / "raw.zip", ("ratings.csv",)),
    ):
        pass


# files outlive the places of classes


def test_a_bundle_loads_after_its_classes_were_moved(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys2stage.ranking import scorers, signals
    from recsys2stage.retrieval import encoders, index
    from recsys2stage.retrieval.encoders import times

    for module, name in (
        (encoders, "Transformer"),
        (times, "RequestGap"),
        (scorers, "DIN"),
        (signals, "Transitions"),
        (index, "Exact"),
    ):
        monkeypatch.setattr(getattr(module, name), "__module__", f"recsys2stage.moved.{name.lower()}")
        monkeypatch.delattr(module, name)
    for file in ("manifest.json", "index.json", "signals/signals.json"):
        named = json.loads((bundle / file).read_text())
        assert "recsys2stage." not in json.dumps(named | {"command": ""} if isinstance(named, dict) else named)
    moved = Recommender.load(bundle)
    assert type(moved.towers.encoder).__module__ == "recsys2stage.moved.transformer"


def test_checkpoints_name_the_package_s_classes_by_their_short_names(informed: Run) -> None:
    for path in (informed.retriever, informed.ranker):
        content = torch.load(path, weights_only=True)
        assert content["format"] == 1
        assert content["split_hash"] == Dataset(informed.data).manifest["split_hash"]
        assert "recsys2stage." not in json.dumps(content["hyper_parameters"])


def test_short_names_say_one_class_and_come_with_their_family() -> None:
    """No two members of a family share a name, and whoever imports the family's base has them all."""
    for module in pkgutil.walk_packages(recsys2stage.__path__, "recsys2stage."):
        importlib.import_module(module.name)
    families = [Encoder, Block, Index, Input, ItemTable, Norm, FeedForward, Position, Scorer, Signal, Time, UserTower]
    for family in families:
        members = list(_members(family))
        assert len({name for name, _ in members}) == len({kind for _, kind in members}), members
        package = sys.modules[family.__module__.rpartition(".")[0]]
        for name, kind in members:
            beside = package is not recsys2stage and getattr(package, name, None) is kind
            assert kind.__module__ == family.__module__ or beside, f"{name} is not imported with {family.__name__}"


# one split from end to end: `informed` is the same log as `trained`, split at other events


def test_a_retriever_of_another_split_is_refused(trained: Run, informed: Run, tmp_path: Path) -> None:
    """Its training events hold other test events; so it would be measured on what it was trained on."""
    assert Dataset(trained.data).num_items == Dataset(informed.data).num_items
    message = r"best.ckpt was made from a dataset with split hash .*its test events may have been trained on"
    index = ("--data", informed.data, "--output", tmp_path / "index")
    with pytest.raises(SystemExit, match=message):
        recsys("export-index", "--retriever", trained.retriever, *index)
    assert not (tmp_path / "index").exists()
    unknown = tampered(trained.retriever, tmp_path / "unknown/best.ckpt", split_hash=None)
    content = torch.load(unknown, weights_only=True) | {"split_hash": None}
    torch.save(content, unknown)
    with pytest.raises(SystemExit, match=r"has no split hash.*fit it again"):
        recsys("export-index", "--retriever", unknown, *index)
    config = ("--config", trained.folder / "retriever.yaml", "--data.init_args.path", informed.data)
    config = (*config, "--output", tmp_path / "fit")
    with pytest.raises(SystemExit, match=message):
        recsys("fit", *config, "--model.init_args.start", trained.retriever)
    message = r"the checkpoint was trained on data with split hash .*its test events may have been trained on"
    for verb in ("fit", "validate", "test"):
        with pytest.raises(SystemExit, match=f"recsys {verb}: {message}"):
            recsys(verb, *config, "--ckpt_path", trained.retriever)
    with pytest.raises(ValueError, match=r"index was made from a dataset with split hash"):
        OtherRetriever(str(trained.index)).fit(Dataset(informed.data), np.zeros((1, 1), np.float32))


def test_a_ranker_or_lists_of_another_split_are_refused(trained: Run, informed: Run, tmp_path: Path) -> None:
    of = ("--index", trained.index, "--ranker", informed.ranker, "--output", tmp_path / "bundle")
    with pytest.raises(SystemExit, match=r"best.ckpt was trained on data with split hash .* mine with this index"):
        recsys("export-bundle", *of)
    of = ("--data", informed.data, "--index", trained.index, "--output", tmp_path / "candidates")
    with pytest.raises(SystemExit, match=r"index was made from a dataset with split hash"):
        recsys("mine-negatives", *of)
    for verb in ("evaluate", "recommend"):
        with pytest.raises(SystemExit, match=r"bundle was made from a dataset with split hash"):
            recsys(verb, "--bundle", trained.bundle, "--data", informed.data, "--output", tmp_path / "out")
    lists = shutil.copytree(trained.candidates, tmp_path / "lists")
    seal(lists, split_hash=Dataset(informed.data).manifest["split_hash"])
    with pytest.raises(ValueError, match=r"lists was made from a dataset with split hash"):
        Candidates(lists)


def test_lists_beside_a_retriever_that_was_trained_on_test_events_are_no_fold(
    trained: Run, informed: Run, tmp_path: Path
) -> None:
    """`trained` holds back one event more than this fold's data, whose retriever saw the test events."""
    late = shutil.copytree(trained.data, tmp_path / "data")
    np.save(late / "users.val_end.npy", Dataset(trained.data).offsets[1:])
    np.save(late / "users.train_end.npy", Dataset(trained.data).offsets[1:])
    fold = shutil.copytree(trained.candidates, tmp_path / "fold")
    manifest = json.loads((fold / "manifest.json").read_text())
    manifest["parents"]["data"]["path"] = str(late)
    seal(fold, **manifest)
    data = Candidates(trained.candidates, folds=[fold])
    with pytest.raises(ValueError, match=r"the retriever of .*fold was trained on test events of .*data"):
        data.setup("fit")
