"""Requests for recommendations."""
