"""Self-attention over the candidates of a list: PRM (Pei et al. 2019, arXiv 1904.06813), SetRank (Pang et al. 2020)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from recsys2stage.options import MAX_LAYERS, MAX_WIDTH, check_integer
from recsys2stage.ranking.scorers.base import RankerInputs, Scorer
from recsys2stage.ranking.scorers.deep import Wide, concat_inputs
from recsys2stage.retrieval.encoders.layers import Dropout


class ListAttention(Scorer):
    """Scores each candidate in the context of the others: a transformer encoder over the list.

    The inputs of a candidate are those of the MLP. As in SetRank (arXiv 1912.05891) there is no position encoding, so
    the scores do not depend on the order of the list: the retriever's rank is a feature, which PRM encodes by position.
    Blocks are pre-norm: x + attention(norm x), then x + MLP(norm x). Padding is never attended to. A linear term of the
    features is added to the score, as in all scorers.

    The scores of a list depend on which candidates it has. Largest tensor: (B, heads, C, C).

    Args:
        dim: width D of states and item vectors.
        num_features: F.
        width: of the encoder.
        layers: number of blocks.
        heads: attention heads of a block.
        dropout: rate after attention and within the MLP.
    """

    listwise = True

    def __init__(
        self, dim: int, num_features: int, width: int = 64, layers: int = 1, heads: int = 2, dropout: float = 0.2
    ) -> None:
        super().__init__()
        check_integer("width", width, 1, MAX_WIDTH, example=64)
        check_integer("layers", layers, 1, MAX_LAYERS, example=1)
        check_integer("heads", heads, 1, width, example=2)
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; change one of them")
        self.of_user = nn.Linear(dim, width, bias=False)
        self.of_candidate = nn.Linear(2 * dim + num_features, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, 1)
        self.wide = Wide(num_features)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, Wide):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.last.weight)

    def forward(self, inputs: RankerInputs) -> Float[Tensor, "B C"]:
        user, candidates = concat_inputs(inputs)
        hidden = self.of_user(user)[:, None] + self.of_candidate(candidates)
        attended = inputs.listed | ~inputs.listed.any(dim=1, keepdim=True)  # an empty list has no softmax
        for block in self.blocks:
            hidden = block(hidden, attended)
        return self.last(self.norm(hidden)).squeeze(-1) + self.wide(inputs.features)


class Block(nn.Module):
    """Pre-norm attention and MLP.

    Args:
        width: W.
        heads: attention heads.
        dropout: rate after attention and within the MLP.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), Dropout(dropout)

    def forward(self, hidden: Float[Tensor, "B C W"], attended: Bool[Tensor, "B C"]) -> Float[Tensor, "B C W"]:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(hidden)).chunk(3, dim=2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attended[:, None, None])
        hidden = hidden + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))
        return hidden + self.down(self.drop(torch.relu(self.up(self.second(hidden)))))
