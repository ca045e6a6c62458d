"""Readers of raw data formats. To add one, subclass `Source` and set it as class_path in YAML."""

from recsys2stage.data.sources.base import Source as Source
from recsys2stage.data.sources.base import Tables as Tables
from recsys2stage.data.sources.movielens import MovieLens as MovieLens
from recsys2stage.data.sources.table import Feature as Feature
from recsys2stage.data.sources.table import SideTable as SideTable
from recsys2stage.data.sources.table import Table as Table
from recsys2stage.data.sources.vectors import Vectors as Vectors
