"""Random kills of the processes of random small jobs, each run compared with one left alone."""
