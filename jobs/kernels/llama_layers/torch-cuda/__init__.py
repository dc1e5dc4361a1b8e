"""RMSNorm and SwiGLU of Llama-like models in Triton, forward and backward."""

from . import layers

__all__ = ["layers"]
