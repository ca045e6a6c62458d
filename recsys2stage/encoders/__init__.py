"""Sequence encoders, one architecture a file."""

from recsys2stage.encoders.base import Encoder as Encoder
from recsys2stage.encoders.base import EncoderFactory as EncoderFactory
from recsys2stage.encoders.bert4rec import BERT4Rec as BERT4Rec
from recsys2stage.encoders.fuxi import FuXi as FuXi
from recsys2stage.encoders.hstu import HSTU as HSTU
from recsys2stage.encoders.ligr import LiGR as LiGR
from recsys2stage.encoders.mamba4rec import Mamba4Rec as Mamba4Rec
from recsys2stage.encoders.sasrec import SASRec as SASRec
from recsys2stage.encoders.transformer import Transformer as Transformer
