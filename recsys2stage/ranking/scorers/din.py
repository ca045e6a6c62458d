"""Target attention over the newest events: the deep interest network (DIN) of Zhou et al. 2018 (arXiv 1706.06978)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_WIDTH, check_integer
from recsys2stage.ranking.scorers.base import RankerInputs, Scorer
from recsys2stage.ranking.scorers.deep import Deep, Wide, concat_inputs, spread

DAY, YEAR = 11.4, 17.3  # in the units of `ages`, log(1 + seconds)


class DIN(Scorer):
    """The MLP with two more inputs per candidate: the user's interest in it, and interest ∘ candidate vector.

    The interest in a candidate with vector c is a weighted sum of the vectors r_j of the newest items. The weights come
    from an activation unit (Zhou et al. 2018, eq. 3 and figure 2), a layer over [r_j, c, r_j ∘ c, age, log position]:

        a_j = w · ReLU(E [r_j, age_j, log position_j] + A c + P (r_j ∘ c)) + b
        interest = Σ_j exp(a_j) r_j / (1 + Σ_j exp(a_j))

    Differences from the paper: age and position of an event are additional inputs; the weights are normalized by a
    softmax with an extra zero logit, so that a user without interest in the candidate has small weights (the paper
    leaves them unnormalized to keep the strength of the interest); ReLU replaces Dice, which depends on the rest of the
    batch; the difference r_j − c is left out, since a linear layer can form it. w and b are initialized to zero: all
    events have equal weight at first.

    The largest tensor is (B, C, R · attention_hidden).

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the layers.
        dropout: rate after each layer.
        attention_hidden: width of the activation unit's layer.
    """

    reads_ages = True

    def __init__(
        self,
        dim: int,
        num_features: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.2,
        attention_hidden: int = 16,
    ) -> None:
        super().__init__()
        check_integer("attention_hidden", attention_hidden, 1, MAX_WIDTH, example=16)
        self.of_event = nn.Linear(dim + 2, attention_hidden)  # E
        self.of_candidate = nn.Parameter(torch.empty(attention_hidden, dim))  # A
        self.of_product = nn.Parameter(torch.empty(attention_hidden, dim))  # P
        bound = (6 / (3 * dim + 2)) ** 0.5  # one layer over the concatenation, for ReLU (He et al. 2015)
        for weight in (self.of_event.weight, self.of_candidate, self.of_product):
            nn.init.uniform_(weight, -bound, bound)
        nn.init.zeros_(self.of_event.bias)
        self.activation = nn.Linear(attention_hidden, 1)  # w and b
        nn.init.zeros_(self.activation.weight)
        nn.init.zeros_(self.activation.bias)
        self.deep = Deep(dim, 4 * dim + num_features, hidden, dropout)
        self.wide = Wide(num_features)

    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]:
        user, candidates = concat_inputs(inputs)
        interest, vectors = self.interest(inputs), spread(inputs.vectors)
        deep = self.deep(user, torch.cat([candidates, interest, interest * vectors], dim=-1))
        return deep.squeeze(-1) + self.wide(inputs.features)

    def interest(self, inputs: RankerInputs) -> Float[Tensor, "B C D"]:
        """The user's interest in each candidate, elements of at most unit variance; zero without events."""
        recent = spread(inputs.recent)
        (requests, candidates, _), newest = inputs.vectors.shape, recent.size(1)
        age = (inputs.ages - DAY) / (YEAR - DAY)
        position = torch.arange(1, newest + 1, dtype=recent.dtype, device=recent.device).log().expand_as(age)
        events = self.of_event(torch.cat([recent, torch.stack([age, position], dim=-1)], dim=-1))
        # A c + P (r ∘ c) = (A + P diag(r)) c: linear in the candidate, with one weight matrix per event
        weights = (self.of_candidate + recent[:, :, None] * self.of_product).flatten(1, 2)
        layer = torch.baddbmm(events.flatten(1)[:, None], spread(inputs.vectors), weights.transpose(1, 2))
        logits = self.activation(layer.relu().view(requests, candidates, newest, events.size(2))).squeeze(-1)
        logits = logits.masked_fill(~inputs.real[:, None], -torch.inf)
        padded = F.pad(logits, (0, 1))  # the extra logit 0
        return torch.bmm(padded.softmax(dim=-1)[..., :-1], recent)
