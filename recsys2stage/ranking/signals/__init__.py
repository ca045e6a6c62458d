"""Signals: features and candidate generators of the ranker, counted from training events; one family per file."""

from recsys2stage.ranking.signals.affinity import Affinity as Affinity
from recsys2stage.ranking.signals.base import Proposer as Proposer
from recsys2stage.ranking.signals.base import Requests as Requests
from recsys2stage.ranking.signals.base import Signal as Signal
from recsys2stage.ranking.signals.content import Content as Content
from recsys2stage.ranking.signals.demographics import Demographics as Demographics
from recsys2stage.ranking.signals.ease import EASE as EASE
from recsys2stage.ranking.signals.graph import TransitionGraph as TransitionGraph
from recsys2stage.ranking.signals.item_knn import ItemKNN as ItemKNN
from recsys2stage.ranking.signals.neighbours import Neighbours as Neighbours
from recsys2stage.ranking.signals.other import OtherRetriever as OtherRetriever
from recsys2stage.ranking.signals.popularity import PopularityAsOf as PopularityAsOf
from recsys2stage.ranking.signals.ratings import Ratings as Ratings
from recsys2stage.ranking.signals.repeats import Repeats as Repeats
from recsys2stage.ranking.signals.session import Session as Session
from recsys2stage.ranking.signals.slit import SLIT as SLIT
from recsys2stage.ranking.signals.transitions import Transitions as Transitions
