"""A served folder: a bundle of both stages, or an index, the first stage alone.

A bundle holds manifest.json (options of both stages, format number, checksums), towers.pt (weights of the retriever),
index.json with index.npy and index.faiss (item vectors and how to search them), items.parquet (the catalogue),
popularity.npy (training events of each item), reranker.pt (weights of the ranker) and signals/ (what was counted for
the ranker's features).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from recsys2stage import columns as c
from recsys2stage.artifacts import read_array, read_json, read_manifest, take, verify
from recsys2stage.checkpoints import build, load_tensors
from recsys2stage.data.catalogue import read_catalogue
from recsys2stage.data.dataset import Dataset
from recsys2stage.data.events import Repeats
from recsys2stage.data.options import RequestTime
from recsys2stage.data.request_inputs import check_user_specs
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.signals.base import FOLDER as SIGNALS
from recsys2stage.ranking.signals.base import load_signals
from recsys2stage.retrieval.index import Index
from recsys2stage.retrieval.towers import TOWERS, TwoTower
from recsys2stage.trust import trusting

RERANKER, POPULARITY = "reranker.pt", "popularity.npy"  # files of a served folder
SPEC = ("name", "kind", "size")  # of a user feature, on which a model and its data must agree
MAX_CANDIDATES = MAX_RECENT = 1 << 20  # of a request to a served folder


def kind_of(path: str | Path) -> str:
    """Whether a folder holds a "bundle" of both stages or an "index", the first alone."""
    manifest = Path(path) / c.MANIFEST
    held = read_json(manifest, dict, "recsys export-bundle").get("kind") if manifest.is_file() else None
    return "bundle" if held == "bundle" else "index"


def bundle_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a bundle or an index folder."""
    return read_manifest(path, kind_of(path), "recsys export-bundle")


def check_split(dataset: Dataset, folder: Path) -> None:
    """Refuses to use a model with a dataset whose training events may be other than those it was trained on."""
    dataset.check_split(folder, take(bundle_manifest(folder), "split_hash", str, folder / c.MANIFEST))


def read_bundle(path: str | Path, trust: Sequence[str] | str | None = ()) -> dict[str, Any]:
    """The arguments of the Recommender that a folder holds.

    Every file is checked against the checksum that the manifest lists, and no code runs that the folder brings or
    names, except that of the modules in `trust`.

    Args:
        path: folder written by export-bundle or export-index.
        trust: modules outside this package whose classes the folder may name.

    Raises:
        ValueError: for a folder that is damaged, of another format, or names other classes.
    """
    path, kind = Path(path), kind_of(path)
    if not (path / c.MANIFEST).is_file():
        raise FileNotFoundError(
            f"{path} holds neither a bundle nor an index; run: recsys export-bundle --output {path}"
        )
    make = f"recsys export-{kind} --output {path}"
    manifest = read_manifest(path, kind, make)
    verify(path, manifest, make)
    of, where = functools.partial(take, manifest, where=path / c.MANIFEST), path / c.MANIFEST
    with trusting(trust):
        index = Index.load(path)
        count, width = of("items", int), of("vector_dim", int)
        if index.vectors.shape != (count, width):
            raise ValueError(
                f"{path} has {index.vectors.shape} item vectors, expected {(count, width)}; make it again: {make}"
            )
        towers = build(TwoTower, of("towers", dict), load_tensors(path / TOWERS, path / TOWERS, make), where)
        reranker = None
        if kind == "bundle":
            weights = load_tensors(path / RERANKER, path / RERANKER, make)
            if "scores_cold" not in of("reranker", dict):
                raise ValueError(
                    f"{path} was exported by an older version, whose second stage knows nothing of cold items; "
                    "mine, fit and export again"
                )
            reranker = build(Reranker, of("reranker", dict), weights, where)
        signals = load_signals(path / SIGNALS) if (path / SIGNALS).is_dir() else []
    request_time, actions, next_action = of("request_time", str), of("actions", list), of("next_action", str)
    if not all(isinstance(name, str) for name in actions) or next_action not in ("none", "target", *actions):
        raise ValueError(
            f"{where} has the actions {actions} and the next action {next_action!r}, expected names, and one of "
            f"them, none or target; make it again: {make}"
        )
    if request_time not in get_args(RequestTime) or towers.items.num_items != count:
        raise ValueError(
            f"{where} has the request time {request_time!r} and towers of {towers.items.num_items:,} items, "
            f"expected one of {', '.join(get_args(RequestTime))} and {count:,} items; make it again: {make}"
        )
    candidates, recent = (of("candidates", int), of("recent", int)) if kind == "bundle" else (200, 0)
    if not (1 <= candidates <= MAX_CANDIDATES and 0 <= recent <= MAX_RECENT):
        raise ValueError(
            f"{where} has {candidates:,} candidates and {recent:,} recent events, expected 1 to "
            f"{MAX_CANDIDATES:,} and 0 to {MAX_RECENT:,}; make it again: {make}"
        )
    repeats, newest_time, user_features = (
        of("repeats", str),
        of("newest_time", int | None),
        of("user_features", list),
    )
    if repeats not in get_args(Repeats) or (newest_time is not None and newest_time < 0):
        raise ValueError(
            f"{where} has repeats {repeats!r} and the newest time {newest_time}, expected one of "
            f"{', '.join(get_args(Repeats))} and seconds since 1970 or null; make it again: {make}"
        )
    check_user_specs(user_features, where)
    if towers.user is not None:
        read = [tuple(feature.get(part) for part in SPEC) for feature in of("towers", dict).get("user_features") or ()]
        if read != [tuple(feature[part] for part in SPEC) for feature in user_features]:
            raise ValueError(f"{where} has other user features than its retriever reads, {read}; make it again: {make}")
    if type(towers.max_length) is not int or towers.max_length < 1:
        raise ValueError(
            f"{where} has the max_length {towers.max_length!r}, expected a whole number above 0; make it again: {make}"
        )
    with torch.inference_mode():
        made = (count, towers.item_vectors(torch.ones(1, dtype=torch.int64)).shape[1])
    second = made if reranker is None else (len(reranker.vectors) - 1, reranker.vectors.shape[1])
    if not made == second == (count, width):
        raise ValueError(
            f"{path} has an index of {count:,} vectors {width} wide, but a retriever of {made} and a ranker of "
            f"{second}; are all of one run? Make it again: {make}"
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
        "has_time": of("has_time", bool),
        "seen": "keep" if repeats == "keep" else "filter",
        "newest_time": newest_time,
        "user_features": user_features,
    }
