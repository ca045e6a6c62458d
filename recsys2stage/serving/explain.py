"""Reasons of a score: its change when one group of the ranker's inputs is set to its mean over the candidates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recsys2stage.columns import PAD
from recsys2stage.ranking.average import Average, SecondStage
from recsys2stage.ranking.reranker import Reranker
from recsys2stage.ranking.scorers import RankerInputs
from recsys2stage.shapes import CandidateBatch

RETRIEVER, POPULARITY, FEATURES, ITEM, SOURCE = "Retriever", "Popularity", "ItemFeatures", "Item", "Source"


class Group(NamedTuple):
    """A group of inputs that is explained together."""

    name: str
    columns: list[int]  # of the scorer's features
    base: bool = False  # whether the base logit, the calibrated score of the retriever, belongs to it
    vectors: bool = False  # whether the item vectors belong to it


def input_groups(reranker: SecondStage, signal_names: Sequence[dict[str, Any]]) -> list[Group]:
    """The groups: retriever, popularity, item features, item, each signal class, and the candidate sources.

    Args:
        reranker: the second stage; its features are score, log rank, margin, is_unknown, popularity, declared item
            features, signals.
        signal_names: of its signal features, as `Stages.signal_names`.
    """
    first = reranker.members[0] if isinstance(reranker, Average) else reranker
    declared = first.features.width if first.features else 0
    groups = [
        Group(RETRIEVER, [0, 1, 2], base=True),
        Group(POPULARITY, [4]),
        Group(FEATURES, list(range(5, 5 + declared))),
        Group(ITEM, [3], vectors=True),
    ]
    signals: dict[str, list[int]] = {}
    for place, signal in enumerate(signal_names, start=5 + declared):
        name = signal["name"].partition(".")[0]
        signals.setdefault(SOURCE if name == "source" else name, []).append(place)
    return [group for group in groups if group.columns] + [Group(name, own) for name, own in signals.items()]


@torch.inference_mode()
def explain(
    reranker: SecondStage, batch: CandidateBatch, row: int, columns: np.ndarray, groups: Sequence[Group]
) -> list[list[dict[str, Any]]]:
    """The reasons of the scores of some candidates of one request, largest effect first.

    An effect is the score minus the score with the group's inputs at their mean over all candidates of the request.

    Args:
        reranker: the second stage.
        batch: candidates of B requests.
        row: the request.
        columns: (n,) the candidates to explain.
        groups: as `input_groups` gives them.

    Returns:
        {"signal", "effect"} of each group, for each of the n candidates.
    """
    own = CandidateBatch(*(part[row : row + 1] for part in batch))
    if isinstance(reranker, Average):
        members = torch.stack([_effects(member, own, columns, groups) for member in reranker.members], dim=-1)
        effects = members @ reranker.weights
    else:
        effects = _effects(reranker, own, columns, groups)
    return [
        sorted(
            ({"signal": group.name, "effect": effect} for group, effect in zip(groups, row_effects, strict=True)),
            key=lambda reason: -abs(reason["effect"]),
        )
        for row_effects in effects.tolist()
    ]


def _effects(reranker: Reranker, own: CandidateBatch, columns: np.ndarray, groups: Sequence[Group]) -> Tensor:
    """The effect of each group on each of n candidates of one request, (n, groups)."""
    real = own.items[0] != PAD
    base, inputs = reranker.scorer_inputs(own, torch.zeros_like(own.items, dtype=torch.bool))
    at = torch.from_numpy(columns)
    bases, features, vectors = [base[0, at]], [inputs.features[0, at]], [inputs.vectors[0, at]]
    for group in groups:
        changed = inputs.features[0, at].clone()
        changed[:, group.columns] = inputs.features[0, real][:, group.columns].mean(dim=0)
        features.append(changed)
        bases.append(_mean(base[0], real, at) if group.base else bases[0])
        vectors.append(_mean(inputs.vectors[0], real, at) if group.vectors else vectors[0])
    changes = torch.stack(bases), torch.stack(vectors), torch.stack(features)  # (groups + 1, n, ...)
    if reranker.scorer.listwise:
        each = [_in_list(reranker, inputs, place, changes, number) for number, place in enumerate(columns.tolist())]
        score = torch.stack(each, dim=1)
    else:
        score = _score(reranker, inputs, changes, torch.ones_like(changes[0], dtype=torch.bool))
    return (score[:1] - score[1:]).T


def _score(reranker: Reranker, inputs: RankerInputs, changes: tuple[Tensor, Tensor, Tensor], listed: Tensor) -> Tensor:
    """Scores of G lists of one request, (G, n); `changes` are the base, vectors and features of the candidates."""
    base, vectors, features = changes
    count = len(base)
    return base + reranker.scorer(
        RankerInputs(
            state=inputs.state.expand(count, -1),
            vectors=vectors,
            features=features,
            recent=inputs.recent.expand(count, *inputs.recent.shape[1:]),
            ages=inputs.ages.expand(count, -1),
            real=inputs.real.expand(count, -1),
            base=base,
            listed=listed,
        )
    )


def _in_list(
    reranker: Reranker, inputs: RankerInputs, place: int, changes: tuple[Tensor, Tensor, Tensor], number: int
) -> Tensor:
    """Scores of one candidate, changed within its whole list, (G,): for scorers that read the list."""
    count = len(changes[0])
    base, vectors, features = (
        whole.repeat(count, *[1] * (whole.dim() - 1)) for whole in (inputs.base, inputs.vectors, inputs.features)
    )
    for own, changed in zip((base, vectors, features), changes, strict=True):
        own[:, place] = changed[:, number]
    return _score(reranker, inputs, (base, vectors, features), inputs.listed.expand(count, -1))[:, place]


def _mean(values: Tensor, real: Tensor, at: Tensor) -> Tensor:
    """The mean over the real candidates, repeated for each one to explain."""
    mean = values[real].mean(dim=0, keepdim=True)
    return mean.expand(len(at), *values.shape[1:])
