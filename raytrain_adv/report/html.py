"""report.html: one file for people that opens from disk, made of report.json and metrics.jsonl."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup

from raytrain_adv import __version__, text
from raytrain_adv.report import charts, plot, variants
from raytrain_adv.report.parts import Failure, NodeReport, Point, Start
from raytrain_adv.report.record import RunReport, write_text
from raytrain_adv.report.summary import mean_of_last
from raytrain_adv.storage import metrics_file

FILE_NAME = "report.html"
MEMORY_PARTS = (
    "parameters", "gradients", "optimizer", "activations", "logits", "gathered", "workspace",
)  # fmt: skip
KNOWN_DATA = frozenset({"train", "eval", "rows", "eval_rows"})
Figure = tuple[str, object, str, str]  # label, value, unit, remark; not shown without a value


def write_html(report: RunReport, output_dir: str | Path, plots: bool = True) -> Path:
    """Write report.html, with plots of the metrics' rows if `plots`. Raises StorageError."""
    folder = Path(output_dir)
    rows = metrics_file.read(folder / metrics_file.FILE_NAME)
    return write_text(render(report, rows, plots), folder / FILE_NAME)


def render(report: RunReport, rows: Sequence[Mapping[str, Any]], plots: bool = True) -> str:
    """Return the document."""
    on_cpu = (report.device or "").startswith("CPU")
    sums = ("predicted peak", "measured peak")
    if on_cpu:
        sums = ("predicted peak of tensors", "peak of the process")
    timeline = dict(report.timeline)
    if timeline and report.seconds:
        timeline["the whole run"] = report.seconds
    workers = text.plural(report.world_size, "worker") if report.world_size else ""
    return page(
        "run.html.j2",
        report=report,
        title=report.run_name or "Run",
        subtitle=[
            report.job.get("model_name_or_path"),
            f"{workers} on {report.device}" if workers and report.device else workers,
            _moment(report.started_at) if report.started_at else "",
        ],
        failure=report.failure
        or (report.error and Failure(kind="", what=report.error, exit_code=3)),
        figures=_figures(report, on_cpu),
        drawings=plot.draw(charts.plots(report, rows)) if plots else [],
        variants=variants,
        baseline=_baseline(report),
        more_data=[
            (key.replace("_", " "), value)
            for key, value in report.data.items()
            if value and key not in KNOWN_DATA
        ],
        on_cpu=on_cpu,
        memory=_memory(report, sums),
        memory_sums=sums,
        timeline=[(phase, spent, text.seconds(spent)) for phase, spent in timeline.items()],
        batch=[(key.replace("_", " "), _plain(value)) for key, value in report.batch.items()],
        notes=[*_chosen(report), *report.model_notes, *report.notes],
        events=[
            (time.strftime("%H:%M:%S", time.localtime(row.get("time", 0))), row.get("message", ""))
            for row in rows
            if row["kind"] == "event"
        ],
        job=yaml.safe_dump(dict(report.job), sort_keys=False, allow_unicode=True, width=100),
    )


