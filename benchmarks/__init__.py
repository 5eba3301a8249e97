"""Measurements. Run from the repository's root; never part of a wheel."""
