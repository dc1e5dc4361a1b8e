"""The section of report.html on the cluster's nodes."""

from raytrain_adv import text as numbers
from raytrain_adv.report.page import text
from raytrain_adv.report.parts import card, table
from raytrain_adv.report.record import NodeReport, PreflightReport

HEADS = ("node", "GPUs", "compute capability", "free / all GiB", "driver", "torch", "verdict")


def preflight_html(found: PreflightReport | None) -> str:
    """Return the nodes as a table; empty where none were looked at."""
    if found is None:
        return ""
    notes = "".join(f'<p class="note">{text(warning)}</p>' for warning in found.warnings)
    return card(table(HEADS, list(map(_row, found.nodes))) + notes)


def _row(node: NodeReport) -> tuple[str, ...]:
    kinds = [f"{node.gpus.count(name)} x {name}" for name in dict.fromkeys(node.gpus)]
    memory = ""
    if node.free_memory_gib is not None and node.memory_gib is not None:
        memory = f"{node.free_memory_gib:.0f} / {node.memory_gib:.0f}"
    return (
        node.address,
        ", ".join(kinds),
        node.compute_capability or "",
        memory,
        node.driver_version or "",
        node.versions.get("torch") or "",
        numbers.plural(node.workers, "worker")
        if node.used
        else " ".join(filter(None, (node.reason, f"({node.found})" if node.found else ""))),
    )
