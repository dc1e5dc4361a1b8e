"""From a trained, sharded model to a folder that loads elsewhere."""
