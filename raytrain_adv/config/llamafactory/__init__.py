"""LLaMA-Factory's keys."""
