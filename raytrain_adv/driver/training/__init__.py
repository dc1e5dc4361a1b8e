"""One run: launch, restarts, console."""
