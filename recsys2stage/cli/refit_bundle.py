"""The second stage of a bundle whose retriever was refitted: weights stay, item tables and signals are made anew.

The ranker was trained on lists of the chosen retriever, which are out of sample; the refitted one has no such lists.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys2stage.artifacts import find_parent, read_array, read_manifest
from recsys2stage.checkpoints import build
from recsys2stage.data.dataset import Dataset
from recsys2stage.ranking.reranker import VECTOR_PARTS, Reranker
from recsys2stage.ranking.signals.base import FOLDER, Signal, load_signals
from recsys2stage.ranking.signals.other import OtherRetriever
from recsys2stage.retrieval.index import VECTORS

SELECTED = "selected"  # in the manifest of a refit's index: SHA-256 of the chosen retriever's checkpoint


def chosen_index(index: Path, indexed: dict[str, Any], mined: Path) -> Path:
    """The index that lists were mined with.

    Args:
        index: of a refitted retriever.
        indexed: its manifest.
        mined: the lists.

    Raises:
        ValueError: if the retriever was refitted from another one than that of the lists.
    """
    manifest = read_manifest(mined, "candidates", f"recsys mine-negatives --output {mined}")
    first = find_parent(mined, manifest, "index", f"put it back, or mine again: recsys mine-negatives --output {mined}")
    _check_same_retriever(index, indexed, first, f"lists of {mined}")
    return first


def refit_signals(mined: Path, dataset: Dataset, vectors: np.ndarray, other: Path | None) -> list[Signal]:
    """The signals of mined lists, counted again.

    Args:
        mined: the lists.
        dataset: with the training events of the refit.
        vectors: (V + 1, D) item vectors of the refitted retriever, row 0 zero.
        other: index of the refitted second retriever, for `OtherRetriever`.
    """
    signals = load_signals(mined / FOLDER)
    second = [signal for signal in signals if isinstance(signal, OtherRetriever)]
    if other is not None and not second:
        raise ValueError(f"--other is {other}, but no signal of {mined} is OtherRetriever; leave it out")
    for signal in second:
        if other is None:
            raise ValueError(
                f"the ranker reads a second retriever, {signal.index}, expected --other, the index of its refit on the "
                "same events; refit it, export its index and give its folder"
            )
        indexed = read_manifest(other, "index", f"recsys export-index --output {other}")
        _check_same_retriever(other, indexed, Path(signal.index), f"signal OtherRetriever of {mined}")
        signal.index = str(other)
    for one in signals:
        one.fit(dataset, vectors)
    return signals


def _check_same_retriever(index: Path, indexed: dict[str, Any], first: Path, user: str) -> None:
    """Raises a ValueError unless the retriever of `index` was refitted from that of `first`."""
    parents = read_manifest(first, "index", f"recsys export-index --output {first}")["parents"]
    if indexed.get(SELECTED) is None or indexed[SELECTED] != parents.get("retriever", {}).get("hash"):
        raise ValueError(
            f"{index} is not of a refit of the retriever of {first}, which the {user} are from; refit that retriever, "
            "export its index and give its folder"
        )


def refit_reranker(
    options: dict[str, Any],
    weights: dict[str, torch.Tensor],
    first: Path,
    dataset: Dataset,
    vectors: np.ndarray,
    ranker: Path,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Options and weights of a ranker with the item tables of a refit.

    The spaces of two retrievers differ by a rotation, or more. A ranker that reads vectors gets the refit's, rotated to
    those it was trained on.

    Args:
        options: of the reranker, with `dim`.
        weights: of the reranker.
        first: index of the retriever that it was trained with.
        dataset: with the training events of the refit.
        vectors: (V + 1, D) item vectors of the refit, row 0 zero.
        ranker: its checkpoint, for errors.
    """
    before = read_array(first / VECTORS, np.float32, vectors[1:].shape)
    if not np.array_equal(weights["vectors"][1:].numpy(), before):
        raise ValueError(f"{ranker} was trained with other item vectors than those of {first}; mine and fit again")
    if not set(VECTOR_PARTS) <= set(options["without"] or ()):
        rotation = rotation_between(vectors[1:], np.asarray(before))
        options = {**options, "rotated": True}
        weights = {**weights, "rotation": torch.from_numpy(rotation)}
        vectors = vectors @ rotation
    reranker = build(Reranker, options, weights, ranker)
    reranker.load_item_tables(torch.from_numpy(vectors), dataset.train_counts, dataset.item_features)
    return options, reranker.state_dict()


def rotation_between(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The orthogonal (D, D) matrix that maps vectors nearest to others (Schönemann 1966, orthogonal Procrustes).

    Args:
        vectors: (V, D).
        others: (V, D), of the same items.
    """
    left, _, right = np.linalg.svd(vectors.astype(np.float64).T @ others.astype(np.float64))
    return np.asarray((left @ right).astype(np.float32))
