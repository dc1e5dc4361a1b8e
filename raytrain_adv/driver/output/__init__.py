"""The output directory: ownership, overwriting, resuming."""
