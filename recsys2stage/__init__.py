"""From a raw log of events to ranked, measured recommendations, in two stages."""

__version__ = "0.1.0"
