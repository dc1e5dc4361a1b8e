"""Fake quantization of linears and embeddings."""
