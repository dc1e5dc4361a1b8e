"""report.html: one file for people that opens from disk, made of report.json and metrics.jsonl."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from markupsafe import Markup

from raytrain_adv import __version__, text
from raytrain_adv.report import charts, plot, variants
from raytrain_adv.report.parts import Failure, NodeReport, Start
from raytrain_adv.report.record import RunReport, write_text
from raytrain_adv.storage import metrics_file

FILE_NAME = "report.html"
MEMORY_PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "gathered",
    "workspace",
)
KNOWN_DATA = frozenset({"train", "eval", "rows", "eval_rows"})
Figure = tuple[str, object, str, str]
"""Label, value, unit and a remark; without a value it is not shown."""


def write_html(report: RunReport, output_dir: str | Path, plots: bool = True) -> Path:
    """Write report.html next to report.json and metrics.jsonl, and return its path.

    Args:
        report: what to show.
        output_dir: folder of the run; its metrics.jsonl has the points of the plots.
        plots: whether to draw them (plot_loss).

    Raises:
        StorageError: when the file cannot be written.
    """
    folder = Path(output_dir)
    rows = metrics_file.read(folder / metrics_file.FILE_NAME)
    return write_text(render(report, rows, plots), folder / FILE_NAME)


def render(report: RunReport, rows: Sequence[Mapping[str, Any]], plots: bool = True) -> str:
    """Return the document."""
    on_cpu = (report.device or "").startswith("CPU")
    whole_run = _duration(report)
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
        figures=_figures(report, on_cpu, whole_run),
        drawings=plot.draw(charts.plots(report, rows)) if plots else [],
        variants=variants.table_rows(report),
        variant_heads=variants.HEADS,
        variant_notes=[variants.sentence(report), report.comparison],
        baseline=_baseline(report),
        data=report.data,
        set_lines=_set_lines,
        more_data=[
            (key.replace("_", " "), value)
            for key, value in report.data.items()
            if value and key not in KNOWN_DATA
        ],
        on_cpu=on_cpu,
        memory=_memory(report, on_cpu),
        memory_sums=_memory_sums(on_cpu),
        timeline=_timeline(report, whole_run),
        batch=[(key.replace("_", " "), _plain(value)) for key, value in report.batch.items()],
        notes=[_attention(report), *report.notes],
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
    }
    return environment.get_template(template).render(version=__version__, now=time.time(), **values)


def _printable(value: object) -> object:
    """Return a value for the page, without the control characters that HTML does not allow."""
    if isinstance(value, Markup):
        return value
    clean = (c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return "".join(clean)


def _figures(report: RunReport, on_cpu: bool, whole_run: float | None) -> list[Figure]:
    speed = "tokens/s per worker"
    if report.step_seconds is not None:
        speed += f", {text.seconds(report.step_seconds)} per step"
    predicted = report.predicted_memory_gib
    memory = "" if predicted is None else f"predicted {text.gib(predicted)} GiB"
    if on_cpu:
        memory = "of the process, libraries included"
    restarts = [text.plural(report.restarts, "restart")] if report.restarts else []
    if report.resumed_from_step is not None:
        restarts.append(f"resumed from step {report.resumed_from_step:,}")
    evaluated_as = variants.evaluated_as(report)
    of_total = f"of {report.total_steps:,}" if report.total_steps else ""
    epochs = "" if report.epochs is None else f"{report.epochs:.2f} epochs"
    rate, mfu, peak = report.tokens_per_second_per_worker, report.mfu_bf16, report.peak_memory_gib
    return [
        ("Eval loss", _last(report.eval_loss), evaluated_as, _first(report.eval_loss)),
        ("Train loss", _last(report.train_loss), "", _first(report.train_loss)),
        ("Speed", rate and text.rate(rate), "", speed),
        ("MFU", mfu and text.percent(mfu), "", "of the dense bf16 peak"),
        ("Peak memory", peak and text.gib(peak), "GiB", memory),
        ("Steps", f"{report.steps:,}", of_total, epochs),
        ("Time", whole_run and text.clock(whole_run), "", ", ".join(restarts)),
    ]


def _baseline(report: RunReport) -> list[tuple[str, str]]:
    other = report.baseline
    if other is None:
        return []
    rows = [("run", other.output_dir), *(("key", line) for line in other.changed_keys)]
    if other.final_eval_loss_change is not None:
        rows.append(("last eval loss", f"{other.final_eval_loss_change:+.2%} here"))
    if other.speedup is not None:
        rows.append(("speed", f"{other.speedup:.2f} x here"))
    if other.memory_ratio is not None:
        rows.append(("peak memory", f"{other.memory_ratio:.2f} x here"))
    return rows


def _set_lines(numbers: Mapping[str, Any], rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the counts of one data set; what is not known is left out."""
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


def _memory(report: RunReport, on_cpu: bool) -> list[tuple[str, float, str]]:
    """Return a bar for each predicted part, and for the predicted and the measured peak."""
    sizes = [(part, report.predicted_memory.get(part)) for part in MEMORY_PARTS]
    known = [(part, size) for part, size in sizes if isinstance(size, int | float) and size]
    if not known:
        return []
    peaks = zip(
        _memory_sums(on_cpu), (report.predicted_memory_gib, report.peak_memory_gib), strict=True
    )
    rows = known + [(label, size) for label, size in peaks if size is not None]
    return [(label, size, f"{size:.2f} GiB") for label, size in rows]


def _memory_sums(on_cpu: bool) -> tuple[str, str]:
    if on_cpu:
        return "predicted peak of tensors", "peak of the process"
    return "predicted peak", "measured peak"


def _timeline(report: RunReport, whole_run: float | None) -> list[tuple[str, float, str]]:
    phases = dict(report.timeline)
    if phases and whole_run:
        phases["the whole run"] = whole_run
    return [(phase, spent, text.seconds(spent)) for phase, spent in phases.items()]


def _node(node: NodeReport) -> tuple[str, ...]:
    kinds = [f"{node.gpus.count(name)} x {name}" for name in dict.fromkeys(node.gpus)]
    memory = ""
    if node.free_memory_gib is not None and node.memory_gib is not None:
        memory = f"{node.free_memory_gib:.0f} / {node.memory_gib:.0f}"
    refused = " ".join(filter(None, (node.reason, node.found and f"({node.found})")))
    return (
        node.address,
        ", ".join(kinds),
        node.compute_capability or "",
        memory,
        node.driver_version or "",
        node.versions.get("torch") or "",
        text.plural(node.workers, "worker") if node.used else refused,
    )


def _start(start: Start) -> tuple[str, ...]:
    moment = time.localtime(start.time)
    return (
        time.strftime("%Y-%m-%d %H:%M:%S", moment) if start.time else "",
        f"{start.step:,}",
        f"{start.workers:,}",
        ", ".join(start.nodes),
        ", ".join(start.lost),
    )


def _attention(report: RunReport) -> str:
    parts = [part for part in (report.attention, report.attention_trial) if part]
    return f"Attention: {'; '.join(parts)}." if report.attention else ""


def _last(points: Sequence[tuple[int, float | None]]) -> str:
    if not points:
        return ""
    value = points[-1][1]
    return "not finite" if value is None else text.loss(value)


def _first(points: Sequence[tuple[int, float | None]]) -> str:
    return f"{text.loss(points[0][1])} at step {points[0][0]:,}" if len(points) > 1 else ""


def _duration(report: RunReport) -> float | None:
    if report.started_at is None or report.finished_at is None:
        return None
    return report.finished_at - report.started_at


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(unix_s))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
