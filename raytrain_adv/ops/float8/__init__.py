"""FP8 linears: casts, products, FP8 all-gather."""
