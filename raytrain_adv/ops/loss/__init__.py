"""Cross-entropy without the whole logits."""

IGNORE = -100  # label of a token on which no loss is taken
