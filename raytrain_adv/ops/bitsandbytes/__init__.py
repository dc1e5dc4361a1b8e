"""Linears whose weights bitsandbytes quantized."""
