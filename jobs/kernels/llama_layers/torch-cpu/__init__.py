"""RMSNorm and SwiGLU of Llama-like models in PyTorch: the build for a CPU, to try jobs out."""

from . import layers

__all__ = ["layers"]
