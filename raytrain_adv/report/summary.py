"""The closing lines of a run on the console."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill, indent, wrap

from rich.table import Table
from rich.text import Text

from raytrain_adv import tables, text
from raytrain_adv.report import variants
from raytrain_adv.report.parts import Baseline, Sample, Start
from raytrain_adv.report.record import RunReport

NUM_SAMPLE_LINES = 8
NUM_SAMPLES = 3
BESIDE = {"base": "what the adapter belongs to", "merged": "with the adapter in it, not rounded"}
"""Folders that a run writes beside some adapters, without `model-` -> what they hold."""
UNLIMITED = 10_000  # columns of a terminal that cuts no table


def summary(report: RunReport) -> str:
    """Return what was reached, a sample answer, where the time went and where everything is."""
    parts = [_samples(report.samples)]
    parts += [indent(columns(_figures(report)), "  "), _variants(report)]
    parts += [fill(f"warning: {one}", width=100) for one in report.warnings]
    parts += [_timeline(report), indent(columns(_places(report)), "  ")]
    return "\n\n".join(part for part in parts if part)


def columns(rows: Sequence[Sequence[str]], num_left: int = 2) -> str:
    """Return rows as aligned columns; those after the first num_left are numbers, to the right."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for i in range(len(rows[0])):
        table.add_column(justify="left" if i < num_left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return tables.plain(table, UNLIMITED)


def story(starts: Sequence[Start]) -> str:
    """Return how the number of workers changed, as `2 workers, 1 from step 40`, if it ever did."""
    later = "".join(
        f", {start.workers} from step {start.step:,}"
        for start, before in zip(starts[1:], starts, strict=False)
        if start.workers != before.workers
    )
    return text.plural(starts[0].workers, "worker") + later if later else ""


def _figures(report: RunReport) -> list[tuple[str, str]]:
    eval_loss = [_from_to(report.eval_loss), variants.evaluated_as(report)]
    figures = [
        ("steps", _steps(report)),
        ("train loss", _train_loss(report.train_loss)),
        ("eval loss", ", ".join(filter(None, eval_loss)) if report.eval_loss else ""),
        ("exact", _exact(report.exact_answers)),
        ("speed", _speed(report)),
        ("peak memory", _memory(report)),
        ("compared", _compared(report.baseline)),
    ]
    for name, transform in report.transforms.items():
        changed = text.plural(transform.changed, "module")
        figures.append((name, f"{changed} changed, {transform.skipped:,} skipped"))
        figures.append(("", transform.proof_sentence))
    figures.append((report.converted[0], report.comparison))
    return [(label, words) for label, words in figures if words]


def _variants(report: RunReport) -> str:
    rows = variants.table_rows(report)
    if not rows:
        return ""
    table = columns([variants.heads(report), *rows], num_left=1)
    return indent("\n".join(filter(None, [table, variants.sentence(report)])), "  ")


def _compared(other: Baseline | None) -> str:
    if other is None:
        return ""
    figures = (
        ("eval loss {:+.2%}", other.final_eval_loss_change),
        ("{:.2f} x the speed", other.speedup),
        ("{:.2f} x the memory", other.memory_ratio),
    )
    parts = [form.format(value) for form, value in figures if value is not None]
    return f"{', '.join(parts)} of {other.output_dir}"


def _steps(report: RunReport) -> str:
    total = report.total_steps
    words = f"{report.steps:,}" + ("" if total in (None, report.steps) else f" of {total:,}")
    if report.epochs is not None:
        words += f" ({report.epochs:.2f} epochs)"
    if report.world_size:
        workers = story(report.starts) or text.plural(report.world_size, "worker")
        words += f" on {workers}, {report.device or 'device unknown'}"
    if report.restarts:
        words += f", {text.plural(report.restarts, 'restart')}"
    if report.skipped_steps:
        words += f", {report.skipped_steps:,} of them skipped for a bad loss"
    if report.resumed_from_step is not None:
        words += f", resumed from step {report.resumed_from_step:,}"
    return words


def _from_to(points: Sequence[tuple[int, float | None]]) -> str:
    ends = [*points[:1], *points[1:][-1:]]
    return " -> ".join(f"{text.loss(value)} (step {step:,})" for step, value in ends)


def _train_loss(points: Sequence[tuple[int, float | None]]) -> str:
    """Return the first and last value, and the mean of the last rows, which noise moves less."""
    (mean, window), words = mean_of_last(points), _from_to(points)
    return f"{words}, {text.loss(mean)} over the last {window} rows" if window else words


def mean_of_last(points: Sequence[tuple[int, float | None]]) -> tuple[float, int]:
    """Return the mean of the last tenth of the values and their number; 0 of fewer than 20."""
    finite = [value for _, value in points if value is not None]
    window = len(finite) // 10
    return (fmean(finite[-window:]), window) if window > 1 else (0.0, 0)


def _exact(points: Sequence[tuple[int, float | None]]) -> str:
    """Return the first and last share of held-out answers that are exactly right."""
    ends = [*points[:1], *points[1:][-1:]]
    words = " -> ".join(f"{value:.1%} (step {step:,})" for step, value in ends if value is not None)
    return f"{words} of the held-out answers" if words else ""


def _speed(report: RunReport) -> str:
    rate, step, mfu = report.tokens_per_second_per_worker, report.step_seconds, report.mfu_bf16
    if rate is None:
        return ""
    per_step = "" if step is None else f", {text.seconds(step)} per step"
    of_peak = "" if mfu is None else f", MFU {text.percent(mfu)} of the bf16 peak"
    return f"{text.rate(rate)} tokens/s per worker{per_step}{of_peak}"


def _memory(report: RunReport) -> str:
    if report.peak_memory_gib is None:
        return ""
    words = f"{text.gib(report.peak_memory_gib)} GiB"
    if (report.device or "").startswith("CPU"):
        return f"{words} of the process, Python and libraries included"
    if report.predicted_memory_gib is not None:
        words += f" (predicted {text.gib(report.predicted_memory_gib)} GiB)"
    return words


def _timeline(report: RunReport) -> str:
    if not report.timeline:
        return ""
    phases = ", ".join(f"{name} {text.seconds(spent)}" for name, spent in report.timeline.items())
    return f"where the time went:\n{indent(fill(phases, width=76), '  ')}"


def _places(report: RunReport) -> list[tuple[str, str]]:
    output_dir = Path(str(report.job.get("output_dir") or "."))
    places = []
    for label, folder, gib in (("model", report.model_dir, report.model_gib), report.converted):
        if folder:
            places.append((label, folder + ("" if gib is None else f" ({text.disk(gib)})")))
    if report.model_dir:
        there = {label: Path(report.model_dir).with_name(f"model-{label}") for label in BESIDE}
        places += [(label, f"{p} ({BESIDE[label]})") for label, p in there.items() if p.is_dir()]
    files = {"report": "report.html", "figures": "report.json"}
    return [*places, *((label, str(output_dir / name)) for label, name in files.items())]


def _samples(samples: Sequence[Sample]) -> str:
    """Return the first answers, fewer lines of each if there are several."""
    shown = samples[:NUM_SAMPLES]
    most = NUM_SAMPLE_LINES // max(len(shown), 1)
    return "\n\n".join(_sample(one, max(most, 2)) for one in shown)


def _sample(sample: Sample, most: int = NUM_SAMPLE_LINES) -> str:
    turns = [("prompt", sample.prompt), ("answer", sample.shown), ("reference", sample.reference)]
    lines = [_turn(label, words, most) for label, words in turns if words is not None]
    return "\n".join(["sample answer:", *lines])


def _turn(label: str, words: str, most: int) -> str:
    """Return words wrapped next to their label; long ones are cut."""
    wrapped = [
        piece
        for line in words.strip().splitlines()
        for piece in wrap(line, width=66, replace_whitespace=False) or [""]
    ]
    if len(wrapped) > most:
        wrapped = [*wrapped[:most], "[...]"]
    first, *rest = wrapped or ["(empty)"]
    return "\n".join([f"  {label:<10}{first}", *(" " * 12 + line for line in rest)])