def page(template: str, **values: Any) -> str:
    """Return a document from one of the templates, in which every value is escaped."""
    from jinja2 import Environment, PackageLoader  # not needed before a run ends

    environment = Environment(
        loader=PackageLoader("raytrain_adv.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {
        "count": text.count,
        "plural": text.plural,
        "moment": _moment,
        "quote": quote,
        "node": _node,
        "start": _start,
        "places": lambda example: (example["where"], example["reason"]),
        "cut": lambda example: (example["where"], text.count(example["tokens"])),
        "set_lines": _set_lines,
    }
    return environment.get_template(template).render(version=__version__, now=time.time(), **values)


def _printable(value: object) -> object:
    """Return a value for the page, without the control characters that HTML does not allow."""
    return value if isinstance(value, Markup) else text.clean(str(value))


def _figures(report: RunReport, on_cpu: bool) -> list[Figure]:
    speed = "tokens/s per worker"
    if report.step_seconds is not None:
        speed += f", {text.seconds(report.step_seconds)} per step"
    predicted = report.predicted_memory_gib
    memory = "" if predicted is None else f"predicted {text.gib(predicted)} GiB"
    memory = "of the process, libraries included" if on_cpu else memory
    restarts = [text.plural(report.restarts, "restart")] if report.restarts else []
    if report.resumed_from_step is not None:
        restarts.append(f"resumed from step {report.resumed_from_step:,}")
    of_total = f"of {report.total_steps:,}" if report.total_steps else ""
    epochs = "" if report.epochs is None else f"{report.epochs:.2f} epochs"
    loss = (_first(report.eval_loss), variants.evaluated_as(report))
    rate, mfu, peak = report.tokens_per_second_per_worker, report.mfu_bf16, report.peak_memory_gib
    return [
        ("Exact answers", *_shares(report.exact_answers)),
        ("Eval loss", _last(report.eval_loss), "", ", ".join(filter(None, loss))),
        ("Train loss", _smooth_last(report.train_loss), "", _first(report.train_loss)),
        ("Speed", rate and text.rate(rate), "", speed),
        ("MFU", mfu and text.percent(mfu), "", "of the dense bf16 peak"),
        ("Peak memory", peak and text.gib(peak), "GiB", memory),
        ("Steps", f"{report.steps:,}", of_total, epochs),
        ("Time", report.seconds and text.clock(report.seconds), "", ", ".join(restarts)),
    ]


def _shares(points: Sequence[Point]) -> tuple[str, str, str]:
    """Return the last share in percent, no unit, and the first one with its step."""
    known = [(step, share) for step, share in points if share is not None]
    if not known:
        return "", "", ""
    (step, first), (_, last) = known[0], known[-1]
    return f"{last:.1%}", "", f"{first:.1%} at step {step:,}" if len(known) > 1 else ""


def _baseline(report: RunReport) -> list[tuple[str, str]]:
    other = report.baseline
    if other is None:
        return []
    figures = (
        ("last eval loss", "{:+.2%} here", other.final_eval_loss_change),
        ("speed", "{:.2f} x here", other.speedup),
        ("peak memory", "{:.2f} x here", other.memory_ratio),
    )
    found = [(label, form.format(value)) for label, form, value in figures if value is not None]
    return [("run", other.output_dir), *(("key", line) for line in other.changed_keys), *found]


def _set_lines(numbers: Mapping[str, Any], rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = [
        ("rows read", rows.get("read")),
        ("rows used", rows.get("used")),
        ("conversations", numbers.get("rows")),
        ("sequences", numbers.get("sequences")),
        ("tokens", numbers.get("tokens")),
        ("tokens with loss", numbers.get("label_tokens")),
        ("rows cut at cutoff_len", rows.get("truncated")),
        ("rows that cannot be used", rows.get("unusable")),
    ]
    lines = [(label, text.count(n)) for label, n in counts if n is not None]
    if numbers.get("packing_efficiency") is not None:
        lines.append(("packed", f"{text.percent(numbers['packing_efficiency'])} full"))
    return lines


def _memory(report: RunReport, sums: tuple[str, str]) -> list[tuple[str, float, str]]:
    """Return a bar for each predicted part, and for the predicted and the measured peak."""
    sizes = {part: report.predicted_memory.get(part) for part in MEMORY_PARTS}
    known = {part: size for part, size in sizes.items() if isinstance(size, int | float) and size}
    peaks = zip(sums, (report.predicted_memory_gib, report.peak_memory_gib), strict=True)
    rows = [*known.items(), *((label, size) for label, size in peaks if size is not None)]
    return [(label, size, f"{size:.2f} GiB") for label, size in rows] if known else []


def _node(node: NodeReport) -> tuple[str, ...]:
    kinds = [f"{number} x {name}" for name, number in Counter(node.gpus).items()]
    memory = text.MISSING
    if node.free_memory_gib is not None and node.memory_gib is not None:
        memory = f"{node.free_memory_gib:.0f} / {node.memory_gib:.0f}"
    refused = " ".join(filter(None, (node.reason, node.found and f"({node.found})")))
    return (
        node.address,
        ", ".join(kinds) or text.MISSING,
        node.compute_capability or text.MISSING,
        memory,
        node.driver_version or text.MISSING,
        node.versions.get("torch") or text.MISSING,
        text.plural(node.workers, "worker") if node.used else refused,
    )


def _start(start: Start) -> tuple[str, ...]:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.time)) if start.time else ""
    places = (", ".join(start.nodes), ", ".join(start.lost))
    return (moment, f"{start.step:,}", f"{start.workers:,}", *places)


def _chosen(report: RunReport) -> Iterator[str]:
    """Yield a sentence on each part of the machinery that was chosen for this run."""
    if report.attention:
        parts = [part for part in (report.attention, report.attention_trial) if part]
        yield f"Attention: {'; '.join(parts)}."
    if report.collectives:
        yield f"Collectives: {report.collectives}."
    if report.sequence_parallel:
        yield f"Sequences: {report.sequence_parallel}."
    if report.cuda_graph:
        yield f"CUDA graph: {report.cuda_graph}."
    if report.compiled:
        yield f"Compiled: {report.compiled}."


def _last(points: Sequence[tuple[int, float | None]]) -> str:
    if not points:
        return ""
    value = points[-1][1]
    return "not finite" if value is None else text.loss(value)


def _smooth_last(points: Sequence[tuple[int, float | None]]) -> str:
    """Return the mean of the last tenth of the points: one step's loss is mostly noise."""
    mean, window = mean_of_last(points)
    return text.loss(mean) if window and points[-1][1] is not None else _last(points)


def _first(points: Sequence[tuple[int, float | None]]) -> str:
    return f"{text.loss(points[0][1])} at step {points[0][0]:,}" if len(points) > 1 else ""


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(unix_s))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
