"""What the second stage is told beside the retriever's opinion, one family of signals a file."""

from recsys2stage.signals.affinity import Affinity as Affinity
from recsys2stage.signals.base import Proposer as Proposer
from recsys2stage.signals.base import Requests as Requests
from recsys2stage.signals.base import Signal as Signal
from recsys2stage.signals.content import Content as Content
from recsys2stage.signals.demographics import Demographics as Demographics
from recsys2stage.signals.neighbours import Neighbours as Neighbours
from recsys2stage.signals.other import OtherRetriever as OtherRetriever
from recsys2stage.signals.popularity import PopularityAsOf as PopularityAsOf
from recsys2stage.signals.ratings import Ratings as Ratings
from recsys2stage.signals.session import Session as Session
from recsys2stage.signals.slit import SLIT as SLIT
from recsys2stage.signals.transitions import Transitions as Transitions
