"""Files that survive: local or remote storage, retries, atomic writes, metrics.jsonl."""
