"""A plan as text: for a terminal of 100 columns, with and without color."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from raytrain_adv.driver.plan import scale_text
from raytrain_adv.estimate.advice import written
from raytrain_adv.estimate.memory import Phase
from raytrain_adv.report.parts import fold_names
from raytrain_adv.transforms.transform import Plan

if TYPE_CHECKING:
    from raytrain_adv.driver.plan.plan import RunPlan

WIDTH = 100
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "gathered")
NUMBERED = re.compile(r"(?<=\.)\d+(?=\.|$)")


def render(plan: RunPlan, verbose: bool = False) -> str:
    """Return the whole plan as plain text."""
    return _plain(view(plan, verbose))


def render_brief(plan: RunPlan) -> str:
    """Return the plan in a few lines, for the start of a run: length, batch, transforms, memory."""
    rows = [*_batch_rows(plan)]
    for name, own in plan.transforms.items():
        rows.append((name, _counts(own)))
        rows += [("", note) for note in own.notes]
    rows.append(("memory", _memory_sentence(plan)))
    return _plain(_pairs(rows))


def view(plan: RunPlan, verbose: bool = False) -> Group:
    """Return the whole plan for a rich console."""
    title = Text.assemble("Plan of ", (plan.job.source or "the job", "bold"))
    title.append(f", {_count(plan.world_size, 'worker')}")
    if plan.assumption:
        title.append(f" ({plan.assumption})", style="dim")
    parts: list[RenderableType] = [title]
    parts += _section("Job", _job_view(plan, verbose))
    parts += _section("Model", _pairs(_model_rows(plan)))
    parts += _section("Batch", _pairs(_batch_rows(plan)))
    parts += _section("Transforms", *_transform_views(plan))
    parts += _section(f"Memory per {_device(plan)}, GiB", *_memory_views(plan))
    if plan.scale is not None:
        rows = scale_text.rows(plan.scale, plan.limits)
        parts += _section(scale_text.title(plan.scale), _pairs(rows))
    if plan.remarks:
        parts += _section("To know", *map(Text, plan.remarks))
    return Group(*parts)


def _plain(renderable: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False)
    console.print(renderable)
    written_text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    return "\n".join(line.rstrip() for line in written_text.splitlines())


def _section(title: str, *content: RenderableType) -> list[RenderableType]:
    body = [Padding(part, (0, 0, 0, 2)) for part in content]
    return [Text(), Text(title, style="bold cyan"), *body]


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _count(number: int, word: str, several: str = "") -> str:
    return f"{number:,} {word}" if number == 1 else f"{number:,} {several or word + 's'}"


def _device(plan: RunPlan) -> str:
    return "worker" if plan.job.parallel.use_cpu else "GPU"


# --- the job's keys


def _job_view(plan: RunPlan, verbose: bool) -> RenderableType:
    changed, defaults = _keys(plan)
    parts: list[RenderableType] = [_pairs(changed.items())]
    if verbose:
        parts += [Text("as they come:", style="dim"), _pairs(defaults.items())]
    else:
        parts.append(Text(f"and {len(defaults)} keys as they come (--verbose)", style="dim"))
    return Group(*parts)


def _keys(plan: RunPlan) -> tuple[dict[str, str], dict[str, str]]:
    """Return the keys that differ from their default, and the others, as YAML would write them."""
    changed: dict[str, str] = {}
    same: dict[str, str] = {}
    for section in plan.job.sections():
        values = section.model_dump(mode="json")
        for key, field in type(section).model_fields.items():
            is_default = not field.is_required() and values[key] == field.get_default(
                call_default_factory=True
            )
            (same if is_default else changed)[key] = written(values[key])
    return changed, same


# --- model and batch


def _model_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    m = plan.model
    yield (
        "architecture",
        f"{m.architecture}, {_count(m.num_layers, 'layer')}, {m.attention} attention",
    )
    share = (
        "" if m.num_trained == m.num_parameters else f" ({m.num_trained / m.num_parameters:.2%})"
    )
    yield (
        "parameters",
        f"{m.num_parameters:,} in {' and '.join(m.dtypes)}, {m.num_trained:,} trained{share}",
    )
    yield "arithmetic", f"{m.flops_per_token / 1e9:,.3g} GFLOP per token, forward and backward"


def _batch_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    a, d, job = plan.arithmetic, plan.data, plan.job
    about = "about " if d.estimated_from else ""
    filled = "" if d.packing_efficiency is None else f", packed {d.packing_efficiency:.0%} full"
    yield (
        "data",
        f"{about}{_count(d.num_rows, 'conversation')} in {_count(d.num_sequences, 'sequence')}, "
        f"{d.num_tokens:,} tokens{filled}",
    )
    if d.estimated_from:
        yield "", f"estimated from {d.estimated_from:,} rows; a run counts them"
    mean = d.num_tokens / d.num_sequences
    yield "sequence", f"{mean:,.0f} tokens on average, {plan.seq_len:,} at most with padding"
    if d.num_held_out:
        yield "held out", f"{about}{_count(d.num_held_out, 'sequence')} for evaluation"
    yield (
        "step",
        f"{a.micro_batch} per worker x {_count(a.accumulation_steps, 'pass', 'passes')} "
        f"x {_count(a.world_size, 'worker')} = {_count(a.global_batch, 'sequence')}, "
        f"about {mean * a.global_batch:,.0f} tokens",
    )
    for size in plan.sizes[1:]:
        yield (
            "",
            f"with {_count(size.workers, 'worker')}: the same in "
            f"{_count(size.accumulation_steps, 'pass', 'passes')}, at most "
            f"{size.memory_gib:.1f} GiB per {_device(plan)}",
        )
    yield "epoch", f"{about}{_count(a.steps_per_epoch, 'step')}"
    source = "max_steps" if job.train.max_steps > 0 else "num_train_epochs"
    warm = f", {a.warmup_steps:,} of them warm-up" if a.warmup_steps else ""
    yield (
        "run",
        f"{about}{_count(a.total_steps, 'step')} = {a.epochs:.4g} epochs (by {source}){warm}, "
        f"{mean * a.total_sequences:,.0f} tokens",
    )
    if a.filled_sequences:
        yield (
            "",
            f"the last batch is filled with {a.filled_sequences:,} of the next epoch's sequences",
        )
    yield "checkpoints", _occasions(a.num_saves, a.save_strategy, a.save_every)
    if d.num_held_out:
        yield "evaluations", _occasions(a.num_evals, a.eval_strategy, a.eval_every)


def _occasions(count: int, strategy: str, every: int) -> str:
    if count == 0:
        return "none"
    if strategy == "steps" and count > 1:
        return f"{count:,}: every {_count(every, 'step')} and at the end"
    return f"{count:,}: after each epoch" if strategy == "epoch" else f"{count:,}: at the end"


# --- transforms


def _transform_views(plan: RunPlan) -> Iterator[RenderableType]:
    if not plan.transforms:
        yield Text("none: the model is trained as it is")
    for name, own in plan.transforms.items():
        yield Text.assemble((name, "bold"), f": {_counts(own)}")
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style="green", no_wrap=True)
        table.add_column(overflow="fold", ratio=3)
        table.add_column(overflow="fold", ratio=2)
        for fqns, change in _grouped(
            {fqn: _becomes(c.before, c.after) for fqn, c in own.changes.items()}
        ):
            table.add_row(f"{len(fqns)}", ", ".join(fold_names(fqns)), change)
        for fqns, reason in _grouped(own.skipped):
            names = ", ".join(fold_names(fqns))
            table.add_row(
                Text(f"{len(fqns)}", style="yellow"),
                Text(names, style="dim"),
                Text(f"left: {reason}", style="dim"),
            )
        yield Padding(table, (0, 0, 0, 2))
        for note in own.notes:
            yield Padding(Text(note, style="italic"), (0, 0, 0, 2))


def _counts(own: Plan) -> str:
    return f"changes {_count(len(own.changes), 'module')}, leaves {len(own.skipped):,}"


def _becomes(before: str, after: str) -> str:
    return f"{_short(before)} -> {_short(after)}"


def _short(name: str) -> str:
    package, _, rest = name.partition(".")
    kind = rest.rpartition(".")[2]
    return (kind if package == "torch" else f"{package}.{kind}") if kind else name


def _grouped(labels: Mapping[str, str]) -> Iterator[tuple[list[str], str]]:
    """Yield module names that differ in their numbers only and share a label, with the label."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fqn, label in labels.items():
        groups.setdefault((NUMBERED.sub("#", fqn), label), []).append(fqn)
    for (_, label), fqns in groups.items():
        yield fqns, label


