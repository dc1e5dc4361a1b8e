"""The job's data: found, read, tokenised once, packed, put in order, and padded into batches."""
