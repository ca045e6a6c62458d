"""Two-stage recommender: retrieval and ranking, from a raw event log to evaluated recommendations."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys2stage.estimator import TwoStageRecommender
    from recsys2stage.recommender import Recommender

__all__ = ["Recommender", "TwoStageRecommender"]
__version__ = "0.1.0"

_MODULES = {"Recommender": "recommender", "TwoStageRecommender": "estimator"}


def __getattr__(name: str) -> Any:
    """Loads a public class, and with it torch, at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
