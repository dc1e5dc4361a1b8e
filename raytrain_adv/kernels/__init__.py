"""Kernels from the Hub or a folder; only select and swap import torch, only workers `kernels`."""
