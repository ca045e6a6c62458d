"""Sequence encoders, one architecture a file."""

from recsys2stage.encoders.base import Encoder as Encoder
from recsys2stage.encoders.base import EncoderFactory as EncoderFactory
from recsys2stage.encoders.transformer import Transformer as Transformer
