"""From a raw log of events to ranked, measured recommendations, in two stages."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recsys2stage.estimator import TwoStageRecommender

__all__ = ["TwoStageRecommender"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads the estimator, and with it torch, when it is asked for and not before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from recsys2stage import estimator

    return getattr(estimator, name)
