"""Grids of independent problems: theory and samples at every point, on one machine or many."""
