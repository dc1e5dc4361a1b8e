"""The plan of a job, before it runs."""
