"""What every rank of a run shares: its process group, its reporter, its schedule, its trackers."""
