"""Kernels from the Hub or a folder: which, at what commit, for which modules, and whether they are
right.

Only modules that touch a model import torch; the `kernels` package is imported on workers alone.
"""
