"""Loading of exported folders: a bundle (both stages) or an index (retriever only).

A bundle holds manifest.json (options of both stages, parents, format number, checksums), towers.pt (weights of the
retriever), index.json and index.npy (search options, item vectors), index.faiss (the structure of a faiss index),
items.parquet (the catalogue), popularity.npy (training events of each item), reranker.pt (weights of the ranker) and,
where the ranker has signals, signals/ (fitted signals). README.md, its model card, is for people and is never read.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from recsys2stage import columns as c
from recsys2stage.artifacts import find_parent, read_array, read_json, read_manifest, take, verify
from recsys2stage.checkpoints import build, load_tensors, trained_until
from recsys2stage.data.catalogue import read_catalogue
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.manifest import SourceLog, source_log
from recsys2stage.data.request_inputs import check_user_specs
from recsys2stage.options import Repeats, RequestTime, Until
from recsys2stage.ranking.average import SecondStage, build_average
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.ranking.signals.base import MAX_CANDIDATES, load_signals
from recsys2stage.retrieval.index import Index
from recsys2stage.retrieval.towers import TOWERS, TwoTower
from recsys2stage.trust import trusting

RERANKER, POPULARITY = "reranker.pt", "popularity.npy"  # files of an exported folder
SPEC = ("name", "kind", "size")  # of a user feature: must be equal in model and data
MAX_RECENT = 1 << 20  # events that the second stage reads


def kind_of(path: str | Path) -> str:
    """The kind of an exported folder: "bundle" (both stages) or "index" (retriever only)."""
    manifest = Path(path) / c.MANIFEST
    kind = read_json(manifest, dict, "recsys export-bundle").get("kind") if manifest.is_file() else None
    return "bundle" if kind == "bundle" else "index"


def bundle_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a bundle or an index folder.

    Raises:
        FileNotFoundError: if the folder is neither.
    """
    if not (Path(path) / c.MANIFEST).is_file():
        raise FileNotFoundError(
            f"{path} holds neither a bundle nor an index; make a bundle: recsys export-bundle --output {path}, or an "
            "index of the first stage: recsys export-index"
        )
    kind = kind_of(path)
    return read_manifest(path, kind, f"recsys export-{kind} --output {path}")


def bundle_data(path: str | Path) -> Path:
    """Path of the prepared dataset that a bundle or an index was made from.

    Raises:
        FileNotFoundError: if it is neither where it was nor at the same place relative to the folder.
    """
    return find_parent(path, bundle_manifest(path), "data", "pass its folder as --data (data= in Python)")


def bundle_log(path: str | Path) -> SourceLog:
    """Columns and time unit of the log that a bundle or an index was prepared from."""
    return source_log(bundle_manifest(path), Path(path) / c.MANIFEST, f"make it again: recsys export-{kind_of(path)}")


def bundle_until(path: str | Path) -> Until:
    """Where the training events of the retriever of a bundle or an index end; "val" unless it was refitted."""
    return trained_until(bundle_manifest(path), Path(path) / c.MANIFEST)


def check_split(dataset: Dataset, folder: Path) -> None:
    """Raises if a dataset has another split than the one a model was trained on."""
    dataset.check_split(folder, take(bundle_manifest(folder), "split_hash", str, folder / c.MANIFEST))


def build_ranker(options: dict[str, Any], average: Any, weights: dict[str, torch.Tensor], where: Path) -> SecondStage:
    """The second stage of a bundle.

    Args:
        options: of the ranker.
        average: options of each further ranker of an average; empty: there is one ranker.
        weights: of the ranker or the average.
        where: the file that the options come from, for the error.
    """
    if not average:
        return build(Reranker, options, weights, where)
    if not (isinstance(average, list) and all(isinstance(one, dict) for one in average)):
        raise ValueError(f"{where} has other rankers than a list of options; make it again: recsys export-bundle")
    return build_average([options, *average], weights, where)


