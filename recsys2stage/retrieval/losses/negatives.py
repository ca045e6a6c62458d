"""Which items an answer is compared with: other answers, draws from the catalogue, or both."""

import math
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.columns import PAD
from recsys2stage.retrieval.losses.base import Catalogue, Targets
from recsys2stage.retrieval.losses.schedule import Schedule


class Drawn(NamedTuple):
    """S sets of N candidates. One set for all places holds every item once, ascending; others may repeat items."""

    items: Int[Tensor, "S N"]
    draws: Float[Tensor, "S N"]  # how often each was drawn
    log_expected: Float[Tensor, "S N"]  # log of how often each is drawn on average, n·q
    target_log_q: Float[Tensor, " M"]  # the same of each place's answer
    starts: Int[Tensor, " S+1"] | None  # set s is of places starts[s] .. starts[s + 1] - 1; None: of place s alone


class Negatives(nn.Module, ABC):
    """Draws candidates for the places of a batch. What is no negative among them (the answer itself) the loss hides."""

    @property
    def scheduled(self) -> bool:
        """Whether it changes with the share of the run that is done."""
        return False

    @abstractmethod
    def forward(self, targets: Targets, catalogue: Catalogue) -> Drawn: ...

    def facts(self, progress: float) -> dict[str, float]:
        """What is worth logging at this point of the run."""
        return {}


class InBatch(Negatives):
    """The answers of the other M − 1 places, each a draw from q(j) ∝ (count_j + 1)^alpha.

    Equal answers are merged exactly: an item that answers n places is one candidate of n draws.

    Args:
        alpha: exponent of popularity in q: 1 is how answers are drawn, less corrects for less of it.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, targets: Targets, catalogue: Catalogue) -> Drawn:
        expected = log_share(catalogue.counts, self.alpha) + math.log(max(len(targets.items) - 1, 1))
        return merged(targets.items, expected, targets)


class Uniform(Negatives):
    """Draws from the catalogue with replacement, every item alike: q = 1 / V, or 1 / active items.

    Args:
        count: draws N of each set; None: as many as the batch has places, where it shares one set.
        per: whether every place has a set of its own (`event`), a history's places share one (`sequence`), or all do
            (`batch`).
        active_after: draw only items whose newest training event is after this moment, an ISO date (UTC unless it
            says otherwise); None: all.
    """

    def __init__(
        self,
        count: int | None = 256,
        per: Literal["event", "sequence", "batch"] = "event",
        active_after: str | None = None,
    ) -> None:
        super().__init__()
        if per not in ("event", "sequence", "batch"):
            raise ValueError(f"per is {per!r}, expected event, sequence or batch")
        if count is None and per != "batch":
            raise ValueError(f"count is null and per is {per}; give a count of draws, or use per: batch")
        if count is not None and count < 1:
            raise ValueError(f"count is {count}, expected at least one draw")
        self.count, self.per, self.active_after = count, per, active_after
        self.after = None if active_after is None else _seconds(active_after)

    def forward(self, targets: Targets, catalogue: Catalogue) -> Drawn:
        places, pool, starts = len(targets.items), self.pool(catalogue), None
        if self.per == "sequence":
            starts = torch.searchsorted(targets.rows, torch.arange(len(targets.window_items) + 1, device=pool.device))
        sets = {"event": places, "sequence": len(targets.window_items), "batch": 1}[self.per]
        count = places if self.count is None else self.count
        picked = pool[torch.randint(len(pool), (sets, count), device=pool.device)]
        expected = torch.tensor(math.log(count / len(pool)), dtype=torch.float64, device=pool.device)
        if sets == 1:
            return merged(picked[0], expected.expand(len(catalogue.counts)), targets)
        once = torch.ones_like(expected).expand(picked.shape)
        return Drawn(picked, once, expected.expand(picked.shape), expected.expand(places), starts)

    def pool(self, catalogue: Catalogue) -> Int[Tensor, " P"]:
        """The items that may be drawn."""
        if self.after is None:
            return torch.arange(1, len(catalogue.counts), device=catalogue.counts.device)
        pool = (catalogue.last_times > self.after).nonzero()[:, 0]
        if not len(pool):
            newest = datetime.fromtimestamp(int(catalogue.last_times.max()), UTC)
            raise ValueError(
                f"active_after is {self.active_after}, but no item has a training event after it; "
                f"the newest is of {newest:%Y-%m-%d %H:%M:%S} UTC, give an earlier date"
            )
        return pool


class Mixed(Negatives):
    """Answers of the other places and draws from the catalogue, shared by the batch, equal items merged.

    A candidate's expected number of draws is the mixture's, (M − 1)·q(j) + n·u(j), wherever it came from: q as of
    InBatch, u = 1 / pool where the pool holds j, and n = share / (1 − share) · (M − 1) draws of the pool.

    Args:
        pool: what is drawn besides answers, Uniform with per: batch and count: null; None: that, of all items.
        share: of the pool's draws among all, at least 0 and below 1; or points [[share of the run, value], ...].
        alpha: exponent of popularity in q, as of InBatch.
    """

    def __init__(
        self, pool: Uniform | None = None, share: float | list[tuple[float, float]] = 0.5, alpha: float = 1.0
    ) -> None:
        super().__init__()
        self.pool = Uniform(count=None, per="batch") if pool is None else pool
        if self.pool.count is not None or self.pool.per != "batch":
            raise ValueError(
                f"pool draws {self.pool.count} per {self.pool.per}, but share says how many; use Uniform with "
                "count: null and per: batch"
            )
        self.share, self.alpha = Schedule("share", share), alpha
        if not all(0 <= value < 1 for value in self.share.values):
            raise ValueError(f"share is {share}, expected at least 0 and below 1; all draws from the pool is Uniform")

    @property
    def scheduled(self) -> bool:
        return self.share.moves

    def forward(self, targets: Targets, catalogue: Catalogue) -> Drawn:
        share, others = self.share.at(targets.progress), max(len(targets.items) - 1, 1)
        count, pool = round(share / (1 - share) * others), self.pool.pool(catalogue)
        expected = others * log_share(catalogue.counts, self.alpha).exp()
        expected[pool] += count / len(pool)
        picked = pool[torch.randint(len(pool), (count,), device=pool.device)]
        return merged(torch.cat([targets.items, picked]), expected.log(), targets)

    def facts(self, progress: float) -> dict[str, float]:
        return {"global_share": self.share.at(progress)} if self.scheduled else {}


def merged(picked: Int[Tensor, " N"], log_expected: Float[Tensor, " W"], targets: Targets) -> Drawn:
    """One set for all places, equal items once.

    Args:
        picked: draws.
        log_expected: of every item of the catalogue, log n·q.
        answers: the places.
    """
    items, draws = torch.unique(picked, return_counts=True)
    starts = torch.tensor([0, len(targets.items)], device="cpu")  # read there: on a GPU that would wait for it
    return Drawn(items[None], draws[None].double(), log_expected[items][None], log_expected[targets.items], starts)


def log_share(counts: Int[Tensor, " W"], alpha: float = 1.0) -> Float[Tensor, " W"]:
    """log q of each item as a training target, q ∝ (count + 1)^alpha; row 0 is padding and has none."""
    weight = alpha * (counts + 1).double().log()
    share = weight - weight[1:].logsumexp(0)
    share[PAD] = -torch.inf
    return share


def _seconds(date: str) -> float:
    try:
        moment = datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"active_after is {date!r}, expected an ISO date such as 2025-05-29") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
