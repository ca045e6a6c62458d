"""Baselines: simple models counted on training events that every report compares with the two stages."""

import sys
from collections.abc import Sequence

from recsys2stage.data.dataset import Dataset
from recsys2stage.evaluation.baselines.base import Baseline as Baseline
from recsys2stage.evaluation.baselines.base import Scored as Scored
from recsys2stage.evaluation.baselines.base import specify_baseline as specify_baseline
from recsys2stage.evaluation.baselines.counted import Markov as Markov
from recsys2stage.evaluation.baselines.counted import PersonalTopFrequency as PersonalTopFrequency
from recsys2stage.evaluation.baselines.counted import Popularity as Popularity
from recsys2stage.evaluation.baselines.of_signals import EASE as EASE
from recsys2stage.evaluation.baselines.of_signals import ItemKNN as ItemKNN
from recsys2stage.evaluation.baselines.of_signals import TransitionGraph as TransitionGraph

GRAPH_ITEMS = 100_000  # largest catalogue with TransitionGraph by default: 1,000 pairs of 13 bytes per item


def default_baselines(dataset: Dataset) -> list[Baseline]:
    """The baselines of a report that names none: those that are cheap to fit. Says on stderr if one is left out."""
    chosen: list[Baseline] = [Popularity(), Markov()]
    if dataset.seen_rule == "keep":
        chosen.append(PersonalTopFrequency())
    if dataset.num_items <= GRAPH_ITEMS:
        return [*chosen, TransitionGraph()]
    names = ", ".join(type(one).__name__ for one in chosen)
    print(
        f"the baseline TransitionGraph is left out: {dataset.num_items:,} items, by default it is for at most "
        f"{GRAPH_ITEMS:,}; ask for it with --baselines '[{names}, TransitionGraph]'",
        file=sys.stderr,
    )
    return chosen


def fit_baselines(baselines: Sequence[Baseline] | None, dataset: Dataset) -> dict[str, Baseline]:
    """Fits baselines on the training events.

    Args:
        baselines: None: `default_baselines`.
        dataset: prepared dataset.

    Returns:
        Fitted baselines by name; those of one class are numbered: ease, ease_2.
    """
    fitted: dict[str, Baseline] = {}
    for baseline in default_baselines(dataset) if baselines is None else baselines:
        count = sum(type(other) is type(baseline) for other in fitted.values())
        name = baseline.name + (f"_{count + 1}" if count else "")
        if name in fitted:
            raise ValueError(
                f"two baselines have the name {name}, expected distinct names of classes; rename "
                f"{type(baseline).__module__}.{type(baseline).__qualname__}"
            )
        fitted[name] = baseline.fit(dataset)
    return fitted
