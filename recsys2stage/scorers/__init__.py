"""Scorers of candidates, one architecture a file."""

from recsys2stage.scorers.base import Scorer as Scorer
from recsys2stage.scorers.base import ScorerFactory as ScorerFactory
from recsys2stage.scorers.mlp import MLP as MLP
