"""What sampled losses optimise, by simulation: their expected gradient beside the full softmax's."""

import pytest
import torch
from torch import Tensor

from recsys2stage.retrieval.losses import Catalogue, InBatch, InfoNCE, Mixed, Negatives, Targets
from recsys2stage.retrieval.losses.negatives import SampledNegatives

V, ANSWER, BATCHES = 30, 20, 2000
COUNTS = torch.cat([torch.zeros(1), 4 + torch.arange(V)]).long()
P = (COUNTS[1:] + 1).double() / (COUNTS[1:] + 1).sum()


class Side(Negatives):
    """Each row is the first place of a batch of its own, of which `inner` draws; every call gives the same draws."""

    def __init__(self, inner: Negatives, others: int) -> None:
        super().__init__()
        self.inner, self.others = inner, others
        self.drawn: SampledNegatives | None = None

    def forward(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        if self.drawn is None:
            self.drawn = self.draw(targets, catalogue)
        return self.drawn

    def draw(self, targets: Targets, catalogue: Catalogue) -> SampledNegatives:
        rows = len(targets.items)
        times, log_expected = torch.zeros(2, rows, V, dtype=torch.float64)
        own = torch.zeros(rows, dtype=torch.float64)
        items = 1 + torch.multinomial(P, rows * self.others, replacement=True).view(rows, self.others)
        for row in range(rows):
            batch = torch.cat([targets.items[row, None], items[row]])
            places = torch.arange(len(batch))
            drawn = self.inner(Targets(batch, places, batch[:, None]), catalogue)
            column = drawn.items[0] - 1
            times[row, column], log_expected[row, column] = drawn.sample_counts[0], drawn.log_expected[0]
            own[row] = drawn.target_log_q[0]
        return SampledNegatives(torch.arange(1, V + 1).expand(rows, V), times, log_expected, own, None)


def bias(side: Side, share: float, correct: str, scores: Tensor) -> float:
    """Norm of (expected gradient for the scores − the full softmax's), relative to the latter's.

    The part of the gradient that is linear in draws − expected draws has a mean of zero, and is taken out: what
    remains has a standard deviation of the order of the bias.
    """
    queries = scores.expand(BATCHES, V).clone().requires_grad_()
    targets = Targets(torch.full((BATCHES,), ANSWER), torch.arange(BATCHES), torch.full((BATCHES, 1), ANSWER))
    table = torch.cat([torch.zeros(1, V), torch.eye(V)]).double()  # the score of item j is coordinate j
    InfoNCE(1.0, side, correct)(queries, targets, Catalogue(lambda items: table[items], COUNTS, 0 * COUNTS)).backward()
    assert queries.grad is not None
    assert side.drawn is not None
    full = scores.softmax(0) - torch.eye(V)[ANSWER - 1]
    surplus = side.drawn.sample_counts / (side.others * (P + share / (1 - share) / V)) - 1
    surplus[:, ANSWER - 1] = 0
    part = scores.softmax(0) * surplus
    linear = part - scores.softmax(0) * part.sum(1, keepdim=True)
    return float(((BATCHES * queries.grad - linear).mean(0) - full).norm() / full.norm())


@pytest.mark.parametrize(("inner", "share"), [(InBatch(), 0.0), (Mixed(share=0.5), 0.5)], ids=["in-batch", "mixed"])
def test_corrected_negatives_estimate_the_full_softmax(inner: Negatives, share: float) -> None:
    """Four times the draws, a quarter of the bias; it stays where nothing or the answer, too, is corrected."""
    scores = P.log() + torch.randn(V, dtype=torch.float64) / 2
    sides = [Side(inner, others) for others in (32, 128, 512)]
    few, more, many = (bias(side, share, "negatives", scores) for side in sides)
    assert 2.5 < few / more < 6
    assert 2.5 < more / many < 6
    assert many < 0.01
    for correct in ("none", "both"):
        assert bias(sides[-1], share, correct, scores) > 10 * many
