"""Negative samplers: in-batch targets, uniform items of the catalogue, or a mixture of both."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recsys2stage.columns import PAD
from recsys2stage.options import check_integer, check_number, check_option
from recsys2stage.processes import gather_rows, share_of
from recsys2stage.retrieval.losses.base import Catalogue, Targets
from recsys2stage.retrieval.losses.schedule import Schedule

MAX_COUNT = 1 << 20  # samples per set


class SampledNegatives(NamedTuple):
    """S sets of N candidates. A set shared by the batch (S = 1) is sorted and unique; other sets may repeat items."""

    items: Int[Tensor, "S N"]
    sample_counts: Float[Tensor, "S N"]  # how often each was sampled
    log_expected: Float[Tensor, "S N"]  # log of each expected count, n·q
    target_log_q: Float[Tensor, " M"]  # log of each target's expected count, n·q
    starts: Int[Tensor, " S+1"] | None  # targets starts[s] .. starts[s + 1] - 1 use set s; None: target s uses set s


class Negatives(nn.Module, ABC):
    """Samples candidates for the targets of a batch. The loss masks those that are not negatives, as the target is."""

    @property
    def scheduled(self) -> bool:
        """Whether any option changes with training progress."""
        return False

    @abstractmethod
    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives: ...

    def facts(self, progress: float) -> dict[str, float]:
        """Values to log at this training progress (0 to 1)."""
        return {}


class InBatch(Negatives):
    """The other M − 1 targets of the batch, each a sample from q(j) ∝ (count_j + 1)^alpha.

    Equal targets are merged exactly: an item that is the target of n positions is one candidate with count n.

    Args:
        alpha: popularity exponent of q. 1: distribution of the targets; below 1: weaker correction.
        gather: with several processes, whether M counts the targets of all of them, as in one process with the same
            global batch; False: each process has its own targets as negatives.
    """

    def __init__(self, alpha: float = 1.0, gather: bool = True) -> None:
        super().__init__()
        check_number("alpha", alpha, low=0, example=1.0)
        self.alpha, self.gather = alpha, gather
        self.log_shares = LogShares(alpha)

    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        # only item numbers are gathered: each process has the whole item table, so it looks the vectors up itself, and
        # the average of the gradients over the processes is exact
        items = gather_rows(targets.items) if self.gather else targets.items
        log_count = math.log(max(len(items) - 1, 1))
        return merge_duplicates(items, lambda these: self.log_shares(these, catalogue.counts) + log_count, targets)


class Uniform(Negatives):
    """Uniform samples from the catalogue with replacement: q = 1 / V, or 1 / number of active items.

    With several processes, each samples for its own targets.

    Args:
        count: samples N per set; None: the number of targets M, only with `per: batch`.
        per: one set per target (`event`), per history (`sequence`) or for the whole `batch`.
        active_after: sample only items with a training event after this ISO date (UTC if without an offset); None: all.
    """

    def __init__(
        self,
        count: int | None = 256,
        per: Literal["event", "sequence", "batch"] = "event",
        active_after: str | None = None,
    ) -> None:
        super().__init__()
        check_option("per", per, Literal["event", "sequence", "batch"])
        if count is None and per != "batch":
            raise ValueError(f"count is null and per is {per}; give a number of samples, or use per: batch")
        check_integer("count", count, 1, MAX_COUNT, other="null for the number of targets", example=256)
        self.count, self.per, self.active_after = count, per, active_after
        self.after = None if active_after is None else _seconds(active_after)
        self.active = Cached(self._active_items)

    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        num_targets, size, starts = len(targets.items), self.size(catalogue), None
        device = catalogue.counts.device
        if self.per == "sequence":
            starts = torch.searchsorted(targets.rows, torch.arange(len(targets.window_items) + 1, device=device))
        sets = {"event": num_targets, "sequence": len(targets.window_items), "batch": 1}[self.per]
        count = num_targets if self.count is None else self.count
        sampled = self.sample((sets, count), catalogue)
        expected = torch.tensor(math.log(count / size), dtype=torch.float64, device=device)
        if sets == 1:
            return merge_duplicates(sampled[0], lambda items: expected.expand(len(items)), targets)
        ones = torch.ones_like(expected).expand(sampled.shape)
        return SampledNegatives(sampled, ones, expected.expand(sampled.shape), expected.expand(num_targets), starts)

    def size(self, catalogue: Catalogue) -> int:
        """Number of items that samples are drawn from."""
        return len(catalogue.counts) - 1 if self.after is None else len(self.active(catalogue.last_times))

    def sample(self, shape: tuple[int, ...], catalogue: Catalogue) -> Int[Tensor, "*shape"]:
        """Uniform samples, with replacement."""
        numbers = torch.randint(self.size(catalogue), shape, device=catalogue.counts.device)
        return numbers + 1 if self.after is None else self.active(catalogue.last_times)[numbers]

    def probability(self, items: Int[Tensor, " N"], catalogue: Catalogue) -> Float[Tensor, " N"]:
        """Probability of each item in a sample: 0 for items that are not active."""
        active = items != PAD if self.after is None else catalogue.last_times[items] > self.after
        return active.double() / self.size(catalogue)

    def _active_items(self, last_times: Int[Tensor, " W"]) -> Int[Tensor, " P"]:
        assert self.after is not None
        active = (last_times > self.after).nonzero()[:, 0]
        if not len(active):
            newest = datetime.fromtimestamp(int(last_times.max()), UTC)
            raise ValueError(
                f"active_after is {self.active_after}, but no item has a training event after it; "
                f"the newest event is at {newest:%Y-%m-%d %H:%M:%S} UTC, give an earlier date"
            )
        return active


class Mixed(Negatives):
    """In-batch targets and uniform samples from the catalogue, in one set for the batch, with equal items merged.

    The expected count of a candidate is that of the mixture, (M − 1)·q(j) + n·u(j), whichever source it came
    from: q as in InBatch, u = 1 / pool size for items of the pool, and n = share / (1 − share) · (M − 1) pool samples.

    Args:
        pool: sampler of the uniform part, Uniform with per: batch and count: null; None: Uniform over all items.
        share: fraction of all samples that come from the pool, from 0 to below 1; or points [[share of the run,
            value], ...].
        alpha: popularity exponent of q, as in InBatch.
        gather: with several processes, whether M counts the targets of all of them, and they share the n samples of the
            pool, as in one process with the same global batch; False: each process has a set of its own.
    """

    def __init__(
        self,
        pool: Uniform | None = None,
        share: float | list[tuple[float, float]] = 0.5,
        alpha: float = 1.0,
        gather: bool = True,
    ) -> None:
        super().__init__()
        self.pool = Uniform(count=None, per="batch") if pool is None else pool
        if self.pool.count is not None or self.pool.per != "batch":
            raise ValueError(
                f"pool samples {self.pool.count} per {self.pool.per}, but share sets the number; use Uniform with "
                "count: null and per: batch"
            )
        self.share, self.alpha, self.gather = Schedule("share", share), alpha, gather
        for value in self.share.values:  # for samples of the pool only: Uniform
            check_number("share", value, low=0, below=1, example=0.5, what="a share")
        check_number("alpha", alpha, low=0, example=1.0)
        self.log_shares = LogShares(alpha)

    @property
    def scheduled(self) -> bool:
        return self.share.varies

    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        items = gather_rows(targets.items) if self.gather else targets.items
        share, num_in_batch = self.share.at(targets.progress), max(len(items) - 1, 1)
        count = round(share / (1 - share) * num_in_batch)
        sampled = self.pool.sample((share_of(count) if self.gather else count,), catalogue)
        if self.gather:
            sampled = gather_rows(sampled)

        def log_expected(these: Tensor) -> Tensor:
            in_batch = num_in_batch * self.log_shares(these, catalogue.counts).exp()
            return (in_batch + count * self.pool.probability(these, catalogue)).log()

        return merge_duplicates(torch.cat([items, sampled]), log_expected, targets)

    def facts(self, progress: float) -> dict[str, float]:
        return {"global_share": self.share.at(progress)} if self.scheduled else {}


def merge_duplicates(
    sampled: Int[Tensor, " N"], log_expected: Callable[[Tensor], Tensor], targets: Targets
) -> SampledNegatives:
    """One set for the whole batch, with equal items merged.

    Args:
        sampled: sampled items, with repeats.
        log_expected: items (U,) -> log n·q of each, (U,).
        targets: targets of the batch.
    """
    items, sample_counts = torch.unique(sampled, return_counts=True)
    starts = torch.tensor([0, len(targets.items)], device="cpu")  # read on the CPU; a GPU tensor would force a sync
    return SampledNegatives(
        items[None], sample_counts[None].double(), log_expected(items)[None], log_expected(targets.items), starts
    )


class Cached:
    """A function of a table of the catalogue, computed again only if the table is another one or has changed.

    It costs as much as the catalogue is large, and a training step must not.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        self.compute = compute
        self.table: Tensor | None = None
        self.version, self.value = -1, torch.empty(0)

    def __call__(self, table: Tensor) -> Tensor:
        if self.table is not table or self.version != table._version:
            self.value, self.table, self.version = self.compute(table), table, table._version
        return self.value


class LogShares:
    """log q of items as training targets, q ∝ (count + 1)^alpha.

    Args:
        alpha: popularity exponent.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha
        self.log_total = Cached(self._log_total)

    def __call__(self, items: Int[Tensor, " N"], counts: Int[Tensor, " W"]) -> Float[Tensor, " N"]:
        """
        Args:
            items: item numbers; −inf for padding, 0.
            counts: (V + 1,) how often each item is a training target.
        """
        return (self._log_weight(counts[items]) - self.log_total(counts)).masked_fill_(items == PAD, -torch.inf)

    def _log_total(self, counts: Tensor) -> Tensor:
        return self._log_weight(counts[1:]).logsumexp(0)

    def _log_weight(self, counts: Tensor) -> Tensor:
        return self.alpha * (counts + 1).double().log()


def _seconds(date: str) -> float:
    try:
        parsed = datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(
            f"active_after is {date!r}, expected an ISO date; set active_after to 2025-05-29, for example"
        ) from error
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
