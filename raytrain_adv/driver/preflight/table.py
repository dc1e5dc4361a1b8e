"""The result of preflight as a table for terminals and logs, and for report.json."""

from collections.abc import Sequence

from rich.console import Group, RenderableType

from raytrain_adv import tables
from raytrain_adv.driver.preflight.probe import GpuReading
from raytrain_adv.driver.preflight.verdicts import Preflight, Verdict
from raytrain_adv.driver.preflight.versions import DECISIVE, SHOWN_NODES
from raytrain_adv.report.parts import NodeReport, PreflightReport
from raytrain_adv.tables import Text
from raytrain_adv.text import GIB, listed, plural


def render(found: Preflight) -> str:
    """Return the table as plain text."""
    return tables.plain(view(found))


def view(found: Preflight) -> Group:
    """Return the table for rich; equal nodes share a row."""
    table = tables.columns("node", "GPUs", "cc", "GiB free/all", "driver", "verdict")
    rows = _group(found.verdicts)
    for verdicts in rows:
        table.add_row(*_cells(verdicts))
    title = f"Cluster: {plural(len(found.verdicts), 'node')}, answered in {found.seconds:.1f} s"
    parts: list[RenderableType] = [Text(title, style="bold cyan"), table]
    parts += [line for verdicts in rows if verdicts[0].refusal for line in _refusal(verdicts)]
    parts += [Text(sentence) for sentence in _versions(found.verdicts)]
    parts += [Text(f"warning: {sentence}", style="yellow") for sentence in found.warnings]
    return Group(*parts)


def report(found: Preflight) -> PreflightReport:
    """Return the section of report.json."""
    return PreflightReport(
        nodes=tuple(map(_node_report, found.verdicts)),
        warnings=found.warnings,
        seconds=found.seconds,
    )


def _group(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    rows: dict[object, list[Verdict]] = {}
    for verdict in verdicts:
        gpus, driver = verdict.seen.gpus, verdict.seen.driver_version
        kind = tuple((gpu.name, gpu.total_bytes) for gpu in gpus)
        found = verdict.found.replace(verdict.node.address, "")
        key = (kind, round(_free_gib(gpus)), driver, verdict.reason, found, verdict.workers)
        rows.setdefault(key, []).append(verdict)
    return list(rows.values())


def _cells(verdicts: list[Verdict]) -> list[Text]:
    first = verdicts[0]
    gpus = first.seen.gpus
    memory = f"{_free_gib(gpus):.0f} / {_total_gib(gpus):.0f}" if gpus else "-"
    if first.accepted:
        each = " each" if len(verdicts) > 1 or first.node.count > 1 else ""
        verdict = Text(f"{plural(first.workers, 'worker')}{each}", style="green")
        if first.probed is None:
            verdict.append(", if it has what it declares", style="dim")
    else:
        is_refused = bool(first.refusal and first.workers)
        verdict = Text("excluded", "red") if is_refused else Text(first.reason, "dim")
    cells = [_kinds(gpus), _capability(gpus), memory, first.seen.driver_version]
    return [Text(_name(verdicts)), *(Text(cell or "-") for cell in cells), verdict]


def _name(verdicts: Sequence[Verdict]) -> str:
    node = verdicts[0].node
    name = f"{node.count} x {node.address}" if node.count > 1 else node.address
    return name if len(verdicts) == 1 else f"{name} and {len(verdicts) - 1} more"


def _refusal(verdicts: Sequence[Verdict]) -> list[RenderableType]:
    first = verdicts[0]
    rule = Text.assemble(f"{_name(verdicts)} excluded: ", (first.refusal, "red"))
    return [rule, tables.indented(Text(first.found, style="dim"))]


def _kinds(gpus: Sequence[GpuReading]) -> str:
    names = [gpu.name.removeprefix("NVIDIA ") for gpu in gpus]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _capability(gpus: Sequence[GpuReading]) -> str | None:
    lowest = min((gpu.compute_capability for gpu in gpus), default=None)
    return f"{lowest[0]}.{lowest[1]}" if lowest is not None else None


def _total_gib(gpus: Sequence[GpuReading]) -> float:
    return min((gpu.total_bytes for gpu in gpus), default=0) / GIB


def _free_gib(gpus: Sequence[GpuReading]) -> float:
    return min((gpu.free_bytes for gpu in gpus), default=0) / GIB


def _versions(verdicts: Sequence[Verdict]) -> list[str]:
    nodes: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.probed is not None:
            found = {**verdict.probed.versions, "CUDA": verdict.probed.cuda_version}
            shown = ", ".join(f"{name} {found.get(name) or '-'}" for name in (*DECISIVE, "CUDA"))
            nodes.setdefault(shown, []).append(verdict.node.address)
    if len(nodes) == 1:
        return list(nodes)
    return [f"{listed(where, SHOWN_NODES)}: {shown}" for shown, where in nodes.items()]


def _node_report(verdict: Verdict) -> NodeReport:
    reading = verdict.seen
    return NodeReport(
        address=verdict.node.address,
        node_id=verdict.node.node_id,
        used=verdict.accepted,
        workers=verdict.workers,
        reason=verdict.reason,
        found=verdict.found,
        gpus=tuple(gpu.name for gpu in reading.gpus),
        compute_capability=_capability(reading.gpus),
        memory_gib=_total_gib(reading.gpus) if reading.gpus else None,
        free_memory_gib=_free_gib(reading.gpus) if reading.gpus else None,
        driver_version=reading.driver_version,
        cuda_version=reading.cuda_version,
        versions=dict(reading.versions),
    )
