"""What several files of tests need."""

from pathlib import Path

TINY_LLAMA = Path(__file__).parents[3] / "jobs" / "models" / "tiny-llama"


def pairs(count: int) -> list[dict[str, str]]:
    """Make alpaca rows of different lengths."""
    return [
        {"instruction": f"Count {i}.", "output": " ".join(str(k) for k in range(1 + i % 7))}
        for i in range(count)
    ]
