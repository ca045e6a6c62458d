"""Pseudo-random numbers that depend only on a key and a seed, not on other data."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(keys: np.ndarray, seed: int) -> np.ndarray:
    """A uniform uint64 for each integer key (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(GOLDEN * (seed + 1) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
