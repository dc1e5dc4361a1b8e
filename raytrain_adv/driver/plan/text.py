"""A plan as text: for a terminal of 100 columns, with and without color."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from raytrain_adv import tables
from raytrain_adv.config.sweep import METRICS, NEVER, SWITCH, Sweep, SweepOptions
from raytrain_adv.estimate.advice import Gpu
from raytrain_adv.estimate.limits import MOST_WORKERS, Limit, Scale
from raytrain_adv.estimate.memory import PARTS
from raytrain_adv.estimate.traffic import GB, Traffic
from raytrain_adv.report.parts import fold_names
from raytrain_adv.report.sweep_html import written as swept
from raytrain_adv.report.sweep_record import ranked_by
from raytrain_adv.tables import Fitting, Text
from raytrain_adv.text import as_yaml, plural
from raytrain_adv.transforms.transform import Plan

if TYPE_CHECKING:
    from raytrain_adv.driver.plan.plan import RunPlan

TRIALS_SHOWN = 40
NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)")

Rows = Iterator[tuple[str, str]]


def render(plan: RunPlan, verbose: bool = False) -> str:
    """Return the whole plan as plain text."""
    return tables.plain(view(plan, verbose))


def render_brief(plan: RunPlan) -> str:
    """Return the plan in a few lines, for the start of a run: length, batch, transforms, memory."""
    rows = [*_batch_rows(plan)]
    for name, own in plan.transforms.items():
        rows.append((name, _counts(own)))
        rows += [("", note) for note in own.notes]
    rows.append(("memory", _memory_sentence(plan)))
    return tables.plain(tables.pairs(rows))


def view(plan: RunPlan, verbose: bool = False) -> Group:
    """Return the whole plan for rich."""
    title = Text.assemble("Plan of ", (plan.job.source or "the job", "bold"))
    title.append(f", {plural(plan.world_size, 'worker')}")
    if plan.assumption:
        title.append(f" ({plan.assumption})", style="dim")
    device = "worker" if plan.job.parallel.use_cpu else "GPU"
    sections: list[tuple[str, Iterable[RenderableType]]] = [
        ("Job", _job_views(plan, verbose)),
        ("Model", [tables.pairs(_model_rows(plan))]),
        ("Batch", [tables.pairs(_batch_rows(plan))]),
        ("Transforms", _transform_views(plan)),
        (f"Memory per {device}, GiB", _memory_views(plan)),
    ]
    if s := plan.scale:
        heading = f"{plural(s.world_size, 'worker')} on {plural(s.nodes, 'node')}"
        rows = tables.pairs(_scale_rows(s, plan.limits))
        sections.append((f"{heading}: computed, not measured", [rows]))
    if plan.remarks:
        sections.append(("To know", map(Text, plan.remarks)))
    return Group(title, *(part for name, body in sections for part in tables.section(name, *body)))


def sweep_view(sweep: Sweep) -> Group:
    """Return a sweep's trials, and how they are compared."""
    better = "lowest" if METRICS[sweep.metric] == "min" else "highest"
    title = (
        f"Sweep: {plural(len(sweep.trials), 'trial')}, the {better} {ranked_by(sweep)} is the best"
    )
    table = Table.grid(padding=(0, 2))
    table.add_row(*sweep.keys)
    for trial in sweep.trials[:TRIALS_SHOWN]:
        cells = {key: swept(trial.values[key]) for key in sweep.keys}
        if SWITCH in cells and trial.values[SWITCH] == NEVER:
            cells[SWITCH] += " (PTQ)"
        table.add_row(*cells.values())
    if len(sweep.trials) > TRIALS_SHOWN:
        table.add_row(f"and {len(sweep.trials) - TRIALS_SHOWN} more")
    return Group(
        Text(f"{title}; {_schedule(sweep.options)}"),
        tables.indented(table),
        Text(f"\nThe plan of the first trial, {sweep.trials[0].name}:\n"),
    )


def _schedule(options: SweepOptions) -> str:
    if options.scheduler == "none":
        return "each runs to its end"
    steps = options.grace_steps
    grace = "a tenth of all steps" if steps is None else f"{steps:,} steps"
    return (
        f"asha stops those that fall behind, none before {grace} after its own switch, and keeps "
        f"about one in {options.reduction_factor} at each comparison"
    )


