"""report.html: one file for people that opens from disk, made of report.json and metrics.jsonl."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raytrain_adv import __version__
from raytrain_adv import text as numbers
from raytrain_adv.report import data_section, variants
from raytrain_adv.report.charts import charts_html
from raytrain_adv.report.page import page, text
from raytrain_adv.report.parts import badge, bars, below, card, folded, section, table
from raytrain_adv.report.preflight_section import preflight_html
from raytrain_adv.report.record import Failure, RunReport, Sample, TransformReport, write_text
from raytrain_adv.report.starts import starts_html
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


def write_html(report: RunReport, output_dir: str | Path, plots: bool = True) -> Path:
    """Write report.html beside report.json and metrics.jsonl, and return its path.

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
    charts = charts_html(report, rows) if plots else ""
    body = "".join(
        [
            _header(report),
            _error(report),
            f'<dl class="figures">{"".join(_figures(report))}</dl>',
            section(
                "Course of the run, over optimizer steps",
                f'<div class="plots">{charts}</div>' if charts else "",
            ),
            section("Sample answers", "".join(map(_sample, report.samples))),
            section("What the transforms did", _transforms(report)),
            section("What quantization costs", _variants(report)),
            section("Beside another run", _baseline(report)),
            section("Data", data_section.data_html(report.data)),
            section("Memory of a worker", _memory(report)),
            section("Where the time went", _timeline(report)),
            section("The cluster before the run", preflight_html(report.preflight)),
            section("The workers' starts", starts_html(report.starts)),
            section("The run", _run(report, rows)),
            section("The job", _job(report)),
            f"<footer>raytrain_adv {__version__}, written {_moment(time.time())}. The same figures "
            "for programs are in report.json, every logged step is in metrics.jsonl.</footer>",
        ]
    )
    return page(f"{report.run_name or 'run'}: {report.status}", body)


def _header(report: RunReport) -> str:
    workers = numbers.plural(report.world_size, "worker") if report.world_size else ""
    parts = [
        str(report.job.get("model_name_or_path") or ""),
        f"{workers} on {report.device}" if workers and report.device else workers,
        _moment(report.started_at) if report.started_at else "",
    ]
    shown = "".join(f"<span>{text(part)}</span>" for part in parts if part)
    return (
        f'<header><div class="title"><h1>{text(report.run_name or "Run")}</h1>'
        f'<span class="status {report.status}">{report.status}</span></div>'
        f'<div class="sub">{shown}</div></header>'
    )


def _error(report: RunReport) -> str:
    if report.status == "running":
        return card("<p>This run has not ended: it is going on, or its driver was killed.</p>")
    if report.error is None and report.failure is None:
        return ""
    failure = report.failure or Failure(kind="", what=report.error or "", exit_code=3)
    rank = "" if failure.rank is None else f"rank {failure.rank}"
    lines = [("found", failure.found), ("fix", failure.fix), ("where", rank)]
    parts = "".join(f"<dt>{label}</dt><dd>{text(line)}</dd>" for label, line in lines if line)
    trace = folded("Traceback", f"<pre>{text(failure.trace)}</pre>") if failure.trace else ""
    what = f"<h2>{text(failure.what)}</h2>"
    kind = "card" if report.status == "stopped" else "card error"
    return f'<section class="{kind}">{what}<dl>{parts}</dl>{trace}</section>'