def read_bundle(path: str | Path, trust: Sequence[str] | str | None = ()) -> dict[str, Any]:
    """Reads the arguments of `Recommender` from an exported folder.

    Every file is checked against its checksum in the manifest. Only classes of this package and of the modules in
    `trust` are loaded.

    Args:
        path: folder written by export-bundle or export-index.
        trust: further modules whose classes may be loaded.

    Raises:
        ValueError: for a folder that is damaged, has another format, or refers to other classes.
    """
    path, manifest = Path(path), bundle_manifest(path)
    kind = kind_of(path)
    make = f"recsys export-{kind} --output {path}"
    verify(path, manifest, make)
    field, where = functools.partial(take, manifest, where=path / c.MANIFEST), path / c.MANIFEST
    with trusting(trust):
        index = Index.load(path)
        count, width = field("items", int), field("vector_dim", int)
        if index.vectors.shape != (count, width):
            raise ValueError(
                f"{path} has {index.vectors.shape} item vectors, expected {(count, width)}; make it again: {make}"
            )
        towers = build(TwoTower, field("towers", dict), load_tensors(path / TOWERS, path / TOWERS, make), where)
        reranker = None
        if kind == "bundle":
            weights = load_tensors(path / RERANKER, path / RERANKER, make)
            if "scores_cold" not in field("reranker", dict):
                raise ValueError(
                    f"{path} was exported by an older version, whose ranker does not support cold items; mine, "
                    "fit and export again"
                )
            reranker = build_ranker(field("reranker", dict), manifest.get("average") or [], weights, where)
        signals = load_signals(path / SIGNALS) if (path / SIGNALS).is_dir() else []
    trained_until(manifest, where)
    request_time, actions, next_action = field("request_time", str), field("actions", list), field("next_action", str)
    if not all(isinstance(name, str) for name in actions) or next_action not in ("none", "target", *actions):
        raise ValueError(
            f"{where} has the actions {actions} and the next action {next_action!r}, expected names, and one of "
            f"these, none or target; make it again: {make}"
        )
    if request_time not in get_args(RequestTime) or towers.items.num_items != count:
        raise ValueError(
            f"{where} has the request time {request_time!r} and towers of {towers.items.num_items:,} items, "
            f"expected one of {', '.join(get_args(RequestTime))} and {count:,} items; make it again: {make}"
        )
    candidates, recent = (field("candidates", int), field("recent", int)) if kind == "bundle" else (200, 0)
    if not (1 <= candidates <= MAX_CANDIDATES and 0 <= recent <= MAX_RECENT):
        raise ValueError(
            f"{where} has {candidates:,} candidates and {recent:,} recent events, expected 1 to "
            f"{MAX_CANDIDATES:,} and 0 to {MAX_RECENT:,}; make it again: {make}"
        )
    repeats, newest_time, user_features = (
        field("repeats", str),
        field("newest_time", int | None),
        field("user_features", list),
    )
    if repeats not in get_args(Repeats) or (newest_time is not None and newest_time < 0):
        raise ValueError(
            f"{where} has repeats {repeats!r} and the newest time {newest_time}, expected one of "
            f"{', '.join(get_args(Repeats))} and seconds since 1970 or null; make it again: {make}"
        )
    check_user_specs(user_features, where)
    source_log(manifest, where, f"make it again: {make}")
    if towers.user is not None:
        trained = [
            tuple(feature.get(part) for part in SPEC) for feature in field("towers", dict).get("user_features") or ()
        ]
        if trained != [tuple(feature[part] for part in SPEC) for feature in user_features]:
            raise ValueError(
                f"{where} has other user features than its retriever reads, {trained}; make it again: {make}"
            )
    if type(towers.max_length) is not int or towers.max_length < 1:
        raise ValueError(
            f"{where} has the max_length {towers.max_length!r}, expected an integer above 0; make it again: {make}"
        )
    with torch.inference_mode():
        retriever_shape = (count, towers.item_vectors(torch.ones(1, dtype=torch.int64)).shape[1])
    ranker_shape = retriever_shape if reranker is None else (len(reranker.vectors) - 1, reranker.vectors.shape[1])
    if not retriever_shape == ranker_shape == (count, width):
        raise ValueError(
            f"{path} has an index of {(count, width)} vectors, a retriever of {retriever_shape} and a ranker of "
            f"{ranker_shape}, expected equal shapes; are all from one run? Make it again: {make}"
        )
    return {
        "towers": towers,
        "index": index,
        "reranker": reranker,
        "catalogue": read_catalogue(path / c.ITEM_TABLE, count),
        "popularity": np.array(read_array(path / POPULARITY, np.int64, (count + 1,))),
        "request_time": cast(RequestTime, request_time),
        "next_action": next_action,
        "actions": actions,
        "candidates": candidates,
        "signals": signals,
        "recent": recent,
        "has_time": field("has_time", bool),
        "seen": "keep" if repeats == "keep" else "filter",
        "newest_time": newest_time,
        "user_features": user_features,
    }