def _passes(number: int) -> str:
    return f"{number:,} {'pass' if number == 1 else 'passes'}"


# --- the job's keys


def _job_views(plan: RunPlan, verbose: bool) -> Iterator[RenderableType]:
    """Yield the keys that differ from their default, and the others, with values as in YAML."""
    changed: dict[str, str] = {}
    same: dict[str, str] = {}
    for section in plan.job.sections():
        values = section.model_dump(mode="json")
        for key, field in type(section).model_fields.items():
            default: Any = field.get_default(call_default_factory=True)
            is_default = not field.is_required() and values[key] == default
            (same if is_default else changed)[key] = as_yaml(values[key])
    yield tables.pairs(changed.items())
    if verbose:
        yield Text("at their defaults:", style="dim")
        yield tables.pairs(same.items())
    else:
        yield Text(f"{len(same)} more keys at their defaults (--verbose)", style="dim")


# --- model and batch


def _model_rows(plan: RunPlan) -> Rows:
    m = plan.model
    layers = plural(m.num_layers, "layer")
    yield "architecture", f"{m.architecture}, {layers}, {m.attention} attention"
    share = m.num_trained / m.num_parameters
    trained = f"{m.num_trained:,} trained" + ("" if share == 1 else f" ({share:.2%})")
    yield "parameters", f"{m.num_parameters:,} in {' and '.join(m.dtypes)}, {trained}"
    yield from (("checkpoint", note) for note in m.notes)
    yield "arithmetic", f"{m.flops_per_token / 1e9:,.3g} GFLOP per token, forward and backward"


def _batch_rows(plan: RunPlan) -> Rows:
    a, d = plan.arithmetic, plan.data
    about = "about " if d.estimated_from else ""
    mean = d.num_tokens / d.num_sequences
    split = plan.job.parallel.sequence_parallel_size
    workers = plural(a.world_size // split, "worker" if split == 1 else "group")
    filled = "" if d.packing_efficiency is None else f", packed {d.packing_efficiency:.0%} full"
    yield (
        "data",
        f"{about}{plural(d.num_rows, 'conversation')} in {plural(d.num_sequences, 'sequence')}, "
        f"{d.num_tokens:,} tokens{filled}",
    )
    if d.estimated_from:
        yield "", f"estimated from {d.estimated_from:,} rows; a run counts them"
    yield "sequence", f"{mean:,.0f} tokens on average, {plan.seq_len:,} at most with padding"
    if d.num_held_out:
        yield "held out", f"{about}{plural(d.num_held_out, 'sequence')} for evaluation"
    yield (
        "step",
        f"{a.micro_batch} per {'worker' if split == 1 else f'{split} workers'} "
        f"x {_passes(a.accumulation_steps)} x {workers} = {plural(a.global_batch, 'sequence')}, "
        f"about {mean * a.global_batch:,.0f} tokens",
    )
    if split > 1:
        yield "", f"each worker has {plan.seq_len // split:,} tokens of a sequence at most"
    if not plan.no_graph:
        yield "CUDA graph", "on a GPU, passes of the same length are recorded, then replayed"
    device = "worker" if plan.job.parallel.use_cpu else "GPU"
    for size in plan.sizes[1:]:
        most = f"at most {size.memory_gib:.1f} GiB per {device}"
        passes = _passes(size.accumulation_steps)
        yield "", f"with {plural(size.workers, 'worker')}: the same in {passes}, {most}"
    yield "epoch", f"{about}{plural(a.steps_per_epoch, 'step')}"
    source = "max_steps" if plan.job.train.max_steps > 0 else "num_train_epochs"
    warm = f", {a.warmup_steps:,} of them warm-up" if a.warmup_steps else ""
    yield (
        "run",
        f"{about}{plural(a.total_steps, 'step')} = {a.epochs:.4g} epochs (by {source}){warm}, "
        f"{mean * a.total_sequences:,.0f} tokens",
    )
    if number := a.filled_sequences:
        yield "", f"the last batch is filled with {number:,} of the next epoch's sequences"
    yield "checkpoints", _occasions(a.num_saves, a.save_strategy, a.save_every)
    if d.num_held_out:
        yield "evaluations", _occasions(a.num_evals, a.eval_strategy, a.eval_every)


def _occasions(count: int, strategy: str, every: int) -> str:
    if count == 0:
        return "none"
    if strategy == "steps" and count > 1:
        return f"{count:,}: every {plural(every, 'step')} and at the end"
    return f"{count:,}: after each epoch" if strategy == "epoch" else f"{count:,}: at the end"


# --- transforms


def _transform_views(plan: RunPlan) -> Iterator[RenderableType]:
    if not plan.transforms:
        yield Text("none: the model is trained unchanged")
    for name, own in plan.transforms.items():
        yield Text.assemble((name, "bold"), f": {_counts(own)}")
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="green", no_wrap=True)
        table.add_column(overflow="fold", ratio=3)
        table.add_column(overflow="fold", ratio=2)
        changes = {
            fqn: f"{_short(c.before)} -> {_short(c.after)}" for fqn, c in own.changes.items()
        }
        skipped = {fqn: f"skipped: {reason}" for fqn, reason in own.skipped.items()}
        for labels, first, style in ((changes, "", ""), (skipped, "yellow", "dim")):
            for fqns, label in _group(labels):
                cells = (f"{len(fqns)}", first), (", ".join(fold_names(fqns)), style)
                table.add_row(*(Text(*cell) for cell in (*cells, (label, style))))
        yield tables.indented(table)
        for note in own.notes:
            yield tables.indented(Text(note, style="italic"))


