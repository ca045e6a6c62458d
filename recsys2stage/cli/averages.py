"""Averages of several rankers, for export-bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from recsys2stage import columns as c
from recsys2stage.artifacts import fingerprint, locate_parent, read_manifest, take
from recsys2stage.checkpoints import SPLIT, build, read_checkpoint
from recsys2stage.ranking.average import EQUAL, MAX_MEMBERS, equal_weights, score, shared_weights, spread
from recsys2stage.ranking.reranker import Reranker

FIT = "recsys fit --config configs/NAME/ranker.yaml"
SAME = ("num_candidates", "recent", SPLIT)  # options of the checkpoints that must be equal, besides EQUAL


def mined_lists(ranker: Path) -> dict[str, Any]:
    """Path and hash of the candidate lists that a ranker was trained on."""
    manifest = read_manifest(ranker.parent, "ranker", f"recsys fit --output {ranker.parent}")
    return take(manifest["parents"], "candidates", dict, ranker.parent / c.MANIFEST)


def average(
    first: Path, others: Sequence[Path], options: dict[str, Any], weights: dict[str, Tensor], names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Options of the further rankers of an average, and the weights of the whole.

    Args:
        first: checkpoint of the first ranker.
        others: checkpoints of the further ones.
        options: of the first checkpoint.
        weights: of the first ranker.
        names: options of the checkpoint that are options of a `Reranker`.

    Raises:
        ValueError: for rankers of other lists or with other features, and for too many.
    """
    if len(others) >= MAX_MEMBERS:
        raise ValueError(f"average has {len(others)} rankers, expected 1 to {MAX_MEMBERS - 1}; leave some out")
    described, parts, lists = [options], [weights], mined_lists(first)
    for path in others:
        own, part = read_checkpoint(path, "reranker", FIT)
        for name in (*SAME, *(name for name in EQUAL if name in names), "vector_dim"):
            if own.get(name) != options.get(name):
                raise ValueError(
                    f"{path} has another {name} than {first}, expected rankers of the same lists; fit both on the "
                    "same candidates"
                )
        if mined_lists(path)["hash"] != lists["hash"]:
            raise ValueError(
                f"{path} was trained on other candidates than {first}, expected the same ones; fit both on the same "
                "candidates"
            )
        described.append(own)
        parts.append(part)
    members = [{"dim": own["vector_dim"]} | {name: own[name] for name in names} for own in described]
    folder = locate_parent(first.parent, lists)
    if fingerprint(folder) != lists["hash"]:
        raise ValueError(f"{first} was trained on other candidates than those now in {folder}; fit again")
    rankers = [
        build(Reranker, own, part, path) for own, part, path in zip(members, parts, [first, *others], strict=True)
    ]
    spreads = [spread(score(ranker, validation_batches(folder, int(options["recent"])))) for ranker in rankers]
    return members[1:], shared_weights(parts, equal_weights(spreads))


def validation_batches(folder: Path, recent: int) -> Any:
    """The validation lists of a mined folder, as batches of candidates."""
    from recsys2stage.ranking.candidates import Candidates  # slow import of Lightning

    candidates = Candidates(folder, recent=recent)
    candidates.setup("validate")
    return (lists.candidates for lists in candidates.val_dataloader())
