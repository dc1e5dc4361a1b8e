"""Stacked experts of mixtures: finding them, and their products."""
