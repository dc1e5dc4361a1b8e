"""Rows to token IDs and labels."""
