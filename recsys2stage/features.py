"""Declared features of items and users as numbers that a network can read."""
