"""Artifacts appear whole or not at all, and say what made them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys2stage.artifacts import (
    atomic_write,
    find_parent,
    fingerprint,
    hash_arrays,
    read_manifest,
    write_json,
    write_manifest,
)

MAKE = "recsys make-it"


def dead_process() -> int:
    """The id of a process that was and is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_folder(path: Path, text: str) -> None:
    with atomic_write(path) as beside:
        beside.mkdir()
        (beside / "content").write_text(text)


@pytest.mark.parametrize("name", ["index", "index.npy", "a.b.c", ".hidden"])
def test_a_file_and_a_folder_of_any_name_appear(tmp_path: Path, name: str) -> None:
    with atomic_write(tmp_path / "files" / name) as beside:
        beside.write_text("one")
    assert (tmp_path / "files" / name).read_text() == "one"
    make_folder(tmp_path / "folders" / name, "two")
    assert (tmp_path / "folders" / name / "content").read_text() == "two"
    assert [file.name for file in tmp_path.glob("*/*")] == [name, name]


def test_nothing_is_at_the_path_before_it_is_complete(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new") as beside:
        beside.write_text("half")
        assert not (tmp_path / "new").exists()


def test_after_a_failure_nothing_half_written_stays(tmp_path: Path) -> None:
    def fail(name: str, error: BaseException) -> None:
        with atomic_write(tmp_path / name) as beside:
            beside.mkdir()
            (beside / "half").write_text("half")
            raise error

    for name, error in (("folder", RuntimeError()), ("index.npy", KeyboardInterrupt())):
        with pytest.raises(type(error)):
            fail(name, error)
    assert list(tmp_path.iterdir()) == []


def test_the_old_artifact_survives_a_failure(tmp_path: Path) -> None:
    make_folder(tmp_path / "folder", "old")
    write_json(tmp_path / "file.json", "old")
    for name in ("folder", "file.json"):
        with pytest.raises(RuntimeError), atomic_write(tmp_path / name):
            raise RuntimeError
    assert (tmp_path / "folder" / "content").read_text() == "old"
    assert json.loads((tmp_path / "file.json").read_text()) == "old"


def test_the_new_artifact_takes_the_place_of_the_old(tmp_path: Path) -> None:
    make_folder(tmp_path / "folder", "old")
    (tmp_path / "folder" / "left over").touch()
    make_folder(tmp_path / "folder", "new")
    assert [(file.name, file.read_text()) for file in (tmp_path / "folder").iterdir()] == [("content", "new")]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk/real").mkdir(parents=True)
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "disk/real")
    for text in ("old", "new"):
        with atomic_write(link) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(text)
    assert link.is_symlink()
    assert (tmp_path / "disk/real/file").read_text() == "new"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "disk"]


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    dead = tmp_path / f".data.{dead_process()}.partial"
    living = tmp_path / f".data.{os.getppid()}.partial"
    of_others = [tmp_path / f".{name}.{dead_process()}.partial" for name in ("other", "data.npy")]
    unlike = [tmp_path / ".data.tar.gz", tmp_path / ".data.1.2.partial"]
    for folder in (dead, living, *of_others, *unlike):
        folder.mkdir()
        (folder / "half").touch()
    make_folder(tmp_path / "data", "new")
    assert not dead.exists()
    assert all(folder.exists() for folder in (living, *of_others, *unlike))


def test_a_run_killed_between_the_two_renames_has_not_lost_the_old_artifact(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", "old")
    (tmp_path / "data").rename(tmp_path / f".data.{dead_process()}.old")  # where the kill struck
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "data"):
        raise RuntimeError
    assert (tmp_path / "data" / "content").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["data"]


