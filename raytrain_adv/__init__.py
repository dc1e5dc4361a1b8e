"""Fine-tune Hugging Face language models on Ray: planned, applied, verified, reported."""

__version__ = "0.1.0"
