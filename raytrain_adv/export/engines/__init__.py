"""Scripts that ask an engine; each is run by the Python that has it, and imports none of ours."""