def _figures(report: RunReport) -> list[str]:
    of_total = f"of {report.total_steps:,}" if report.total_steps else ""
    epochs = "" if report.epochs is None else f"{report.epochs:.2f} epochs"
    seconds = _passed(report)
    rate, mfu = report.tokens_per_second_per_worker, report.mfu_bf16
    speed = "tokens/s per worker"
    if report.step_seconds is not None:
        speed += f", {numbers.seconds(report.step_seconds)} per step"
    predicted = report.predicted_memory_gib
    against = "" if predicted is None else f"predicted {numbers.gib(predicted)} GiB"
    if (report.device or "").startswith("CPU"):
        against = "of the process, libraries included"
    restarts = numbers.plural(report.restarts, "restart") if report.restarts else ""
    resumed = report.resumed_from_step
    if resumed is not None:
        restarts += f"{', ' if restarts else ''}resumed from step {resumed:,}"
    began = _began(report.eval_loss)
    return [
        _figure("Eval loss", _last(report.eval_loss), variants.evaluated_as(report), began),
        _figure("Train loss", _last(report.train_loss), "", _began(report.train_loss)),
        _figure("Speed", rate and numbers.rate(rate), "", speed),
        _figure("MFU", mfu and numbers.percent(mfu), "", "of the dense bf16 peak"),
        _figure(
            "Peak memory",
            report.peak_memory_gib and numbers.gib(report.peak_memory_gib),
            "GiB",
            against,
        ),
        _figure("Steps", f"{report.steps:,}", of_total, epochs),
        _figure("Time", seconds and numbers.clock(seconds), "", restarts),
    ]


def _figure(label: str, value: object, unit: str, more: str) -> str:
    if not value:
        return ""
    small = f" <small>{text(unit)}</small>" if unit else ""
    below = f'<div class="more">{text(more)}</div>' if more else ""
    return f'<div class="card"><dt>{label}</dt><dd>{text(value)}{small}{below}</dd></div>'


def _sample(sample: Sample) -> str:
    turns = [
        ("prompt", "Prompt", sample.prompt),
        ("answer", "Answer of the trained model", sample.answer),
    ]
    if sample.reference is not None:
        turns.append(("reference", "Reference", sample.reference))
    return card(
        "".join(
            f'<div class="turn {kind}"><b>{label}</b>'
            f"<pre>{text(said.strip()) or '(empty)'}</pre></div>"
            for kind, label, said in turns
        )
    )


def _transforms(report: RunReport) -> str:
    if not report.transforms:
        why = (
            "None: the model was trained as it is, every weight of it."
            if report.world_size is not None
            else "None yet: the run ended before its plan was made."
        )
        return card(f'<p class="note">{why}</p>')
    return "".join(_transform(name, done) for name, done in report.transforms.items())


def _transform(name: str, done: TransformReport) -> str:
    counts = f"{numbers.plural(done.changed, 'module')} changed, {done.skipped:,} skipped"
    parts = [f"<h3>{text(name)}{badge(counts)}</h3>"]
    parts += [f'<p class="note">{text(note)}</p>' for note in done.notes]
    if done.changed_by_class:
        rows = [(change, numbers.count(n)) for change, n in done.changed_by_class.items()]
        parts.append(table(("changed", "modules"), rows, num_columns=1))
    if done.proof:
        parts.append(f"<p>Proof: {text(done.proof_sentence)}</p>")
        kernels = [str(name) for name in done.proof.get("gpu_kernels") or ()]  # type: ignore[union-attr]
        if kernels:
            parts.append(folded("GPU kernels it launched, the longest first", _names(kernels)))
    if done.changed_modules:
        parts.append(folded("Names of the changed modules", _names(done.changed_modules)))
    if done.skipped_reasons:
        skipped = [
            f"<p><b>{numbers.count(n)}</b> {text(reason)}</p>"
            f"{_names(done.skipped_modules.get(reason, ()))}"
            for reason, n in done.skipped_reasons.items()
        ]
        parts.append(
            folded(f"{numbers.plural(done.skipped, 'skipped module')}, and why", "".join(skipped))
        )
    return card("".join(parts))


