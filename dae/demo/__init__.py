"""Synthetic CT and MR bodies, to try everything without data."""
