"""Evaluation: from a bundle to a report."""
