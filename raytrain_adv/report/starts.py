"""The starts of a run's workers, from the events in metrics.jsonl; and how their number changed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain_adv import text
from raytrain_adv.report.parts import card, table
from raytrain_adv.report.record import Start


def starts(rows: Sequence[Mapping[str, Any]]) -> tuple[Start, ...]:
    """Return the starts of the workers that got as far as to know their step."""
    found = []
    places: Mapping[str, Any] = {}
    for row in rows:
        if row.get("event") == "workers":
            places = row
        elif row.get("event") == "plan" and row.get("world_size"):
            found.append(
                Start(
                    step=row.get("resumed_from_step") or 0,
                    time=row.get("time"),
                    workers=row["world_size"],
                    nodes=tuple(filter(None, str(places.get("nodes", "")).split())),
                    lost=tuple(filter(None, str(places.get("lost", "")).split())),
                )
            )
            places = {}
    return tuple(found)


def story(starts: Sequence[Start]) -> str:
    """Return how the number of workers changed, as `2 workers, 1 from step 40, 2 from step 80`;
    empty where it never did.
    """
    changes = [one for one, before in zip(starts[1:], starts, strict=False) if differ(one, before)]
    if not changes:
        return ""
    later = "".join(f", {one.workers} from step {one.step:,}" for one in changes)
    return text.plural(starts[0].workers, "worker") + later


def differ(one: Start, before: Start) -> bool:
    """Whether there were more or fewer workers than at the start before."""
    return one.workers != before.workers


def starts_html(starts: Sequence[Start]) -> str:
    """Return the starts as a table; empty where the workers started once."""
    if len(starts) < 2:
        return ""
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time)) if one.time else "",
            f"{one.step:,}",
            f"{one.workers:,}",
            ", ".join(one.nodes),
            ", ".join(one.lost),
        )
        for one in starts
    ]
    return card(table(("started", "after step", "workers", "nodes", "nodes lost"), rows))
