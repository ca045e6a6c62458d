"""Averages of several rankers, for export-bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from recsys2stage import columns as c
from recsys2stage.artifacts import fingerprint, read_manifest, take
from recsys2stage.checkpoints import SPLIT, build, check_selected, read_checkpoint
from recsys2stage.ranking.average import EQUAL, MAX_MEMBERS, average_weights, score_lists
from recsys2stage.ranking.reranker import Reranker

Member = tuple[dict[str, Any], dict[str, Tensor]]  # options and weights of a `Reranker`

FIT = "recsys fit --config configs/NAME/ranker.yaml"
CHOSEN = "average the rankers that they were refitted from, or export the refit alone"
SAME = ("num_candidates", "recent", "vector_dim", SPLIT)  # options of the checkpoints that must be equal, besides EQUAL


def average(
    first: Path,
    others: Sequence[Path],
    options: dict[str, Any],
    weights: dict[str, Tensor],
    names: Sequence[str],
    mined: Path,
) -> tuple[list[Member], Tensor]:
    """Options and weights of all rankers of an average, the first one's first, and their shares of it, (K,).

    Args:
        first: checkpoint of the first ranker.
        others: checkpoints of the further ones.
        options: of the first checkpoint.
        weights: of the first ranker.
        names: options of the checkpoint that are options of a `Reranker`.
        mined: the lists that the first ranker was trained on.

    Raises:
        ValueError: for rankers of other lists or with other features, for refits, and for too many.
    """
    if len(others) >= MAX_MEMBERS:
        raise ValueError(f"average has {len(others)} rankers, expected 1 to {MAX_MEMBERS - 1}; leave some out")
    check_selected(first, read_ranker(first), CHOSEN)
    described, parts, lists = [options], [weights], fingerprint(mined)
    for path in others:
        own, part = read_checkpoint(path, "reranker", FIT)
        for name in (*SAME, *(name for name in EQUAL if name in names)):
            if own.get(name) != options.get(name):
                raise ValueError(
                    f"{path} has another {name} than {first}, expected rankers of the same lists; fit both on the "
                    "same candidates"
                )
        manifest = read_ranker(path)
        check_selected(path, manifest, CHOSEN)
        if take(manifest["parents"], "candidates", dict, path.parent / c.MANIFEST).get("hash") != lists:
            raise ValueError(
                f"{path} was trained on other candidates than {first}, expected the same ones; fit both on the same "
                "candidates"
            )
        described.append(own)
        parts.append(part)
    members = [
        {name: ({"mask_ids": False} | own)[name] for name in names} | {"dim": own["vector_dim"]} for own in described
    ]
    rankers = [
        build(Reranker, own, part, path) for own, part, path in zip(members, parts, [first, *others], strict=True)
    ]
    validation = validation_lists(mined, int(options["recent"]))  # each iteration starts anew
    shares = average_weights([score_lists(one, validation) for one in rankers])
    return list(zip(members, parts, strict=True)), shares


def read_ranker(path: Path) -> dict[str, Any]:
    """The manifest of the fit that wrote a ranker's checkpoint."""
    return read_manifest(path.parent, "ranker", f"recsys fit --output {path.parent}")


def validation_lists(folder: Path, recent: int) -> Any:
    """The validation lists of a mined folder, in batches."""
    from recsys2stage.ranking.candidates import Candidates  # slow import of Lightning

    candidates = Candidates(folder, recent=recent)
    candidates.setup("validate")
    return candidates.val_dataloader()
