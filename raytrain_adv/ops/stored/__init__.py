"""Weights that a checkpoint holds rounded: which there are, and their values."""
