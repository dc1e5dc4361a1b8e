"""A sweep of trials with Ray Tune."""
