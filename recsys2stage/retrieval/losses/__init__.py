"""Losses and negative samplers of the retriever, one family per file. Those of the ranker: `ranking.losses`."""

from recsys2stage.retrieval.losses.base import Catalogue as Catalogue
from recsys2stage.retrieval.losses.base import Loss as Loss
from recsys2stage.retrieval.losses.base import Targets as Targets
from recsys2stage.retrieval.losses.contrast import DCL as DCL
from recsys2stage.retrieval.losses.contrast import FullSoftmax as FullSoftmax
from recsys2stage.retrieval.losses.contrast import InfoNCE as InfoNCE
from recsys2stage.retrieval.losses.negatives import InBatch as InBatch
from recsys2stage.retrieval.losses.negatives import Mixed as Mixed
from recsys2stage.retrieval.losses.negatives import Negatives as Negatives
from recsys2stage.retrieval.losses.negatives import Uniform as Uniform
from recsys2stage.retrieval.losses.pairwise import BCE as BCE
from recsys2stage.retrieval.losses.pairwise import BPR as BPR
from recsys2stage.retrieval.losses.pairwise import GBCE as GBCE
from recsys2stage.retrieval.losses.pairwise import MSE as MSE
from recsys2stage.retrieval.losses.penalty import NormPenalty as NormPenalty
from recsys2stage.retrieval.losses.sampled import Sampled as Sampled
