"""What a job will do, before it runs."""