def _names(names: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li><code>{text(name)}</code></li>' for name in names)}</ul>"


def _memory(report: RunReport) -> str:
    prediction = report.predicted_memory
    sizes = {part: _number(prediction.get(part)) for part in MEMORY_PARTS}
    rows = [(part, size, f"{size:.2f} GiB") for part, size in sizes.items() if size]
    if not rows:
        return ""
    on_cpu = (report.device or "").startswith("CPU")
    shown = [
        ("predicted peak of tensors" if on_cpu else "predicted peak", report.predicted_memory_gib),
        ("peak of the process" if on_cpu else "measured peak", report.peak_memory_gib),
    ]
    rows += [(label, size, f"{size:.2f} GiB") for label, size in shown if size is not None]
    peak = prediction.get("peak")
    note = "Each part at its own largest; not all are held at the same moment"
    note += f": the peak is in {peak}." if peak else "."
    if on_cpu:
        note += (
            " The prediction is of the tensors alone; the process was measured with Python and "
            "its libraries, so that the two are not to be compared."
        )
    explained = prediction.get("explanations")
    why = ""
    if isinstance(explained, dict):
        why = folded("How the parts come about", table(("part", ""), list(explained.items())))
    faded = {label for label, _ in shown}
    return card(f'{bars(rows, faded)}<p class="note">{text(note)}</p>{why}')


def _variants(report: RunReport) -> str:
    rows = variants.table_rows(report)
    if not rows:
        return ""
    said = [variants.sentence(report), variants.compared(report)]
    notes = "".join(f'<p class="note">{text(sentence)}</p>' for sentence in said if sentence)
    return card(table(variants.HEADS, rows, num_columns=4) + notes)


def _baseline(report: RunReport) -> str:
    other = report.baseline
    if other is None:
        return ""
    rows = [("run", other.output_dir), *(("key", line) for line in other.changed_keys)]
    if other.final_eval_loss_change is not None:
        rows.append(("last eval loss", f"{other.final_eval_loss_change:+.2%} here"))
    if other.speedup is not None:
        rows.append(("speed", f"{other.speedup:.2f} x here"))
    if other.memory_ratio is not None:
        rows.append(("peak memory", f"{other.memory_ratio:.2f} x here"))
    return card(table(("", ""), rows))


def _timeline(report: RunReport) -> str:
    rows = [(phase, spent, numbers.seconds(spent)) for phase, spent in report.timeline.items()]
    total = _passed(report)
    if not rows:
        return ""
    if total:
        rows.append(("the whole run", total, numbers.seconds(total)))
    return card(bars(rows, {"the whole run"}))


def _run(report: RunReport, rows: Sequence[Mapping[str, Any]]) -> str:
    batch = [(key.replace("_", " "), _plain(value)) for key, value in report.batch.items()]
    cards = []
    if batch:
        cards.append(card(f"<h3>Batch arithmetic</h3>{table((), batch, num_columns=1)}"))
    if report.versions:
        versions = list(report.versions.items())
        cards.append(card(f"<h3>Versions</h3>{table((), versions, num_columns=1)}"))
    events = [
        (time.strftime("%H:%M:%S", time.localtime(row.get("time", 0))), str(row.get("message", "")))
        for row in rows
        if row["kind"] == "event"
    ]
    sentences = [f"Attention: {report.attention}."] if report.attention else []
    if report.attention_trial:
        sentences[-1] = f"Attention: {report.attention}; {report.attention_trial}."
    sentences += report.notes
    notes = "".join(f'<p class="note">{text(note)}</p>' for note in sentences)
    said = folded(numbers.plural(len(events), "event"), table((), events)) if events else ""
    side_by_side = f'<div class="two">{"".join(cards)}</div>' if cards else ""
    return side_by_side + below(card(notes + said) if notes or said else "")


def _job(report: RunReport) -> str:
    if not report.job:
        return ""
    head = [
        ("file", report.job_file),
        ("overrides", " ".join(report.overrides)),
        ("command", report.command),
    ]
    lines = "".join(f"<p>{label} <code>{text(line)}</code></p>" for label, line in head if line)
    written = yaml.safe_dump(dict(report.job), sort_keys=False, allow_unicode=True, width=100)
    return card(
        f'{lines}<details open><summary>Every key as it was resolved</summary><div class="copied">'
        f'<button type="button">copy</button><pre>{text(written)}</pre></div></details>'
    )


def _last(points: Sequence[tuple[int, float | None]]) -> str:
    if not points:
        return ""
    value = points[-1][1]
    return "not finite" if value is None else numbers.loss(value)


def _began(points: Sequence[tuple[int, float | None]]) -> str:
    if len(points) < 2:
        return ""
    return f"{numbers.loss(points[0][1])} at step {points[0][0]:,}"


def _passed(report: RunReport) -> float | None:
    if report.started_at is None or report.finished_at is None:
        return None
    return report.finished_at - report.started_at


def _moment(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(unix_s))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
