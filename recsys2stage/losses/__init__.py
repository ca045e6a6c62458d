"""Losses of the retriever, one family a file; those of the ranker are in `losses.lists`."""

from recsys2stage.losses.base import Answers as Answers
from recsys2stage.losses.base import Catalogue as Catalogue
from recsys2stage.losses.base import Loss as Loss
from recsys2stage.losses.contrast import FullSoftmax as FullSoftmax
from recsys2stage.losses.contrast import InfoNCE as InfoNCE
from recsys2stage.losses.contrast import cross_entropy as cross_entropy
from recsys2stage.losses.penalty import NormPenalty as NormPenalty
