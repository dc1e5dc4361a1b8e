"""Trials on each worker before the first step."""
