"""Kernels from the Hub or a folder: fetch, select, try and install them.

Only select and swap import torch; the `kernels` package is imported on workers alone.
"""
