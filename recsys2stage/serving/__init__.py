"""Serving: requests from a dataset or a file."""
