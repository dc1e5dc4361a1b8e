"""Cross-entropy without the whole logits."""
