"""The plan of a sweep, for --plan: its trials, and how they are compared."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from raytrain_adv import tables
from raytrain_adv.config.sweep import METRICS, NEVER, SWITCH, Sweep
from raytrain_adv.report.sweep_html import written
from raytrain_adv.text import plural

NUM_SHOWN = 40


def view(sweep: Sweep) -> Group:
    """Return the trials as a table for rich."""
    better = "lowest" if METRICS[sweep.metric] == "min" else "highest"
    table = Table.grid(padding=(0, 2))
    table.add_row(*sweep.keys)
    for trial in sweep.trials[:NUM_SHOWN]:
        table.add_row(*(_cell(key, trial.values[key]) for key in sweep.keys))
    if len(sweep.trials) > NUM_SHOWN:
        table.add_row(f"and {len(sweep.trials) - NUM_SHOWN} more")
    return Group(
        Text(
            f"Sweep: {plural(len(sweep.trials), 'trial')}, the {better} {sweep.metric} is the "
            f"best; {_schedule(sweep)}"
        ),
        tables.indented(table),
        Text(f"\nThe plan of the first trial, {sweep.trials[0].name}:\n"),
    )


def _schedule(sweep: Sweep) -> str:
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


def _cell(key: str, value: object) -> str:
    return written(value) + (" (PTQ)" if key == SWITCH and value == NEVER else "")
