"""Comparing a replacement with the original before training."""
