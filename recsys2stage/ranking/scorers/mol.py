"""Mixture of logits, a similarity of high rank (Zhai et al. 2023, arXiv 2306.04039; Ding & Zhai 2024, 2407.15462)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_WIDTH, check_integer, check_number
from recsys2stage.ranking.scorers.base import RankerInputs, Scorer
from recsys2stage.ranking.scorers.deep import DIRECT_SCALE, Deep, Wide, concat_inputs, spread


class MoL(Scorer):
    """Gated sum of the cosines between several user embeddings and several item embeddings.

        scale · Σ_p Σ_q π_pq cos(f_p, g_q) / temperature,  π = softmax of the gating network

    The f_p are linear maps of the user state, the g_q of the item vector and the features. The papers compute the gates
    with three small networks, of user, item and cosines; here one network, with the layers of the MLP, takes all three.
    `scale` is learned and initialized to 0, so that training starts from the retriever's order; the other weights of
    the mixture get gradients from the second step on. A linear term of the features is added, as in all scorers.

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        hidden: widths of the gating network's layers.
        dropout: rate after each layer.
        user_parts: number P of embeddings of the user.
        item_parts: number Q of embeddings of the item.
        part_dim: width K of each embedding.
        temperature: divisor of the cosines.
    """

    def __init__(
        self,
        dim: int,
        num_features: int,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.2,
        user_parts: int = 8,
        item_parts: int = 4,
        part_dim: int = 32,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0, example=0.05)
        for name, value, usual in (
            ("user_parts", user_parts, 8),
            ("item_parts", item_parts, 4),
            ("part_dim", part_dim, 32),
        ):
            check_integer(name, value, 1, MAX_WIDTH, example=usual)
        self.user_parts, self.item_parts, self.part_dim = user_parts, item_parts, part_dim
        self.temperature = temperature
        self.of_user = nn.Linear(dim, user_parts * part_dim)
        self.of_item = nn.Linear(dim + num_features, item_parts * part_dim)
        for linear in (self.of_user, self.of_item):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
            nn.init.zeros_(linear.bias)
        pairs = user_parts * item_parts
        self.gates = Deep(dim, 2 * dim + num_features + pairs, hidden, dropout, outputs=pairs)
        self.scale = nn.Parameter(torch.zeros(()))
        self.wide = Wide(num_features)

    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]:
        user, candidates = concat_inputs(inputs)
        cosines = self.cosines(inputs)
        gates = self.gates(user, torch.cat([candidates, cosines], dim=-1)).softmax(dim=-1)
        mixture = (gates * cosines).sum(-1) / self.temperature
        return DIRECT_SCALE * self.scale * mixture + self.wide(inputs.features)

    def cosines(self, inputs: RankerInputs) -> Float[Tensor, "B C N"]:
        """Cosine of each user embedding with each item embedding, N = P · Q."""
        requests, candidates, _ = inputs.vectors.shape
        users = self.of_user(spread(inputs.state)).view(requests, self.user_parts, self.part_dim)
        items = self.of_item(torch.cat([spread(inputs.vectors), inputs.features], dim=-1))
        items = items.view(requests, candidates * self.item_parts, self.part_dim)
        products = torch.bmm(F.normalize(items, dim=-1), F.normalize(users, dim=-1).transpose(1, 2))
        return products.view(requests, candidates, self.item_parts * self.user_parts)
