"""Data: sources of events, preparation of a dataset, splits, and histories as models read them."""
