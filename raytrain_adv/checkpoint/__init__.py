"""Training checkpoints: save, load, resume."""