def _counts(own: Plan) -> str:
    return f"changes {plural(len(own.changes), 'module')}, skips {len(own.skipped):,}"


def _short(name: str) -> str:
    package, _, rest = name.partition(".")
    kind = rest.rpartition(".")[2]
    return (kind if package == "torch" else f"{package}.{kind}") if kind else name


def _group(labels: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    """Yield module names that differ only in their numbers and share a label, with the label."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fqn, label in labels.items():
        groups.setdefault((NUMBERED.sub("#", fqn), label), []).append(fqn)
    for (_, label), fqns in groups.items():
        yield fqns, label


# --- memory


def _memory_views(plan: RunPlan) -> Iterator[RenderableType]:
    yield Fitting(_phase_table(plan), tables.pairs(_phase_rows(plan)))
    shown = [p for p in PARTS if getattr(plan.memory, p) >= 0.005]
    explanations = ((p, plan.memory.explanations[p]) for p in shown)
    yield tables.indented(tables.pairs(explanations), by=0, above=1)
    yield tables.indented(Text(_memory_sentence(plan), style="bold"), by=0, above=1)
    if plan.host.per_worker >= 0.05:
        yield Text(f"and host memory: {plan.host.sentence()}")
        short = plan.host_gib is not None and plan.host.per_node > plan.host_gib
        if verdict := plan.host.verdict(plan.host_gib):
            yield tables.indented(Text(verdict, style="bold red" if short else ""), by=4)
    for gpu in () if plan.job.parallel.use_cpu else plan.gpus:
        yield from _verdict(plan, gpu)


def _phase_table(plan: RunPlan) -> Table:
    table = tables.columns("at", *PARTS, "total", right=(*PARTS, "total"))
    table.padding = (0, 1, 0, 0)
    for column in table.columns:
        column.no_wrap = True
    for phase in plan.memory.phases:
        is_peak = phase.name == plan.memory.peak
        sizes = [getattr(phase, part) for part in PARTS]
        cells = ["-" if gib < 0.005 else f"{gib:.2f}" for gib in sizes]
        total = f"{phase.total:.2f}" + (" <" if is_peak else "  ")
        table.add_row(phase.name, *cells, total, style="bold" if is_peak else "")
    return table


def _phase_rows(plan: RunPlan) -> Rows:
    """Yield the same for a narrow terminal: each phase's total and its parts."""
    for phase in plan.memory.phases:
        sizes = [(getattr(phase, part), part) for part in PARTS]
        parts = " + ".join(f"{gib:.2f} {part}" for gib, part in sizes if gib >= 0.005)
        peak = ", the peak" if phase.name == plan.memory.peak else ""
        yield phase.name, f"{phase.total:.2f}{peak}: {parts}"


def _memory_sentence(plan: RunPlan) -> str:
    at = next(p for p in plan.memory.phases if p.name == plan.memory.peak)
    largest = max(PARTS, key=lambda part: getattr(at, part))
    return f"peak {plan.memory.total:.1f} GiB, at: {at.name}; most of it {largest}"


def _verdict(plan: RunPlan, gpu: Gpu) -> Iterator[RenderableType]:
    fits = plan.memory.fits(gpu.memory_gib)
    verdict = ("fits", "green") if fits else ("does not fit", "bold red")
    line = Text.assemble(f"{gpu.name} ({gpu.memory_gib:.0f} GiB): ", verdict)
    advice = plan.advice[gpu.name]
    if advice:
        line.append("; there is room for" if fits else "; it would with one of")
    elif not fits:
        line.append("; no change of these keys makes it fit")
    yield line
    for change in advice:
        yield tables.indented(Text(change.sentence()), by=4)


# --- many workers


def _scale_rows(s: Scale, limits: tuple[Limit, ...]) -> Rows:
    yield "moved", _moved(s.moved)
    yield from _times(s)
    yield from _checkpoint(s)
    h = s.head
    yield (
        "head node",
        f"gcs_server and Ray Train's controller take {h.cpu_s:,.0f} s of CPU to start and end a "
        f"run, {h.memory_gib:.1f} GiB and up to {h.files:,.0f} open files; extrapolated from a few "
        "empty CPU workers on one node",
    )
    yield "", "data and checkpoints do not pass through Ray's object store"
    if not limits:
        yield "limits", f"none is reached with up to {MOST_WORKERS:,} workers"
    for place, limit in enumerate(limits):
        met = "reached: " if limit.workers <= s.world_size else ""
        name = "first limit" if place == 0 else "then"
        yield name, f"{met}from {limit.workers:,} workers on {limit.what}"
        yield "", f"fix: {limit.fix}"
    yield "assumed", ", ".join(f"{k} {v:g}" for k, v in asdict(s.assumed).items())
    yield "", "another cluster: --assume NAME=VALUE"


def _moved(m: Traffic) -> str:
    parts = [
        (m.gathers, f"all-gathers of {_gb(m.gathered)} in all"),
        (m.reductions, f"reduce-scatters of {_gb(m.reduced)} in float32"),
        (m.all_reductions, f"all-reduces of {_gb(m.all_reduced)} between {m.replicas:,} copies"),
    ]
    moved = ", ".join(f"{number:,} {what}" for number, what in parts if number)
    return f"{_gb(m.received)} into each GPU a step: {moved or 'nothing'}"


def _times(s: Scale) -> Rows:
    t = s.times
    if t.compute is None:
        yield "time of it", "not computed for CPUs"
        return
    by = f"{t.bandwidth:.3f} by bandwidth, {t.latency:.3f} in hops"
    yield "time of it", f"{t.communication:.3f} s: {by}"
    how = f"on {s.gpu}, FSDP2's copies in it, at the MFU of one H200"
    yield "computation", f"{t.compute:.3f} s a step {how}"
    low, high = max(t.compute, t.communication), t.compute + t.communication
    yield (
        "step",
        f"{low:.3f} to {high:.3f} s: exposed communication is {t.least_exposed:.0%} of it with "
        f"full overlap, {t.most_exposed:.0%} with none",
    )


def _checkpoint(s: Scale) -> Rows:
    c = s.checkpoint
    none = "" if s.saves else "none is saved; it would be "
    yield (
        "checkpoint",
        f"{none}{_gb(c.total)}, {_gb(c.per_rank)} of it on each rank; training stands "
        f"still for {c.staging:.2f} s, written in {c.save:,.1f} s, read in {c.load:,.1f} s",
    )
    if c.metadata > 0.05 * c.total:
        yield "", f"{_gb(c.metadata)} of it is .metadata: rank 0 writes it, every rank reads all"
    if c.model_load:
        yield "", f"the initial weights are read in {c.model_load:,.1f} s"
    if s.save_interval is not None:
        yield "", f"one is due every {s.save_interval:,.0f} s"


def _gb(number: float) -> str:
    return f"{number / GB:,.1f} GB" if number >= GB / 10 else f"{number / 1e6:,.2f} MB"
