"""Which nodes can run the job."""
