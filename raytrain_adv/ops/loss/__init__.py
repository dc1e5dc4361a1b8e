"""Cross-entropy without the whole logits."""

import math

IGNORE = -100  # label of a token on which no loss is taken


def perplexity(loss: float) -> float:
    """Return e^loss, or e^700 of a loss whose power would be too large for a float."""
    return math.exp(min(loss, 700.0))
