"""Diversity of a list by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998)."""

import numpy as np


def mmr(relevance: np.ndarray, vectors: np.ndarray, count: int, diversity: float, shown: np.ndarray) -> np.ndarray:
    """Chooses items one after another: each the one with the largest

        (1 − diversity) · relevance − diversity · largest cosine to an item chosen before or shown.

    Relevance is scaled to 0..1 within the list; of equal items the one that comes first is chosen.

    Args:
        relevance: (n,) scores.
        vectors: (n, D) unit vectors of the items.
        count: number of items to choose.
        diversity: weight in 0..1.
        shown: (m, D) unit vectors of items shown before.

    Returns:
        (min(count, n),) indices in the order of choice.
    """
    spread = np.ptp(relevance) if len(relevance) else 0.0
    scaled = (relevance - relevance.min()) / spread if spread > 0 else np.zeros(len(relevance))
    closest = (vectors @ shown.T).max(axis=1) if len(shown) else np.full(len(vectors), -np.inf)
    left, chosen = np.ones(len(relevance), dtype=bool), []
    for _ in range(min(count, len(relevance))):
        penalty = np.where(np.isneginf(closest), 0.0, closest)
        best = int(np.where(left, (1 - diversity) * scaled - diversity * penalty, -np.inf).argmax())
        chosen.append(best)
        left[best] = False
        closest = np.maximum(closest, vectors @ vectors[best])
    return np.array(chosen, dtype=np.int64)
