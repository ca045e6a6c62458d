"""Scorers: the neural networks of the ranker (MLP, DIN, DCN-v2, MoL), one architecture per file."""

from recsys2stage.ranking.scorers.base import RankerInputs as RankerInputs
from recsys2stage.ranking.scorers.base import Scorer as Scorer
from recsys2stage.ranking.scorers.base import ScorerFactory as ScorerFactory
from recsys2stage.ranking.scorers.dcn import DCN as DCN
from recsys2stage.ranking.scorers.din import DIN as DIN
from recsys2stage.ranking.scorers.mlp import MLP as MLP
from recsys2stage.ranking.scorers.mol import MoL as MoL
