"""A bundle to a report."""