# --- memory


def _memory_views(plan: RunPlan) -> Iterator[RenderableType]:
    yield _phase_table(plan)
    shown = [p for p in PARTS if getattr(plan.memory, p) >= 0.005]
    yield Padding(_pairs((p, plan.memory.explanations[p]) for p in shown), (1, 0, 0, 0))
    yield Padding(Text(_memory_sentence(plan), style="bold"), (1, 0, 0, 0))
    if plan.host.per_worker >= 0.05:
        yield Text(f"and host memory: {plan.host.sentence()}")
        short = plan.host_gib is not None and plan.host.per_node > plan.host_gib
        for verdict in plan.host.verdicts(plan.host_gib):
            yield Padding(Text(verdict, style="bold red" if short else ""), (0, 0, 0, 4))
    if not plan.job.parallel.use_cpu:
        yield from _verdicts(plan)


def _phase_table(plan: RunPlan) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("at", no_wrap=True)
    for part in (*PARTS, "workspace", "total"):
        table.add_column(part, justify="right", no_wrap=True)
    for phase in plan.memory.phases:
        is_peak = phase.name == plan.memory.peak
        cells = [_gib(getattr(phase, part)) for part in (*PARTS, "workspace")]
        total = f"{phase.total:.2f}" + (" <" if is_peak else "  ")
        table.add_row(phase.name, *cells, total, style="bold" if is_peak else "")
    return table


def _gib(value: float) -> str:
    return "-" if value < 0.005 else f"{value:.2f}"


def _memory_sentence(plan: RunPlan) -> str:
    at = _phase_named(plan, plan.memory.peak)
    largest = max((*PARTS, "workspace"), key=lambda part: getattr(at, part))
    return f"peak {plan.memory.total:.1f} GiB, at: {at.name}; most of it {largest}"


def _phase_named(plan: RunPlan, name: str) -> Phase:
    return next(p for p in plan.memory.phases if p.name == name)


def _verdicts(plan: RunPlan) -> Iterator[RenderableType]:
    for gpu in plan.gpus:
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
            yield Padding(Text(change.sentence()), (0, 0, 0, 4))
