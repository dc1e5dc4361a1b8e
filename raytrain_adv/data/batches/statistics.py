"""What is reported about the data, in numbers and in sentences."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain_adv.data.batches.sequences import SequenceSet

NUM_EXAMPLES = 5
"""Unusable rows that are named; the others are counted."""


def describe(sequences: SequenceSet, cutoff_len: int, packed: bool) -> dict[str, Any]:
    """Return the numbers of one set: rows, sequences, tokens, label tokens, lengths of its
    conversations."""
    members = np.concatenate(sequences.members)
    num_tokens = int(sequences.lengths.sum())
    numbers: dict[str, Any] = {
        "rows": len(members),
        "sequences": len(sequences),
        "tokens": num_tokens,
        "label_tokens": int(sequences.label_counts.sum()),
        "lengths": _percentiles(sequences.rows.lengths[members]),
        "histogram": _histogram(sequences.rows.lengths[members]),
    }
    if packed:
        numbers["packing_efficiency"] = round(num_tokens / (len(sequences) * cutoff_len), 4)
    return numbers


def _percentiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    points = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: float(np.percentile(lengths, point)) for name, point in points.items()} | {
        "mean": round(float(lengths.mean()), 1)
    }


def _histogram(lengths: NDArray[np.int64]) -> dict[str, list[int]]:
    """Count lengths in up to 20 bins of whole tokens: bin i holds edges[i] <= length < edges[i +
    1]."""
    step = max(1, -(-(int(lengths.max()) + 1) // 20))
    edges = np.arange(0, int(lengths.max()) + step + 1, step)
    return {"edges": edges.tolist(), "counts": np.histogram(lengths, edges)[0].tolist()}


def unusable_sentence(rows: dict[str, Any]) -> str:
    """Name the first unusable rows and count all."""
    shown = "; ".join(f"{e['where']}: {e['reason']}" for e in rows["unusable_examples"])
    more = rows["unusable"] - len(rows["unusable_examples"])
    return f"{rows['unusable']:,} of {rows['read']:,} rows cannot be used: {shown}" + (
        f"; and {more:,} more" if more else ""
    )


def sentences(stats: dict[str, Any]) -> list[str]:
    """Return the sentences that summarize the data."""
    lines = []
    for name in ("train", "eval"):
        numbers = stats[name]
        if numbers is None:
            continue
        packed = (
            f", packed {numbers['packing_efficiency']:.0%} full"
            if "packing_efficiency" in numbers
            else ""
        )
        lines.append(
            f"Data for {name}: {numbers['rows']:,} conversations in "
            f"{numbers['sequences']:,} sequences, "
            f"{numbers['tokens']:,} tokens, loss on {numbers['label_tokens']:,}{packed}"
        )
    for rows in (stats["rows"], stats["eval_rows"]):
        if rows and rows["unusable"]:
            lines.append(unusable_sentence(rows))
        if rows and rows["truncated"]:
            lines.append(
                f"{rows['truncated']:,} rows were longer than cutoff_len ({stats['cutoff_len']}) "
                "and were cut"
            )
    return lines