def test_a_manifest_says_what_made_it_from_what(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    parent.mkdir()
    child.mkdir()
    write_manifest(parent, "dataset", {"core": 5}, {})
    write_manifest(child, "index", {"k": 1}, {"data": parent}, items=7)
    manifest = read_manifest(child, "index", MAKE)
    assert manifest["items"] == 7
    assert manifest["options"] == {"k": 1}
    entry = {"path": str(parent), "relative": "../parent", "hash": fingerprint(parent)}
    assert manifest["parents"] == {"data": entry}
    assert manifest["versions"].keys() == {"recsys2stage", "python", "numpy"}
    assert manifest["command"] == " ".join(sys.argv)


def test_the_paths_of_parents_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they hold in any working folder; and the relative one is that of the final place of the artifact."""
    write_manifest(tmp_path, "dataset", {}, {})
    monkeypatch.chdir(tmp_path.parent)
    with atomic_write(Path("runs") / "index", "index") as folder:
        folder.mkdir()
        write_manifest(folder, "index", {}, {"data": Path(tmp_path.name)})
    parent = read_manifest("runs/index", "index", MAKE)["parents"]["data"]
    assert (parent["path"], parent["relative"]) == (str(tmp_path), f"../../{tmp_path.name}")
    shutil.rmtree("runs")


def related(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A dataset and an index made from it, with the manifest of the index."""
    for name, parents in (("data", {}), ("index", {"data": folder / "data"})):
        (folder / name).mkdir(parents=True)
        write_manifest(folder / name, "dataset" if name == "data" else name, {"of": str(folder)}, parents)
    return folder / "index", read_manifest(folder / "index", "index", MAKE)


def test_a_parent_that_was_moved_together_with_its_child_is_found(tmp_path: Path) -> None:
    index, manifest = related(tmp_path / "here")
    assert find_parent(index, manifest, "data", "") == tmp_path / "here" / "data"
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert find_parent(tmp_path / "there/index", manifest, "data", "") == tmp_path / "there" / "data"
    (tmp_path / "link").symlink_to(tmp_path / "there/index")
    assert find_parent(tmp_path / "link", manifest, "data", "") == tmp_path / "there" / "data"
    (tmp_path / "here" / "data").mkdir(parents=True)  # other data where the old ones were
    write_manifest(tmp_path / "here" / "data", "dataset", {"of": "others"}, {})
    assert find_parent(tmp_path / "there/index", manifest, "data", "") == tmp_path / "there" / "data"


def test_a_parent_that_is_nowhere_is_named_with_the_places_that_were_tried(tmp_path: Path) -> None:
    index, manifest = related(tmp_path / "here")
    shutil.move(index, tmp_path / "index")
    shutil.move(tmp_path / "here", tmp_path / "gone")
    message = rf"the data of .*index does not exist, expected at {tmp_path}/here/data or {tmp_path}/data; pass --data"
    with pytest.raises(FileNotFoundError, match=message):
        find_parent(tmp_path / "index", manifest, "data", "pass --data")
    del manifest["parents"]["data"]["relative"]  # as earlier versions wrote it
    with pytest.raises(FileNotFoundError, match=rf"expected at {tmp_path}/here/data; pass --data"):
        find_parent(tmp_path / "index", manifest, "data", "pass --data")


def test_a_missing_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/manifest.json does not exist.* run: {MAKE}"):
        read_manifest(tmp_path, "dataset", MAKE)


def test_a_manifest_of_another_kind_says_which(tmp_path: Path) -> None:
    write_manifest(tmp_path, "index", {}, {})
    with pytest.raises(ValueError, match=rf"{tmp_path} holds an index, expected a dataset; .* prepare-data wrote"):
        read_manifest(tmp_path, "dataset", MAKE)


@pytest.mark.parametrize("text", ["", '{"kind": "data', "[]", '"dataset"', "\udcff"])
def test_a_broken_manifest_says_how_to_make_it_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"{tmp_path}/manifest.json is not .*: {MAKE}"):
        read_manifest(tmp_path, "dataset", MAKE)


def test_a_fingerprint_is_of_a_file_or_of_a_folders_manifest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert fingerprint(tmp_path / "file") == of_abc
    assert fingerprint(tmp_path) is None
    assert fingerprint(tmp_path / "nothing") is None
    (tmp_path / "manifest.json").write_bytes(b"abc")
    assert fingerprint(tmp_path) == of_abc


def test_a_hash_of_arrays_tells_values_types_shapes_and_order_apart() -> None:
    a, b = np.arange(6), np.arange(6) + 1
    different = [
        hash_arrays(a, b),
        hash_arrays(b, a),
        hash_arrays(a),
        hash_arrays(a.reshape(2, 3)),
        hash_arrays(a.reshape(2, 3).T),
        hash_arrays(a.astype(np.int32)),
    ]
    assert len(set(different)) == len(different)
    assert hash_arrays(a, b) == hash_arrays(a.copy(), b.copy())
    assert hash_arrays(np.repeat(a, 2)[::2]) == hash_arrays(a)  # what it holds, not how it lies in memory
