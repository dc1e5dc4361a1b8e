"""Checks on each worker during training."""
