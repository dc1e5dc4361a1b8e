"""Datasets as rows: entries, files, formats."""
