"""Fine-tune Hugging Face language models on Ray: FP8, QAT and Hub kernels, planned, applied, verified, reported."""

__version__ = "0.1.0"
