"""The model: files, building, attention, sharding, weights."""
