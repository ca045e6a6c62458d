"""Candidate lists to a ranker."""
