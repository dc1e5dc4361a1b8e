"""What preflight found as a table: for a terminal, a log and report.json."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raytrain_adv.driver.preflight.probe import GpuReading
from raytrain_adv.driver.preflight.verdicts import Preflight, Verdict
from raytrain_adv.driver.preflight.versions import DECISIVE, some
from raytrain_adv.hardware import GIB
from raytrain_adv.report.parts import NodeReport, PreflightReport
from raytrain_adv.text import plural

WIDTH = 100


def render(found: Preflight) -> str:
    """Return the table as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    console.print(view(found))
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return "\n".join(line.rstrip() for line in text.splitlines())


def view(found: Preflight) -> Group:
    """Return the table for a rich console; nodes that are alike share a row."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("node", "GPUs", "cc", "GiB free/all", "driver", "verdict"):
        table.add_column(name, overflow="fold")
    rows = _alike(found.verdicts)
    for verdicts in rows:
        table.add_row(*_cells(verdicts))
    title = f"Cluster: {plural(len(found.verdicts), 'node')}, asked in {found.seconds:.1f} s"
    parts: list[RenderableType] = [Text(title, style="bold cyan"), table]
    parts += [line for verdicts in rows if verdicts[0].refusal for line in _refusal(verdicts)]
    parts += [Text(sentence) for sentence in _versions(found.verdicts)]
    parts += [Text(f"warning: {sentence}", style="yellow") for sentence in found.warnings]
    return Group(*parts)


def report(found: Preflight) -> PreflightReport:
    """Return what report.json keeps."""
    return PreflightReport(
        nodes=tuple(map(_node_report, found.verdicts)),
        warnings=found.warnings,
        seconds=found.seconds,
    )


def _alike(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    rows: dict[object, list[Verdict]] = {}
    for verdict in verdicts:
        gpus = verdict.reading.gpus if verdict.reading is not None else ()
        free = _free_gib(gpus)
        driver = verdict.reading.driver_version if verdict.reading is not None else None
        kind = tuple((gpu.name, gpu.total_bytes) for gpu in gpus)
        against = verdict.found.replace(verdict.node.address, "")
        key = (kind, round(free), driver, verdict.reason, against, verdict.workers)
        rows.setdefault(key, []).append(verdict)
    return list(rows.values())


def _cells(verdicts: list[Verdict]) -> list[Text]:
    first = verdicts[0]
    node, reading = first.node, first.reading
    gpus = reading.gpus if reading is not None else ()
    memory = f"{_free_gib(gpus):.0f} / {_total_gib(gpus):.0f}" if gpus else "-"
    if first.accepted:
        each = " each" if len(verdicts) > 1 or node.count > 1 else ""
        verdict = Text(f"{plural(first.workers, 'worker')}{each}", style="green")
        if reading is None or reading.is_declared:
            verdict.append(", if it is what it declares", style="dim")
    else:
        verdict = (
            Text("left out", "red")
            if first.refusal and first.workers
            else Text(first.reason, "dim")
        )
    cells = [_kinds(gpus), _capability(gpus) or "-", memory, reading and reading.driver_version]
    return [Text(_name(verdicts)), *(Text(cell or "-") for cell in cells), verdict]


def _name(verdicts: Sequence[Verdict]) -> str:
    node = verdicts[0].node
    name = f"{node.count} x {node.address}" if node.count > 1 else node.address
    return name if len(verdicts) == 1 else f"{name} and {len(verdicts) - 1} more"


def _refusal(verdicts: Sequence[Verdict]) -> list[RenderableType]:
    first = verdicts[0]
    rule = Text.assemble(f"{_name(verdicts)} left out: ", (first.refusal, "red"))
    return [rule, Padding(Text(first.found, style="dim"), (0, 0, 0, 2))]


def _kinds(gpus: Sequence[GpuReading]) -> str:
    names = [gpu.name.removeprefix("NVIDIA ") for gpu in gpus]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _capability(gpus: Sequence[GpuReading]) -> str:
    lowest = min((gpu.compute_capability for gpu in gpus), default=None)
    return f"{lowest[0]}.{lowest[1]}" if lowest is not None else ""


def _total_gib(gpus: Sequence[GpuReading]) -> float:
    return min((gpu.total_bytes for gpu in gpus), default=0) / GIB


def _free_gib(gpus: Sequence[GpuReading]) -> float:
    return min((gpu.free_bytes for gpu in gpus), default=0) / GIB


def _versions(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the decisive versions, a line for each set of them with the nodes that have it."""
    nodes: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.probed is not None:
            found = verdict.probed.versions
            shown = ", ".join(f"{name} {found.get(name) or '-'}" for name in DECISIVE)
            nodes.setdefault(f"{shown}, CUDA {verdict.probed.cuda_version or '-'}", []).append(
                verdict.node.address
            )
    if len(nodes) == 1:
        return list(nodes)
    return [f"{some(where)}: {shown}" for shown, where in nodes.items()]


def _node_report(verdict: Verdict) -> NodeReport:
    reading = verdict.reading
    common = {
        "address": verdict.node.address,
        "node_id": verdict.node.node_id,
        "used": verdict.accepted,
        "workers": verdict.workers,
        "reason": verdict.reason,
        "found": verdict.found,
    }
    if reading is None:
        return NodeReport(**common)
    return NodeReport(
        **common,
        gpus=tuple(gpu.name for gpu in reading.gpus),
        compute_capability=_capability(reading.gpus) or None,
        memory_gib=_total_gib(reading.gpus) if reading.gpus else None,
        free_memory_gib=_free_gib(reading.gpus) if reading.gpus else None,
        driver_version=reading.driver_version,
        cuda_version=reading.cuda_version,
        versions=dict(reading.versions),
    )
