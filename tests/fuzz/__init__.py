"""Mutated files from elsewhere: no traceback, no hang, no memory, no code of theirs runs."""
