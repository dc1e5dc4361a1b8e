"""Memory, FLOPs, traffic and limits, before a run."""
