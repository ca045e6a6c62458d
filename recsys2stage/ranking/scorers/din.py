"""Target attention over the newest events: the deep interest network of Zhou et al. 2018 (arXiv 1706.06978)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.ranking.scorers.base import Scorer, Shown
from recsys2stage.ranking.scorers.deep import Deep, Wide, seen, spread

DAY, YEAR = 11.4, 17.3  # as ages are told: log(1 + seconds)


class DIN(Scorer):
    """The MLP, which also sees the user's interest in each candidate and the product of that interest with it.

    A candidate's interest is the sum of the newest items' vectors r_j, weighted by an activation unit of its own
    vector c (Zhou et al. 2018, eq. 3 and figure 2), a layer over [r_j, c, r_j ∘ c, age, log place]:

        a_j = w · ReLU(E [r_j, age_j, log place_j] + A c + P (r_j ∘ c)) + b
        interest = Σ_j exp(a_j) r_j / (1 + Σ_j exp(a_j))

    It differs from the paper so: age and place of an event are seen, which the paper's unit does not; the weights are
    bounded by a softmax beside a place where nothing is, at which a user without interest in the candidate looks,
    while the paper leaves them unbounded to keep the interest's strength; ReLU stands for Dice, which knows the rest of
    the batch; the difference r_j − c is left out, as a linear layer makes it from its parts. w and b begin at zero:
    at first all events weigh alike.

    The largest tensor is (B, C, R · attention_hidden).

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the layers.
        dropout: after each of them.
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

    def forward(self, shown: Shown) -> Float[Tensor, "B C"]:
        user, candidates = seen(shown)
        interest, vectors = self.interest(shown), spread(shown.vectors)
        deep = self.deep(user, torch.cat([candidates, interest, interest * vectors], dim=-1))
        return deep.squeeze(-1) + self.wide(shown.features)

    def interest(self, shown: Shown) -> Float[Tensor, "B C D"]:
        """Of the user in each candidate, in numbers of at most unit variance; zero where nothing has happened."""
        recent = spread(shown.recent)
        (requests, candidates, _), newest = shown.vectors.shape, recent.size(1)
        age = (shown.ages - DAY) / (YEAR - DAY)
        place = torch.arange(1, newest + 1, dtype=recent.dtype, device=recent.device).log().expand_as(age)
        events = self.of_event(torch.cat([recent, torch.stack([age, place], dim=-1)], dim=-1))
        # A c + P (r ∘ c) = (A + P diag(r)) c: linear in the candidate, with weights of each event
        weights = (self.of_candidate + recent[:, :, None] * self.of_product).flatten(1, 2)
        layer = torch.baddbmm(events.flatten(1)[:, None], spread(shown.vectors), weights.transpose(1, 2))
        logits = self.activation(layer.relu().view(requests, candidates, newest, events.size(2))).squeeze(-1)
        logits = logits.masked_fill(~shown.real[:, None], -torch.inf)
        with_nothing = F.pad(logits, (0, 1))  # logit 0
        return torch.bmm(with_nothing.softmax(dim=-1)[..., :-1], recent)
