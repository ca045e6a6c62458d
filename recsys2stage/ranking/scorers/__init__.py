"""Scorers of the ranker: networks (MLP, DIN, DCN-v2, MoL, ListAttention), boosted trees (GBDT), and blends of them."""

from recsys2stage.ranking.scorers.base import BoostedScorer as BoostedScorer
from recsys2stage.ranking.scorers.base import CalibratedScorer as CalibratedScorer
from recsys2stage.ranking.scorers.base import ListTable as ListTable
from recsys2stage.ranking.scorers.base import RankerInputs as RankerInputs
from recsys2stage.ranking.scorers.base import Scorer as Scorer
from recsys2stage.ranking.scorers.base import ScorerFactory as ScorerFactory
from recsys2stage.ranking.scorers.blend import Blend as Blend
from recsys2stage.ranking.scorers.dcn import DCN as DCN
from recsys2stage.ranking.scorers.din import DIN as DIN
from recsys2stage.ranking.scorers.gbdt import GBDT as GBDT
from recsys2stage.ranking.scorers.list_attention import ListAttention as ListAttention
from recsys2stage.ranking.scorers.mlp import MLP as MLP
from recsys2stage.ranking.scorers.mol import MoL as MoL
