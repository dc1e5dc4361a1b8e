"""The closing lines of a run on the console."""

import textwrap
from pathlib import Path

from raytrain_adv import text as numbers
from raytrain_adv.report import variants
from raytrain_adv.report.record import Baseline, RunReport, Sample
from raytrain_adv.report.starts import story

NUM_SAMPLE_LINES = 8


def summary(report: RunReport) -> str:
    """Return what was reached, a sample answer, where the time went and where everything is."""
    parts = [_sample(report.samples[0])] if report.samples else []
    parts += [_block(_figures(report)), _variants(report)]
    parts += [_timeline(report), _block(_places(report))]
    return "\n\n".join(part for part in parts if part)


def _figures(report: RunReport) -> list[tuple[str, str]]:
    figures = [("steps", _steps(report))]
    if report.train_loss:
        figures.append(("train loss", _from_to(report.train_loss)))
    if report.eval_loss:
        how = variants.evaluated_as(report)
        text = _from_to(report.eval_loss) + (f", {how}" if how else "")
        figures.append(("eval loss", text))
    figures.append(("speed", _speed(report)))
    if report.peak_memory_gib is not None:
        figures.append(("peak memory", _memory(report)))
    if report.baseline is not None:
        figures.append(("compared", _compared(report.baseline)))
    for name, transform in report.transforms.items():
        changed = numbers.plural(transform.changed, "module")
        figures.append((name, f"{changed} changed, {transform.skipped:,} skipped"))
        if transform.proof:
            figures.append(("", transform.proof_sentence))
    figures.append(("quantized", variants.compared(report)))
    return [(label, text) for label, text in figures if text]


def _variants(report: RunReport) -> str:
    rows = [variants.HEADS, *variants.table_rows(report)]
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
    said = variants.sentence(report)
    return "\n".join([*(f"  {line}" for line in lines), *([f"  {said}"] if said else [])])


def _compared(other: Baseline) -> str:
    parts = []
    if other.final_eval_loss_change is not None:
        parts.append(f"eval loss {other.final_eval_loss_change:+.2%}")
    if other.speedup is not None:
        parts.append(f"{other.speedup:.2f} x the speed")
    if other.memory_ratio is not None:
        parts.append(f"{other.memory_ratio:.2f} x the memory")
    return f"{', '.join(parts)} of {other.output_dir}"


def _steps(report: RunReport) -> str:
    total = report.total_steps
    text = (
        f"{report.steps:,}" if total in (None, report.steps) else f"{report.steps:,} of {total:,}"
    )
    if report.epochs is not None:
        text += f" ({report.epochs:.2f} epochs)"
    if report.world_size:
        workers = story(report.starts) or numbers.plural(report.world_size, "worker")
        text += f" on {workers}, {report.device or 'device unknown'}"
    if report.restarts:
        text += f", {numbers.plural(report.restarts, 'restart')}"
    if report.skipped_steps:
        text += f", {report.skipped_steps:,} of them skipped for a bad loss"
    if report.resumed_from_step is not None:
        text += f", resumed from step {report.resumed_from_step:,}"
    return text


def _from_to(points: tuple[tuple[int, float | None], ...]) -> str:
    first, last = points[0], points[-1]
    end = f"{numbers.loss(last[1])} (step {last[0]:,})"
    if len(points) == 1:
        return end
    return f"{numbers.loss(first[1])} (step {first[0]:,}) -> {end}"


def _speed(report: RunReport) -> str:
    if report.tokens_per_second_per_worker is None:
        return ""
    text = f"{numbers.rate(report.tokens_per_second_per_worker)} tokens/s per worker"
    if report.step_seconds is not None:
        text += f", {numbers.seconds(report.step_seconds)} per step"
    if report.mfu_bf16 is not None:
        text += f", MFU {numbers.percent(report.mfu_bf16)} of the bf16 peak"
    return text


def _memory(report: RunReport) -> str:
    text = f"{numbers.gib(report.peak_memory_gib)} GiB"
    if (report.device or "").startswith("CPU"):
        return f"{text} of the process, Python and libraries included"
    if report.predicted_memory_gib is not None:
        text += f" (predicted {numbers.gib(report.predicted_memory_gib)} GiB)"
    return text


def _timeline(report: RunReport) -> str:
    if not report.timeline:
        return ""
    phases = ", ".join(
        f"{name} {numbers.seconds(spent)}" for name, spent in report.timeline.items()
    )
    lines = textwrap.wrap(phases, width=78, initial_indent=" " * 2, subsequent_indent=" " * 2)
    return "\n".join(["where the time went:", *lines])


def _places(report: RunReport) -> list[tuple[str, str]]:
    output_dir = Path(str(report.job.get("output_dir") or "."))
    places = [
        ("report", str(output_dir / "report.html")),
        ("figures", str(output_dir / "report.json")),
    ]
    if report.quantized_dir:
        places.insert(0, ("quantized", f"{report.quantized_dir}{_size(report.quantized_gib)}"))
    if report.model_dir:
        places.insert(0, ("model", f"{report.model_dir}{_size(report.model_gib)}"))
    return places


def _size(gib: float | None) -> str:
    return "" if gib is None else f" ({numbers.disk(gib)})"


def _block(lines: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"  {label:<{width}}  {text}" for label, text in lines)


def _sample(sample: Sample) -> str:
    lines = [
        "sample answer:",
        _indented("prompt", sample.prompt),
        _indented("answer", sample.answer),
    ]
    if sample.reference is not None:
        lines.append(_indented("reference", sample.reference))
    return "\n".join(lines)


def _indented(label: str, text: str) -> str:
    """Return the text wrapped beside its label, long ones cut."""
    wrapped = [
        piece
        for line in text.strip().splitlines()
        for piece in textwrap.wrap(line, width=66, replace_whitespace=False) or [""]
    ]
    if len(wrapped) > NUM_SAMPLE_LINES:
        wrapped = [*wrapped[:NUM_SAMPLE_LINES], "[...]"]
    first, *rest = wrapped or ["(empty)"]
    return "\n".join([f"  {label:<10}{first}", *(" " * 12 + line for line in rest)])
