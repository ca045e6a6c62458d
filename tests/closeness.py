"""Equal but for rounding: what may be asked of floats that were computed in other shapes, places or orders.

A sum of n rounded terms is off by some √n · 2^-24 of their size, and in which order it runs depends on the vector width
of the processor, the batch around a row, and the row's place in it. Thousands of terms give 2^-18, a few layers one
after the other 2^-17. What is copied, loaded, or computed anew in the same shapes by the same process is equal to the
last bit, and is compared so.
"""

from collections.abc import Iterable

import numpy as np
import polars as pl
from torch import Tensor

ROUNDING = 2.0**-17  # of float32 numbers up to 1, relative above


def close(one: Tensor | np.ndarray, other: Tensor | np.ndarray, rounding: float = ROUNDING) -> None:
    """Arrays of one shape, whose numbers are of one size."""
    one, other = (x.detach().numpy() if isinstance(x, Tensor) else x for x in (one, other))
    assert one.shape == other.shape
    size = max(1.0, float(np.abs(one[np.isfinite(one)]).max(initial=0)))
    np.testing.assert_allclose(one, other, rtol=0, atol=rounding * size)


def ranks_of(scores: Iterable[float], own: float, rounding: float = ROUNDING) -> range:
    """The ranks of a target among other items' scores, ties against it: one, or several where some are as near.

    Args:
        scores: of the others.
        own: of the target.
        rounding: 0 for scores that are counted, not computed.
    """
    apart = np.array(list(scores)) - own
    near = rounding * max(1.0, abs(own))
    return range(1 + int((apart > near).sum()), 2 + int((apart >= -near).sum()))


def same_ranks(one: np.ndarray, other: np.ndarray) -> None:
    """Ranks of the same targets: a near tie may fall the other way, for one in twenty users at most."""
    assert one.shape == other.shape
    assert (np.abs(one - other) <= 1).all()
    assert (one != other).mean() <= 0.05


def same_lists(one: pl.DataFrame, other: pl.DataFrame, rounding: float = ROUNDING) -> None:
    """Recommendations for the same users: items change places only with one whose score is as near."""
    assert one.columns == other.columns
    user, item = one.columns[:2]
    assert one.select(user, "rank").equals(other.select(user, "rank"))
    close(one["score"].to_numpy(), other["score"].to_numpy(), rounding)
    moved = (one[item] != other[item]).to_numpy()
    close(one["retriever_score"].to_numpy()[~moved], other["retriever_score"].to_numpy()[~moved], rounding)
    assert moved.mean() <= 0.05
    users, score = one[user].to_numpy(), one["score"].to_numpy()
    near = (users[1:] == users[:-1]) & (np.abs(np.diff(score)) <= rounding * np.maximum(1, np.abs(score[1:])))
    last = np.append(users[1:] != users[:-1], True)  # its like may stand below the end of the list
    assert (~moved | last | np.append(near, False) | np.insert(near, 0, False)).all()
