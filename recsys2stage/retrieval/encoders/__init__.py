"""Sequence encoders, one architecture per file."""

from recsys2stage.retrieval.encoders.base import Encoder as Encoder
from recsys2stage.retrieval.encoders.base import EncoderFactory as EncoderFactory
from recsys2stage.retrieval.encoders.bert4rec import BERT4Rec as BERT4Rec
from recsys2stage.retrieval.encoders.fuxi import FuXi as FuXi
from recsys2stage.retrieval.encoders.hstu import HSTU as HSTU
from recsys2stage.retrieval.encoders.ligr import LiGR as LiGR
from recsys2stage.retrieval.encoders.mamba4rec import Mamba4Rec as Mamba4Rec
from recsys2stage.retrieval.encoders.sasrec import SASRec as SASRec
from recsys2stage.retrieval.encoders.transformer import Transformer as Transformer
