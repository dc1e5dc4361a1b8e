"""What a sweep would run, for --plan: its trials, and how they are compared."""

from __future__ import annotations

from raytrain_adv import text
from raytrain_adv.config.sweep import METRICS, NEVER, SWITCH, Sweep
from raytrain_adv.report.sweep_table import written

NUM_SHOWN = 40


def render(sweep: Sweep) -> str:
    """Return the trials as a table, and what follows below it."""
    trials = text.plural(len(sweep.trials), "trial")
    lines = [f"Sweep: {trials}, {_better(sweep)} {sweep.metric} is the best; {_scheduled(sweep)}"]
    rows = [list(sweep.keys)]
    rows += [
        [written(t.values[key]) + _remark(key, t.values[key]) for key in sweep.keys]
        for t in sweep.trials[:NUM_SHOWN]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(sweep.keys))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {'  '.join(cells)}".rstrip())
    if len(sweep.trials) > NUM_SHOWN:
        lines.append(f"  and {len(sweep.trials) - NUM_SHOWN} more")
    lines.append(f"\nThe plan of the first trial, {sweep.trials[0].name}:\n")
    return "\n".join(lines)


def _better(sweep: Sweep) -> str:
    return "the lowest" if METRICS[sweep.metric] == "min" else "the highest"


def _scheduled(sweep: Sweep) -> str:
    options = sweep.options
    if options.scheduler == "none":
        return "each runs to its end"
    grace = (
        "a tenth of all steps" if options.grace_steps is None else f"{options.grace_steps:,} steps"
    )
    return (
        f"asha stops those that fall behind, none before {grace} after its own switch, and keeps "
        f"about one in {options.reduction_factor} at each comparison"
    )


def _remark(key: str, value: object) -> str:
    return " (PTQ)" if key == SWITCH and value == NEVER else ""
